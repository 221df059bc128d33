"""Room on the disk: what cannot fit is refused before the work; a write that failed for lack of it says so."""

from __future__ import annotations

import shutil
from pathlib import Path

from intactkv_export.errors import IntactKVError


def check_space(directory: Path, needed: int, what: str, otherwise: str) -> None:
    """Raises IntactKVError if `needed` bytes do not fit. what: "... needs"; otherwise: what can be done."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise IntactKVError(
            f"{what} {needed / 1e9:.1f} GB in {directory} and {free / 1e9:.1f} GB are free: {otherwise}"
        )


def is_full(path: Path) -> bool:
    """Whether a write beside `path` that failed can have failed for lack of room: under 1 MiB is left."""
    return shutil.disk_usage(path.parent).free < 1 << 20


def full(path: Path, otherwise: str = "make room") -> IntactKVError:
    """The error of a write that the disk had no room for."""
    free = shutil.disk_usage(path.parent).free
    return IntactKVError(f"cannot write {path}: the disk is full, {free} bytes are free: {otherwise}")
