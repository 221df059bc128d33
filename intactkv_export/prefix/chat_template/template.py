"""A model's chat template, rendered as llama.cpp's server renders it, or as llama-cpp-python does.

A prefix is of use where conversations are rendered as the prefix was. `llama-server` and llama-cpp-python's formatter
differ: in variables that a template can ask for (enable_thinking, the date), in what they leave undefined (tools), in
messages that a template cannot take. What is made for a prompt is rendered as the server does it, and whoever chats
behind such a prefix (IntactLlama, chat) renders in the same way. Prefix files of before were made by llama-cpp-python's
formatter, and are rendered by it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from datetime import date, datetime
from functools import cached_property
from os.path import commonprefix
from typing import Any

from intactkv_export import library
from intactkv_export.errors import UsageError, first_line
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix.chat_template.day import asks_clock, beginning, date_variables
from intactkv_export.prefix.chat_template.rendering import Rendering
from intactkv_export.prefix.chat_template.server_jinja import compile_template, given

Messages = Sequence[Mapping[str, Any]]

DATE = datetime(2024, 7, 26, 9, 8, 7)  # of texts that must not differ from day to day
BOS_ONLY = "use --bos-only"
_PROBE = "PROBE-7-EBORP"  # stands for a message, to find what a template does with it
# Texts by which the server knows templates that it treats in a way of its own.
_MINISTRAL = ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]")
_THINKING = (_MINISTRAL, ("'<|tool_call>call:'",))
_TAIL = 64  # characters that a text may end with, whatever is before
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "string", "description": "A number."}}},
    },
}
_STEPFUN = "You have access to the following functions in JSONSchema format"


class Template:
    """A chat template as the runtime renders it. Raises UsageError if there is none or it cannot be compiled.

    bos, eos: texts of these tokens. adds_bos: whether the tokenizer puts a BOS before a text, as the server lets it do:
    then a template need not. rendering: None: as llama-cpp-python's formatter.
    """

    def __init__(
        self, template: str | None, bos: str, eos: str, rendering: Rendering | None = None, adds_bos: bool = False
    ) -> None:
        if not template:
            raise UsageError(f"the model has no chat template, so a system prompt has no place: {BOS_ONLY}")
        self.sha256 = hashlib.sha256(template.encode()).hexdigest()
        self.rendering = rendering
        self._source, self._bos, self._eos, self._adds_bos = template, bos, eos, adds_bos
        try:
            if rendering is None:
                self._formatter: Any = _formatter(template, bos, eos)
            else:
                self._compiled = compile_template(template)
        except Exception as error:  # a template is a program: anything can happen
            reason = first_line(error)
            raise UsageError(f"the model's chat template cannot be compiled ({reason}): {BOS_ONLY}") from error

    def render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, now: datetime | None = None
    ) -> str:
        """The text of a conversation that goes on with the assistant's reply, whatever the template raises.

        tools: instead of the rendering's. now: where the rendering has no date; None: the clock's.
        """
        day = None if self.rendering is None else self.rendering.date
        now = now or datetime.now() if day is None else beginning(day)
        if self.rendering is None:
            self._formatter.strftime_now = now.strftime
            text: str = self._formatter(messages=messages, tools=tools).prompt
        else:
            tools = self.rendering.tools if tools is None else tools
            text = self._as_the_server(self._for_the_template(messages), tools, now)
        return text if not self._adds_bos or text.startswith(self._bos) else self._bos + text

    def conversation(self, system_prompt: str | None, *turns: str, now: datetime = DATE) -> str:
        """The text of a conversation: system prompt, then user and assistant in turns. UsageError if refused."""
        messages = [] if system_prompt is None else system_messages(system_prompt)
        messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        try:
            return self.render(messages, now=now)
        except Exception as error:
            without = "" if system_prompt is None else "leave out the system prompt, or "
            raise UsageError(
                f"the model's chat template refuses the conversation ({first_line(error)}): {without}{BOS_ONLY}"
            ) from error

    @property
    def differs(self) -> bool:
        """Whether what it renders is not what llama-cpp-python's formatter renders."""
        return self.rendering is not None or self._adds_bos

    def with_args(self, **args: Any) -> Template:
        """The same with other arguments beside those it has, as a request can bring them."""
        assert self.rendering is not None
        other = copy(self)
        other.rendering = replace(self.rendering, args={**self.rendering.args, **args})
        return other

    def writes_date(self, system_prompt: str | None) -> bool:
        """Whether a conversation shows which day it is."""
        assert self.rendering is not None
        other = copy(self)
        texts = set()
        for day in (DATE.date(), date(1999, 2, 13)):
            other.rendering = replace(self.rendering, date=day)
            texts.add(other.conversation(system_prompt, "Hello"))
        return len(texts) > 1

    @property
    def may_ask_for_date(self) -> bool:
        """Whether there is something in it that can give a date, in whatever conversation."""
        return asks_clock(self._source) or any(map(self.asks_for, date_variables(DATE)))

    def asks_for(self, name: str) -> bool:
        """Whether it may look at a variable."""
        return name in self._source

    @property
    def stated(self) -> Rendering | None:
        """The rendering with what the server decides by itself: whether the model is to think, if it is asked that."""
        if self.rendering is None or "enable_thinking" not in self._source:
            return self.rendering
        return replace(self.rendering, args={"enable_thinking": self.thinks, **self.rendering.args})

    def _as_the_server(self, messages: Messages, tools: Sequence[Mapping[str, Any]], now: datetime) -> str:
        """Rendered with the server's variables; what it leaves undefined is undefined."""
        assert self.rendering is not None
        args = {"preserve_reasoning": True, **given(self.rendering.args)}
        with_tools = {"tools": given(tools)} if tools else {}
        if isinstance(effort := args.get("reasoning_effort"), str):
            args = {"reasoning_strength": effort, **args}
        if isinstance(keep := args.get("preserve_reasoning"), bool):
            names = ("clear_thinking", "truncate_history_thinking", "drop_thinking")
            args = {"preserve_thinking": keep, **dict.fromkeys(names, not keep), **args}
        clock = {"strftime_now": now.strftime, **date_variables(now)}
        variables = {"bos_token": self._bos, "eos_token": self._eos, **clock, **with_tools}
        return self._rendered(given(messages), {"enable_thinking": self.thinks, **variables, **args})

    def _rendered(self, messages: Messages, variables: Mapping[str, Any]) -> str:
        usual = {"messages": messages, "raise_exception": _raise, "add_generation_prompt": True}
        return self._compiled.render({**usual, **variables})

    def _for_the_template(self, messages: Messages) -> list[dict[str, Any]]:
        """Messages as the server gives them to a template that cannot take them as they are."""
        made = [dict(message) for message in messages]
        if any(message.get("tool_calls") for message in made) and self._takes_objects:
            made = [_with_objects(message) for message in made]
        if _STEPFUN in self._source:
            made = [_with_content(message, str.strip) for message in made]
        if not self._knows_system and made and made[0].get("role") == "system":
            system, *made = made
            if made:
                made[0] = {**made[0], "content": f"{system['content']}\n{made[0]['content']}"}
        if self._only_parts:
            return [_with_content(message, _parts) for message in made]
        if all(mark in self._source for mark in _MINISTRAL) and "[CALL_ID]" not in self._source:
            return [_with_content(m, _parts) if m.get("role") in ("system", "assistant") else m for m in made]
        return made

    @cached_property
    def _knows_system(self) -> bool:
        """Whether it uses a system message. One that raises without having looked at its text does not."""
        system = _Watched(role="system", content=_PROBE)
        text = self._tried([system, {"role": "user", "content": "Hi"}])
        if text is None or _PROBE not in text:
            parts = _Watched(role="system", content=_parts(_PROBE))
            other = self._tried([parts, {"role": "user", "content": _parts("Hi")}])
            return _PROBE in (other or "") or (text is None and system.looked_at)
        return True

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether it shows a call's arguments that are an object: then the server makes one of a text."""
        call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": _PROBE}}}
        text = self._tried(
            [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "4", "tool_call_id": "call00001"},
                {"role": "assistant", "content": "It is 4."},
                {"role": "user", "content": "Hi"},
            ],
            tools=[_TOOL],
        )
        return _PROBE in (text or "")

    @cached_property
    def _only_parts(self) -> bool:
        """Whether it shows the text of a message only if this comes as a list of parts."""
        whole, parts = (self._tried([{"role": "user", "content": made}]) for made in (_PROBE, _parts(_PROBE)))
        return _PROBE not in (whole or "") and _PROBE in (parts or "")

    @cached_property
    def thinks(self) -> bool:
        """Whether the server takes it for a template of a model that can think, and has it think: it shows an
        assistant's reasoning, or begins or leaves out reasoning at the end where it is asked to."""
        if any(all(mark in self._source for mark in marks) for marks in _THINKING):
            return True
        user = {"role": "user", "content": "What is it, 2 plus 2 ?"}  # as long as the server's own
        reply = {"role": "assistant", "content": "Hello", "reasoning_content": _PROBE}
        call = {"name": "add", "arguments": {"a": "1"}}
        calls = {**reply, "content": None, "tool_calls": [{"id": "call00001", "type": "function", "function": call}]}
        for answer in (reply, calls):
            more = {"tools": [_TOOL]} if answer is calls else {}
            shown = self._tried([user, answer], enable_thinking=True, add_generation_prompt=False, **more)
            if _PROBE in (shown or ""):
                return True
        off, on = (self._tried([user], enable_thinking=asked) for asked in (False, True))
        return off is not None and on is not None and _ends_otherwise(off, on)

    def _tried(self, messages: Messages, **variables: Any) -> str | None:
        """The text of a conversation, without anything else that the server gives; None: refused."""
        try:
            return self._rendered(messages, {"bos_token": "", "eos_token": "", "tools": [], **variables})
        except Exception:  # a template is a program: anything can happen
            return None


