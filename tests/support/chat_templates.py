"""What becomes of a system prompt in every chat template of upstream's: a row each, rendered by llama.cpp's own server
and as IntactLlama does. `python -m tests.support.chat_templates MODEL.gguf` prints the table."""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import Prompt, Rendering, Template, asks_clock, date_variables, make_prompt, with_date
from tests.support.llama_server import Server

SYSTEM = "You are a helpful pirate. Answer in one sentence."
DAY = date(2026, 2, 1)
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Weather in a city, in °C – "now".',
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                    "days": {"type": "integer", "minimum": 1},
                    "share": {"type": "number", "default": 1.0, "maximum": 3.14159265},
                },
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
    {"type": "function", "function": {"name": "bare_one", "description": "No parameters <b>&'"}},
]
USER = {"role": "user", "content": "What is 2 + 2?"}
THREE = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": " and 3 + 3?"}]
THINKING = [USER, {"role": "assistant", "content": "4", "reasoning_content": "Two and two."}, THREE[2]]
CALL = {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
CALLING = [
    {"role": "user", "content": "How warm is it in Bonn?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": "21"},
]
# Conversations that every prefix is asked to begin, and of requests that bring more than it was made with.
TALKS: dict[str, list[dict[str, Any]]] = {"one turn": [USER], "several turns": THREE, "thinking": THINKING}
ASKED: dict[str, dict[str, Any]] = {
    "no thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True},
    "effort": {"reasoning_effort": "high"},
}
# How a prefix is made: with nothing, with tools, with tools and switches, for a day.
MADE: dict[str, dict[str, Any]] = {
    "plain": {},
    "tools": {"tools": TOOLS},
    "switches": {"tools": TOOLS, "args": {"enable_thinking": False, "reasoning_effort": "high"}},
    "day": {"day": DAY},
}
OTHERS: dict[str, tuple[Any, Any]] = {"tools": (TOOLS, None), **{name: (None, args) for name, args in ASKED.items()}}
WHOLE, DATED, LATER = "whole", "ends before the date", "first tokens: the prompt comes in a later message"


@dataclass
class Row:
    """A template. prefix: by how it is made (MADE), its tokens; why: which reason was given where it is not whole.
    n_plain: tokens of a conversation of one turn. false: what a prefix should begin and does not: (how it was made,
    which conversation, by whom). other_text: conversations that IntactLlama and the server do not render alike.
    refused: conversations that the server refuses; ours_refused: those that only IntactLlama refuses. serves: whether
    the plain prefix begins requests with what it was not made with: tools, switches.
    """

    name: str
    n_plain: int = 0
    prefix: dict[str, Prompt] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    false: list[tuple[str, str, str]] = field(default_factory=list)
    other_text: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    ours_refused: list[tuple[str, str]] = field(default_factory=list)
    serves: dict[str, bool] = field(default_factory=dict)

    def kind(self, made: str) -> str:
        """WHOLE, DATED, LATER, or why it was refused."""
        why = self.why.get(made, "")
        if made not in self.prefix:
            return f"refused: {why}"
        if "before the system prompt" in why:
            return DATED
        return LATER if "into a later message" in why else WHOLE


def templates() -> list[Path]:
    """Upstream's, beside its converter; none if that is not installed."""
    try:
        return sorted(Path(library.converter_path()).parent.glob("models/templates/*.jinja"))
    except IntactKVError:
        return []


Texts = dict[tuple[str, str], str | None]


def of_server(path: Path, model: Path) -> Texts:
    """What the server makes of the template: by how a prefix is made, and what is said. None: it refuses."""
    text, found = path.read_text(), Texts()
    fixed = model.with_name(f"{path.stem}.fixed.jinja")  # as `serve` gives it for a day

    def ask(made: str, server: Server) -> None:
        given = {"args": date_variables(DAY)} if made == "day" else MADE[made]
        for name, turns in _talks(made).items():
            found[made, name] = _rendered(server, turns, given.get("tools"), given.get("args"))

    with Server(model, path) as server:
        for made in MADE:
            if made != "day" and _is_for(made, text):
                ask(made, server)
        for name, (tools, args) in OTHERS.items():
            found["others", name] = _rendered(server, [USER], tools, args)
    if _is_for("day", text):
        fixed.write_text(with_date(text, DAY))
        with Server(model, fixed) as server:
            ask("day", server)
    return found


def read(path: Path, texts: Texts, vocabulary: Vocabulary) -> Row:
    """The row of a template of which the server makes these texts. vocabulary: of the server's model."""
    row, text = Row(path.stem), path.read_text()
    first = texts["plain", "one turn"]
    row.n_plain = 0 if first is None else len(vocabulary.tokenize(first, special=True))
    for made, given in MADE.items():
        if not _is_for(made, text):
            continue
        _make(row, made, given, text, vocabulary)
        if made in row.prefix:
            _compare(row, made, text, texts, vocabulary)
    if "plain" in row.prefix:
        tokens = row.prefix["plain"].tokens
        for name in OTHERS:
            whole = vocabulary.tokenize(texts["others", name] or "", special=True)
            row.serves[name] = whole[: len(tokens)] == tokens
    return row


def _talks(made: str) -> dict[str, list[dict[str, Any]]]:
    return {**TALKS, **({"calls": CALLING} if "tools" in MADE[made] else {})}


def _rendered(server: Server, turns: list[dict[str, Any]], tools: Any, args: Any) -> str | None:
    try:
        return server.rendered([*_system(), *turns], tools, args)
    except ValueError:
        return None


def _is_for(made: str, text: str) -> bool:
    """Whether it makes a difference to a template."""
    if made == "switches":
        return any(name in text for name in ("enable_thinking", "reasoning_effort", "reasoning_strength"))
    return made != "day" or asks_clock(text) or any(name in text for name in date_variables(DAY))


def _system() -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}]


