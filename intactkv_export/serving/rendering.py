"""What a served model's chat requests are rendered with: the day that its prefixes were made for, and whether they
begin with these prefixes at all."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from os.path import commonprefix
from typing import Any

from intactkv_export.prefix import Prefix, Rendering, asks_clock, date_variables, with_date

_OWN_TEMPLATE = ("--chat-template", "--chat-template-file", "--no-jinja", "--skip-chat-parsing")
_TEMPLATE = "LLAMA_ARG_CHAT_TEMPLATE"
_VARIABLES = "--chat-template-kwargs"
_FOR_TOOLS = "tokenizer.chat_template.tool_use"

Ask = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def keep_to_date(
    prefixes: Sequence[Prefix],
    header: Mapping[str, Any],
    more: Sequence[str],
    environment: dict[str, str],
    notes: list[str],
) -> list[str]:
    """The arguments `more` of llama-server with those with which it renders the day of the prefixes, the latest if they
    have several.

    A template that asks the clock is given to it with the day written in, by its environment. Notes say which day, and
    what is not used then. Raises UsageError for a template that cannot be given another day.
    """
    day = _day(prefixes)
    if day is None:
        return list(more)
    for prefix in prefixes:
        if (other := _day([prefix])) not in (None, day):
            notes.append(
                f"the prefix of {prefix.source} is for conversations of {other}, and they are rendered with {day}: it "
                "is not used"
            )
    template = header.get("tokenizer.chat_template")
    asks = isinstance(template, str) and asks_clock(template)
    own = next((word for word in (word.partition("=")[0] for word in more) if word in _OWN_TEMPLATE), None)
    own = own or next((name for name in (_TEMPLATE, f"{_TEMPLATE}_FILE") if name in environment), None)
    if own or (asks and _FOR_TOOLS in header):
        reason = f"{own} gives the template" if own else "its template for tools would be lost"
        notes.append(f"conversations are not held to {day}, the day of their prefix: {reason}")
        return list(more)
    if asks:
        environment[_TEMPLATE] = with_date(str(template), day)
    notes.append(f"conversations are rendered with {day} as the day, as their prefix was")
    return _with_variables(date_variables(day), more)


def _day(prefixes: Sequence[Prefix]) -> date | None:
    """The latest day that prefixes were made for."""
    made = [rendering for prefix in prefixes if (rendering := Rendering.of(prefix.manifest)) is not None]
    return max((rendering.date for rendering in made if rendering.date is not None), default=None)


def _with_variables(variables: Mapping[str, str], more: Sequence[str]) -> list[str]:
    """The arguments with variables of the template, where they give none of these names: it takes them once."""
    arguments, given = list(more), dict[str, Any](variables)
    for i, word in enumerate(arguments[:-1]):
        if word == _VARIABLES:
            with contextlib.suppress(ValueError, TypeError):  # llama-server says what is wrong with it
                arguments[i + 1] = json.dumps(given | json.loads(arguments[i + 1]))
            return arguments
    return [_VARIABLES, json.dumps(given), *arguments]


def never_used(prefixes: Sequence[Prefix], ask: Ask) -> list[str]:
    """Of a server's prefixes those that requests do not begin with, as it renders them, a sentence each.

    ask: its answer to a path and a body; an empty one, if it refuses, tells nothing.
    """
    found = []
    day = _day(prefixes)
    for prefix in prefixes:
        if prefix.manifest["bos_only"] or prefix.kept is not None:  # before everything; of tokens it has seen
            continue
        if _day([prefix]) not in (None, day):  # said already
            continue
        args = prefix.manifest.get("template_args") or {}
        shared = [_shared(prefix, given, ask) for given in ({}, args)[: 1 + bool(args)]]
        if None in shared or shared[0] == len(prefix.tokens):
            continue
        name = f"{prefix.name} of {prefix.source}" if prefix.name else prefix.source
        if shared[-1] == len(prefix.tokens):
            found.append(f'the prefix {name} is for requests with "chat_template_kwargs": {json.dumps(args)}')
        else:
            found.append(
                f"requests with the messages of the prefix {name} are rendered otherwise, {shared[-1]} of its "
                f"{len(prefix.tokens)} tokens are the same, so it is not used: make it for the chat template as it is "
                "served"
            )
    return found


def _shared(prefix: Prefix, args: Mapping[str, Any], ask: Ask) -> int | None:
    """How many of a prefix's tokens a request for it begins with. None: the server does not say."""
    body = {"messages": [*prefix.messages, {"role": "user", "content": "Hello"}], "chat_template_kwargs": args}
    text = ask("/apply-template", {**body, **({"tools": prefix.tools} if prefix.tools else {})}).get("prompt")
    if not isinstance(text, str):
        return None
    tokens = ask("/tokenize", {"content": text, "add_special": True, "parse_special": True}).get("tokens")
    return len(commonprefix([tokens, prefix.tokens])) if isinstance(tokens, list) else None
