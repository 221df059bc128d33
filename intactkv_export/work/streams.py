"""Standard streams that are closed, full, or read by nobody: none of that is a failure of the work.

standard error     what cannot be written there is dropped: progress and warnings are never fatal
standard output    closed: as if it were /dev/null; a pipe that nobody reads any more: the command ends, quietly;
                   full: an error like any other
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from intactkv_export.errors import IntactKVError

CLOSED_PIPE = 141  # 128 + SIGPIPE, as shells count


class _Standard(io.RawIOBase):
    """Standard output, 1, or standard error, 2: the latter takes everything, and passes on what it can."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return os.write(self._number, data)
        except BrokenPipeError:
            if self._number == 1:
                raise
        except OSError as error:
            if self._number == 1:
                give_up()
                reason = os.strerror(error.errno or 0)
                raise IntactKVError(f"cannot write to standard output: {reason}: send it elsewhere") from error
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


@contextmanager
def safe() -> Iterator[None]:
    """Within, sys.stdout and sys.stderr are there. Writing to stderr never fails; to stdout raises BrokenPipeError if
    nobody reads it any more, else IntactKVError."""
    before = sys.stdout, sys.stderr
    _open_missing()
    sys.stdout, sys.stderr = _wrapped(sys.stdout, 1), _wrapped(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def give_up() -> None:
    """Nothing more is written to standard output: what is left in its buffers goes nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _wrapped(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # it was closed when the process began
        stream = open(os.devnull, "w", encoding="utf-8")
    elif _number(stream) == number:
        stream.flush()
        raw = io.BufferedWriter(_Standard(number))  # type: ignore[type-var]
        at_once = number == 2 or bool(stream.line_buffering)
        through = stream.write_through  # type: ignore[attr-defined]
        stream = io.TextIOWrapper(raw, stream.encoding, line_buffering=at_once, write_through=through)
    stream.reconfigure(errors="replace")  # type: ignore[attr-defined]  # a terminal may lack a character, not a reply
    return stream


def _open_missing() -> None:
    """Take the numbers of closed standard streams, lest a file that is opened becomes what libraries print to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)


def _number(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a test's, or a notebook's
        return -1
