"""docs/reference/models.md says what is: for a model of each kind of memory here, for all of them by `make models`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import support_table, tiny_rwkv, upstream_archs
from tests.support.architecture_row import Row

# Plain K and V, windows, sinks, ALiBi, experts without RoPE in some layers, M-RoPE, MLA, hybrids, recurrent,
# no cache
SAMPLE = (
    "llama",
    "gemma3",
    "gpt-oss",
    "bloom",
    "smallthinker",
    "qwen2vl",
    "deepseek2",
    "qwen35",
    "lfm2",
    "mamba",
    "dream",
)


@pytest.fixture(scope="module")
def page() -> list[str]:
    return support_table.PAGE.read_text(encoding="utf-8").splitlines()


def test_no_row_fails(page: list[str]) -> None:
    assert [line for line in page if "**fails**" in line] == []


def test_every_family_has_a_line(page: list[str]) -> None:
    for family in support_table.FAMILIES:
        (line,) = [line for line in page if line.startswith(f"| {family} |")]
        assert "not tried" not in line


@pytest.mark.slow
@pytest.mark.skipif(not upstream_archs.can_build(), reason="no C++ compiler, or no libllama-common (make tools)")
def test_lines_are_what_the_models_do(page: list[str], tmp_path: Path) -> None:
    made = upstream_archs.make(tmp_path, SAMPLE)
    assert not made.crashed and not made.left_out
    for row in support_table.rows([*made.paths.values(), tiny_rwkv.write(tmp_path / "rwkv7.gguf")]):
        assert support_table.line(row) in page, "make models"


def test_a_crash_and_a_file_that_is_none_are_rows_that_fail(tmp_path: Path) -> None:
    (tmp_path / "none.gguf").write_bytes(b"none")
    row = support_table.run(tmp_path / "none.gguf")
    assert row.status == "fails" and "none.gguf" in row.reason
    assert "**fails**: " in support_table.line(row)


def test_a_family_of_two_outcomes_names_both() -> None:
    works = Row("a", "x", status="works", numbers={"influence": 1.0, "q4_0 weights, plain": 0.1})
    refused = Row("b", "qwen3", status="refused", reason="it is none")
    text = support_table.page([works, refused], {})
    assert "| Qwen3 | refused: it is none | not asked | not asked |" in text
    assert "the worst of its models: 1 works, 1 is refused.\n" in text
    assert "| a | x | works | - | not asked | not asked |" in text
