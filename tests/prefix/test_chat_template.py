"""Tools and template arguments: what is taken, what is refused, how it is rendered and kept. Against a real server:
test_server_renders.py."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import SecurityError

from intactkv_export import cli
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import Rendering, Template, from_json, ikv, make_prompt
from intactkv_export.prefix import manifest as manifests
from intactkv_export.prefix.chat_template import with_date
from intactkv_export.prefix.chat_template.server_jinja import to_json
from intactkv_export.runtime import IntactLlama, open_chat
from tests.support.chat_templates import CALLING, templates
from tests.support.smol import Smol

SYSTEM = "You are terse."
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}},
}
# As many templates: tools behind the system prompt, a switch, a date behind all.
AGENT = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.first and tools %}\nTools: {{ tools | tojson }}{% endif %}"
    "{% if m.role == 'system' and enable_thinking is defined and not enable_thinking %}\nDo not think.{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking | default(true) %}<think></think>{% endif %}{% endif %}"
)


def rendered(template: str, rendering: Rendering | None = None, **kwargs: Any) -> str:
    return Template(template, "<s>", "</s>", rendering or Rendering(), **kwargs).render(
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}], now=datetime(2026, 11, 26)
    )


# What is taken


def test_tools_are_what_the_server_passes_on() -> None:
    given = [{**TOOL, "extra": 1}, {"type": "function", "function": {"strict": True, "name": "bare"}}]
    made = Rendering.checked(given, {"a": 1})
    assert made is not None and made.tools == [
        TOOL,
        {"type": "function", "function": {"name": "bare", "description": "", "parameters": {}}},
    ]
    assert Rendering.of({**made.fields, "text": ""}) == made and Rendering.checked() is None
    assert Rendering.of({}) is None and Rendering.of(Rendering().fields) == Rendering()


def deep(levels: int) -> Any:
    return {"x": deep(levels - 1)} if levels else 0


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([], "the tools are an empty list: give a list as OpenAI has it"),
        (TOOL, "the tools are an object: give a list"),
        ("add", "the tools are a text"),
        ([TOOL, TOOL["function"]], "tool 1 is no function"),
        ([TOOL, 7], "tool 1 is no function"),
        ([{"type": "web_search"}], "tool 0 is no function"),
        ([{"type": "function", "function": "add"}], "tool 0 is no function"),
        ([{"type": "function", "function": {"description": "x"}}], "tool 0 has no name"),
        ([{"type": "function", "function": {"name": ""}}], "tool 0 has no name"),
        ([{"type": "function", "function": {"name": "a", "description": None}}], "description of the tool 'a' is null"),
        ([{"type": "function", "function": {"name": "a", "parameters": []}}], "of the tool 'a' are an empty list"),
        ([{"type": "function", "function": {"name": "a", "parameters": deep(29)}}], "tool 'a' is nested deeper"),
        ([{"type": "function", "function": {"name": "a", "parameters": {"x": 10**400}}}], "a number that no double"),
        ([{"type": "function", "function": {"name": "a", "description": "\ud83d"}}], "half of a surrogate pair"),
    ],
)
def test_tools_that_are_none(tools: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        Rendering.checked(tools)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ([], "arguments are an empty list: give an object"),
        ("x", "arguments are a text"),
        ({"messages": []}, "messages is no argument of the template's own"),
        ({"tools": []}, "tools is no argument"),
        ({"enable_thinking": "false"}, "enable_thinking is 'false': give true or false"),
        ({"x": deep(31)}, "nested deeper"),
        ({"x": float("inf")}, "no double"),
    ],
)
def test_arguments_that_are_none(args: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        Rendering.checked(None, args)
    assert "\n" not in str(caught.value)


def test_as_deep_as_readers_take(smol: Smol) -> None:
    """The library's own reader too: what is taken here is not refused after the work."""
    from intactkv_export.libllama import bindings

    prefix = ikv.read(smol.bos)
    function = {"name": "a", "parameters": deep(28)}
    made = Rendering.checked([{"type": "function", "function": function}], {"x": deep(30)})
    assert made is not None
    other = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")} | made.fields
    K, V = ({layer.il: getattr(layer, side) for layer in prefix.layers} for side in "KV")
    data = ikv.build(prefix.manifest["model"], prefix.tokens, K, V, other)
    assert bindings.verify(data) == 1 and ikv.read(data).tools == list(made.tools)


