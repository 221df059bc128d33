"""chat: in a real terminal (a pty), for one message, from a pipe, and when the context is full."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.runtime import chat
from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.smol import SYSTEM_PROMPT, Smol

COMMAND = [sys.executable, "-m", "intactkv_export", "chat"]
SEA = "Write one sentence about the sea."


class Terminal:
    """A child on a pseudo-terminal: what a person at a keyboard has."""

    def __init__(self, arguments: list[str], state: Path) -> None:
        self.unread = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", XDG_STATE_HOME=str(state))
            os.execv(sys.executable, [*COMMAND, *arguments])

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def comes(self, text: str, seconds: float) -> bool:
        """Whether the child writes `text` in that time."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                return False
            try:
                self.unread += os.read(self.fd, 4096).decode(errors="replace")
            except OSError:  # Linux: the child has closed its side
                raise AssertionError(f"it ended without {text!r}: {self.unread!r}") from None
        return True

    def read_until(self, text: str) -> str:
        """What the child writes up to and with `text`; what comes after is kept for the next call."""
        assert self.comes(text, 600), f"no {text!r} in {self.unread!r}"
        got, found, self.unread = self.unread.partition(text)
        return got + found

    def interrupt_prompt(self) -> None:
        """Ctrl-C at the prompt, and again if nothing happens.

        CPython's readline loses a SIGINT that comes between its look for signals and its select(2), about one in a
        thousand on a busy machine, until the next key.
        """
        for patience in (10, 600):
            self.send("\x03")
            if self.comes("\n> ", patience):
                self.read_until("\n> ")
                return
        raise AssertionError(f"two times Ctrl-C did not bring the prompt back: {self.unread!r}")

    def ask(self, line: str) -> str:
        """Type a line; what comes up to the next prompt."""
        self.send(line + "\n")
        self.read_until("\n")  # the echo
        return self.read_until("> ").removesuffix("> ")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


@pytest.fixture
def terminal(smol: Smol, tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        standard = [str(smol.gguf), "--prefix", str(smol.ikv), "--temp", "0", "-t", "2"]
        opened.append(Terminal([*standard, *arguments], tmp_path))
        opened[-1].read_until("> ")
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    t = terminal("-n", "8")
    first = t.ask(SEA)
    assert first.strip()
    stats = t.ask("/stats")
    for fact in ("24 tokens from", "24 intact", "loaded 1 times", "(24 from the cache)"):
        assert fact in stats
    assert t.ask("And the land?").strip()
    stats = t.ask("/stats")
    assert "loaded 1 times" in stats and "(24 from the cache)" not in stats, "the first turn was in the cache"
    assert t.ask("/reset") == ""
    assert "/reset" in t.ask("/help") and "no command /foo" in t.ask("/foo")
    assert t.ask("") == ""
    t.send("\x1b[A")  # up arrow: the last line of the history
    t.read_until("/foo")
    t.send("\x15/quit\n")
    assert t.exit_code() == 0
    history = (tmp_path / "intactkv-export" / "history").read_text()
    assert SEA in history and "/quit" in history
    assert (tmp_path / "intactkv-export" / "history").stat().st_mode & 0o077 == 0


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal: Any) -> None:
    t = terminal()
    t.send("Tell me a very long story about a dragon and a princess, in ten chapters.\n")
    t.read_until("\n")
    t.read_until(" ")  # the reply has begun
    t.send("\x03")
    assert "[stopped]" in t.read_until("\n> ")
    t.send("half a line")
    t.read_until("half a line")  # the echo: a terminal drops, at Ctrl-C, what nobody has read
    t.interrupt_prompt()
    assert "24 intact" in t.ask("/stats")
    t.send("\x04")  # Ctrl-D
    assert t.exit_code() == 0


def run(*arguments: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=900, **kwargs)


def test_one_message_and_a_pipe_give_the_same_reply_and_nothing_else(smol: Smol) -> None:
    arguments = [str(smol.gguf), "--prefix", str(smol.ikv), "--temp", "0", "-n", "8", "-t", "2"]
    arguments += ["--kv-type", "q8_0,q4_0"]
    one = run(*arguments, "-p", SEA)
    assert (one.returncode, one.stderr) == (0, "") and one.stdout.strip() and one.stdout.endswith("\n")
    piped = run(*arguments, input=SEA + "\n")
    assert (piped.returncode, piped.stderr, piped.stdout) == (0, "", one.stdout)
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": SEA}]
    llama = IntactLlama(smol.gguf, smol.ikv, ("q8_0", "q4_0"), n_ctx=4096, n_threads=2, n_threads_batch=2)
    answer = llama.create_chat_completion(messages, max_tokens=8, temperature=0, repeat_penalty=1.0)
    assert one.stdout == answer["choices"][0]["message"]["content"] + "\n"


