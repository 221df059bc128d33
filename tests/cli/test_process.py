"""The command line as a process: signals that end it, standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.smol import SYSTEM_PROMPT, Smol

PROGRAM = [sys.executable, "-m", "intactkv_export"]


def start(*arguments: Any, **kwargs: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([*PROGRAM, *map(str, arguments)], **{"stderr": subprocess.PIPE, "text": True, **kwargs})


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
@pytest.mark.parametrize(
    ("number", "to_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGHUP, True)]
)
def test_signals_during_convert_leave_nothing(
    smol: Smol, tmp_path: Path, number: signal.Signals, to_group: bool
) -> None:
    """To the process as `kill` does it, and to its group as a terminal or `timeout` does. The old output stays."""
    shutil.copyfile(smol.gguf, tmp_path / "out.gguf")
    with start("convert", smol.reference, "-o", "out", cwd=tmp_path, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("widen"):
                break
        time.sleep(0.3)
        stages = children(process.pid)
        assert stages
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait(60) == 128 + number
        assert not [line for line in process.stderr if "..." not in line]
    assert all(is_gone(pid) for pid in stages)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]
    assert (tmp_path / "out.gguf").read_bytes() == smol.gguf.read_bytes()


def test_a_signal_that_is_ignored_stays_ignored(smol: Smol, tmp_path: Path) -> None:
    """nohup"""
    command = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *PROGRAM, "convert", str(smol.reference), "-o", "out"]
    command += ["-q", "Q4_0", "-s", SYSTEM_PROMPT, "-t", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("hash"))
        process.send_signal(signal.SIGHUP)
        process.stderr.read()
        assert process.wait(600) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.ikv"]


@pytest.fixture
def broken() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def closed(number: int) -> Callable[[], None]:
    return lambda: os.close(number)


@pytest.mark.parametrize("command", ["inspect", "embed", "--help"])
def test_no_command_minds_its_streams(smol: Smol, tmp_path: Path, broken: int, command: str) -> None:
    gguf = Path(shutil.copyfile(smol.gguf, tmp_path / "x.gguf"))
    arguments = [command, *{"inspect": [smol.ikv], "embed": [smol.ikv, gguf]}.get(command, [])]
    done, unbuffered = {}, {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open("/dev/full", "wb") as full:
        for name, kwargs in {
            "stderr closed": {"preexec_fn": closed(2), "stderr": None},
            "stderr full": {"stderr": full},
            "stderr broken": {"stderr": broken},
            "stdout closed": {"preexec_fn": closed(1), "stdout": None},
            "stdout broken": {"stdout": broken},
            "both broken": {"stdout": broken, "stderr": broken},
            "stdout full": {"stdout": full},
            "stdout full, unbuffered": {"stdout": full, "env": unbuffered},
        }.items():
            with start(*arguments, cwd=tmp_path, **{"stdout": subprocess.PIPE, **kwargs}) as process:
                out, err = process.communicate(timeout=100)
            done[name] = process.returncode, bool(out), err or ""
    for name in ("stderr closed", "stderr full", "stderr broken"):
        assert done[name][:2] == (0, True), name
    assert done["stdout closed"] == (0, False, "")
    for name in ("stdout broken", "both broken"):
        assert done[name] == (141, False, ""), name
    for name in ("stdout full", "stdout full, unbuffered"):
        code, _, said = done[name]
        assert code == 1 and said.count("\n") == 1 and "cannot write to standard output: No space left" in said


def test_errors_keep_their_code_without_stderr(tmp_path: Path, broken: int) -> None:
    for arguments, code in ((["frobnicate"], 2), (["extract", "nowhere.gguf"], 1)):
        for kwargs in ({"preexec_fn": closed(2), "stderr": None}, {"stderr": broken}):
            with start(*arguments, cwd=tmp_path, **kwargs) as process:
                assert process.wait(100) == code


@pytest.mark.parametrize("kind", ["closed", "full"])
def test_convert_without_stderr(smol: Smol, tmp_path: Path, kind: str) -> None:
    """No file it opens may become what libraries print to; and its progress goes nowhere."""
    with open("/dev/full", "wb") as full:
        kwargs = {"closed": {"preexec_fn": closed(2), "stderr": None}, "full": {"stderr": full}}
        arguments = ["convert", smol.reference, "-o", "out", "-q", "Q4_0", "--bos-only", "-t", 2]
        with start(*arguments, cwd=tmp_path, stdout=subprocess.PIPE, **kwargs[kind]) as process:
            out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "bits/weight" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.ikv"]
