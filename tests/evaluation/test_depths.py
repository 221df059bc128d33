"""Evaluation behind text: which tokens are measured, in which ubatches, and that each text begins anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import evaluation
from intactkv_export.cli.main import main
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation import Texts, Way, metrics, tables
from intactkv_export.evaluation.depths import Depths, Windows
from intactkv_export.evaluation.metrics import Figures
from intactkv_export.evaluation.multiple_choice import Question
from intactkv_export.libllama import Vocabulary
from intactkv_export.runtime.intact_llama import IntactLlama
from intactkv_export.texts import default_text
from tests.support.smol import Smol


def test_windows() -> None:
    windows = Windows((0, 5, 7), 4)  # two of them overlap
    assert np.flatnonzero(windows.measured).tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    found = {depth: np.flatnonzero(windows.measured)[at].tolist() for depth, at in windows.each()}
    assert found == {0: [0, 1, 2, 3], 5: [5, 6, 7, 8], 7: [7, 8, 9, 10]}
    whole = Windows((), 3)
    assert whole.measured.tolist() == [True] * 3 and list(whole.each()) == [(0, slice(0, 3))]


def test_settings() -> None:
    assert Depths.of((), None, None, ()) == Depths() and list(Depths().ways("q4_0")) == [Way()]
    found = Depths.of([64, 8, 64], None, 512, [0, 128])
    assert found.behind == (8, 64) and found.deepest == 64
    assert list(found.ways("q4_0")) == [Way(16, 0), Way(16, 128), Way(512, 0), Way(512, 128)]
    assert list(found.ways("f16")) == [Way(16, 0), Way(512, 0)], "an exact cache has no tail"
    assert list(Depths.of([8], 4, 4, ()).ways("q8_0,q4_0")) == [Way(4, None)]
    for settings, message in (
        (((), 16, None, ()), "no depths are given"),
        (((), None, 512, ()), "no depths are given"),
        (((), None, None, [128]), "no depths are given"),
        (([-1], None, None, ()), "a depth of -1 tokens"),
        (([8], 0, None, ()), "a longest ubatch of 0 tokens"),
        (([8], None, None, [0, -2]), "a tail of -2 tokens"),
        (([8], None, None, [2**31]), "longer than any context: give 2147483647 at most"),
    ):
        with pytest.raises(UsageError, match=message):
            Depths.of(*settings)


def log_probs(model: Path, kv_type: str, prefix: Path | None, tokens: list[int], ubatch: int) -> np.ndarray:
    """After each of the tokens, by IntactLlama itself, `ubatch` at a time; F64 [n_tokens, n_vocab]."""
    llama = IntactLlama(
        model, prefix, kv_type, tail=0, n_ctx=512, n_batch=ubatch, n_ubatch=ubatch, n_threads=2, logits_all=True
    )
    llama.eval(tokens)
    logits = llama.scores[: len(tokens)].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.filterwarnings("ignore")  # the model is the reference itself: it does not name one
def test_figures_are_those_of_the_runtime(smol: Smol) -> None:
    """Of a model whose weights are the reference's: all that differs is the cache."""
    with Vocabulary(smol.reference) as vocabulary:
        text = vocabulary.tokenize(default_text(), special=False)[:108]
    found = list(
        evaluation.evaluate(
            smol.reference, [smol.reference], smol.ikv, kv_types=["q4_0"], modes=["reference", "prompt"],
            texts=Texts(1, 20), depths=[60, 88], ubatch=128, kv_tails=[0], n_threads=2,
        )
    )  # fmt: skip
    assert [(r.mode, r.depth, r.way.ubatch) for r in found] == [
        ("reference", 60, None), ("reference", 88, None),
        ("prompt", 60, 16), ("prompt", 88, 16), ("prompt", 60, 128), ("prompt", 88, 128),
    ]  # fmt: skip
    target = log_probs(smol.reference, "f16", None, [*smol.tokens, *text], 128)[24:]
    for r in found:
        at = slice(r.depth, r.depth + 20)
        assert r.kld_by_token.shape == (1, 20) and r.nll_by_token.shape == (1, 19)
        if r.mode == "reference":
            nll = -target[at][np.arange(19), text[r.depth + 1 : r.depth + 20]]
            np.testing.assert_allclose(r.nll_by_token[0], nll, atol=0.02)
            continue
        assert r.way.ubatch is not None
        ours = log_probs(smol.reference, "q4_0", smol.ikv, [*smol.tokens, *text], r.way.ubatch)[24:]
        kld = (np.exp(target[at]) * (target[at] - ours[at])).sum(-1)
        # Of F16 weights: a last bit of an input makes others of thousands, in a 4-bit cache above all.
        assert r.kld[0] == pytest.approx(kld.mean(), rel=0.1)
        assert np.corrcoef(r.kld_by_token[0], kld)[0, 1] > 0.95


def test_each_text_begins_with_its_prefix_anew(smol: Smol) -> None:
    """Whatever the tail has left behind of it: the same text again has the same figures, to the last bit."""
    text = np.random.default_rng(0).integers(1000, 20000, 200).tolist()
    found = evaluation.evaluate(
        smol.reference, [smol.gguf], smol.ikv, kv_types=["q4_0"], modes=["reference", "plain"],
        texts=Texts(tokens=[text, text]), depths=[40, 190], kv_tails=[64], n_threads=2,
    )  # fmt: skip
    for r in found:
        assert r.kld[0] == r.kld[1] and r.nll[0] == r.nll[1], (r.mode, r.depth)


