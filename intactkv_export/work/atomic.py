"""Outputs that are whole or absent: written under a temporary name in the same directory, fsynced, renamed.

A temporary name is `.NAME.tmp-PID`, a directory's `.NAME.tmp-PID.d`: it cannot be taken for the output, and says which
process it belongs to. It is removed when the work fails or is interrupted; what a killed process has left is removed by
the next one that writes the same NAME.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from intactkv_export.errors import IntactKVError


@contextmanager
def output(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well. Raises IntactKVError if it cannot be written."""
    path = Path(path)
    temporary = _temporary(path)
    try:
        with explained(path):
            remove_stale(path)
            with open(temporary, "wb") as file:
                yield file
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def work_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory beside `path` for what is made on the way to it; removed after the block, whatever happens."""
    path = Path(path)
    directory = Path(f"{_temporary(path)}.d")
    try:
        with explained(path):
            remove_stale(path)
            directory.mkdir()
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file of the same file system its final name, durably. Raises IntactKVError."""
    with explained(path):
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says about writing `path` into one sentence (IntactKVError)."""
    try:
        yield
    except OSError as error:
        raise IntactKVError(_sentence(Path(path), error)) from error


def _sentence(path: Path, error: OSError) -> str:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return f"cannot write {path}: the disk is full, {free} bytes are free: make room, or choose another directory"
    if error.errno == errno.EFBIG:
        return f"cannot write {path}: it would be larger than a file may be here: raise the limit (ulimit -f)"
    return f"cannot write {path}: {reason}: choose a directory that exists and can be written to"


def remove_stale(path: Path) -> None:
    """Remove what processes that no longer live have left of `path`."""
    pattern = re.compile(re.escape(f".{path.name}.tmp-") + r"(\d+)(\.d)?")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.parent / f".{path.name}.tmp-{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