@pytest.mark.parametrize("text", ["", "{", "[NaN]", "{'a': 1}", "[" * 100_000])
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(UsageError, match="tools.json is not JSON") as caught:
        from_json(text, "tools.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("template_args", []),
        ("template_args", None),
        ("tools", []),
        ("tools", [{}]),
        ("tools", [{"function": {}}]),
        ("date", "2026-02-30"),
        ("date", "today"),
        ("date", None),
        ("date", 20260201),
    ],
)
def test_a_manifest_with_wrong_fields(smol: Smol, field: str, value: Any) -> None:
    manifest = {**ikv.read(smol.ikv).manifest, "template_args": {}, field: value}
    with pytest.raises(IntactKVError, match=f"manifest.{field}"):
        manifests.decode(json.dumps(manifest).encode())


# How it is rendered


def test_variables_of_the_server() -> None:
    text = "{{ date_string }}|{{ datetime }}|{{ strftime_now('%Y-%m-%d') }}|{{ tools is defined }}|{{ tool_choice }}"
    assert rendered(text) == "26 Nov 2026|Nov 26 2026|2026-11-26|False|"
    assert rendered("{{ date_string }}", Rendering(args={"date_string": "today"})) == "today"
    effort = Rendering(args={"reasoning_effort": "low"})
    assert rendered("{{ reasoning_effort }} {{ reasoning_strength }}", effort) == "low low"
    assert rendered("{{ preserve_thinking }} {{ clear_thinking }}") == "True False"


def test_thinking_is_on_where_the_server_thinks_so() -> None:
    prompt = "{{ '<think>' if enable_thinking }}"
    assert rendered(prompt) == "<think>"  # asked to think, it ends otherwise
    assert rendered("{% if enable_thinking %}yes{% else %}no{% endif %}{{ messages[0].content }}").startswith("no")
    assert Template(AGENT, "", "", Rendering()).stated == Rendering(args={"enable_thinking": True})
    given = Rendering(args={"enable_thinking": False})
    assert Template(AGENT, "", "", given).stated == given
    assert Template("{{ messages }}", "", "", Rendering()).stated == Rendering()


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("{{ none }}|{{ true }}|{{ 1.0 }}|{{ 2.5 }}|{{ 3.14159265 }}", "|True|1.0|2.5|3.141593"),
        ("{{ [1, 'a'] }}|{{ {'a': 1} }}", "1a|"),
        (
            "{{ nothing.at.all }}|{{ 'a' + nothing }}|{{ nothing + 'a' }}|{{ nothing.items() | list | length }}",
            "|a|a|0",
        ),
        ("{{ '<b>' | safe + '<' }}", "<b><"),
        ("{{ 1.0 | string }}", "1"),
        ("{{ {'a': [1, true, none, 1.0, 'x']} | tojson }}", '{"a": [1, true, null, 1, "x"]}'),
        ("{{ tools | map(attribute='type') | tojson }}", "[]"),
    ],
)
def test_what_the_servers_jinja_writes(expression: str, text: str) -> None:
    assert rendered(expression) == text


@pytest.mark.parametrize("kwargs", [{}, {"indent": 2}, {"indent": 0}, {"ensure_ascii": True}, {"separators": ",:"}])
@pytest.mark.parametrize("value", [{}, [], {"a": [], "b": {}, "c": [1, {"d": 'é\u2028\x01"\\/😀\n'}]}, [[1], [2, 3]]])
def test_json_is_pythons_but_for_numbers(value: Any, kwargs: Any) -> None:
    assert to_json(value, **kwargs) == json.dumps(value, **{"ensure_ascii": False, **kwargs})


def test_the_sandbox_stays_closed() -> None:
    for text in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__() }}"):
        with pytest.raises(Exception, match="unsafe|not safe"):
            rendered(text)


def test_a_bos_is_there_once() -> None:
    text = "{% for m in messages %}{{ m.content }} {% endfor %}"
    assert rendered(text, adds_bos=True) == rendered("{{ bos_token }}" + text, adds_bos=True) == f"<s>{SYSTEM} Hi "


