"""Stages in processes of their own: results, errors, crashes, interruption, memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.work import stages
from tests.support.paths import REPO


def double(x, progress=None):
    if progress:
        progress(1, 2)
    print("what a stage prints goes nowhere")
    return 2 * x


def fail(kind):
    if kind == "usage":
        raise UsageError("wrong usage")
    if kind == "value":
        raise ValueError("bad value")
    if kind == "memory":
        raise MemoryError
    if kind == "exit":
        sys.exit(3)
    print("GGML_ASSERT(x > 0) failed", file=sys.stderr, flush=True)
    print("a stack\nof frames", file=sys.stderr, flush=True)
    os.kill(os.getpid(), getattr(signal, kind))


def use(n_bytes):
    return len(bytearray(n_bytes))


def wait(path):
    path.write_text(str(os.getpid()))
    time.sleep(60)


def test_result_and_progress():
    seen = []
    done = stages.run(double, 21, progress=lambda *counts: seen.append(counts))
    assert done.value == 42 and seen == [(1, 2)] and done.seconds > 0


@pytest.mark.parametrize(
    "kind, error, message",
    [
        ("usage", UsageError, "wrong usage"),
        ("value", IntactKVError, "fail failed: ValueError: bad value"),
        ("memory", IntactKVError, "ran out of memory"),
        ("exit", IntactKVError, "SystemExit: 3"),
        ("SIGABRT", IntactKVError, r"died \(SIGABRT\): GGML_ASSERT\(x > 0\) failed"),
        ("SIGSEGV", IntactKVError, "SIGSEGV"),
        ("SIGKILL", IntactKVError, "lack of memory"),
    ],
)
def test_failures_are_one_sentence(kind, error, message):
    with pytest.raises(error, match=message) as caught:
        stages.run(fail, kind)
    assert type(caught.value) is error and "\n" not in str(caught.value)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_peak_memory_is_of_the_stage_alone():
    ballast = bytearray(500_000_000)
    small, large = stages.run(use, 0), stages.run(use, 200_000_000)
    assert small.peak_bytes < 100_000_000 < 200_000_000 < large.peak_bytes < 300_000_000
    assert len(ballast) == 500_000_000


def test_child_ends_with_its_parent(tmp_path):
    """Also when the parent is killed and cannot say goodbye."""
    code = """
        import sys, pathlib
        sys.path.insert(0, sys.argv[2])
        from tests.work import test_stages
        from intactkv_export.work import stages
        stages.run(test_stages.wait, pathlib.Path(sys.argv[1]))
    """
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path, str(REPO)])
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pid = int(path.read_text())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        with open(f"/proc/{pid}/stat") as stat:
            if stat.read().split()[2] == "Z":  # dead; whoever inherited it has not looked yet
                break
        assert time.monotonic() < deadline
        time.sleep(0.05)
