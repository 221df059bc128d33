"""Ctrl-C while nothing is to be tidied up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process as the system does: while modules are imported a KeyboardInterrupt is a
    traceback, or is lost in one of Python's own callbacks."""
    mine = threading.current_thread() is threading.main_thread()  # nobody else may
    before = signal.getsignal(signal.SIGINT)
    if not mine or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