def test_prefixes_differ_as_conversations_do(vocabulary: Vocabulary) -> None:
    plain, tools, quick = (
        make_prompt(vocabulary, AGENT, SYSTEM, rendering=Rendering.checked(*given))
        for given in ((None, None), ([TOOL], None), ([TOOL], {"enable_thinking": False}))
    )
    assert plain.text == f"<|im_start|>system\n{SYSTEM}"  # then come the tools, where there are any
    assert (
        tools.text == f"<|im_start|>system\n{SYSTEM}Tools: {to_json([TOOL])}"
        and "Do not think.<|im_end|>" in quick.text
    )
    assert plain.rendering == Rendering(args={"enable_thinking": True})
    assert quick.rendering == Rendering([TOOL], {"enable_thinking": False})


def test_tools_that_make_no_difference_are_said(vocabulary: Vocabulary, template: str) -> None:
    with pytest.warns(UserWarning, match="shows the tools nowhere"):
        made = make_prompt(vocabulary, template, SYSTEM, rendering=Rendering.checked([TOOL]))
    assert made.tokens == make_prompt(vocabulary, template, SYSTEM).tokens
    behind = AGENT.replace("loop.first and tools", "loop.last and tools")
    with pytest.warns(UserWarning, match="the prefix ends before them"):
        made = make_prompt(vocabulary, behind, SYSTEM, rendering=Rendering.checked([TOOL]))
    assert made.text == f"<|im_start|>system\n{SYSTEM}"


DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}. "


@pytest.mark.parametrize("template", [DATED + AGENT, "Today: {{ strftime_now('%Y-%m-%d') }}. " + AGENT])
def test_a_date_before_the_prompt_ends_the_prefix_or_is_fixed(vocabulary: Vocabulary, template: str) -> None:
    template = f"<|im_start|>{template}"
    with pytest.warns(
        UserWarning, match=r"ends before the date .*, and before the system prompt, .*: --date YYYY-MM-DD"
    ):
        made = make_prompt(vocabulary, template, SYSTEM)
    assert SYSTEM not in made.text and made.text.startswith("<|im_start|>") and made.messages
    assert made.rendering == Rendering(args={"enable_thinking": True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = make_prompt(vocabulary, template, SYSTEM, rendering=Rendering.checked(day="2026-02-01"))
    shown = "Today: 2026-02-01." if "Today" in template else "01 Feb 2026."
    assert made.text.startswith(f"<|im_start|>{shown}") and made.text.endswith(SYSTEM)
    assert made.rendering is not None and made.rendering.fields["date"] == "2026-02-01"
    assert Rendering.of(made.rendering.fields) == made.rendering


def test_a_date_alone_leaves_nothing_without_one(vocabulary: Vocabulary) -> None:
    with pytest.raises(
        UsageError, match="the date is what differs, so fix it with --date YYYY-MM-DD, or use --bos-only"
    ):
        make_prompt(vocabulary, "{{ strftime_now('%d %b %Y') }}" + AGENT, SYSTEM)


def test_a_date_behind_the_prompt_can_be_fixed_too(vocabulary: Vocabulary) -> None:
    template = "{{ messages[0].content }} It is {{ strftime_now('%A') }}. {{ messages[1].content }}"
    made = make_prompt(vocabulary, template, SYSTEM, rendering=Rendering.checked(day=date(2026, 11, 26)))
    assert made.text.startswith(f"{SYSTEM} It is Thursday.")


def test_a_date_that_is_nowhere_is_said(vocabulary: Vocabulary) -> None:
    with pytest.warns(UserWarning, match="writes no date, so 2026-11-26 makes no difference"):
        made = make_prompt(vocabulary, AGENT, SYSTEM, rendering=Rendering.checked(day="2026-11-26"))
    assert made.rendering is not None and made.rendering.date is None  # chat and serve would say it again


def test_a_date_that_other_conversations_write_is_kept(vocabulary: Vocabulary) -> None:
    template = "{% if messages|length > 8 %}{{ strftime_now('%A') }}{% endif %}" + AGENT
    with pytest.warns(UserWarning, match="writes no date, so 2026-11-26 makes no difference"):
        made = make_prompt(vocabulary, template, SYSTEM, rendering=Rendering.checked(day="2026-11-26"))
    assert made.rendering is not None and made.rendering.date == date(2026, 11, 26)


@pytest.mark.parametrize(
    "given",
    ["", "today", "2026-13-01", "2026-02-30", "20261126", "2026-11-26T10:00:00+02:00", "26 Nov 2026", "0026-11-26",
     "２０２６-11-26", 20261126, datetime(2026, 11, 26)],
)  # fmt: skip
def test_dates_that_are_none(given: Any) -> None:
    with pytest.raises(
        UsageError, match=r"^the date is .*: give a day of the calendar without time and time zone"
    ) as no:
        Rendering.checked(day=given)
    assert "\n" not in str(no.value)


def test_a_date_is_said_once() -> None:
    with pytest.raises(
        UsageError, match="date_string is what the date 2026-11-26 gives the template: give one of both"
    ):
        Rendering.checked(None, {"date_string": "x"}, "2026-11-26")


def test_a_day_is_written_into_a_template() -> None:
    """What it renders then, with the clock as it is, is what the clock of that day would have it render."""
    text = "{{ strftime_now('%Y-%m-%d') }}|{% set f = strftime_now( \"%d %b %Y %H:%M\" ) %}{{ f }}"
    text += "|{{ strftime_now is defined }}"
    assert rendered(with_date(text, date(2026, 2, 1))) == "2026-02-01|01 Feb 2026 00:00|True"
    assert rendered(text, Rendering(date=date(2026, 2, 1))) == "2026-02-01|01 Feb 2026 00:00|True"
    with pytest.raises(UsageError, match="computes how it writes the date"):
        with_date("{% set f = '%Y' %}{{ strftime_now(f) }}", date(2026, 2, 1))


@pytest.mark.parametrize(
    ("template", "served", "end"),
    [
        (AGENT, True, SYSTEM),  # tools behind the prompt: the prefix ends before them
        ("{% if tools %}{{ tools | tojson }}{% endif %}" + AGENT, False, f"{SYSTEM}<|im_end|>\n<|im_start|>user\n"),
        (AGENT.replace("<|im_end|>\n{% endfor", "{{ ' and' * 50 }}<|im_end|>\n{% endfor"), False, " and and"),
    ],
    ids=["behind", "before", "much to lose"],
)
def test_tools_that_nobody_spoke_of(vocabulary: Vocabulary, template: str, served: bool, end: str) -> None:
    """A prefix serves requests with tools too, where that costs it a few tokens and no word of the prompt."""
    template = template.replace("not enable_thinking", "false")
    made = make_prompt(vocabulary, template, SYSTEM)
    assert end in made.text and (made.text.endswith(SYSTEM) == served)
    chat = Template(template, "", "", made.rendering)
    text = chat.render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}], [TOOL])
    assert (vocabulary.tokenize(text, special=True)[: len(made.tokens)] == made.tokens) == served


