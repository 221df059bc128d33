"""Talking to a model in a terminal: the line that is typed, the commands, and the reply."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output, create_output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.utils import is_dumb_terminal

from intactkv_export.cli.options import PROG
from intactkv_export.cli.output import remark, say
from intactkv_export.errors import IntactKVError
from intactkv_export.escapes import shown

if TYPE_CHECKING:
    from intactkv_export.runtime import Conversation

_REMEMBERED = 1000  # messages of earlier chats that the arrow keys bring back
HELP = """\
/reset   forget the conversation (the prefix stays)
/stats   what the prefix, the cache and the last reply cost, and the seed
/help    this list
/quit    leave; so does Ctrl-D
Enter sends, Alt-Enter (or Esc, Enter) begins another line. A paste is one message.
The arrow keys bring back earlier messages. Ctrl-C stops a reply, and clears what
is typed when there is none. All else is a message, /etc/fstab too; to send one
that is the name of a command, put a blank before it."""


def interactive(talk: Conversation) -> None:
    """Talk until /quit or Ctrl-D."""
    s = talk.llama.prefix_stats
    loaded = talk.llama.prefix
    prefix = f"prefix of {loaded.contents} at F16" if loaded else "no prefix"
    say(f"{Path(talk.llama.model_path).name}: {s['kv_type']} cache, {prefix}. /help lists the commands.")
    session = _session()
    while True:
        try:
            typed = session.prompt()
        except (EOFError, KeyboardInterrupt) as end:
            if is_dumb_terminal():  # there nothing else leaves the line that was begun
                say("")
            if isinstance(end, EOFError):
                return
            continue
        command = typed.rstrip()
        if command == "/quit":
            return
        if command == "/reset":
            talk.reset()
        elif command == "/stats":
            say(talk.report())
        elif command == "/help":
            say(HELP)
        elif typed.strip():
            _answer(talk, typed.strip())


def once(talk: Conversation, text: str) -> None:
    """Answer one message on stdout, and nothing else there: as it is into a file or a pipe, harmless to a terminal."""
    to_the_eye = sys.stdout.isatty()
    for piece in talk.say(text):
        sys.stdout.write(shown(piece) if to_the_eye else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def notice(text: str) -> None:
    """Where a chat says what it had to do."""
    remark(f"[{text}]")


def _answer(talk: Conversation, text: str) -> None:
    try:
        once(talk, text)
    except KeyboardInterrupt:
        say("\n[stopped]")
    except IntactKVError as error:  # this message did not work, the next may
        remark(f"{PROG}: {error}")


def _session() -> PromptSession[str]:
    """The editor of messages of one line or several, with a history that later chats have too."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_History(_history_file()),
        output=_editor_output(),
        enable_suspend=True,
    )


def _editor_output() -> Output | None:
    """Where the editor draws. stdout may be a file: the prompt does not belong into it. None: it cannot draw at all."""
    if is_dumb_terminal():
        return None
    output = create_output(always_prefer_tty=True)
    if isinstance(output, Vt100_Output):
        # It would ask where the cursor is, and wait; an answer that comes late would be taken as typed.
        output.enable_cpr = False
    return output


class _History(FileHistory):
    """A file of messages; where it cannot be read or written, those of this chat."""

    def load_history_strings(self) -> Iterable[str]:
        with contextlib.suppress(OSError):
            yield from islice(super().load_history_strings(), _REMEMBERED)

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(string)


def _history_file() -> Path:
    """Made readable for its owner only."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "intactkv-export" / "history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    return path
