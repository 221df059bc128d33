"""Evaluation in a process that was forked from one that had evaluated before.

OpenMP keeps its threads for the thread that used them. After fork() they are gone in the child, OpenMP does not
know, and waits for them for ever. A thread that is new in the child starts with none, and so gets its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

_forked = False  # since this module was imported
_thread: ThreadPoolExecutor | None = None  # of this process, if it was forked


def _after_fork() -> None:
    global _forked, _thread
    _forked, _thread = True, None


os.register_at_fork(after_in_child=_after_fork)


def compute(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments), which evaluates a batch: here, or in a child after fork in the thread for it."""
    global _thread
    if not _forked:
        return function(*arguments)
    if _thread is None:
        _thread = ThreadPoolExecutor(1, "intactkv-compute")
    future: Future[Any] = _thread.submit(function, *arguments)
    try:
        return future.result()
    except BaseException:  # Ctrl-C: the batch still runs, and nothing else may touch its context until it is done
        wait([future])
        raise
