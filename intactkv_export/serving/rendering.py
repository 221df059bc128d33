"""What a served model's chat requests are rendered with: the day that its prefixes were made for, and whether they
begin with these prefixes at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from intactkv_export.prefix import Prefix, Rendering, asks_clock, date_variables, with_date

_OWN_TEMPLATE = ("--chat-template", "--chat-template-file", "--no-jinja", "--skip-chat-parsing")
_TEMPLATE = "LLAMA_ARG_CHAT_TEMPLATE"
_FOR_TOOLS = "tokenizer.chat_template.tool_use"

Ask = Callable[[str, Mapping[str, Any]], Mapping[str, Any]]


def keep_to_date(
    prefixes: Sequence[Prefix],
    header: Mapping[str, Any],
    more: Sequence[str],
    environment: dict[str, str],
    notes: list[str],
) -> list[str]:
    """Arguments of llama-server with which it renders the day of the prefixes, the latest if they have several.

    A template that asks the clock is given to it with the day written in, by its environment. Notes say which day, and
    what is not used then. Raises UsageError for a template that cannot be given another day.
    """
    days = [(rendering.date, prefix) for prefix in prefixes if (rendering := Rendering.of(prefix.manifest)) is not None]
    day = max((day for day, _ in days if day is not None), default=None)
    if day is None:
        return []
    for other, prefix in days:
        if other not in (None, day):
            notes.append(
                f"the prefix of {prefix.source} is for conversations of {other}, and they are rendered with {day}: it "
                "is not used"
            )
    template = header.get("tokenizer.chat_template")
    own = next((name for name in _OWN_TEMPLATE if name in more), None)
    own = own or next((name for name in (_TEMPLATE, f"{_TEMPLATE}_FILE") if name in environment), None)
    if own or (isinstance(template, str) and asks_clock(template) and _FOR_TOOLS in header):
        reason = f"{own} gives the template" if own else "its template for tools would be lost"
        notes.append(f"conversations are not held to {day}, the day of their prefix: {reason}")
        return []
    if isinstance(template, str) and asks_clock(template):
        environment[_TEMPLATE] = with_date(template, day)
    notes.append(f"conversations are rendered with {day} as the day, as their prefix was")
    return ["--chat-template-kwargs", json.dumps(date_variables(day))]


def never_used(prefixes: Sequence[Prefix], ask: Ask) -> list[str]:
    """Of a server's prefixes those that requests do not begin with, as it renders them, a sentence each.

    ask: its answer to a path and a body; an empty one, if it refuses, tells nothing.
    """
    found = []
    for prefix in prefixes:
        if prefix.manifest["bos_only"] or prefix.kept is not None:  # before everything; of tokens it has seen
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