def test_the_seed_decides(smol: Smol) -> None:
    arguments = [str(smol.gguf), "-p", SEA, "-n", "8", "-t", "2", "--temp", "1.5", "--seed"]
    replies = [run(*arguments, seed).stdout for seed in ("1", "1", "2")]
    assert replies[0] == replies[1] != replies[2]


def test_ctrl_c_ends_a_single_message_with_130(smol: Smol) -> None:
    arguments = [str(smol.gguf), "-p", "Tell me a very long story.", "-t", "2", "--temp", "0"]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.wait(600) == 130
        assert "Traceback" not in child.stderr.read()


@pytest.fixture
def notices() -> list[str]:
    return []


def talk(smol: Smol, notices: list[str], n_ctx: int, max_tokens: int = 8, prefix: Any = "ikv") -> chat.Chat:
    path = smol.ikv if prefix == "ikv" else prefix
    llama = IntactLlama(smol.gguf, path, "q4_0", n_ctx=n_ctx, n_threads=2, n_threads_batch=2)
    return chat.Chat(llama, chat.opening_messages(llama, None), chat.Sampling(max_tokens, 0.0), notices.append)


def test_full_context_drops_the_oldest_turns_and_keeps_the_prefix(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, n_ctx=256, max_tokens=2)
    for i in range(4):
        assert "".join(conversation.say(f"Number {i}: " + "word " * 60))
    assert notices and all("dropped" in notice for notice in notices)
    assert [user[:9] for user, _ in conversation.turns][-1] == "Number 3:" and len(conversation.turns) < 4
    assert conversation.llama.intact_cells == 24 and conversation.llama.n_tokens <= 256
    assert conversation.llama.prefix_stats["loads"] == 1, "it never left the cache"
    with pytest.raises(IntactKVError, match="--ctx-size"):
        "".join(conversation.say("word " * 400))
    assert "".join(conversation.say("Hi")), "the conversation goes on"


def test_a_reply_that_fills_the_context_ends_with_a_notice(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, n_ctx=256, max_tokens=0)
    list(conversation.say("word " * 180 + "Repeat all of this, word by word, three times."))
    if conversation.llama.n_tokens >= 255:  # the model might have stopped earlier of its own accord
        assert any("full" in notice for notice in notices)
    assert conversation.llama.n_tokens <= 256


def test_an_interrupted_reply_stays_in_the_conversation(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, n_ctx=256, max_tokens=50)
    reply = conversation.say(SEA)
    begun = next(reply) + next(reply)
    reply.close()
    assert conversation.turns == [(SEA, begun)]
    assert "".join(conversation.say("Go on.")) and conversation.llama.intact_cells == 24
    conversation.reset()
    assert conversation.turns == [] and "".join(conversation.say(SEA)).startswith(begun)


def test_system_prompts(smol: Smol, notices: list[str]) -> None:
    llama = talk(smol, notices, 256).llama
    own = [{"role": "system", "content": SYSTEM_PROMPT}]
    assert chat.opening_messages(llama, None) == chat.opening_messages(llama, SYSTEM_PROMPT) == own
    with pytest.raises(UsageError, match="pirate"):
        chat.opening_messages(llama, "You are a pirate.")
    for other in (smol.bos, None):
        llama = talk(smol, notices, 256, prefix=other).llama
        assert chat.opening_messages(llama, None) == []
        assert chat.opening_messages(llama, "Arr.") == [{"role": "system", "content": "Arr."}]


def test_a_model_without_a_template_is_refused(smol: Smol, notices: list[str]) -> None:
    llama = talk(smol, notices, 256).llama
    del llama.metadata["tokenizer.chat_template"]
    with pytest.raises(IntactKVError, match="no chat template"):
        chat.Chat(llama, [], chat.Sampling(), notices.append)


def test_a_template_that_raises_is_one_sentence(smol: Smol, notices: list[str]) -> None:
    llama = talk(smol, notices, 256).llama
    llama.metadata["tokenizer.chat_template"] = "{{ raise_exception('System role not supported') }}"
    conversation = chat.Chat(llama, [], chat.Sampling(), notices.append)
    with pytest.raises(IntactKVError, match="System role not supported"):
        next(conversation.say("Hi"))
