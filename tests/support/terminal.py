"""A child on a pseudo-terminal: what a person at a keyboard has."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time
from pathlib import Path

READY, SENT = "\x1b[?2004h", "\x1b[?2004l"  # the editor asks for bracketed pastes while it is read, and only then
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|[@-Z\\-_])")


class Terminal:
    """`intactkv-export chat` on a terminal of 80 columns."""

    def __init__(self, arguments: list[str], state: Path, term: str = "xterm") -> None:
        self.unread = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM=term, XDG_STATE_HOME=str(state))
            os.execv(sys.executable, [sys.executable, "-m", "intactkv_export", "chat", *arguments])

    def send(self, text: str) -> None:
        while text:  # the line discipline takes some thousand bytes at a time
            text = text[os.write(self.fd, text[:1000].encode()) :]

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

    def ask(self, message: str) -> str:
        """Type a message; what comes up to the next prompt, as it is written."""
        self.send(message + "\r")
        self.read_until(SENT)
        return self.read_until(READY).removesuffix(READY)

    def wait_for_the_editor(self) -> None:
        """Until keys are read one by one: what is typed before is a line to the kernel, and Ctrl-D its end."""
        end = time.monotonic() + 600
        while termios.tcgetattr(self.fd)[3] & termios.ICANON:
            assert time.monotonic() < end, self.unread
            time.sleep(0.01)

    def paste(self, text: str) -> None:
        self.send(f"\x1b[200~{text}\x1b[201~")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


def plain(text: str) -> str:
    """What is left to read when the terminal has obeyed: without escape sequences, lines ending in a line feed."""
    return _ESCAPES.sub("", text).replace("\r", "")
