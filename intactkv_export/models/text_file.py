"""A file of text that a user gives."""

from __future__ import annotations

import os
from pathlib import Path

from intactkv_export.errors import IntactKVError, UsageError


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8. Raises UsageError if there is none to read, IntactKVError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise IntactKVError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
