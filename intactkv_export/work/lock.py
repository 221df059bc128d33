"""Who is at work on a file: a lock that the system itself drops when the process ends, however it ends.

Not a process number: those begin anew in every container, and mean nothing to another one on the same volume.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


def take(descriptor: int) -> bool | None:
    """Lock an open file, until it is closed: True; False if another has it; None if this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def keeps(descriptor: int, path: Path) -> bool:
    """Lock a file just opened at `path`; False if another was faster, who may have removed it by now."""
    if take(descriptor) is False:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
