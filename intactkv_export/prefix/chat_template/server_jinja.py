"""Jinja as llama.cpp's server runs it, where that differs from the Python package.

Its own engine is more lenient: what is undefined has attributes, can be called, added to a text; a list can be appended
to and popped from, and a loop goes over what it was when the loop began. It prints lists as their elements, objects as
nothing, and JSON with numbers of six digits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from intactkv_export import library

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPES = {**{chr(i): f"\\u{i:04x}" for i in range(32)}, **_ESCAPES}
_LONGEST = 10_000  # elements of a list that is appended to: loops over itself would double it again and again


@lru_cache(maxsize=4)  # one command renders one template, for several prefixes
def compile_template(template: str) -> jinja2.Template:
    """Raises whatever Jinja raises for a template that is none."""
    library.load()
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    environment = _Environment(
        loader=jinja2.BaseLoader(),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=_Undefined,
        finalize=_printed,
        extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, loopcontrols],
    )
    environment.filters |= {"tojson": to_json, "safe": lambda value: value, "string": _string}
    parsed = environment.parse(template)
    for loop in list(parsed.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, "list", [], [], None, None, lineno=loop.lineno)
    return environment.from_string(parsed)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter tojson. Raises ValueError for sorted keys, which the server does not know."""
    if sort_keys:
        raise ValueError("tojson with sort_keys=true is not known to llama.cpp's server")
    between, behind_key = separators or ("," if indent is not None else ", ", ": ")
    text = "".join(_json(value, indent, between, behind_key, "\n"))
    return re.sub(r"[^\x00-\x7f]", lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _json(value: Any, indent: int | None, between: str, behind_key: str, line: str) -> Iterable[str]:
    """line: a line break and the indentation of the value."""
    if isinstance(value, str):
        yield '"' + "".join(_ESCAPES.get(c, c) for c in value) + '"'
    elif isinstance(value, bool):
        yield "true" if value else "false"
    elif isinstance(value, int):
        yield str(value)
    elif isinstance(value, float):
        yield f"{value:g}"
    elif isinstance(value, jinja2.Undefined) or value is None:
        yield "null"
    else:
        is_object = isinstance(value, Mapping)
        items = list(value.items()) if is_object else [(None, item) for item in value]
        inner = line + " " * (indent or 0)
        yield "{" if is_object else "["
        for i, (key, item) in enumerate(items):
            yield (between if i else "") + ("" if indent is None else inner)
            if is_object:
                yield from _json(str(key), None, between, behind_key, inner)
                yield behind_key
            yield from _json(item, indent, between, behind_key, inner)
        yield line if items and indent is not None else ""
        yield "}" if is_object else "]"


class _Environment(ImmutableSandboxedEnvironment):
    """Changes nothing but lists that the template made, and those only as the server does: some templates collect the
    calls that results answer."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        # not a list that was given, which is of a kind of its own
        if type(obj) is not list or attribute not in ("append", "pop"):
            return super().getattr(obj, attribute)

        def append(item: Any) -> list[Any]:
            if len(obj) >= _LONGEST:
                raise OverflowError(f"a list of the template's has more than {_LONGEST} elements")
            obj.append(item)
            return obj

        def pop(index: int = -1) -> Any:
            return obj.pop(index)

        return append if attribute == "append" else pop


class _Given(list[Any]):
    """A list that the template did not make."""


class _Undefined(jinja2.ChainableUndefined):
    """Nothing, whatever is done with it; but what the sandbox forbids stays forbidden."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        if issubclass(self._undefined_exception, SecurityError):
            self._fail_with_undefined_error()
        return self

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


class _Float(float):
    """A number that is printed, by itself or within a list or an object, with six decimals at most."""

    def __repr__(self) -> str:
        text = f"{float(self):f}".rstrip("0")
        return f"{text}0" if text.endswith(".") else text

    __str__ = __repr__


def given(value: Any) -> Any:
    """What a request brings: its numbers as the server prints them, its lists not to be changed."""
    if isinstance(value, Mapping):
        return {key: given(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return _Given(given(item) for item in value)
    return _Float(value) if isinstance(value, float) else value


def _string(value: Any) -> str:
    """The filter string."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _printed(value: Any) -> Any:
    """What {{ value }} writes."""
    if isinstance(value, float):
        return str(_Float(value))
    if value is None or isinstance(value, Mapping):
        return ""
    if isinstance(value, list | tuple):
        return "".join(str(_printed(item)) for item in value)
    return value
