"""A system prompt as prefix tokens: what every later conversation with this prompt begins with.

The model's own chat template is rendered as llama.cpp's server and the runtime do it (chat_template.py) and tokenized
whole by llama.cpp, for several conversations that begin with the same system prompt, tools and template switches. Their
longest common token prefix is the prefix. Tokens at its end that merge with what follows, or that depend on the date,
fall out by themselves. It ends where conversations with tools, or asked to think otherwise, go another way, if that
costs it no word of the prompt and a few tokens at most: then it serves these too.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

from intactkv_export import extras
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Rope, Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix.chat_template import (
    BOS_ONLY,
    DATE,
    Rendering,
    Template,
    chat_template_of,
    system_messages,
    with_date,
)

Messages = list[dict[str, str]]

_DATE = "--date YYYY-MM-DD"

# First user messages that begin with every class of character that tokenizers tell apart, and an empty one. None
# begins with a line break or with several blanks: these would merge with the line break that most templates put
# before the message, and cost every conversation that token. The runtime computes such a conversation as usual.
_FIRST_MESSAGES = (
    "Hello, who are you?",
    "",
    "a",
    "Zürich",
    "7 * 6 =",
    "1,000",
    " one blank",
    "!",
    "'s",
    "...",
    "#include <stdio.h>",
    "def f(x):\n    return x\n",
    '{"a": [1]}',
    "<b>",
    "[INST",
    "|",
    "_",
    "@you",
    "你好",
    "こんにちは",
    "Да",
    "é",
    "😀",
)
# Every part of a date differs.
_DATES = (DATE, datetime(2031, 12, 5, 21, 45, 30), datetime(1999, 2, 13, 14, 36, 59))
# What requests may bring where none is said, and what it may cost a prefix to serve them too: so many tokens, or a
# quarter of all, if it holds a prompt and goes on holding it; else fewer.
_OTHER_TOOLS: list[list[dict[str, Any]]] = [
    [{"type": "function", "function": {"name": name, "description": text, "parameters": parameters}} for name in names]
    for names, text, parameters in (
        (["get_weather", "now"], "Tells it.", {"type": "object", "properties": {"x": {"type": "string"}}}),
        (["add"], "", {}),
    )
]
_OTHER_ARGS = {"enable_thinking": (True, False), "reasoning_effort": ("low", "medium", "high")}
_FEW, _VERY_FEW = 16, 4
_REASONING: list[dict[str, Any]] = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "Two and two."},
    {"role": "user", "content": "And 3 + 3?"},
]


@dataclass(frozen=True)
class Prompt:
    """Prefix tokens and where they come from.

    text: that of the tokens. messages: what a conversation has to begin with, so that its tokens begin with these;
    None if no system prompt was given. The tokens may be only the first of what these messages render (first_tokens()).
    rendering: with what else they are rendered; None: by llama-cpp-python's formatter.
    """

    tokens: list[int]
    text: str
    messages: Messages | None
    bos_only: bool
    chat_template_sha256: str | None
    rendering: Rendering | None = None

    @classmethod
    def of(cls, tokens: list[int], manifest: Mapping[str, Any]) -> Prompt:
        """That of a prefix file."""
        m = manifest
        return cls(tokens, m["text"], m["messages"], m["bos_only"], m["chat_template_sha256"], Rendering.of(m))


def make_prompt(
    vocabulary: Vocabulary,
    template: str | None,
    system_prompt: str | None,
    bos_only: bool = False,
    rendering: Rendering | None = None,
) -> Prompt:
    """The prefix of a system prompt (None: of the template's own), or with `bos_only` of every text.

    template: the model's chat template, None if it has none. rendering: tools, switches of the template, the date;
    None: none. Where the prompt stands behind today's date, or in a later message, the prefix ends before it, with a
    warning. Where the server cannot render the template, llama-cpp-python's formatter does it, with a warning.

    Raises UsageError if there is no template, it refuses the conversation or shows no system prompt, if conversations
    have nothing in common, or if the prompt's text contains control tokens of the model.
    """
    names = vocabulary.token_name(vocabulary.bos), vocabulary.token_name(vocabulary.eos)
    if bos_only:
        return _bos(vocabulary, template, names)
    if template and rendering is not None and rendering.date is not None:
        with_date(template, rendering.date)  # as serve will need it
    try:
        chat = Template(template, *names, rendering or Rendering(), vocabulary.adds_bos)
        return _of_conversations(vocabulary, chat, system_prompt)
    except UsageError as error:
        if not template:
            raise
        if rendering is not None:
            raise
        try:
            made = _of_conversations(vocabulary, Template(template, *names), system_prompt)
        except UsageError:
            raise error from None
        warnings.warn(
            f"as llama-server renders this chat template, {_clause(error)}: the prefix is made for IntactLlama and "
            "chat alone",
            stacklevel=2,
        )
        return made


def _of_conversations(vocabulary: Vocabulary, chat: Template, system_prompt: str | None) -> Prompt:
    """What all conversations with a prompt have in common."""
    variants = [vocabulary.tokenize(text, special=True) for text in _conversations(chat, system_prompt)]
    tokens = _common(variants)
    of_one_day = _common([variants[0], *variants[len(_DATES) :]])
    prompt = None if system_prompt is None else _place(vocabulary, chat, system_prompt, variants[0])
    if not tokens:
        date = f"the date is what differs, so fix it with {_DATE}, or " if of_one_day else ""
        raise UsageError(
            f"conversations of this chat template have no token in common at their beginning: {date}{BOS_ONLY}"
        )
    if chat.rendering is not None and chat.rendering.date is not None and not chat.writes_date(system_prompt):
        warnings.warn(
            f"the model's chat template writes no date, so {chat.rendering.date} makes no difference", stacklevel=3
        )
        if not chat.may_ask_for_date:  # nor do other conversations: nobody need hear of it again
            chat.rendering = replace(chat.rendering, date=None)
    dated = len(of_one_day) > len(tokens)
    if chat.rendering is not None:
        tokens = _also_for_others(vocabulary, chat, system_prompt, tokens, prompt)
    if dated:
        _warn_of_date(len(tokens), len(of_one_day), prompt)
    elif prompt is not None and len(tokens) <= prompt.start:
        plural = f"first {len(tokens)} tokens" if len(tokens) > 1 else "first token"
        warnings.warn(
            f"the model's chat template puts the system prompt into a later message, so the prefix is the {plural} "
            "alone, which all conversations begin with",
            stacklevel=3,
        )
    if chat.rendering is not None and chat.rendering.tools:
        _warn_of_tools(vocabulary.text(tokens), chat, system_prompt)
    messages = None if system_prompt is None else system_messages(system_prompt)
    return Prompt(tokens, vocabulary.text(tokens), messages, False, chat.sha256, chat.stated)


@dataclass(frozen=True)
class _Place:
    """Where a conversation's tokens depend on its system prompt: from the token `start` on, and where it ends."""

    start: int
    end: int


def _place(vocabulary: Vocabulary, chat: Template, system_prompt: str, tokens: Sequence[int]) -> _Place:
    """Raises UsageError if the prompt brings control tokens, or is nowhere in the conversation of these tokens."""

    def beginning(prompt: str) -> list[int]:
        return vocabulary.tokenize(chat.conversation(prompt, _FIRST_MESSAGES[0], now=_DATES[0]), special=True)

    neutral = beginning("Z" if not system_prompt.startswith("Z") else "Q")
    _refuse_control_tokens(vocabulary, tokens, neutral)
    if neutral == tokens:
        raise UsageError(f"the model's chat template does not show the system prompt at all: {BOS_ONLY}")
    return _Place(*(len(_common([tokens, other])) for other in (neutral, beginning(f"{system_prompt} Z"))))


def _also_for_others(
    vocabulary: Vocabulary, chat: Template, system_prompt: str | None, tokens: list[int], prompt: _Place | None
) -> list[int]:
    """The tokens, without those at their end that keep requests with tools or other switches from beginning so, where
    that costs little."""
    holds = prompt is not None and len(tokens) > prompt.start
    needed = max(prompt.start + 1, prompt.end - 2) if prompt is not None and holds else 1  # its last words may merge
    few = max(_FEW if holds else _VERY_FEW, len(tokens) // 4)
    kept = tokens
    for texts in _other_conversations(chat, system_prompt):
        shorter = _common([kept, *(vocabulary.tokenize(text, special=True) for text in texts)])
        if len(shorter) >= needed and len(tokens) - len(shorter) <= few:
            kept = shorter
    return kept


def _other_conversations(chat: Template, system_prompt: str | None) -> Iterator[list[str]]:
    """Conversations of requests that bring what was not said, by kind: tools, then each switch of the template."""
    assert chat.rendering is not None  # the caller's part of the contract
    before = [] if system_prompt is None else system_messages(system_prompt)

    def rendered(chat: Template, **given: Any) -> Iterator[str]:
        for text in _FIRST_MESSAGES[:2]:
            with contextlib.suppress(Exception):  # a template is a program: anything can happen
                yield chat.render([*before, {"role": "user", "content": text}], now=_DATES[0], **given)

    if not chat.rendering.tools:
        yield [text for tools in _OTHER_TOOLS for text in rendered(chat, tools=tools)]
    for name, values in _OTHER_ARGS.items():
        if name not in chat.rendering.args and chat.asks_for(name):
            yield [text for value in values for text in rendered(chat.with_args(**{name: value}))]


def _conversations(chat: Template, system_prompt: str | None) -> Iterator[str]:
    """Conversations that differ in everything but the system prompt, the tools and the template's switches.

    The first ones must be possible; of the others those that the template refuses will be refused at run time too.
    """
    for date in _DATES:
        yield chat.conversation(system_prompt, _FIRST_MESSAGES[0], now=date)
    yield chat.conversation(system_prompt, "Hello", "Hi! What can I do?", "2 + 2?", now=_DATES[0])
    before = [] if system_prompt is None else system_messages(system_prompt)
    others: list[list[dict[str, Any]]] = [[{"role": "user", "content": text}] for text in _FIRST_MESSAGES[1:]]
    if chat.rendering is not None:
        others += [_REASONING, *_tool_turns(chat.rendering)]
    for messages in others:
        with contextlib.suppress(Exception):  # a template is a program: anything can happen
            yield chat.render([*before, *messages], now=_DATES[0])


def _tool_turns(rendering: Rendering) -> Iterator[list[dict[str, Any]]]:
    """A question, the call of a tool, and what comes of it: its arguments as an object, and as a text."""
    for tool in rendering.tools[:1]:
        for arguments in ({"x": "1"}, '{"x": "1"}'):
            function = {"name": tool["function"]["name"], "arguments": arguments}
            call = {"id": "call00001", "type": "function", "function": function}
            result = {"role": "tool", "tool_call_id": "call00001", "name": function["name"], "content": "42"}
            asked = {"role": "assistant", "content": "", "tool_calls": [call]}
            yield [{"role": "user", "content": "What is it?"}, asked, result]


def _warn_of_tools(prefix: str, chat: Template, system_prompt: str | None) -> None:
    """Where a prefix does not hold the tools that it was made with."""
    assert chat.rendering is not None  # the caller's part of the contract
    name = chat.rendering.tools[-1]["function"]["name"]
    if name in prefix:
        return
    shown = name in chat.conversation(system_prompt, _FIRST_MESSAGES[0])
    where = "behind the beginning that conversations share, so the prefix ends before them" if shown else "nowhere"
    warnings.warn(f"the model's chat template shows the tools {where}", stacklevel=4)


def _clause(refused: UsageError) -> str:
    """Of a refusal, without what it says is to be done."""
    return str(refused).partition(f": {BOS_ONLY}")[0]


def first_tokens(made: Prompt, n: int, vocabulary: Vocabulary) -> Prompt:
    """The first n tokens of a prefix: a shorter prefix of the same conversations. Raises UsageError."""
    if not 1 <= n <= len(made.tokens):
        raise UsageError(
            f"--prefix-tokens is {n}, and the conversations of this prompt begin with {len(made.tokens)} tokens that "
            f"are always the same: give 1 to {len(made.tokens)}"
        )
    return replace(made, tokens=made.tokens[:n], text=vocabulary.text(made.tokens[:n]))


def prompt_for(
    gguf: Path,
    system_prompt: str | None,
    bos_only: bool,
    prefix_tokens: int | str | None,
    rope: Rope | None = None,
    rendering: Rendering | None = None,
) -> Prompt:
    """Prefix tokens by the GGUF's tokenizer; refused if its header tells that the model can have no prefix.

    rendering: tools and switches of the template. rope: settings it will be used with; if there are any, the model's
    own context is no limit.
    """
    values = gguf_file.read(gguf).values
    arch = values.get("general.architecture")
    template = chat_template_of(values, rendering)
    with Vocabulary(gguf) as vocabulary:
        why_not = vocabulary.refusal()
        if why_not:
            raise IntactKVError(f"a model of architecture {arch!r} cannot carry a prefix: {why_not}")
        made = make_prompt(vocabulary, template, system_prompt, bos_only, rendering)
        if isinstance(prefix_tokens, int):
            made = first_tokens(made, prefix_tokens, vocabulary)
    limit = values.get(f"{arch}.context_length")
    if not rope and isinstance(limit, int) and len(made.tokens) >= limit:
        raise UsageError(f"the prefix has {len(made.tokens)} tokens, the model's context {limit}: shorten the prompt")
    return made


def check_prefix_tokens(prefix_tokens: int | str | None, bos_only: bool) -> None:
    if isinstance(prefix_tokens, str) and prefix_tokens != "auto":
        raise UsageError(f"--prefix-tokens is {prefix_tokens!r}: give a number of tokens, or auto")
    if prefix_tokens == "auto":
        extras.require("torch", for_="--prefix-tokens auto", otherwise="give a number of tokens")
    if bos_only and prefix_tokens is not None:
        raise UsageError(f"--bos-only keeps one token and --prefix-tokens says {prefix_tokens}: give one of both")


def check_prompt(
    chat_template: str | None, system_prompt: str | None, bos_only: bool, rendering: Rendering | None = None
) -> None:
    """What can be known about the prompt without a tokenizer, before any work."""
    if bos_only and system_prompt is not None:
        raise UsageError("--bos-only keeps no system prompt: give one of both")
    if bos_only and rendering is not None:
        raise UsageError("--bos-only keeps no --tools, --template-args or --date: leave them out, or --bos-only")
    if bos_only:
        return
    try:
        chat = Template(chat_template, "<s>", "</s>", rendering or Rendering())
        chat.conversation(system_prompt, _FIRST_MESSAGES[0])
    except UsageError:
        if rendering is not None:
            raise
        Template(chat_template, "<s>", "</s>").conversation(system_prompt, _FIRST_MESSAGES[0])


def _bos(vocabulary: Vocabulary, template: str | None, names: tuple[str, str]) -> Prompt:
    """The first token of every text: the BOS that the tokenizer adds, or else that of every conversation.

    A template need not render the BOS that llama.cpp's programs put before any text. Where they put none, a
    conversation begins with what the template renders, and nothing else.
    """
    token = vocabulary.bos
    sha256 = None
    if template:
        with contextlib.suppress(UsageError):  # a template that is of no use is as good as none
            chat = Template(template, *names, adds_bos=vocabulary.adds_bos)
            tokens = _common([vocabulary.tokenize(text, special=True) for text in _conversations(chat, None)])
            token, sha256 = (tokens or [token])[0], chat.sha256
    if token < 0:
        raise UsageError(
            "the model has no BOS token and no chat template, so its texts have no common beginning: "
            "there is no prefix to keep intact"
        )
    return Prompt([token], vocabulary.text([token]), None, True, sha256)


def _refuse_control_tokens(vocabulary: Vocabulary, tokens: Sequence[int], neutral: Sequence[int]) -> None:
    """The prompt may not bring control tokens of its own: `neutral` has those of the template."""
    ours, theirs = ([t for t in text if vocabulary.is_control(t)] for text in (tokens, neutral))
    if ours != theirs:
        same = len(_common([ours, theirs]))
        name = vocabulary.token_name((ours[same:] or [vocabulary.eos])[0])
        raise UsageError(
            f"the system prompt contains {name!r}, a control token of the model, or changes those of its template: "
            "write it in another way"
        )


def _warn_of_date(n: int, n_dated: int, prompt: _Place | None) -> None:
    """Where a prefix ends before the date of the day."""
    before = ", and before the system prompt" if prompt is not None and n <= prompt.start else ""
    warnings.warn(
        f"the prefix ends before the date that the chat template writes{before}, after {n} of {n_dated} tokens: "
        f"{_DATE} makes it whole, for conversations of that day",
        stacklevel=4,
    )


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    columns = zip(*sequences, strict=False)
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