def _make(row: Row, made: str, given: dict[str, Any], text: str, vocabulary: Vocabulary) -> None:
    rendering = Rendering.checked(*(given.get(name) for name in ("tools", "args", "day")))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row.prefix[made] = make_prompt(vocabulary, text, SYSTEM, rendering=rendering)
        except UsageError as error:
            row.why[made] = str(error)
            return
    row.why[made] = " ".join(str(warning.message) for warning in caught if warning.category is UserWarning)


def _compare(row: Row, made: str, text: str, texts: Texts, vocabulary: Vocabulary) -> None:
    """Whether the prefix begins conversations of its kind, as the server and as IntactLlama render them."""
    prompt = row.prefix[made]
    bos, eos = (vocabulary.token_name(token) for token in (vocabulary.bos, vocabulary.eos))
    chat = Template(text, bos, eos, prompt.rendering)
    for name, turns in _talks(made).items():
        theirs = texts[made, name]
        if theirs is None:
            row.refused.append((made, name))
            continue
        try:
            ours = chat.render([*_system(), *turns])
        except Exception:  # a template is a program: anything can happen
            row.ours_refused.append((made, name))
            continue
        if name != "thinking" and ours != theirs:
            row.other_text.append((made, name))
        for who, whole in (("IntactLlama", ours), ("llama-server", theirs)):
            if vocabulary.tokenize(whole, special=True)[: len(prompt.tokens)] != prompt.tokens:
                row.false.append((made, name, who))


@contextmanager
def rows(model: Path, vocabulary: Vocabulary, paths: Sequence[Path]) -> Iterator[Callable[[str], Row]]:
    """The row of a name, read once. Two servers at a time are asked ahead. model: the smaller the sooner."""
    by_name = {path.stem: path for path in paths}
    with ThreadPoolExecutor(2) as pool:
        asked = {name: pool.submit(of_server, path, model) for name, path in by_name.items()}
        try:
            yield cache(lambda name: read(by_name[name], asked[name].result(), vocabulary))
        finally:
            pool.shutdown(cancel_futures=True)


def markdown(made: Sequence[Row]) -> Iterator[str]:
    """The table of the documents, a line each, and below it the counts."""
    yield "| template | prefix | tokens | with `--date` | requests with tools | thinking on, off |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in made:
        plain, day = (row.prefix.get(name) for name in ("plain", "day"))
        dated = "as it is" if day is None else len(day.tokens)
        switches = row.serves.get("thinking", False) and row.serves.get("no thinking", False)
        tools = "too" if row.serves.get("tools") else "`--tools`"
        n = len(plain.tokens) if plain is not None else 0
        other = "both" if switches else "`--template-args`"
        yield f"| {row.name} | {row.kind('plain')} | {n} | {dated} | {tools} | {other} |"
    kinds = [row.kind("plain") for row in made]
    yield ""
    yield "; ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) + f"; of {len(made)}"


if __name__ == "__main__":
    with (
        Vocabulary(sys.argv[1]) as opened,
        TemporaryDirectory() as folder,
        rows(Path(shutil.copy(sys.argv[1], folder)), opened, templates()) as row_of,
    ):
        print("\n".join(markdown([row_of(path.stem) for path in templates()])))
