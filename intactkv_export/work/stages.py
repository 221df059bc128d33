"""The stages of long work, each in a process of its own: its crash is one sentence, and its peak memory is its own.

`Stages` runs them for whoever wants to hear of their progress; `run` is one of them, the parent's side. The child gets
a function and its arguments pickled on its standard input, and answers on its standard output: steps, then a result or
an error. The function must be importable. When the parent dies, even by kill -9, the child's input ends and it exits.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from intactkv_export.errors import IntactKVError
from intactkv_export.work.memory import peak_bytes
from intactkv_export.work.progress import Progress, Steps


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
        """Run a stage (see run() below) and return its value. counted: the function reports its steps."""

        def report(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        report(0, 0)
        result = run(function, *args, progress=report if counted else None, **kwargs)
        self.done.append(Stage(name, result.seconds, result.peak_bytes))
        return result.value


@dataclass(frozen=True)
class Done:
    """What a stage returned, how long it took (wall time), and its peak resident memory in bytes."""

    value: Any
    seconds: float
    peak_bytes: int


def run(function: Callable[..., Any], *args: Any, progress: Steps | None = None, **kwargs: Any) -> Done:
    """Call function(*args, **kwargs) in a new process. With `progress`, it is given one as keyword argument.

    Raises what the function raises if that is an IntactKVError, and an IntactKVError if it fails in another way or
    the process dies; the child is killed if this process is interrupted.
    """
    start = time.perf_counter()
    task = pickle.dumps((function, args, kwargs, progress is not None))
    boot = f"import sys; sys.path[:] = {sys.path!r}; from intactkv_export.work.stages import main; main()"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        try:
            assert process.stdin and process.stdout
            try:
                process.stdin.write(len(task).to_bytes(8, "little") + task)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it died: its answer, or the lack of one, says why
            answer = _listen(process.stdout, progress)
            if answer is None:
                process.wait()
                raise IntactKVError(_death(process.returncode, function, log))
            value, error, trace, peak_bytes = answer
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                try:
                    pipe and pipe.close()
                except BrokenPipeError:
                    pass
    if error is not None:
        raise error from RuntimeError(trace)
    return Done(value, time.perf_counter() - start, peak_bytes)


def _listen(stream: IO[bytes], progress: Steps | None) -> Any:
    """The final answer, or None if the child ended without one."""
    while True:
        try:
            kind, payload = pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return None
        if kind == "answer":
            return payload
        if progress is not None:
            progress(*payload)


def _death(code: int, function: Callable[..., Any], log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    # ggml's own words first: a crash handler may print a whole stack after them
    said = next((line for line in lines if "GGML_ASSERT" in line), lines[-1] if lines else "it said nothing")
    if code == -signal.SIGKILL:
        return f"the process of {function.__name__} was killed, probably for lack of memory: free some and try again"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"the process of {function.__name__} died ({name}): {said}"


def main() -> None:
    """The child's side."""
    size = int.from_bytes(sys.stdin.buffer.read(8), "little")
    function, args, kwargs, wants_progress = pickle.loads(sys.stdin.buffer.read(size))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the whole group: the parent has it too, and ends this process
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints, prints to the log
    if wants_progress:
        kwargs["progress"] = lambda done, total: _send(answers, "progress", (done, total))
    value, error, trace = None, None, ""
    try:
        value = function(*args, **kwargs)
    except IntactKVError as e:
        error, trace = e, traceback.format_exc()
    except MemoryError:
        error = IntactKVError(f"{function.__name__} ran out of memory: free some, or use a smaller model")
    except BaseException as e:
        error, trace = IntactKVError(f"{function.__name__} failed: {type(e).__name__}: {e}"), traceback.format_exc()
    _send(answers, "answer", (value, error, trace, peak_bytes()))
    os._exit(0)  # no destructors of libraries: they have crashed before, and all is said


def _send(stream: IO[bytes], kind: str, payload: Any) -> None:
    stream.write(pickle.dumps((kind, payload)))
    stream.flush()


def _exit_with_parent() -> None:
    os.read(0, 1)  # nothing more is ever sent: this returns when the pipe closes
    os._exit(1)
