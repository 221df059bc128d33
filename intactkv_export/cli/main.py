"""The command line. It parses, calls, prints, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from intactkv_export.cli import make, measure, prefixes, talk  # their commands register themselves
from intactkv_export.cli.options import PROG, app
from intactkv_export.cli.output import remark
from intactkv_export.errors import IntactKVError, UsageError

__all__ = ["main", "make", "measure", "prefixes", "talk"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = [a for a in given if a != "--debug"]  # it may stand anywhere
    debug = len(args) < len(given)
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a character, not a reply
    try:
        code = app(args or ["--help"], prog_name=PROG, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            remark(traceback.format_exc())
        return _explain(error)


def _explain(error: BaseException) -> int:
    if isinstance(error, IntactKVError):
        remark(f"{PROG}: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, typer.BadParameter.__base__ or ()):  # the parser's usage errors
        command = error.ctx.command_path if error.ctx else PROG  # type: ignore[attr-defined]
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        remark(f"{PROG}: {message[:1].lower()}{message[1:]}: see `{command} --help`")
        return UsageError.exit_code
    remark(f"{PROG}: internal error: {type(error).__name__}: {error}; run with --debug to see where")
    return IntactKVError.exit_code


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    remark(f"{PROG}: warning: {message}")