@pytest.mark.parametrize(
    ("switch", "served"), [("enable_thinking", True), ("reasoning_effort", True), ("style", False)]
)
def test_switches_that_nobody_spoke_of(vocabulary: Vocabulary, switch: str, served: bool) -> None:
    """What the server is asked to do with each request comes behind the prompt: it is left out of the prefix."""
    template = AGENT.replace("not enable_thinking", "false").replace("{% if loop.first and tools", "{% if false")
    template = template.replace("<|im_end|>\n{% endfor", f" {{{{ {switch} }}}}<|im_end|>\n{{% endfor")
    made = make_prompt(vocabulary, template, SYSTEM)
    for value in (False, "high"):
        text = Template(template, "", "", Rendering(args={switch: value})).conversation(SYSTEM, "Hi")
        assert (vocabulary.tokenize(text, special=True)[: len(made.tokens)] == made.tokens) == served


def test_arguments_of_calls_are_objects_where_the_template_takes_them() -> None:
    """Requests have them as texts of JSON, and the server reads these for such a template."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": [1, 2]}'}}
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    shown = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ SHOW }}{% endfor %}{% endfor %}"
    items = Template(shown.replace("SHOW", "c.function.arguments.a | tojson"), "", "", Rendering())
    texts = Template(shown.replace("SHOW", "c.function.arguments ~ '!'"), "", "", Rendering())
    assert items.render(talk) == "[1, 2]"
    bad = {**talk[1], "tool_calls": [{**call, "function": {"name": "add", "arguments": "{"}}]}
    assert items.render([talk[0], bad]) == "null"
    assert "!" in texts.render(talk)
    assert call["function"]["arguments"] == '{"a": [1, 2]}'  # type: ignore[index]  # it is the caller's


def test_a_list_of_the_templates_own_is_appended_to_and_popped_from() -> None:
    """As the server does it; a loop over such a list that changes it goes on over what it was."""
    text = "{% set own = namespace(l=[]) %}{% for x in 'ab' %}{% set _ = own.l.append(x) %}{% endfor %}"
    assert rendered(text + "{{ own.l.pop(0) }},{{ own.l.append('c') | join('-') }},{{ own.l.pop() }}") == "a,b-c,c"
    copied = "{% set l = messages[1:] %}{% set _ = l.append(7) %}{{ l | length }},{{ messages | length }}"
    assert rendered(copied) == "1,1"  # of a template that shows no system message the user's has its text
    loop = "{% for i in l %}{{ i }}{% set _ = l.CHANGE %}{% endfor %}={{ l }}"
    assert rendered("{% set l = [1, 2, 3, 4] %}" + loop.replace("CHANGE", "pop(0)")) == "1234="
    assert rendered("{% set l = [1, 2] %}" + loop.replace("CHANGE", "append(i)")) == "12=1212"
    with pytest.raises(OverflowError, match="has more than 10000 elements"):
        rendered("{% set l = [1, 2] %}" + 14 * "{% for i in l %}{% set _ = l.append(i) %}{% endfor %}")
    with pytest.raises(IndexError):
        rendered("{{ [].pop() }}")
    for cyclic in ("{{ l }}", "{{ l | tojson }}"):
        with pytest.raises(RecursionError):
            rendered("{% set l = [] %}{% set _ = l.append(l) %}" + cyclic)


@pytest.mark.parametrize(
    "change",
    [
        "messages.append(1)", "messages.pop()", "messages[1].content.append(1)", "tools.append(1)", "tools.pop(0)",
        "tools[0].function.parameters.required.append('x')", "kept.append(1)", "messages[0].update(role='x')",
        "[].extend([1])", "[].insert(0, 1)", "[1].clear()", "[1].reverse()", "[1].remove(1)", "{}.update(a=1)",
        "{'a': 1}.pop('a')", "messages['append'](1)", "(messages | attr('append'))(1)",
    ],
)  # fmt: skip
def test_nothing_else_is_changed(change: str) -> None:
    parts = [{"type": "text", "text": "Hi"}]
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": parts}]
    function = {**TOOL["function"], "parameters": {"type": "object", "properties": {}, "required": ["a"]}}
    rendering = Rendering([{"type": "function", "function": function}], {"kept": [1]})
    before = json.dumps([messages, rendering.fields])
    shown = "{% for m in messages %}{{ m.content }}{% endfor %}"  # so that they come as they are
    with pytest.raises(SecurityError):
        Template(shown + "{% set _ = " + change + " %}", "", "", rendering).render(messages)
    assert json.dumps([messages, rendering.fields]) == before


def test_what_appends_is_no_way_out_of_the_sandbox() -> None:
    for name in ("__globals__", "__closure__", "__self__", "__code__", "__class__", "__call__"):
        assert rendered(f"{{{{ [].append.{name} }}}}{{{{ [].pop.{name} }}}}") == ""


# From the command to the conversation


@pytest.fixture(scope="module")
def agent(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with such a template, and a prefix for an agent, made by the command."""
    folder = tmp_path_factory.mktemp("agent")
    reference, model = folder / "reference.gguf", folder / "model.gguf"
    os.link(ikv.rewrite(smol.reference, {"tokenizer.chat_template": AGENT}, folder / "made.gguf"), reference)
    ikv.rewrite(smol.gguf, {"tokenizer.chat_template": AGENT}, model)
    (folder / "tools.json").write_text(json.dumps([TOOL]))
    command = ["prefix", reference, "-m", model, "-o", folder / "agent.ikv", "-s", SYSTEM, "-t", "2"]
    command += ["--tools", folder / "tools.json", "--template-args", '{"enable_thinking": false}', "--dtype", "auto"]
    assert cli.main([str(x) for x in command]) == 0
    return model, folder / "agent.ikv"


