"""What becomes of a system prompt in every chat template of upstream's: a row each, rendered by llama.cpp's own server
and as IntactLlama does. `python -m tests.support.chat_templates MODEL.gguf` prints the table."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
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
_WARNINGS = threading.Lock()  # they are caught for the whole process
WHOLE, DATED, LATER = "whole", "ends before the date", "first tokens: the prompt comes in a later message"


@dataclass
class Row:
    """A template. prefix: by how it is made (MADE), its tokens; why: which reason was given where it is not whole.
    n_plain: tokens of a conversation of one turn. false: what a prefix should begin and does not: (how it was made,
    which conversation, by whom). other_text: conversations that IntactLlama and the server do not render alike.
    refused: conversations that the server refuses. serves: whether the plain prefix begins requests with what it was
    not made with: tools, switches."""

    name: str
    n_plain: int = 0
    prefix: dict[str, Prompt] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    false: list[tuple[str, str, str]] = field(default_factory=list)
    other_text: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
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


def read(path: Path, model: Path, vocabulary: Vocabulary) -> Row:
    """The row of a template. model: any whose vocabulary this is, the smaller the sooner."""
    row, text = Row(path.stem), path.read_text()
    with ExitStack() as stack:
        server = stack.enter_context(Server(model, path))
        row.n_plain = len(vocabulary.tokenize(server.rendered([*_system(), USER]), special=True))
        for made, given in MADE.items():
            if not _is_for(made, text):
                continue
            _make(row, made, given, text, vocabulary)
            if made == "day" and made in row.prefix:
                server = stack.enter_context(_of_that_day(path, text, model))
                given = {"args": date_variables(DAY)}
            if made in row.prefix:
                _compare(row, made, given, text, server, vocabulary)
            if made == "plain" and made in row.prefix:
                _serves_others(row, server, vocabulary)
    return row


def _is_for(made: str, text: str) -> bool:
    """Whether it makes a difference to a template."""
    if made == "switches":
        return any(name in text for name in ("enable_thinking", "reasoning_effort", "reasoning_strength"))
    return made != "day" or asks_clock(text) or any(name in text for name in date_variables(DAY))


def _system() -> list[dict[str, Any]]:
    return [{"role": "system", "content": SYSTEM}]


def _make(row: Row, made: str, given: dict[str, Any], text: str, vocabulary: Vocabulary) -> None:
    rendering = Rendering.checked(*(given.get(name) for name in ("tools", "args", "day")))
    with _WARNINGS, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            row.prefix[made] = make_prompt(vocabulary, text, SYSTEM, rendering=rendering)
        except UsageError as error:
            row.why[made] = str(error)
            return
    row.why[made] = " ".join(str(warning.message) for warning in caught if warning.category is UserWarning)


@contextmanager
def _of_that_day(path: Path, text: str, model: Path) -> Iterator[Server]:
    """A server that is given the template as `serve` gives it."""
    fixed = model.with_name(f"{path.stem}.fixed.jinja")
    fixed.write_text(with_date(text, DAY))
    with Server(model, fixed) as server:
        yield server


def _compare(row: Row, made: str, given: dict[str, Any], text: str, server: Server, vocabulary: Vocabulary) -> None:
    """Whether the prefix begins conversations of its kind, as the server and as IntactLlama render them."""
    prompt, (tools, args) = row.prefix[made], (given.get(name) for name in ("tools", "args"))
    bos, eos = (vocabulary.token_name(token) for token in (vocabulary.bos, vocabulary.eos))
    chat = Template(text, bos, eos, prompt.rendering)
    for name, turns in {**TALKS, **({"calls": CALLING} if tools else {})}.items():
        texts = {"IntactLlama": chat.render([*_system(), *turns]) if name != "calls" else ""}
        try:
            texts["llama-server"] = server.rendered([*_system(), *turns], tools, args)
        except ValueError:
            row.refused.append((made, name))
            continue
        if name in ("one turn", "several turns") and len(set(texts.values())) > 1:
            row.other_text.append((made, name))
        for who, whole in texts.items():
            if whole and vocabulary.tokenize(whole, special=True)[: len(prompt.tokens)] != prompt.tokens:
                row.false.append((made, name, who))


def _serves_others(row: Row, server: Server, vocabulary: Vocabulary) -> None:
    """Whether the plain prefix begins requests that bring tools, or switches."""
    requests: dict[str, tuple[Any, Any]] = {"tools": (TOOLS, None), **{name: (None, x) for name, x in ASKED.items()}}
    tokens = row.prefix["plain"].tokens
    for name, (tools, args) in requests.items():
        text = server.rendered([*_system(), USER], tools, args)
        row.serves[name] = vocabulary.tokenize(text, special=True)[: len(tokens)] == tokens


@contextmanager
def rows(model: Path, vocabulary: Vocabulary, paths: Sequence[Path]) -> Iterator[dict[str, Future[Row]]]:
    """By name, two at a time: most of it is waiting for servers."""
    with ThreadPoolExecutor(2) as pool:
        try:
            yield {path.stem: pool.submit(read, path, model, vocabulary) for path in paths}
        finally:
            pool.shutdown(cancel_futures=True)


def markdown(made: Sequence[Row]) -> Iterator[str]:
    """The table of the documents, a line each, and below it the counts."""
    yield "| template | prefix | tokens of a first turn | with `--date` | requests with tools | thinking on, off |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in made:
        plain, day = (row.prefix.get(name) for name in ("plain", "day"))
        dated = "as it is" if day is None else len(day.tokens)
        switches = row.serves.get("thinking", False) and row.serves.get("no thinking", False)
        tools = "too" if row.serves.get("tools") else "`--tools`"
        n = len(plain.tokens) if plain is not None else 0
        other = "both" if switches else "`--template-args`"
        yield f"| {row.name} | {row.kind('plain')} | {n} of {row.n_plain} | {dated} | {tools} | {other} |"
    kinds = [row.kind("plain") for row in made]
    yield ""
    yield "; ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))) + f"; of {len(made)}"


if __name__ == "__main__":
    with Vocabulary(sys.argv[1]) as opened, rows(Path(sys.argv[1]), opened, templates()) as found:
        print("\n".join(markdown([future.result() for future in found.values()])))
