"""A prefix is a beginning of what llama.cpp's own server makes of chat requests: for all templates of upstream's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prompt, Rendering, Template, ikv, make_prompt, prompt_for
from tests.support.llama_server import Server, program

SYSTEM = "You are a helpful pirate. Answer in one sentence."
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
# What the requests of one user always have: system prompt, tools, arguments of the template.
ALWAYS: list[tuple[str, list[dict[str, Any]] | None, dict[str, Any] | None]] = [
    (SYSTEM, None, None),
    (SYSTEM, TOOLS, None),
    (SYSTEM, TOOLS, {"enable_thinking": False, "reasoning_effort": "high"}),
]
# Why a template has no prefix of a system prompt: the date of the day is before it, or it is in the last message.
BEHIND_THE_DATE = {
    "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b", "upstage-Solar-Open-100B",
}  # fmt: skip
IN_THE_LAST_MESSAGE = {"mistralai-Mistral-Nemo-Instruct-2407"}


@pytest.fixture(scope="module")
def templates(converter: str | Path) -> dict[str, Path]:
    """Upstream's, by name: beside its converter."""
    found = {path.stem: path for path in Path(converter).parent.glob("models/templates/*.jinja")}
    if not found:
        pytest.skip("upstream's chat templates are not beside its converter")
    return found


@pytest.fixture(scope="module")
def small(model: Callable[[str], Path]) -> Path:
    program()  # or there is nothing to compare with
    return model("Q2_K")


def names() -> Iterator[str]:
    """Of templates, before any fixture: those of the installed converter."""
    try:
        yield from sorted(path.stem for path in Path(library.converter_path()).parent.glob("models/templates/*.jinja"))
    except IntactKVError:
        yield "none"


def made_for(
    vocabulary: Vocabulary, template: str, system: str | None, tools: Any, args: dict[str, Any] | None
) -> Prompt | str:
    """The prefix, or why there is none; a prefix for our programs alone counts as none."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = make_prompt(vocabulary, template, system, rendering=Rendering.checked(tools, args))
        except UsageError as error:
            return str(error)
    return made if made.rendering is not None else str(caught[0].message)


@pytest.mark.parametrize("name", names())
def test_a_true_prefix_or_a_reason(name: str, templates: dict[str, Path], small: Path, vocabulary: Vocabulary) -> None:
    text = templates[name].read_text()
    bos, eos = vocabulary.token_name(vocabulary.bos), vocabulary.token_name(vocabulary.eos)
    with Server(small, templates[name]) as server:
        for system, tools, args in ALWAYS:
            made = made_for(vocabulary, text, system, tools, args)
            before = [{"role": "system", "content": system}]
            if isinstance(made, str):
                assert name in BEHIND_THE_DATE | IN_THE_LAST_MESSAGE and "as if it comes" in made
                continue
            assert name not in BEHIND_THE_DATE | IN_THE_LAST_MESSAGE
            chat = Template(text, bos, eos, made.rendering)
            for turns in ([USER], THREE, THINKING, *([CALLING] if tools else [])):
                try:
                    wanted = server.rendered([*before, *turns], tools, args)
                except ValueError:
                    assert turns is CALLING, "of a template that has no calls"
                    continue
                assert server.tokens(wanted)[: len(made.tokens)] == made.tokens
                if turns in ([USER], THREE):
                    assert chat.render([*before, *turns]) == wanted


@pytest.mark.parametrize("name", sorted(x for x in BEHIND_THE_DATE if "Llama" in x))
def test_a_date_that_is_given_stays(name: str, templates: dict[str, Path], small: Path, vocabulary: Vocabulary) -> None:
    args = {"date_string": "26 Jul 2024"}
    for tools in (None, TOOLS):
        made = made_for(vocabulary, templates[name].read_text(), SYSTEM, tools, args)
        assert isinstance(made, Prompt) and SYSTEM in made.text and "Today Date: 26 Jul 2024" in made.text
        with Server(small, templates[name]) as server:
            text = server.rendered([{"role": "system", "content": SYSTEM}, USER], tools, args)
            assert server.tokens(text)[: len(made.tokens)] == made.tokens


def test_the_models_own_template(model: Callable[[str], Path], small: Path) -> None:
    """SmolLM2 as it is: nothing given, a prompt given, and what a GGUF holds for tools alone."""
    prompts = [prompt_for(small, system, False, None) for system in (None, SYSTEM)]
    with Server(small) as server:
        for made, before in zip(prompts, ([], [{"role": "system", "content": SYSTEM}]), strict=True):
            for turns in ([USER], THREE):
                assert server.tokens(server.rendered([*before, *turns]))[: len(made.tokens)] == made.tokens


def test_a_template_for_tools(small: Path, tmp_path: Path) -> None:
    """Where the GGUF has one, the server takes it for requests with tools."""
    both = tmp_path / "both.gguf"
    own = gguf_file.read(small).values["tokenizer.chat_template"]
    ikv.rewrite(small, {"tokenizer.chat_template.tool_use": "{{ tools | tojson }}" + own}, both)
    plain, given = (prompt_for(both, SYSTEM, False, None, None, Rendering.checked(tools)) for tools in (None, TOOLS))
    assert given.text.startswith('[{"type": "function"') and not plain.text.startswith("[")
    assert given.chat_template_sha256 != plain.chat_template_sha256
    with Server(both) as server:
        text = server.rendered([{"role": "system", "content": SYSTEM}, USER], TOOLS)
        assert server.tokens(text)[: len(given.tokens)] == given.tokens
