"""How far a long job is: a bar in a terminal, a line for each stage elsewhere. On stderr."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Called with (stage, done, total); total 0: unknown. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stage: str | None = None
        self._task: TaskID | None = None
        columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._finish()
            self._stage, self._task = stage, self._bars.add_task(stage, total=None)
            if self._bars.disable and not self._quiet:
                print(f"{stage} ...", file=sys.stderr, flush=True)
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total or None)

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1)
