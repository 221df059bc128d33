"""Questions: the shapes they come in, their tokens behind a prefix, and how answers are scored and compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation import multiple_choice
from intactkv_export.evaluation.model import Evaluated
from intactkv_export.evaluation.multiple_choice import Answers, Question
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.texts.turns import Turns
from tests.support.lowlevel import Context, L, load_model
from tests.support.smol import Smol


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "Q", "choices": ["x", "y"], "answer": 1}, Question("Q", ["x", "y"], 1, True)),
        ({"question": "Q", "choices": ["x", "y"], "answer": "B"}, Question("Q", ["x", "y"], 1, True)),
        ({"id": "Mercury_1", "question": "Q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "1"},
         Question("Q", ["x", "y"], 0, True)),
        ({"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
         Question("Q", ["x", "y"], 1, True)),
        ({"ctx_a": "C", "ctx": "C d", "endings": ["x", "y", "z"], "label": "2"},
         Question("C d", ["x", "y", "z"], 2, False)),
        ({"query": "Q:", "choices": ["x", "y"], "gold": 0}, Question("Q:", ["x", "y"], 0, False)),
        ({"goal": "G", "sol1": "x", "sol2": "y", "label": 1}, Question("G", ["x", "y"], 1, False)),
    ],
)  # fmt: skip
def test_shapes(tmp_path: Path, record: dict, expected: Question) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text("\n" + json.dumps(record) + "\n\n")
    assert multiple_choice.read(file) == [expected]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "Q"', "line 1 is not JSON"),
        ("[]", "line 1 is not a JSON object"),
        ('{"text": "Q", "choices": ["x", "y"], "answer": 0}', "line 1 has no question"),
        ('{"question": "Q", "choices": ["x"], "answer": 0}', "no two choices"),
        ('{"question": "Q", "choices": {"text": ["x", "y"]}, "answer": 0}', "no two choices"),
        ('{"question": "Q", "choices": ["x", ""], "answer": 0}', "no two choices"),
        ('{"question": "Q", "choices": ["x", "y"]}', "the answer is missing"),
        ('{"question": "Q", "choices": ["x", "y"], "answer": 2}', "the answer is 2: give an index from 0 to 1"),
        ('{"question": "Q", "choices": ["x", "y"], "answer": "C"}', "the answer is 'C'"),
        ('{"question": "Q", "choices": ["x", "y"], "answer": true}', "the answer is True"),
        ("\n \n", "has no question"),
    ],
)
def test_files_that_are_no_questions(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text(text)
    with pytest.raises(IntactKVError, match=message) as raised:
        multiple_choice.read(file)
    assert "tasks.jsonl" in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(UsageError, match="nowhere"):
        multiple_choice.read(tmp_path / "nowhere.jsonl")


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert multiple_choice.mcnemar(0, 0) == 1 and multiple_choice.mcnemar(3, 3) == 1
    assert multiple_choice.mcnemar(0, 5) == multiple_choice.mcnemar(5, 0) == 2 / 2**5
    assert multiple_choice.mcnemar(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 2**10)


def test_scores_and_comparison() -> None:
    items = [multiple_choice.Item([1], [[2], [3]], [1, 4], 0), multiple_choice.Item([1], [[2], [3]], [2, 2], 1)]
    seen: list[int] = []
    scores = multiple_choice.score(items, lambda context, choices: [-2.0, -3.0], seen.append)
    assert scores.acc.tolist() == [True, False] and scores.acc_norm.tolist() == [False, False] and seen == [1, 2]
    assert scores.picked.tolist() == [0, 0] and scores.picked_norm.tolist() == [1, 0]
    assert scores.part(slice(1, 2)).acc.tolist() == [False] and scores.as_json()["acc_norm"]["picked"] == [1, 0]
    right = np.array([1, 1, 1, 0, 1, 0, 1, 1], bool)
    picked = np.zeros(8, int)
    ours, theirs = Answers(right, right, picked, picked), Answers(np.zeros(8, bool), right, picked, picked)
    assert ours.accuracy("acc") == (0.75, pytest.approx(math.sqrt(0.75 * 0.25 / 7)))
    against = ours.against(theirs)
    assert against["acc"] == {"difference": 0.75, "mcnemar_p": 2 / 2**6, "within_noise": False}
    assert against["acc_norm"] == {"difference": 0.0, "mcnemar_p": 1.0, "within_noise": True}


def test_questions_as_tokens(smol: Smol) -> None:
    template = gguf_file.read(smol.reference).values["tokenizer.chat_template"]
    asked = [Question("Why?", ["So", "No, no"], 0, True), Question("It is", ["so"], 0, False)]
    with Vocabulary(smol.reference) as vocabulary:
        first, _ = multiple_choice.encode(asked, Turns(ikv.read(smol.ikv), vocabulary, template))
        assert vocabulary.text(first.context) == "Why?<|im_end|>\n<|im_start|>assistant\n"
        assert [vocabulary.text(choice) for choice in first.choices] == ["So", "No, no"] and first.n_bytes == [2, 6]
        plain, continued = multiple_choice.encode(asked, Turns(ikv.read(smol.bos), vocabulary, None))
        assert vocabulary.text(plain.context + plain.choices[1]) == "Question: Why?\nAnswer: No, no"
        assert vocabulary.text(continued.context + continued.choices[0]) == "It is so"
        assert plain.n_tokens == len(plain.context) + len(plain.choices[1])


def test_likelihoods_are_those_of_the_whole_text(smol: Smol) -> None:
    template = gguf_file.read(smol.reference).values["tokenizer.chat_template"]
    question = Question(
        "What is the capital of France?", ["The capital of France is Paris.", "Of the seven", "So"], 0, True
    )
    with Vocabulary(smol.reference) as vocabulary:
        (item,) = multiple_choice.encode([question], Turns(ikv.read(smol.ikv), vocabulary, template))
    model = Evaluated(smol.reference, "f16", smol.tokens, {"n_ctx": 128, "n_batch": 64, "n_threads": 2})
    model.begin(None)
    found = model.likelihoods(item.context, item.choices)
    context = Context(load_model(smol.reference), "f16")
    for choice, ours in zip(item.choices, found, strict=True):
        start = len(smol.tokens) + len(item.context)
        L.llama_memory_clear(context.memory, True)
        logits = context.decode([*smol.tokens, *item.context, *choice], 0)[start - 1 : -1].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert ours == pytest.approx(log_probs[np.arange(len(choice)), choice].sum(), abs=0.02 * len(choice))
    assert int(np.argmax(np.array(found) / item.n_bytes)) == 0
