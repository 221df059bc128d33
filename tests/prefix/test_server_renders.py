"""A prefix is a beginning of what llama.cpp's own server makes of chat requests, and IntactLlama too: for all templates
of upstream's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Rendering, ikv, prompt_for
from tests.support import shorter
from tests.support.chat_templates import (
    DATED,
    LATER,
    SYSTEM,
    THREE,
    TOOLS,
    USER,
    WHOLE,
    Row,
    markdown,
    rows,
    templates,
)  # fmt: skip
from tests.support.llama_server import Server, program

# Where the prompt has no place in the prefix of a request that says nothing: behind the day's date, in the last message
BEHIND_THE_DATE = {
    "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "openai-gpt-oss-120b", "upstage-Solar-Open-100B",
}  # fmt: skip
IN_THE_LAST_MESSAGE = {"mistralai-Mistral-Nemo-Instruct-2407"}
# Tools come before the prompt, or so much behind it depends on them that it would be lost: a prefix for them is another
TOOLS_FIRST = {
    "Bielik-11B-v3.0-Instruct", "Cohere2MoE", "CohereForAI-c4ai-command-r7b-12-2024-tool_use", "GLM-4.6",
    "GLM-4.7-Flash", "Kimi-K2-Instruct", "Kimi-K2-Thinking", "Kimi-K3", "Qwen3.5-4B", "Spark2.5",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "inclusionai-ling-3.0-flash", "llama-cpp-deepseek-r1",
    "meetkai-functionary-medium-v3.1", "meetkai-functionary-medium-v3.2", "meta-llama-Llama-3.1-8B-Instruct",
    "meta-llama-Llama-3.2-3B-Instruct", "meta-llama-Llama-3.3-70B-Instruct", "moonshotai-Kimi-K2", "muse-glimmer",
    "tencent-Hy3",
}  # fmt: skip
# The server has code of its own for the results of calls in such a template, of before its maker's last
OTHER_RESULTS = {"google-gemma-4-31B-it-interleaved"}
# Whether to think stands before the prompt, or costs as much
THINKING_FIRST = {
    "Apertus-8B-Instruct", "Bielik-11B-v3.0-Instruct", "HuggingFaceTB-SmolLM3-3B", "google-gemma-4-31B-it",
    "google-gemma-4-31B-it-interleaved",
}  # fmt: skip


@pytest.fixture(scope="module")
def small(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    program()  # or there is nothing to compare with
    return shorter.write(model("Q2_K"), tmp_path_factory.mktemp("small") / "small.gguf", 1)


@pytest.fixture(scope="module")
def vocabulary(small: Path) -> Iterator[Vocabulary]:
    with Vocabulary(small) as opened:
        yield opened


@pytest.fixture(scope="module")
def row_of(small: Path, vocabulary: Vocabulary) -> Iterator[Callable[[str], Row]]:
    with rows(small, vocabulary, templates()) as found:
        yield found


PAGE = Path(__file__).parents[2] / "docs" / "reference" / "templates.md"
NONE = "none"
NAMES = [path.stem for path in templates()] or [NONE]


@pytest.mark.parametrize("name", NAMES)
def test_a_true_prefix_or_a_reason(name: str, row_of: Callable[[str], Row]) -> None:
    """Of turns, tools, reasoning; made with nothing, with tools, with switches, for a day."""
    if name == NONE:
        pytest.skip("upstream's chat templates are not beside its converter")
    row = row_of(name)
    assert not row.false
    assert {talk for _, talk in row.other_text} == ({"calls"} if name in OTHER_RESULTS else set())
    assert {talk for _, talk in row.refused} <= {"calls"}  # of templates that have none
    assert not row.ours_refused
    plain = DATED if name in BEHIND_THE_DATE else LATER if name in IN_THE_LAST_MESSAGE else WHOLE
    assert {made: row.kind(made) for made in row.prefix} == {
        made: WHOLE if made == "day" and plain == DATED else plain for made in row.prefix
    }
    assert set(row.prefix) >= {"plain", "tools"}
    for prompt in row.prefix.values():
        assert (SYSTEM[:-1] in prompt.text) == (row.kind(made_as(row, prompt)) == WHOLE)
    if plain == DATED:
        assert "--date YYYY-MM-DD makes it whole, for conversations of that day" in row.why["plain"]
        assert len(row.prefix["day"].tokens) > len(row.prefix["plain"].tokens)
    assert row.serves["tools"] == (name not in TOOLS_FIRST)
    assert (row.serves["thinking"] and row.serves["no thinking"]) == (name not in THINKING_FIRST)


def made_as(row: Row, prompt: object) -> str:
    return next(made for made, other in row.prefix.items() if other is prompt)


def test_the_table_counts_them(row_of: Callable[[str], Row]) -> None:
    """What the documents say is what was found."""
    if NAMES == [NONE]:
        pytest.skip("upstream's chat templates are not beside its converter")
    lines = list(markdown([row_of(name) for name in NAMES]))
    dated, later = len(BEHIND_THE_DATE), len(IN_THE_LAST_MESSAGE)
    assert len(lines) == 2 + len(NAMES) + 2
    assert lines[-1] == f"{dated} {DATED}; {later} {LATER}; {len(NAMES) - dated - later} {WHOLE}; of {len(NAMES)}"
    assert PAGE.read_text(encoding="utf-8").endswith("\n".join(lines[:-2]) + "\n")


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
