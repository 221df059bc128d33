"""The stages of a conversion: each in a process of its own, with its time and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intactkv_export import child

Progress = Callable[[str, int, int], None]  # stage, done, total; total 0: unknown


@dataclass(frozen=True)
class Stage:
    """seconds: wall time; peak_bytes: resident memory of the process that did it."""

    name: str
    seconds: float
    peak_bytes: int


@dataclass
class Stages:
    """The stages that were run, where they leave their files, and who wants to hear of them."""

    directory: Path
    progress: Progress | None
    done: list[Stage] = field(default_factory=list)

    def run(self, name: str, function: Callable[..., Any], /, *args: Any, counted: bool = False, **kwargs: Any) -> Any:
        """Run a stage (child.run) and return its value. counted: the function reports its progress."""

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        report(0, 0)
        result = child.run(function, *args, progress=report if counted else None, **kwargs)
        self.done.append(Stage(name, result.seconds, result.peak_bytes))
        return result.value