def test_the_tail_is_measured_as_a_reply_fills_it(smol: Smol) -> None:
    """Of a 4-bit cache behind 200 tokens: the longer the tail, the closer; one that holds all is as good as F16."""
    found = list(
        evaluation.evaluate(
            smol.reference, [smol.reference], smol.ikv, kv_types=["q4_0", "f16"], modes=["prompt"], texts=Texts(2, 24),
            depths=[200], kv_tails=[0, 32, 512], n_threads=2,
        )
    )  # fmt: skip
    assert [(r.kv_type, r.way.tail) for r in found] == [("q4_0", 0), ("q4_0", 32), ("q4_0", 512), ("f16", 0)]
    none, short, whole, exact = (metrics.summary(r.kld).mean for r in found)
    assert none > 2 * short > 20 * whole and whole < 1e-3 and exact < 1e-4


def test_the_tail_of_the_library_s_own_choice_is_named(smol: Smol) -> None:
    """And without depths there is none: a text at once would all be in it."""
    settings: dict[str, Any] = {"kv_types": ["q4_0", "q8_0"], "modes": ["prompt"], "n_threads": 2}
    texts = Texts(1, 16)
    at_depth = evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, texts=texts, depths=[8], **settings)
    tails = [r.way.tail for r in at_depth]
    assert tails[1] == 0 and tails[0] is not None and tails[0] > 0
    at_once = evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, texts=texts, **settings)
    assert [r.way for r in at_once] == [Way(None, 0)] * 2


def test_tables_and_json_tell_depths_apart() -> None:
    def made(mode: str, depth: int, way: Way, kld: float) -> Figures:
        both = np.array([[kld, kld], [2 * kld, 2 * kld]], np.float32)
        return Figures("m", "q4_0", mode, both, both < 0.3, both[:, :1] + 1, None, depth, way)

    rows = [made("reference", depth, Way(), 0) for depth in (512, 2048)]
    for tail in (0, 128):
        for mode, kld in (("plain", 0.2), ("prompt", 0.1)):
            rows += [made(mode, depth, Way(16, tail), kld + depth / 1e5) for depth in (512, 2048)]
    shown = _text(rows)
    first = shown.splitlines()[2].split()
    assert first[:4] == ["KV", "prefix", "depth", "tail"] and "ubatch" not in shown
    assert [line.split()[2] for line in shown.splitlines()[3:5]] == ["512", "2048"], "the reference at both"
    assert "± 0.0" in shown and shown.count("prompt - plain") == 4
    assert "ubatch" in _text([*rows, made("plain", 512, Way(512, 0), 0.3)])
    at_once = _text([made("plain", 0, Way(), 0.2)])
    assert "depth" not in at_once and "tail" not in at_once
    figures = json.loads(json.dumps(metrics.as_json(rows)))
    assert [figures["results"][i][key] for i, key in ((0, "ubatch"), (3, "depth"), (2, "kv_tail"), (6, "kv_tail"))] == [
        None, 2048, 0, 128
    ]  # fmt: skip
    assert [(d["depth"], d["kv_tail"]) for d in figures["differences"]] == [
        (512, 0), (2048, 0), (512, 128), (2048, 128)
    ]  # fmt: skip


def _text(rows: list[Figures]) -> str:
    from rich.console import Console

    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in tables.tables(rows):
        console.print(part)
    return console.export_text()


def test_what_cannot_be_measured_at_a_depth(smol: Smol) -> None:
    def ask(**settings: Any) -> None:
        list(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, **settings))

    short = r"2 chunks of 756 \(56 at a depth of 700\) need 1512: .* \(it is enough for 1\) .* smaller depths"
    with pytest.raises(IntactKVError, match=short):
        ask(texts=Texts(2, 56, text="The ferry left at noon. " * 150), depths=[100, 700])
    with pytest.raises(UsageError, match="8256 tokens behind the prefix of 24 .* smaller --depths"):
        ask(texts=Texts(1, 64), depths=[8192])
    with pytest.raises(UsageError, match="evaluate them without --depths"):
        ask(texts=Texts(1, 64, questions=[Question("Why?", ["So", "No"], 0, True)]), depths=[64])
    with pytest.raises(UsageError, match="a chunk of 40 tokens has none to measure behind 64"):
        ask(texts=Texts(tokens=[[1] * 40]), depths=[64])


def test_no_rounded_prefix_in_a_pair_of_exact_types(smol: Smol) -> None:
    kv_types = ["f16,f16", "f32,f16"]
    found = evaluation.evaluate(
        smol.reference, [smol.gguf], smol.ikv, kv_types=kv_types, modes=["rounded", "prompt"], texts=Texts(1, 8)
    )
    assert [(r.kv_type, r.mode) for r in found] == [(kv_type, "prompt") for kv_type in kv_types]


def test_the_command_at_depths(smol: Smol, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(smol.reference), str(smol.reference), "--prefix", str(smol.ikv), "--modes", "prompt"]
    command += ["--chunks", "1", "--tokens", "16", "--threads", "2", "--kv-type", "q8_0/q4_0"]
    assert main([*command, "--depths", "32,8", "--decode-batch", "8", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(r["kv_type"], r["depth"], r["ubatch"]) for r in rows] == [("q8_0/q4_0", 8, 8), ("q8_0/q4_0", 32, 8)]
    assert main([*command, "--depths", "far"]) == 2
    assert "--depths far: give whole numbers" in capsys.readouterr().err
    assert main([*command, "--ubatch", "512"]) == 2
    assert "give --depths too" in capsys.readouterr().err