def test_the_file_says_how_it_was_rendered(agent: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    made = ikv.read(agent[1])
    assert made.tools == [TOOL] and made.manifest["template_args"] == {"enable_thinking": False}
    assert cli.main(["inspect", str(agent[1])]) == 0
    out = capsys.readouterr().out
    assert "tools       1: add" in out and 'rendered    as llama-server does with {"enable_thinking": false}' in out


def test_conversations_begin_with_it(agent: tuple[Path, Path]) -> None:
    llama = IntactLlama(*agent, n_ctx=256, n_threads=2)
    assert llama.prefix is not None and llama.prefix_tools == [TOOL]
    opening, user = llama.prefix_messages, {"role": "user", "content": "Hi"}
    for given, loads in (({}, 1), ({"tools": [{**TOOL, "strict": True}]}, 2), ({"tools": []}, 2)):
        llama.reset()
        llama.create_chat_completion([*opening, user], max_tokens=1, **given)
        assert llama.prefix_stats["loads"] == loads, given
        assert (b"Tools:" in llama.detokenize(llama.input_ids[: llama.n_tokens].tolist())) == (given != {"tools": []})
    llama.reset()
    llama.create_chat_completion(
        [{"role": "system", "content": "Rhyme."}, user], max_tokens=1
    )  # another's conversation
    assert b"Tools:" not in llama.detokenize(llama.input_ids[: llama.n_tokens].tolist())
    with pytest.raises(UsageError, match="tool 0 is no function"):
        llama.create_chat_completion([*opening, user], tools=[{"type": "x"}], max_tokens=1)
    llama.close()
    said: list[str] = []
    talk = open_chat(agent[0], prefix=agent[1], notice=said.append, n_ctx=256, n_threads=2)
    assert talk.begins_with_prefix() and not said
    assert "".join(talk.say("Hi")) is not None and talk.llama.prefix_stats["loads"] == 1
    talk.llama.close()


@pytest.mark.parametrize("name", ["Kimi-K2-Instruct", "Kimi-K2-Thinking"])
def test_tool_results_where_a_template_collects_calls(smol: Smol, tmp_path: Path, name: str) -> None:
    """Answered behind the prefix; what the server renders of them is compared in test_server_renders.py."""
    template = next((path.read_text() for path in templates() if path.stem == name), None)
    if template is None:
        pytest.skip("upstream's chat templates are not beside its converter")
    reference, model, out = (tmp_path / each for each in ("reference.gguf", "model.gguf", "kimi.ikv"))
    ikv.rewrite(smol.reference, {"tokenizer.chat_template": template}, reference)
    ikv.rewrite(smol.gguf, {"tokenizer.chat_template": template}, model)
    command = ["prefix", reference, "-m", model, "-o", out, "-s", SYSTEM, "-t", "2", "--dtype", "auto"]
    assert cli.main([str(word) for word in command]) == 0
    llama = IntactLlama(model, out, n_ctx=1024, n_threads=2)
    calls = copy.deepcopy(CALLING)
    answer = llama.create_chat_completion([*llama.prefix_messages, *calls], max_tokens=1)
    assert answer["usage"]["completion_tokens"] == 1 and llama.prefix_stats["loads"] == 1
    text = llama.detokenize(llama.input_ids[: llama.n_tokens].tolist(), special=True).decode()
    assert "## Return of functions.get_weather:0\n21" in text or "## Return of call00001\n21" in text, text
    assert calls == CALLING
    llama.close()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--tools", "nowhere.json"], "nowhere.json"),
        (["--tools", "bad.json"], "bad.json is not JSON"),
        (["--tools", "one.json"], "the tools are an object"),
        (["--template-args", "{"], "--template-args is not JSON"),
        (["--template-args", "@bad.json"], "--template-args is not JSON"),
        (["--template-args", "{}", "--bos-only"], "--bos-only keeps no --tools, --template-args or --date"),
        (["--date", "2026-11-26", "--bos-only"], "--bos-only keeps no --tools, --template-args or --date"),
        (["--date", "tomorrow"], "the date is 'tomorrow': give a day of the calendar"),
    ],
)
@pytest.mark.parametrize("command", ["prefix", "convert"])
def test_wrong_usage_is_one_sentence(
    smol: Smol,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    arguments: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.json").write_text("{'a'")
    (tmp_path / "one.json").write_text(json.dumps(TOOL))
    target = ["-m", str(smol.gguf)] if command == "prefix" else []
    assert cli.main([command, str(smol.reference), *target, "-o", "x", *arguments]) == 2
    err = capsys.readouterr().err
    assert reason in err and len(err.strip().splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bad.json", "one.json"}


def test_eval_and_calibrate_read_the_same_conversations(
    agent: tuple[Path, Path], model: Callable[[str], Path], vocabulary: Vocabulary
) -> None:
    """Turns behind the prefix are those of conversations with its tools."""
    from intactkv_export.texts import Turns

    turns = Turns(ikv.read(agent[1]), vocabulary, AGENT)
    assert vocabulary.text(turns.first("Hi")) == "Hi<|im_end|>\n<|im_start|>assistant\n<think></think>"
