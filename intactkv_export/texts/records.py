"""A record of a data set in one of the shapes that people have, as what the user and the model say in turns.

    {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, or the list alone
    {"prompt", "completion"}, {"instruction", "input", "output"}, {"question", "answer"} and their like
    {"text"}, or the text alone: no conversation, a text as it is

A content may be a list of parts, of which those with text count. A tool that is called is a part of the reply, as JSON;
what it gives back comes from outside, as what a user says does. Messages in a row from one side are joined.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

_LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog")
_USER = ("user", "human", "prompter", "tool", "function", "function_response", "observation", "ipython", "environment")
_REPLY = ("assistant", "gpt", "model", "bot", "chatgpt", "function_call", "tool_call")
_SYSTEM = ("system", "developer")
# What is asked, what goes with it, what is answered
_PAIRS = (
    ("instruction", ("input", "context"), ("output", "response", "completion")),
    ("prompt", (), ("completion", "response", "chosen", "output")),
    ("question", ("context",), ("answer", "response")),
    ("query", (), ("response", "answer")),
    ("input", (), ("output",)),
)
_TEXTS = ("text", "content")


class Unusable(Exception):
    """Why a record cannot be used, as the end of a sentence: the same words for the same fault."""


def turns_or_text(record: Any, lost: Counter[str]) -> list[str] | str:
    """A conversation, user and model in turns, complete pairs only; or a text. lost counts parts that were left out.

    The record's own system messages are left out: the prefix has one. Raises Unusable.
    """
    if isinstance(record, str):
        return _some(record)
    if isinstance(record, list):
        return _conversation(record, lost)
    if not isinstance(record, dict):
        raise Unusable("neither an object, a list nor a text")
    for key in _LISTS:
        if isinstance(record.get(key), list):
            return _conversation(record[key], lost)
    for asked, more, answers in _PAIRS:
        answered = next((key for key in answers if record.get(key)), None)
        if record.get(asked) and answered is not None:
            beside = [record[key] for key in more if isinstance(record.get(key), str) and record[key].strip()]
            return _conversation(
                [*_said(record[asked], "user", beside), *_said(record[answered], "assistant", [])], lost
            )
    text = next((record[key] for key in _TEXTS if isinstance(record.get(key), str)), None)
    if text is not None:
        return _some(text)
    raise Unusable(f"in none of the shapes that --data reads ({', '.join(map(repr, sorted(record)[:4]))} are there)")


def _some(text: str) -> str:
    if not text.strip():
        raise Unusable("without text")
    return text


def _said(value: Any, role: str, beside: list[str]) -> list[Any]:
    """One side of a pair as messages: a text, or messages already."""
    if isinstance(value, list) and all(isinstance(x, dict) and ("role" in x or "from" in x) for x in value):
        return value
    content = "\n\n".join([value, *beside]) if isinstance(value, str) else value
    return [{"role": role, "content": content}]


def _conversation(messages: list[Any], lost: Counter[str]) -> list[str]:
    turns: list[str] = []
    for message in messages:
        reply, text = _message(message, lost)
        if reply is None or (not turns and reply):
            continue  # a system message; conversations that were cut out of longer ones begin with a reply
        if not text:
            raise Unusable("with a message that has no text")
        if len(turns) % 2 == reply:
            turns.append(text)
        else:
            turns[-1] = f"{turns[-1]}\n\n{text}"
    if len(turns) < 2:
        raise Unusable("without a reply to a user")
    return turns[: len(turns) // 2 * 2]


def _message(message: Any, lost: Counter[str]) -> tuple[bool | None, str]:
    """(whether the model says it, None for a system message; its text)."""
    if not isinstance(message, dict):
        raise Unusable(f"with a message that is a {type(message).__name__}")
    role = message.get("role", message.get("from"))
    if role in _SYSTEM:
        return None, ""
    if role not in (*_USER, *_REPLY):
        raise Unusable(f"with a message of role {role!r}")
    content = message.get("content", message.get("value", message.get("text")))
    pieces = [_text(content, lost)] + [_call(call) for call in message.get("tool_calls") or []]
    if message.get("function_call"):
        pieces.append(_call({"function": message["function_call"]}))
    return role in _REPLY, "\n".join(piece for piece in pieces if piece.strip())


def _text(content: Any, lost: Counter[str]) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, dict) and not isinstance(content.get("text"), str):
        return json.dumps(content, ensure_ascii=False)  # what a tool gave back
    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text", part.get("content")) if isinstance(part, dict) else part
        if isinstance(text, str):
            texts.append(text)
        else:
            kind = part.get("type", "untyped") if isinstance(part, dict) else type(part).__name__
            lost[f"part of a message of type {kind!r}"] += 1
    return "\n".join(texts)


def _call(call: Any) -> str:
    """A tool that the model calls, as JSON of name and arguments."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        return json.dumps(call, ensure_ascii=False)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            pass  # as it is
    return json.dumps({"name": function.get("name"), "arguments": arguments}, ensure_ascii=False)
