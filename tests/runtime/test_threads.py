"""One model in several threads, several models at once, and models after fork: real threads, real processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.runtime import threads
from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.smol import Smol

HEAD = """
import os, sys, threading, time
import numpy as np
from intactkv_export.errors import IntactKVError
from intactkv_export.runtime.intact_llama import IntactLlama, L
gguf, ikv = sys.argv[1:]
def opened(**kwargs):
    settings = dict(n_ctx=256, n_batch=128, n_threads=2, n_threads_batch=2)
    return IntactLlama(gguf, ikv, "q8_0", **{**settings, **kwargs})
def answer(llama, text="Once upon a time", n=6):
    llama.reset()
    return llama.create_completion(text, max_tokens=n, temperature=0)["choices"][0]["text"]
"""


def run(smol: Smol, code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", HEAD + code, str(smol.gguf), str(smol.ikv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def make(smol: Smol) -> IntactLlama:
    return IntactLlama(smol.gguf, smol.ikv, "q8_0", n_ctx=256, n_batch=128, n_threads=1, n_threads_batch=1)


def words(llama: IntactLlama, text: str, stream: bool = False) -> str:
    done: Any = llama.create_completion(text, max_tokens=6, temperature=0, stream=stream)
    return "".join(c["choices"][0]["text"] for c in done) if stream else done["choices"][0]["text"]


def test_a_child_after_fork_answers(smol: Smol) -> None:
    done = run(
        smol,
        """
llama = opened()
expected = answer(llama)
for make in (lambda: llama, opened):  # the parent's model, and one opened in the child
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if answer(make()) == expected else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
assert answer(llama) == expected
""",
    )
    assert done.returncode == 0, done.stderr


def test_a_child_of_a_process_that_was_evaluating_refuses(smol: Smol) -> None:
    done = run(
        smol,
        """
llama = opened()
busy = threading.Thread(target=answer, args=(llama, "Once", 60))
busy.start()
while llama._turns._running is None:
    time.sleep(0.01)
child = os.fork()
if child == 0:
    try:
        answer(llama)
    except IntactKVError as error:
        print(error, flush=True)
        os._exit(0)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0
busy.join()
""",
    )
    assert done.returncode == 0, done.stderr
    assert "another thread when process" in done.stdout and done.stdout.count("\n") == 1


def test_calls_of_several_threads_take_turns(smol: Smol) -> None:
    llama = make(smol)
    texts = ["Once upon a time", "The capital of France", "Rain is"]
    expected = []
    for text in texts:
        llama.reset()
        expected.append(words(llama, text))
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda i: words(llama, texts[i % 3], stream=i % 2 == 0), range(12)))
    assert got == [expected[i % 3] for i in range(12)]
    state = llama.save_state()
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(llama.load_state, state), pool.submit(llama.shift_context), pool.submit(llama.embed, "x")]
        jobs += [pool.submit(words, llama, text) for text in texts] + [pool.submit(lambda: llama.prefix_stats)]
        assert isinstance(jobs[2].exception(), RuntimeError), "an ordinary error of llama_cpp gives its turn back"
    assert [job.result() for job in jobs[3:6]] == expected


def test_a_reply_left_unread_waits_and_goes_on(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.2)
    llama = make(smol)
    expected = words(llama, "Once upon a time", stream=True)
    llama.reset()
    reply: Any = llama.create_completion("Once upon a time", max_tokens=6, temperature=0, stream=True)
    got = next(reply)["choices"][0]["text"]
    start = time.monotonic()
    llama.reset()
    other = words(llama, "Rain is")
    assert time.monotonic() - start >= 0.2
    assert got + "".join(c["choices"][0]["text"] for c in reply) == expected
    llama.reset()
    assert words(llama, "Rain is") == other
    pieces = llama.generate([504, 505], temp=0)
    next(pieces)
    pieces.close()
    start = time.monotonic()
    llama.reset()
    assert time.monotonic() - start < 0.2, "a closed reply holds nothing"


def test_pieces_of_a_reply_may_be_read_in_different_threads(smol: Smol) -> None:
    """As web frameworks do."""
    llama = make(smol)
    expected = words(llama, "Once upon a time")
    reply: Any = llama.create_completion("Once upon a time", max_tokens=6, temperature=0, stream=True)
    got = []

    def read() -> None:
        chunk = next(reply, None)
        if chunk is not None:
            got.append(chunk["choices"][0]["text"])

    for _ in range(12):
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    assert "".join(got) == expected


def test_a_closed_model_says_so(smol: Smol) -> None:
    llama = make(smol)
    llama.close()
    with pytest.raises(IntactKVError, match="was closed"):
        llama.eval([30])


def test_opening_beside_anything(smol: Smol) -> None:
    """Two threads open and close models while a third evaluates and a fourth writes to stdout and stderr."""
    done = run(
        smol,
        """
llama, over = opened(), threading.Event()
before = [os.fstat(fd) for fd in (1, 2)]
expected = answer(llama)
wrong = []
def write():
    while not over.is_set():
        os.write(1, b"o\\n"), os.write(2, b"e\\n")
        wrong.extend(fd for fd, stat in zip((1, 2), before) if os.fstat(fd).st_ino != stat.st_ino)
        time.sleep(0.001)
def evaluate():
    while not over.is_set():
        assert answer(llama) == expected
def open_some():
    for _ in range(4):
        opened().close()
        try:
            opened(n_gpu_layers=0, kv_overrides={"general.architecture": "nonesuch"})
        except (IntactKVError, ValueError):
            pass
def failing():
    for _ in range(20):
        try:
            IntactLlama(ikv, None)
        except IntactKVError:
            continue
        wrong.append("opened")
beside = [threading.Thread(target=write), threading.Thread(target=evaluate)]
openers = [threading.Thread(target=f) for f in (open_some, open_some, failing)]
[t.start() for t in beside + openers], [t.join() for t in openers]
over.set()
[t.join() for t in beside]
assert not wrong, wrong
assert [os.fstat(fd).st_ino for fd in (1, 2)] == [stat.st_ino for stat in before]
print("done")
""",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("done\n") and set(done.stdout.split()) == {"o", "done"}
    assert set(done.stderr.split()) == {"e"}, done.stderr[-2000:]
