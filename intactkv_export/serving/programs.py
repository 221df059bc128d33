"""Upstream's programs, built from the same source on our libraries: where they are, and how they are run."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.prefix import ikv

_BUILD = "install with `make tools`, or pip install --config-settings=cmake.define.INTACTKV_TOOLS=ON"


def program_names() -> list[str]:
    """Those that were built. Raises IntactKVError if none were."""
    try:
        directory = library.programs_path()
    except IntactKVError as error:
        raise IntactKVError(f"llama.cpp's programs were not built: {_BUILD}") from error
    return sorted(path.stem for path in directory.iterdir() if os.access(path, os.X_OK))


def program_path(name: str) -> Path:
    """The program of that name. Raises IntactKVError if none were built, UsageError if there is no such one."""
    names = program_names()
    if name not in names:
        raise UsageError(f"there is no program {name!r}: give one of {', '.join(names)}")
    return library.programs_path() / name


def run_program(name: str, arguments: Sequence[str]) -> NoReturn:
    """Become the program: its exit code, and the signals it gets, are those of this process.

    Raises as program_path(), and IntactKVError if it cannot be run, or a prefix that LLAMA_INTACTKV names cannot be
    read: some programs keep the library's reasons to themselves.
    """
    path = program_path(name)
    ikv.of_environment()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a program inherits that
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execve(path, [name, *arguments], library.environment())
    except OSError as error:
        raise IntactKVError(f"cannot run {path} ({error.strerror}): {_BUILD}") from error
