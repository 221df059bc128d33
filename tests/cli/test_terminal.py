"""chat in a real terminal (a pty): pastes, commands, history, Ctrl-C, Ctrl-D, and replies that cannot command it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intactkv_export.cli import terminal as chat_terminal
from tests.support.smol import Smol
from tests.support.terminal import READY, SENT, Terminal, plain

SEA = "Write one sentence about the sea."
Start = Callable[..., Terminal]


@pytest.fixture
def terminal(smol: Smol, tmp_path: Path) -> Iterator[Start]:
    opened: list[Terminal] = []

    def start(*arguments: str, term: str = "xterm", until: str = READY) -> Terminal:
        standard = [str(smol.gguf), "--prefix", str(smol.ikv), "--temp", "0", "-t", "2"]
        opened.append(Terminal([*standard, *arguments], tmp_path, term))
        opened[-1].read_until(until)
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation_in_a_terminal(terminal: Start, tmp_path: Path) -> None:
    t = terminal("-n", "8", "--seed", "7")
    assert t.ask(SEA).strip()
    stats = t.ask("/stats")
    for fact in (
        "24 tokens from",
        " intact, fused attention",
        "tail       128 cells",
        "loaded 1 times",
        "(24 from the cache)",
        "seed 7",
    ):
        assert fact in stats
    assert t.ask("And the land?").strip()
    stats = t.ask("/stats")
    assert "loaded 1 times" in stats and "(24 from the cache)" not in stats, "the first turn was in the cache"
    assert t.ask("/reset") == ""
    assert "/reset" in t.ask("/help") and t.ask("") == ""
    t.send("\x1b[A")  # up arrow: the last message of the history
    t.read_until("/help")
    t.send("\x15/quit\r")
    assert t.exit_code() == 0
    file = tmp_path / "intactkv-export" / "history"
    history = file.read_text()
    assert SEA in history and "/quit" in history and file.stat().st_mode & 0o077 == 0
    t = terminal("-n", "8")  # another chat remembers
    t.send("\x1b[A\x1b[A")
    t.read_until("/help")


def test_only_commands_are_commands(terminal: Start) -> None:
    t = terminal("-n", "4")
    for number, message in enumerate(("/no_think What is 2+2?", "/etc/fstab looks odd", "// a comment", " /help"), 1):
        assert "no command" not in (reply := t.ask(message)) and "forget the conversation" not in reply, message
        assert f"last reply {t.ask('/stats').partition('last reply ')[2].split()[0]} tokens" in t.ask("/stats"), number
    assert "put a blank before it" in t.ask("/help ")


def test_a_paste_is_one_message_of_any_length(terminal: Start, tmp_path: Path) -> None:
    t = terminal("-n", "4")
    lines = "def f(x):\n    return x\n\nprint(f(1))"
    t.paste(lines.replace("\n", "\r"))  # terminals send the Enter key for a line break
    t.ask("")
    long = "word " * 1199 + "last."  # 6,000 characters: a line of the kernel's editor ends at 4,096
    t.paste(long)
    t.ask("")
    stats = t.ask("/stats")
    assert int(stats.partition("last reply ")[2].split()[0]) > 1200, "all of the long line was evaluated"
    t.send("two\x1b\rlines")  # Alt-Enter
    t.ask("")
    entries = (tmp_path / "intactkv-export" / "history").read_text().split("\n\n# ")
    messages = ["\n".join(line[1:] for line in entry.splitlines() if line.startswith("+")) for entry in entries]
    assert messages == [lines, long, "/stats", "two\nlines"]


def test_ctrl_c_stops_the_reply_and_not_the_program(terminal: Start) -> None:
    t = terminal()
    t.send("Tell me a very long story about a dragon and a princess, in ten chapters.\r")
    t.read_until(SENT)
    t.read_until(" ")  # the reply has begun
    t.send("\x03")
    assert "[stopped]" in t.read_until(READY)
    t.send("half a line")
    t.read_until("half a line")
    t.send("\x03")
    t.read_until(READY)
    assert "24 tokens from" in t.ask("/stats"), "the half line was cleared"
    t.send("\x04")  # Ctrl-D
    assert t.exit_code() == 0


def test_a_dumb_terminal_will_do(terminal: Start) -> None:
    t = terminal("-n", "4", term="dumb", until="> ")

    def send(text: str, until: str) -> str:
        t.wait_for_the_editor()
        t.send(text)
        return t.read_until(until)

    assert "24 tokens from" in send("/stats\r", "\n> ")
    assert send(f"{SEA}\r", "\n> ").partition(f"{SEA}\r\r\n")[2].removesuffix("> ").strip()
    send("half a line", "half a line")
    send("\x03", "\n> ")
    assert "last reply" in send("/stats\r", "\n> ")
    send("\x04", "\n")
    assert t.exit_code() == 0


def test_the_history_may_not_be_there(terminal: Start, tmp_path: Path) -> None:
    (tmp_path / "intactkv-export").write_text("a file where a directory should be")
    t = terminal("-n", "4")
    assert "24 tokens from" in t.ask("/stats") and "24 tokens from" in t.ask("/stats")


class Replies:
    """A model that says what it is told to."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def say(self, text: str) -> Iterator[str]:
        yield from self.pieces


def test_a_reply_cannot_command_a_terminal_and_a_file_gets_it_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Replies("\x1b]0;title\x07", "a\tb\n", "\x9b2J", "é🙂", "\u202e")
    chat_terminal.once(talk, "")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "".join(talk.pieces) + "\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    chat_terminal.once(talk, "")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "\\x1b]0;title\\x07a\tb\n\\x9b2Jé🙂\\u202e\n"


def test_what_the_terminal_shows_is_what_was_said(terminal: Start) -> None:
    assert plain(terminal("-n", "8").ask(SEA)).strip().isprintable()
