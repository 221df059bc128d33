"""How whoever waits is told how far the work is: one protocol for all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Steps = Callable[[int, int], None]  # of one stage: done, total; total 0: unknown


class Progress(Protocol):
    """Called as work proceeds. stage: its name; done of total, 0: unknown; note: what it has come to so far."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """A Progress for whoever does not want to hear."""
