"""The command line. It parses, calls, prints, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.work import interrupts_at_once, streams

with interrupts_at_once():
    import typer

    from intactkv_export.cli import make, measure, prefixes, talk  # their commands register themselves
    from intactkv_export.cli.options import PROG, app
    from intactkv_export.cli.output import remark

__all__ = ["main", "make", "measure", "prefixes", "talk"]

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_SAME_REQUEST = 1.0  # seconds in which a second signal to end is an echo: a process and its group are often both told


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ours, others = _ours(given)
    args = [a for a in ours if a != "--debug"] + others  # it may stand anywhere
    debug = "--debug" in ours
    warnings.showwarning = _warn
    with streams.safe():
        try:
            with _ended_by_signals():
                code = app(args or ["--help"], prog_name=PROG, standalone_mode=False)
                sys.stdout.flush()
                return code if isinstance(code, int) else 0
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            if debug:
                remark(traceback.format_exc())
            return _explain(error)


def _ours(given: list[str]) -> tuple[list[str], list[str]]:
    """What is said to this program, and what it passes on as it is: behind --, and to a program that `tool` runs."""
    command = next((i for i, a in enumerate(given) if not a.startswith("-")), len(given))
    end = command + 1 if given[command : command + 1] == ["tool"] else len(given)
    end = min([end, *(i for i, a in enumerate(given) if a == "--")])
    return given[:end], given[end:]


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within, SIGTERM and SIGHUP are an exception, SystemExit: stages end, and temporary files go."""
    last = -_SAME_REQUEST

    def leave(number: int, _: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _SAME_REQUEST:
            last = now
            sys.exit(128 + number)  # as shells count

    caught = []
    if threading.current_thread() is threading.main_thread():  # nobody else may
        ends = (signal.SIGTERM, signal.SIGHUP)
        caught = [number for number in ends if signal.getsignal(number) is signal.SIG_DFL]  # nohup ignores SIGHUP
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _explain(error: BaseException) -> int:
    cause = error.__context__ if isinstance(error, SystemExit) else error  # which typer and rich make of it
    if isinstance(cause, BrokenPipeError):
        streams.give_up()  # whoever read our output has gone
        return streams.CLOSED_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else IntactKVError.exit_code
    if isinstance(error, IntactKVError):
        remark(f"{PROG}: {error}")
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, typer.BadParameter.__base__ or ()):  # the parser's usage errors
        command = error.ctx.command_path if error.ctx else PROG  # type: ignore[attr-defined]
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        remark(f"{PROG}: {message[:1].lower()}{message[1:]}: see `{command} --help`")
        return UsageError.exit_code
    remark(f"{PROG}: internal error: {type(error).__name__}: {error}; run with --debug to see where")
    return IntactKVError.exit_code


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    remark(f"{PROG}: warning: {message}")
