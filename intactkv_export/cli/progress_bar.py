"""How far a long job is: a bar in a terminal, a line for each stage elsewhere. On stderr."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from intactkv_export.cli.output import remark
from intactkv_export.escapes import shown


class ProgressBar:
    """A work.Progress for the eye. A context manager."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stage: str | None = None
        self._task: TaskID | None = None
        self._note = ""
        columns = (
            TextColumn("{task.description:24}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bars = Bars(*columns, console=Console(stderr=True), disable=quiet or not sys.stderr.isatty())

    def __enter__(self) -> ProgressBar:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        stage, note = shown(stage), shown(note)
        lines = self._bars.disable and not self._quiet
        if stage != self._stage:
            self._finish()
            self._stage, self._task = stage, self._bars.add_task(stage, total=None, note=note)
            if lines:
                remark(f"{stage} ...")
        if lines and note and note != self._note:
            remark(f"{stage} {done}/{total}: {note}")
        self._note = note
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total or None, note=note)

    def _finish(self) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=1, total=1)
