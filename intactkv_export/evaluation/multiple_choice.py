"""Multiple choice by log-likelihood: questions of a local file, and which choice a model finds likeliest.

As lm-evaluation-harness scores them: "acc" counts the questions whose right choice has the highest log-likelihood,
"acc_norm" those where it has the highest per byte of its text. The question is a user's turn behind the prefix, the
choices are possible replies; for a model without a chat template, both are plain text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.models import read_text
from intactkv_export.texts import Turns

_ASKED = ("question", "question_stem")  # are answered; the others are continued
_QUESTION = (*_ASKED, "query", "ctx", "goal")
_CHOICES = ("choices", "endings")
_ANSWER = ("answer", "answerKey", "gold", "label")


@dataclass(frozen=True)
class Question:
    """asked: it is a question, not the beginning of a text. answer: index of the right choice."""

    text: str
    choices: list[str]
    answer: int
    asked: bool


@dataclass(frozen=True)
class Item:
    """A question as tokens that follow the prefix. choices: the tokens of each; n_bytes: of their texts."""

    context: list[int]
    choices: list[list[int]]
    n_bytes: list[int]
    answer: int

    @property
    def n_tokens(self) -> int:
        return len(self.context) + max(map(len, self.choices))


@dataclass(frozen=True)
class Answers:
    """Which questions a model gets right, bool [n]: by log-likelihood, and by log-likelihood per byte.

    picked, picked_norm: int [n], the choices it finds likeliest so. Right answers hide how often a model says
    something else than its reference: some become right as others become wrong.
    """

    acc: np.ndarray
    acc_norm: np.ndarray
    picked: np.ndarray
    picked_norm: np.ndarray

    def accuracy(self, name: str) -> tuple[float, float]:
        """Share of right answers and its standard error, of "acc" or "acc_norm"."""
        right = getattr(self, name)
        p = float(right.mean())
        return p, math.sqrt(p * (1 - p) / (len(right) - 1)) if len(right) > 1 else math.nan

    def as_json(self) -> dict[str, Any]:
        """For a program."""
        accuracies = {name: self.accuracy(name) for name in ("acc", "acc_norm")}
        return {"n": len(self.acc)} | {
            name: {
                "mean": p,
                "error": None if math.isnan(error) else error,
                "right": getattr(self, name).tolist(),
                "picked": getattr(self, name.replace("acc", "picked")).tolist(),
            }
            for name, (p, error) in accuracies.items()
        }

    def part(self, which: slice) -> Answers:
        """To some of the questions."""
        return Answers(self.acc[which], self.acc_norm[which], self.picked[which], self.picked_norm[which])

    def against(self, other: Answers) -> dict[str, Any]:
        """Difference of the accuracies to those of the same questions, and McNemar's p of each."""
        found = {}
        for name in ("acc", "acc_norm"):
            a, b = getattr(self, name), getattr(other, name)
            p = mcnemar(int((a & ~b).sum()), int((b & ~a).sum()))
            found[name] = {"difference": float(a.mean() - b.mean()), "mcnemar_p": p, "within_noise": p >= 0.05}
        return found


def read(path: str | Path) -> list[Question]:
    """The questions of a JSONL file, one a line, in the shapes that data sets for lm-evaluation-harness have.

    Text: "question", "question_stem", "query", "ctx" or "goal". Choices: "choices" (a list of texts, or {"text":
    [...], "label": [...]}), "endings", or "sol1" and "sol2". Right one: "answer", "answerKey", "gold" or "label", its
    index or its label (without labels: A, B, ...).

    Raises UsageError if there is no such file, IntactKVError that names the line if it is not as above.
    """
    path = Path(path)
    lines = read_text(path).split("\n")
    questions = [_question(line, f"{path}, line {i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise IntactKVError(f"{path} has no question: give one JSON object a line")
    return questions


def encode(questions: Sequence[Question], turns: Turns) -> list[Item]:
    """The questions as tokens."""
    items = []
    for question in questions:
        pairs = [turns.answer(question.text, choice, question.asked) for choice in question.choices]
        n_bytes = [len(choice.encode()) for choice in question.choices]
        items.append(Item(pairs[0][0], [reply for _, reply in pairs], n_bytes, question.answer))
    return items


def score(
    items: Sequence[Item],
    likelihoods: Callable[[list[int], list[list[int]]], list[float]],
    progress: Callable[[int], None],
) -> Answers:
    """Let a model answer. likelihoods(context, choices): log-likelihood of each, nats. progress: items done."""
    picked, picked_norm = [], []
    for done, item in enumerate(items, 1):
        found = np.array(likelihoods(item.context, item.choices))
        picked.append(int(found.argmax()))
        picked_norm.append(int((found / item.n_bytes).argmax()))
        progress(done)
    right, by_likelihood, by_byte = np.array([item.answer for item in items]), np.array(picked), np.array(picked_norm)
    return Answers(by_likelihood == right, by_byte == right, by_likelihood, by_byte)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p that a and b are equally often right, from the questions that only one of them gets right."""
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def _question(line: str, where: str) -> Question:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise IntactKVError(f"{where} is not JSON ({error}): correct it") from error
    if not isinstance(record, dict):
        raise IntactKVError(f"{where} is not a JSON object: give one question a line")
    key = next((name for name in _QUESTION if isinstance(record.get(name), str)), None)
    if key is None:
        raise IntactKVError(f"{where} has no question: give its text as one of {', '.join(_QUESTION)}")
    choices, labels = _choices(record)
    if len(choices) < 2 or not all(isinstance(choice, str) and choice for choice in choices):
        raise IntactKVError(f"{where} has no two choices with a text: give them as one of {', '.join(_CHOICES)}")
    answers = [record[name] for name in _ANSWER if name in record]
    answer = _index(answers[0], labels) if answers else None
    if answer is None or not 0 <= answer < len(choices):
        given = repr(answers[0]) if answers else f"missing, it is one of {', '.join(_ANSWER)}"
        raise IntactKVError(
            f"{where}: the answer is {given}: give an index from 0 to {len(choices) - 1}, or one of the labels "
            f"{', '.join(labels)}"
        )
    return Question(record[key], choices, answer, key in _ASKED)


def _choices(record: dict[str, Any]) -> tuple[list[Any], list[str]]:
    """Texts and labels."""
    found = next((record[name] for name in _CHOICES if name in record), None)
    if found is None:
        found = [record[name] for name in ("sol1", "sol2") if name in record]
    if isinstance(found, dict):
        texts, labels = found.get("text"), found.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return texts, [str(label) for label in labels]
        return [], []
    texts = found if isinstance(found, list) else []
    return texts, [chr(ord("A") + i) for i in range(len(texts))]


def _index(answer: Any, labels: list[str]) -> int | None:
    """Of the right choice: a number is an index, a text is a label or else a number."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, str):
        if answer in labels:
            return labels.index(answer)
        return int(answer) if answer.isdecimal() else None
    return answer if isinstance(answer, int) else None
