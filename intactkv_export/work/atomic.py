"""Outputs that are whole or absent: written under a temporary name in the same directory, fsynced, renamed.

A temporary name is `.NAME.tmp-RANDOM`, a directory's `.NAME.tmp-RANDOM.d`: it cannot be taken for the output, and never
is another process's. Whoever writes holds a lock on it (lock.py; of a directory, on the file `lock` in it). It is
removed when the work fails or is interrupted; what a killed process has left, and so nobody holds a lock on, is removed
by the next one that writes the same NAME. On file systems without locks it stays.

Only regular files are replaced. A link is followed, and a file that is replaced hands on its mode.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.work import lock
from intactkv_export.work.space import full

_LOCK = "lock"
_COPY_BLOCK = 1 << 22  # bytes
# What the system says of a disk that fails. Anything else it says of fsync means that it has none here.
_FAILED = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def output(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file that becomes `path` when the block ends well.

    Raises UsageError if something stands there that is no regular file, IntactKVError if it cannot be written.
    """
    target = destination(path)
    temporary = None
    try:
        with explained(target):
            remove_stale(target)
            while True:
                temporary = _temporary(target)
                with open(temporary, "xb") as file:
                    if not lock.keeps(file.fileno(), temporary):
                        continue
                    yield file
                    file.flush()
                    _replace(temporary, target)
                    return
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def work_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory beside `path` for what is made on the way to it; removed after the block, whatever happens."""
    path = Path(path)
    directory = None
    try:
        with explained(path):
            remove_stale(path)
            while True:
                directory = Path(f"{_temporary(path)}.d")
                directory.mkdir()
                held = _locked(directory)
                if held is not None:
                    break
        with held:
            yield directory
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def kept_directory(path: Path) -> Iterator[Path]:
    """The directory `path`, made if it is not there: it stays if the block fails, and is removed if it ends well.

    Raises IntactKVError if another process is at work in it, or it cannot be made.
    """
    with explained(path):
        path.mkdir(exist_ok=True)
        held = _locked(path)
    if held is None:
        raise IntactKVError(
            f"another process is at work in {path}: wait until it has ended, or choose another name for the output"
        )
    with held:
        yield path
        shutil.rmtree(path, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its final name, durably. Raises UsageError, IntactKVError as output() does."""
    target = destination(path)
    with explained(target):
        try:
            _replace(temporary, target)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:  # a link may lead to another file system
                raise
    with open(temporary, "rb") as made, output(target) as file:
        shutil.copyfileobj(made, file, _COPY_BLOCK)
    temporary.unlink()


def destination(path: str | os.PathLike[str]) -> Path:
    """The file that would be written for `path`, links followed. Raises UsageError if it is no regular file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        mode = stat.S_IFREG  # not there: it will be; or whoever opens it says why not
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise UsageError(f"{path} is {kind}, and only a file can be written: choose another name")
    return Path(os.path.realpath(path))


@contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says about writing `path` into one sentence (IntactKVError)."""
    try:
        yield
    except OSError as error:
        raise _explanation(Path(path), error) from error


def _explanation(path: Path, error: OSError) -> IntactKVError:
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return full(path, "make room, or choose another directory")
    if error.errno == errno.EFBIG:
        reason = "it would be larger than a file may be here: raise the limit (ulimit -f)"
        return IntactKVError(f"cannot write {path}: {reason}")
    return IntactKVError(f"cannot write {path}: {reason}: choose a directory that exists and can be written to")


def remove_stale(path: Path) -> None:
    """Remove what nobody is at work on any more of `path`. What cannot be removed stays: that is nobody's failure."""
    pattern = re.compile(re.escape(_beginning(path)) + r"[0-9a-f]+(\.d)?")
    with suppress(OSError):
        for entry in list(path.parent.iterdir()):
            match = pattern.fullmatch(entry.name)
            if match:
                with suppress(OSError):
                    _remove_if_left(entry, is_directory=match[1] is not None)


def _remove_if_left(entry: Path, is_directory: bool) -> None:
    create = os.O_CREAT if is_directory else 0  # its owner was killed before it made one, or will find itself overtaken
    held = os.open(entry / _LOCK if is_directory else entry, os.O_RDWR | os.O_NOFOLLOW | create, 0o666)
    try:
        if lock.take(held) is True:
            if is_directory:
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)
    finally:
        os.close(held)


def _locked(directory: Path) -> IO[bytes] | None:
    """The lock of a directory, held until it is closed; None if another process was faster."""
    path = directory / _LOCK
    try:
        file = open(path, "ab")
    except FileNotFoundError:
        return None
    if lock.keeps(file.fileno(), path):
        return file
    file.close()
    return None


def _replace(temporary: Path, target: Path) -> None:
    _sync(temporary)
    with suppress(FileNotFoundError):
        old = os.stat(target)
        with suppress(PermissionError):
            os.chown(temporary, old.st_uid, old.st_gid)
        with suppress(PermissionError):  # of another user, or a file system without modes
            os.chmod(temporary, stat.S_IMODE(old.st_mode))
    os.replace(temporary, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Have the disk hold a file, or a directory's names, where the file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _FAILED:
            raise


def _temporary(path: Path) -> Path:
    return path.with_name(f"{_beginning(path)}{secrets.token_hex(8)}")


def _beginning(path: Path) -> str:
    name = os.fsdecode(os.fsencode(path.name)[:200])  # with what is added, no longer than a name may be
    return f".{name}.tmp-"
