"""What conversations are rendered with besides their messages: tools, arguments of the template, a date."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from intactkv_export.errors import UsageError, first_line
from intactkv_export.prefix.chat_template.day import checked_date, to_text

_DEEPEST = 31  # arrays and objects in one another that readers of a prefix file take below the manifest itself
_OURS = {"messages", "tools", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now"}
_TOOL_FORMAT = 'give a list as OpenAI has it, [{"type": "function", "function": {"name": ..., "parameters": {...}}}]'


@dataclass(frozen=True)
class Rendering:
    """What conversations are rendered with besides their messages, as `llama-server` takes it with a request.

    tools: definitions in OpenAI's format, as the server passes them on (checked()); none: (). args: of the template,
    the server's chat_template_kwargs: enable_thinking, reasoning_effort, ... date: the day that the template is told
    it is; None: today.
    """

    tools: Sequence[Mapping[str, Any]] = ()
    args: Mapping[str, Any] = field(default_factory=dict)
    date: date | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Rendering | None:
        """Of a prefix file's manifest; None: one that was rendered by llama-cpp-python's formatter."""
        if "template_args" not in manifest:
            return None
        return cls(manifest.get("tools") or (), manifest["template_args"], checked_date(manifest.get("date")))

    @classmethod
    def checked(cls, tools: object = None, args: object = None, day: object = None) -> Rendering | None:
        """What a user gives, the day as checked_date() takes it; None: nothing. Raises UsageError if the server would
        not take it."""
        if tools is None and args is None and day is None:
            return None
        made_args, made_day = {} if args is None else _checked_args(args), checked_date(day)
        if made_day is not None and (twice := sorted({"date_string", "datetime"} & made_args.keys())):
            raise UsageError(f"{twice[0]} is what the date {made_day} gives the template: give one of both")
        return cls(() if tools is None else checked_tools(tools), made_args, made_day)

    @property
    def fields(self) -> dict[str, Any]:
        """Of the manifest."""
        tools = {"tools": [dict(tool) for tool in self.tools]} if self.tools else {}
        return {**tools, "template_args": dict(self.args), **to_text(self.date)}


def from_json(text: str, name: str) -> Any:
    """What a user wrote as JSON. Raises UsageError, which says where it comes from, if it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{name} is not JSON ({first_line(error)}): correct it") from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not of JSON")


def checked_tools(tools: object) -> list[dict[str, Any]]:
    """As the server passes them on to a template: type, name, description and parameters, and nothing else. Raises
    UsageError if they are not in OpenAI's format."""
    if not isinstance(tools, list) or not tools:
        raise UsageError(f"the tools are {_kind(tools)}: {_TOOL_FORMAT}")
    made = []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict):
            raise UsageError(f"tool {i} is no function: {_TOOL_FORMAT}")
        name, description = function.get("name"), function.get("description", "")
        if not isinstance(name, str) or not name:
            raise UsageError(f"tool {i} has no name: {_TOOL_FORMAT}")
        if not isinstance(description, str):
            raise UsageError(f"the description of the tool {name!r} is {_kind(description)}: give a text")
        parameters = function.get("parameters", {})
        if not isinstance(parameters, dict):
            raise UsageError(
                f"the parameters of the tool {name!r} are {_kind(parameters)}: give a JSON schema, an object"
            )
        described = {"name": name, "description": description, "parameters": parameters}
        _check_storable(described, f"the tool {name!r}", _DEEPEST - 3)
        made.append({"type": "function", "function": described})
    return made


def _checked_args(args: object) -> dict[str, Any]:
    if not isinstance(args, dict):
        raise UsageError(
            f"""the template's arguments are {_kind(args)}: give an object, {{"enable_thinking": false}}"""
        )
    if taken := sorted(_OURS & args.keys()):
        raise UsageError(f"{taken[0]} is no argument of the template's own, every conversation has it: leave it out")
    if isinstance(args.get("enable_thinking"), str):
        raise UsageError(f"enable_thinking is {args['enable_thinking']!r}: give true or false, without quotes")
    _check_storable(args, "the template's argument", _DEEPEST - 1)
    return args


def _check_storable(value: object, name: str, levels: int) -> None:
    """Raises UsageError if a prefix file cannot hold it. levels: of arrays and objects that it may have within."""
    if levels < 0:
        raise UsageError(f"{name} is nested deeper than a prefix file can hold: make it flatter")
    if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
        raise UsageError(f"{name} has a number that no double can hold: give a smaller one")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(f"{name} has half of a surrogate pair, {value[:50]!r}, which is no character: write it whole")
    within = value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else []
    for item in within:
        _check_storable(item, name, levels - isinstance(item, dict | list))


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list" if value else "an empty list", str: "a text", type(None): "null"}
    return names.get(type(value), ascii(value)[:50])
