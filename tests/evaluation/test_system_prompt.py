"""Evaluation of a prefix of the first token behind system prompts: the prompt's other tokens are the model's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import evaluation
from intactkv_export.cli.main import main
from intactkv_export.errors import UsageError
from intactkv_export.evaluation import SELF, Texts, metrics, modes, tables
from intactkv_export.evaluation.metrics import Figures
from intactkv_export.evaluation.multiple_choice import Question
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import locate
from intactkv_export.prefix import ikv
from intactkv_export.work import Stages, silent
from tests.support.smol import SYSTEM_PROMPT, Smol

OTHER = "You are a pirate.\nYou answer in one sentence."
QUESTION = Question("What is the capital of France?", ["Paris", "Of running the"], 0, True)


def ask(smol: Smol, prefix: Any, **settings: Any) -> list[Figures]:
    settings = {"texts": Texts(2, 24), "kv_types": ["q4_0"], "n_threads": 2, **settings}
    return list(evaluation.evaluate(smol.reference, [smol.gguf], prefix, **settings))


@pytest.mark.parametrize("depths", [[], [40]])
def test_the_same_tokens_have_the_same_figures(smol: Smol, depths: list[int]) -> None:
    """Whether they stand there as a prefix of the prompt, or as a prompt behind a prefix of the first token."""
    questions = [] if depths else [QUESTION]
    settings: dict[str, Any] = {"texts": Texts(2, 24, questions=questions), "modes": ["reference", "plain", "bos"]}
    whole = ask(smol, smol.ikv, depths=depths, **settings)
    first = ask(smol, smol.bos, depths=depths, **settings, system_prompt=SYSTEM_PROMPT)
    assert [r.mode for r in first] == [r.mode for r in whole] == ["reference", "plain", "bos"]
    for a, b in zip(whole, first, strict=True):
        assert a.system_prompt is None and b.system_prompt == SYSTEM_PROMPT and a.depth == b.depth
        if a.mode != "bos":  # whose row was computed in another batch
            np.testing.assert_array_equal(a.kld_by_token, b.kld_by_token)
            np.testing.assert_array_equal(a.nll_by_token, b.nll_by_token)
        assert metrics.summary(b.kld).mean == pytest.approx(metrics.summary(a.kld).mean, rel=0.15, abs=1e-6)
        if questions:
            assert a.answers is not None and b.answers is not None
            np.testing.assert_array_equal(a.answers.acc, b.answers.acc)


def test_several_prompts_each_with_its_rows(smol: Smol) -> None:
    found = ask(smol, smol.bos, system_prompt=[SYSTEM_PROMPT, OTHER], modes=["reference", "plain", "rounded", "bos"])
    names = [r.mode for r in found[:4]]
    assert names == ["reference", "plain", "rounded", "bos"]
    assert [(r.system_prompt, r.mode) for r in found] == [(p, name) for p in (SYSTEM_PROMPT, OTHER) for name in names]
    assert found[0].nll != found[4].nll, "the reference is asked again"
    plain, bos = found[5], found[7]
    assert plain.kld != bos.kld and metrics.summary(bos.kld).mean < 1.1 * metrics.summary(plain.kld).mean
    gains = [d for d in metrics.differences(found) if (d.a.mode, d.b.mode) == ("bos", "plain")]
    assert [(d.a.system_prompt, d.b.system_prompt) for d in gains] == [(p, p) for p in (SYSTEM_PROMPT, OTHER)]
    text = "\n".join(str(part) for part in tables.tables(found))
    assert f'behind the system prompt "{SYSTEM_PROMPT[:57]}..."' in text and "pirate. You answer" in text


def test_the_first_tokens_of_a_prompt(smol: Smol) -> None:
    """A prefix may be shorter than its prompt; one that is the whole prompt is as without it."""
    whole = ask(smol, smol.ikv, modes=["prompt"])
    same = ask(smol, smol.ikv, modes=["prompt"], system_prompt=SYSTEM_PROMPT)
    np.testing.assert_array_equal(whole[0].kld_by_token, same[0].kld_by_token)


def test_conversations_stand_behind_the_whole_prompt(smol: Smol, tmp_path: Path) -> None:
    """Turns and the reference's own texts are made behind the prefix of the prompt, by the reference."""
    found, work = locate(smol.reference), Stages(tmp_path, silent)
    given = modes.find_given(smol.gguf, smol.bos, None, work, found, found.path)
    behind = modes.behind_prompt(given, found.path, SYSTEM_PROMPT)
    made, wanted = modes.whole_prefix(behind, work, found, found.path), ikv.read(smol.ikv)
    assert made.tokens == wanted.tokens == behind.tokens and made.messages == wanted.messages
    for a, b in zip(made.layers, wanted.layers, strict=True):
        np.testing.assert_allclose(a.V, b.V, rtol=2e-2, atol=2e-2)
    assert modes.whole_prefix(given, work, found, found.path) is given.prefix
    assert Texts(text=SELF).as_conversation and Texts(questions=[QUESTION]).as_conversation
    assert not Texts().as_conversation, "prose is the same behind all"


def test_a_model_without_a_template_reads_a_paragraph(smol: Smol, tmp_path: Path) -> None:
    reference = ikv.rewrite(smol.reference, {"tokenizer.chat_template": None}, tmp_path / "base.gguf")
    found, work = locate(reference), Stages(tmp_path, silent)
    given = modes.behind_prompt(modes.find_given(smol.gguf, smol.bos, None, work, found, found.path), reference, OTHER)
    with Vocabulary(reference) as vocabulary:
        assert given.tokens == [vocabulary.bos, *vocabulary.tokenize(f"{OTHER}\n\n", special=False)]
    assert given.system_prompt == OTHER and given.data.keys() == {"plain", "rounded", "bos"}
    texts = Texts(1, 16, questions=[QUESTION])
    rows = list(
        evaluation.evaluate(reference, [smol.gguf], smol.bos, kv_types=["f16"], texts=texts, system_prompt=OTHER)
    )
    assert [(r.mode, r.answers is not None) for r in rows] == [("reference", True), ("plain", True), ("bos", True)]


def test_what_is_refused(smol: Smol) -> None:
    with pytest.raises(UsageError, match="has the 24 tokens .* with which the prompt .*pirate.* does not begin"):
        ask(smol, smol.ikv, system_prompt=OTHER)
    with pytest.raises(UsageError, match="in mode 'prompt': there is no such prefix, only plain, rounded, bos"):
        ask(smol, smol.bos, system_prompt=OTHER, modes=["prompt"])
    with pytest.raises(UsageError, match="behind the prefix of 8[0-9]+ makes .* was trained for 8192"):
        ask(smol, smol.bos, system_prompt="word " * 8170)


def test_the_command(smol: Smol, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(OTHER + "\n")
    command = ["eval", str(smol.reference), str(smol.gguf), "--prefix", str(smol.bos), "--modes", "plain,bos"]
    command += ["--chunks", "1", "--tokens", "16", "--threads", "2", "--kv-type", "q8_0"]
    command += ["-s", SYSTEM_PROMPT, "--system-prompt", f"@{tmp_path / 'other.txt'}"]
    assert main([*command, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    wanted = [(SYSTEM_PROMPT, "plain"), (SYSTEM_PROMPT, "bos"), (OTHER, "plain"), (OTHER, "bos")]
    assert [(r["system_prompt"], r["mode"]) for r in figures["results"]] == wanted
    assert [d["system_prompt"] for d in figures["differences"]] == [SYSTEM_PROMPT, OTHER]
