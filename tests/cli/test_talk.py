"""chat for one message: from -p, from a pipe, from both, in any encoding; only the reply is on stdout."""

from __future__ import annotations

import locale
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.smol import SYSTEM_PROMPT, Smol

SEA = "Write one sentence about the sea."
COMMAND = [sys.executable, "-m", "intactkv_export", "chat"]
Chat = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def chat(smol: Smol) -> Chat:
    def run(*arguments: str | bytes, n: int = 4, **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
        standard = [str(smol.gguf), "--prefix", str(smol.ikv), "--temp", "0", "-n", str(n), "-t", "2"]
        command: list[Any] = [*COMMAND, *standard, *arguments]
        given = {"stdin": subprocess.DEVNULL} if "input" not in kwargs else {}
        return subprocess.run(command, capture_output=True, timeout=900, **given, **kwargs)

    return run


def reply(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert (done.returncode, done.stderr) == (0, b""), done.stderr
    return done.stdout


def said(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one sentence of a failure."""
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code and len(lines) == 1 and done.stdout == b"", done.stderr
    return lines[0].removeprefix("intactkv-export: ")


def test_one_message_and_a_pipe_give_the_same_reply_and_nothing_else(smol: Smol, chat: Chat) -> None:
    types = ["--kv-type", "q8_0,q4_0"]
    one = reply(chat(*types, "-p", SEA, n=8))
    assert one.strip() and one.endswith(b"\n")
    assert reply(chat(*types, input=SEA.encode() + b"\n", n=8)) == one
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": SEA}]
    llama = IntactLlama(smol.gguf, smol.ikv, ("q8_0", "q4_0"), n_ctx=4096, n_threads=2, n_threads_batch=2)
    answer = llama.create_chat_completion(messages, max_tokens=8, temperature=0, repeat_penalty=1.0)
    assert one.decode() == answer["choices"][0]["message"]["content"] + "\n"


def test_a_prompt_and_then_what_is_piped(chat: Chat) -> None:
    both = reply(chat("-p", "Review this:", input=b"+ a line\n- another\n"))
    assert both == reply(chat("-p", "Review this:\n\n+ a line\n- another"))
    assert reply(chat("-p", SEA, input=b"\n")) == reply(chat("-p", SEA)), "an empty pipe adds nothing"


WORDS = "Le café à Zürich, 你好"


def test_every_encoding_that_shows_itself(chat: Chat) -> None:
    expected = reply(chat("-p", f"{WORDS}\nand so on"))
    text = f"{WORDS}\r\nand so on\r\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert reply(chat(input=text.encode(encoding))) == expected, encoding
    text = "Le café\n".encode("latin-1")
    assert "byte 6 (0xe9): convert it, or name the encoding it has with --encoding" in said(chat(input=text), 1)
    assert reply(chat("--encoding", "latin-1", input=text)) == reply(chat("-p", "Le café"))


@pytest.mark.parametrize(
    ("arguments", "given", "code", "reason"),
    [
        ([], b"\x7fELF\x02\x01\x01\x00\x00\x01", 1, "standard input is not text: byte 7 is 0x00"),
        ([], b"\xff\xfea", 1, "begins as UTF-16-LE and is not at byte 2"),
        (["--encoding", "ascii"], "é".encode(), 1, "standard input is not ascii at byte 0 (0xc3)"),
        (["--encoding", "klingon"], b"Hi", 2, "there is no text encoding 'klingon'"),
        (["--encoding", "hex"], b"Hi", 2, "there is no text encoding 'hex'"),
        (["-p", b"caf\xe9"], b"", 1, "--prompt is not UTF-8 at byte 3"),
        ([], b" \n", 2, "there is no message"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(
    chat: Chat, arguments: list[str | bytes], given: bytes, code: int, reason: str
) -> None:
    assert reason in said(chat(*arguments, input=given), code)


def test_a_closed_stdin(chat: Chat) -> None:
    def close() -> None:
        os.close(0)

    assert "there is no message" in said(chat(preexec_fn=close), 2)
    assert reply(chat("-p", SEA, preexec_fn=close)) == reply(chat("-p", SEA))


def test_the_locale_decides_where_the_bytes_do_not(chat: Chat) -> None:
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    expected = reply(chat("-p", "café"))
    for made in (chat(input="café".encode(), env=plain), chat("-p", "café".encode(), env=plain)):
        assert made.returncode == 0 and made.stdout.decode(errors="replace").isascii() or made.stdout == expected
    name = "en_US.ISO-8859-1"
    before = locale.setlocale(locale.LC_CTYPE)
    try:
        locale.setlocale(locale.LC_CTYPE, name)
    except locale.Error:
        pytest.skip(f"this system has no locale {name}")
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
    latin = {**os.environ, "LC_ALL": name, "PYTHONUTF8": "0"}
    assert chat(input="café".encode("latin-1"), env=latin).stdout.decode("latin-1") == expected.decode()


def test_a_system_prompt_from_an_editor_is_that_of_the_prefix(chat: Chat, tmp_path: Path) -> None:
    expected = reply(chat("-p", SEA))
    for text in (f"{SYSTEM_PROMPT}\n", f"\ufeff{SYSTEM_PROMPT}\r\n"):
        (tmp_path / "prompt.txt").write_bytes(text.encode())
        assert reply(chat("-p", SEA, "-s", f"@{tmp_path / 'prompt.txt'}")) == expected
    (tmp_path / "prompt.txt").write_bytes(f"{SYSTEM_PROMPT}".encode("utf-16"))
    assert reply(chat("-p", SEA, "-s", f"@{tmp_path / 'prompt.txt'}")) == expected
    done = chat("-p", SEA, "-s", SYSTEM_PROMPT.replace("a helpful", "a\nhelpful"))
    assert done.stdout == expected and b"warning: the system prompt differs" in done.stderr


def test_the_seed_decides(smol: Smol) -> None:
    arguments = [str(smol.gguf), "-p", SEA, "-n", "8", "-t", "2", "--temp", "1.5"]

    def said(*seed: str) -> bytes:
        return subprocess.run([*COMMAND, *arguments, *seed], capture_output=True, stdin=subprocess.DEVNULL).stdout

    fixed = [said("--seed", seed) for seed in ("1", "1", "2")]
    assert fixed[0] == fixed[1] != fixed[2]
    assert len({said() for _ in range(3)}) > 1, "without one, every run has its own"


def test_ctrl_c_ends_a_single_message_with_130(smol: Smol) -> None:
    arguments = [str(smol.gguf), "-p", "Tell me a very long story.", "-t", "2", "--temp", "0"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*COMMAND, *arguments], text=True, **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(600) == 130
        assert "Traceback" not in child.stderr.read()