def _ends_otherwise(a: str, b: str) -> bool:
    """Whether one of the texts is the other with more at its end, by all or by what it ends with."""
    same = len(commonprefix([a, b]))
    left, right = a[same:].strip(), b[same:].strip()
    if not (left and right):
        return bool(left or right)
    for base, longer in ((b, a), (a, b)):
        before, found, behind = longer.rpartition(base[-_TAIL:])
        if found and behind.strip():
            return True
    return False


def chat_template_of(header: Mapping[str, Any], rendering: Rendering | None) -> str | None:
    """The chat template in a GGUF's header: where there are tools the one for tools, if it has such, as the server."""
    for_tools = header.get("tokenizer.chat_template.tool_use") if rendering is not None and rendering.tools else None
    return for_tools or header.get("tokenizer.chat_template")


def of_prefix(
    template: str | None, manifest: Mapping[str, Any], tokens: Sequence[int], vocabulary: Vocabulary
) -> Template:
    """A model's chat template, rendered as it was for a prefix: a BOS that the tokenizer adds is there if the prefix
    begins with it."""
    bos, eos = (vocabulary.token_name(token) for token in (vocabulary.bos, vocabulary.eos))
    return Template(template, bos, eos, Rendering.of(manifest), vocabulary.adds_bos and tokens[0] == vocabulary.bos)


def system_messages(system_prompt: str) -> list[dict[str, Any]]:
    """What a conversation with a system prompt begins with."""
    return [{"role": "system", "content": system_prompt}]


class _Watched(dict[str, Any]):
    """A message that knows whether its content was asked for."""

    looked_at = False

    def __getitem__(self, key: str) -> Any:
        self.looked_at |= key == "content"
        return super().__getitem__(key)


def _with_content(message: dict[str, Any], change: Any) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": change(content)} if isinstance(content, str) else message


def _with_objects(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as objects; what is no JSON stays a text."""
    calls = []
    for call in message.get("tool_calls") or ():
        function = dict(call.get("function") or {})
        if isinstance(function.get("arguments"), str):
            with suppress(ValueError):
                function["arguments"] = json.loads(function["arguments"])
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _raise(message: str) -> None:
    raise ValueError(message)


def _formatter(template: str, bos: str, eos: str) -> Any:
    library.load()
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    return Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
