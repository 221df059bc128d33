"""Evaluation: its arithmetic, its ways to give the prefix, that it finds what IntactKV changes, and the command."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import evaluation, extras
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation import SELF, Texts, metrics, tables, target
from intactkv_export.evaluation import model as evaluated
from intactkv_export.evaluation import modes as given
from intactkv_export.evaluation.metrics import Figures
from intactkv_export.evaluation.model import Evaluated
from intactkv_export.evaluation.multiple_choice import Question
from intactkv_export.libllama import bindings, state
from intactkv_export.models.reference import locate
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import IntactLlama, L
from intactkv_export.texts import default_text
from intactkv_export.work.stages import Stages
from tests.support import extra_cells
from tests.support.lowlevel import Context, load_model
from tests.support.smol import Smol

SETTINGS = {"texts": Texts(2, 48), "n_threads": 2}
QUESTIONS = [
    Question("What is the capital of France?", ["Paris", "Of running the"], 0, True),
    Question("Say hello.", ["Seven because banana", "Hello"], 1, False),
]


@pytest.fixture(scope="module")
def results(smol: Smol) -> list[Figures]:
    """Of every mode of a quantized model behind a q4_0 cache, and of its reference."""
    found = evaluation.evaluate(
        smol.reference, [smol.gguf], smol.ikv, kv_types=["q4_0"], texts=Texts(2, 48, questions=QUESTIONS), n_threads=2
    )  # fmt: skip
    return list(found)


def made(mode: str, kld: Any, nll: Any = ((1.0, 2.0), (3.0, 4.0))) -> Figures:
    kld = np.array(kld, np.float32)
    return Figures("m", "q8_0", mode, kld, kld < 0.3, np.array(nll, np.float32))


def test_mean_and_paired_difference() -> None:
    found = evaluation.summary([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.error == pytest.approx(1 / np.sqrt(3))
    paired = evaluation.difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert paired.mean == pytest.approx(0.1) and paired.error < 1e-9, "the chunks' own spread does not count"
    assert f"{paired:+.2f}" == "+0.10 ± 0.00" and str(metrics.summary([0.5])) == "0.5000"
    assert not paired.within_noise and metrics.Estimate(-0.19, 0.1).within_noise
    assert not metrics.Estimate(0.21, 0.1).within_noise and metrics.summary([0.1]).within_noise, "one chunk: unknown"
    assert metrics.Estimate(0.0, 0.0).within_noise


def test_statistics_against_numpy() -> None:
    random = np.random.default_rng(0)
    kld, nll = random.gamma(1, 0.1, (6, 40)).astype(np.float32), random.gamma(2, 1, (6, 39)).astype(np.float32)
    plain, prompt = made("plain", 2 * kld, nll + 0.1), made("prompt", kld, nll)
    assert prompt.percentile(99) == pytest.approx(np.quantile(kld, 0.99)) and prompt.percentile(100) == kld.max()
    chunks = nll.mean(1)
    assert prompt.perplexity.mean == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    assert prompt.perplexity.error == pytest.approx(np.exp(nll.mean()) * chunks.std(ddof=1) / np.sqrt(6), rel=1e-5)
    (gain,) = metrics.differences([plain, prompt])
    by_chunk = -kld.mean(1)
    assert gain.a is prompt and gain.kld.mean == pytest.approx(by_chunk.mean(), rel=1e-6)
    assert gain.kld.error == pytest.approx(by_chunk.std(ddof=1) / np.sqrt(6), rel=1e-5)
    assert gain.log_perplexity.mean == pytest.approx(-0.1, rel=1e-5) and not gain.log_perplexity.within_noise
    assert gain.top1.mean == pytest.approx((kld < 0.3).mean() - (2 * kld < 0.3).mean())
    as_json = json.loads(json.dumps(metrics.as_json([plain, prompt])))
    assert as_json["results"][1]["kld"]["median"] == pytest.approx(np.median(kld))
    np.testing.assert_allclose(as_json["results"][0]["kld"]["by_token"], 2 * kld, rtol=1e-5)
    assert as_json["differences"][0]["kld"]["within_noise"] is False


def test_differences_are_of_the_same_model_and_cache() -> None:
    rows = [made(mode, [[0.1], [0.2]]) for mode in ("plain", "rounded", "prompt", "calibrated")]
    rows += [Figures("m", "f16", "bos", *(getattr(rows[0], n) for n in ("kld_by_token", "same_top", "nll_by_token")))]
    pairs = [(d.a.mode, d.b.mode) for d in metrics.differences(rows)]
    assert pairs == [pair for pair in metrics.PAIRS if "bos" not in pair]


def state_of(llama: IntactLlama) -> bytes:
    data = (L.llama_cpp.ctypes.c_uint8 * L.llama_state_seq_get_size(llama.ctx, 0))()
    return bytes(data[: L.llama_state_seq_get_data(llama.ctx, data, len(data), 0)])


def test_a_state_without_intact_cells_is_one_that_never_had_any(smol: Smol) -> None:
    llama = IntactLlama(smol.gguf, smol.ikv, "q4_0", n_ctx=256, n_threads=2)
    llama.eval([*smol.tokens, 504, 6354])
    mixed = state_of(llama)
    ordinary = state.without_intact_cells(mixed)
    assert len(mixed) > len(ordinary) > 26 * 30 * 2 * 192 * 0.5
    assert state.without_intact_cells(ordinary) == ordinary
    data = (L.llama_cpp.ctypes.c_uint8 * len(ordinary)).from_buffer_copy(ordinary)
    assert L.llama_state_seq_set_data(llama.ctx, data, len(data), 0) == len(data)
    assert llama.intact_cells == 0 and state_of(llama) == ordinary


def test_first_token_is_the_prefix_of_bos(smol: Smol) -> None:
    ours, theirs = ikv.read(given.first_token(ikv.read(smol.ikv))), ikv.read(smol.bos)
    assert ours.tokens == theirs.tokens and ours.manifest["bos_only"]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        np.testing.assert_allclose(a.K, b.K, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(a.V, b.V, rtol=2e-3, atol=2e-3)


def test_one_context_for_all_modes_gives_what_fresh_ones_give(smol: Smol) -> None:
    prefix = ikv.read(smol.ikv)
    settings = {"n_ctx": 256, "n_batch": 128, "n_threads": 2}
    chunk = [504, 6354, 28, 314, 260]

    def seen(model: Evaluated) -> tuple[np.ndarray, int]:
        rows = np.concatenate([got for _, got in model.log_probs(chunk)])
        return rows, bindings.n_cells(model.llama.ctx)

    ways: list[tuple[bytes | None, bool]] = [(None, False), (prefix.data, True), (prefix.data, False), (None, False)]
    one = Evaluated(smol.gguf, "q8_0", prefix.tokens, settings)
    for data, rounded in ways:
        one.begin(data, rounded)
        fresh = Evaluated(smol.gguf, "q8_0", prefix.tokens, settings)
        fresh.begin(data, rounded)
        (ours, n_ours), (theirs, n_theirs) = seen(one), seen(fresh)
        np.testing.assert_array_equal(ours, theirs)
        assert n_ours == n_theirs == (24 if data and not rounded else 0)
        np.testing.assert_allclose(np.exp(ours).sum(-1), 1, rtol=1e-4)
    whole = IntactLlama(smol.gguf, smol.ikv, "q8_0", n_ctx=256, n_batch=128, n_threads=2, logits_all=True)
    whole.eval([*prefix.tokens, *chunk])
    one.begin(prefix.data)
    np.testing.assert_allclose(seen(one)[0], evaluated._log_softmax(whole.scores[24:29]), atol=1e-3)


def test_a_model_is_at_no_distance_from_itself(smol: Smol) -> None:
    itself = [smol.reference]
    source, same = evaluation.evaluate(smol.reference, itself, smol.ikv, kv_types=["f16"], modes=["reference", "plain"],
                                     **SETTINGS)  # fmt: skip
    assert (source.mode, same.mode) == ("reference", "plain")
    assert np.abs(same.kld_by_token).max() == 0 and same.same_top.all() and same.nll == source.nll


def test_perplexity_is_that_of_the_reference_s_logits(smol: Smol, results: list[Figures]) -> None:
    context = Context(load_model(smol.reference), "f16")
    llama = IntactLlama(smol.reference, None, "f16", n_ctx=64)
    text = llama.tokenize(default_text().encode(), add_bos=False)[:48]
    context.decode(smol.tokens, 0)
    logits = context.decode(text, 24).astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_probs[np.arange(47), text[1:]]
    assert results[0].mode == "reference"
    np.testing.assert_allclose(results[0].nll_by_token[0], expected, atol=1e-4)


def test_a_prefix_shortens_the_distance(results: list[Figures]) -> None:
    found = {r.mode: r for r in results}
    assert list(found) == ["reference", "plain", "rounded", "bos", "prompt"]
    assert len({tuple(r.kld) for r in results}) == 5, "different ways"
    gain = evaluation.difference(found["prompt"].kld, found["plain"].kld)
    assert gain.mean < 0 and 0.05 < evaluation.summary(found["prompt"].kld).mean < 1
    for r in results:
        assert r.kld_by_token.shape == r.same_top.shape == (2, 48) and r.nll_by_token.shape == (2, 47)
        assert r.kld_by_token.min() > -1e-4 and r.answers is not None and r.answers.acc.all(), r.mode


def test_a_calibrated_prefix_is_compared_with_what_it_began_as(smol: Smol, tmp_path: Path) -> None:
    prefix = ikv.read(smol.ikv)
    rows = [{x.il: getattr(x, name) for x in prefix.layers} for name in ("K", "V")]
    rows[1] = {il: (v * np.float16(1.05)).astype(np.float16) for il, v in rows[1].items()}
    manifest = {key: prefix.manifest[key] for key in prefix.manifest.keys() - {"format", "tokens", "model"}}
    manifest["calibrated"] = {"objective": "kl"}
    tuned = tmp_path / "tuned.ikv"
    tuned.write_bytes(ikv.build(prefix.manifest["model"], prefix.tokens, *rows, manifest))
    modes = {"kv_types": ["q8_0"], "modes": ["prompt", "calibrated"]}
    found = list(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, calibrated=tuned, **modes, **SETTINGS))
    assert [r.mode for r in found] == ["prompt", "calibrated"] and found[0].kld != found[1].kld
    work, located = Stages(tmp_path, None), locate(smol.reference)
    alone = given.find_given(smol.gguf, tuned, None, work, located, located.path)
    assert alone.data["calibrated"] == tuned.read_bytes() and alone.prefix.manifest["calibrated"] is None
    for again, began in zip(alone.prefix.layers, prefix.layers, strict=True):
        np.testing.assert_allclose(again.V, began.V, rtol=0, atol=4e-3 * np.abs(began.V).max())
    with pytest.raises(IntactKVError, match="of the same prompt"):
        next(evaluation.evaluate(smol.reference, [smol.gguf], smol.bos, calibrated=tuned))
    with pytest.raises(UsageError, match="'calibrated': there is no such prefix"):
        next(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, modes=["calibrated"]))


def test_a_calibrated_prefix_with_extra_cells(smol: Smol, tmp_path: Path) -> None:
    """Of the same tokens as the uncalibrated one; the text fills the context that both would have without them."""
    tuned = extra_cells.write(smol.ikv, smol.reference, tmp_path / "tuned.ikv").source
    texts, modes = Texts(1, 256 - 24), {"kv_types": ["q8_0"], "modes": ["bos", "prompt", "calibrated"], "n_threads": 2}
    settings = {"calibrated": tuned, "texts": texts, **modes}
    found = list(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, **settings))
    assert [r.mode for r in found] == ["bos", "prompt", "calibrated"] and len({tuple(r.kld) for r in found}) == 3
    # given as the prefix itself, though nothing says that it was calibrated: then it is "prompt"
    whole = given.find_given(smol.gguf, tuned, None, Stages(tmp_path, None), locate(smol.reference), smol.reference)
    assert (whole.n_extra, whole.n_cells) == (16, 40) and whole.tokens == smol.tokens
    bos = ikv.read(whole.data["bos"] or b"")
    assert (bos.n_extra, bos.n_cells) == (0, 1) and "extra_cells" not in bos.manifest


def test_text_that_the_reference_writes(smol: Smol) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    stages: list[str] = []
    (found,) = evaluation.evaluate(
        smol.reference, [smol.gguf], smol.ikv, modes=["prompt"], texts=Texts(2, 24, text=SELF),
        n_threads=2, progress=lambda stage, done, total, note="": stages.append(stage),
    )  # fmt: skip
    assert found.kld_by_token.shape == (2, 24) and 0 < evaluation.summary(found.kld).mean < 1
    assert "sample conversations" in stages and "smol q8_0 prompt" in stages


def test_a_hugging_face_reference(smol: Smol, hf_dir: Path) -> None:
    stages: list[str] = []
    source, found = evaluation.evaluate(
        hf_dir, [smol.gguf], smol.ikv, modes=["reference", "prompt"], **SETTINGS,
        progress=lambda stage, done, total, note="": stages.append(stage),
    )  # fmt: skip
    (same,) = evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, modes=["prompt"], **SETTINGS)
    assert stages[0] == "convert to GGUF" and source.model == "hf"
    np.testing.assert_allclose(found.kld, same.kld, rtol=0.02)


def test_what_cannot_be_evaluated(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="sideways"):
        next(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, modes=["sideways"]))
    with pytest.raises(IntactKVError, match="no model at nowhere.gguf"):
        next(evaluation.evaluate(smol.reference, [smol.gguf, "nowhere.gguf"], smol.ikv))
    with pytest.raises(IntactKVError, match="needs 19660.8 GB .* TMPDIR"):
        target._room(smol.ikv, (100000, 1000, 49152))
    with pytest.raises(UsageError, match="measure nothing"):
        Texts(n_tokens=1)
    with pytest.raises(IntactKVError, match="need 3072"):
        next(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, texts=Texts(text="too short")))
    with pytest.raises(UsageError, match="F16.gguf has no prefix"):
        next(evaluation.evaluate(smol.reference, [smol.reference]))
    with pytest.raises(UsageError, match="is quantized"):
        next(evaluation.evaluate(smol.gguf, [smol.gguf], smol.ikv))
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        next(evaluation.evaluate(smol.reference, [smol.gguf], smol.ikv, texts=Texts(text=SELF)))


def test_tables(results: list[Figures]) -> None:
    from rich.console import Console

    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in tables.tables(results):
        console.print(part)
    text = console.export_text()
    prompt = next(r for r in results if r.mode == "prompt")
    gain = next(d for d in metrics.differences(results) if d.a.mode == "prompt" and d.b.mode == "plain")
    for part in (str(metrics.summary(prompt.kld)), f"{gain.kld.mean:+.4f}", "reference", "acc of 2", "within noise"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intactkv_export", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_the_command(smol: Smol, tmp_path: Path) -> None:
    text, questions = tmp_path / "text.txt", tmp_path / "questions.jsonl"
    text.write_text("The ferry left at noon, and nobody waved. " * 20)
    questions.write_text('{"query": "Say hello.", "choices": ["Hello", "Seven of the"], "gold": 0}\n')
    small = [smol.reference, smol.gguf, "--chunks", 2, "--tokens", 16, "--threads", 2, "--text", text]
    shown = run(*small, "--prefix", smol.ikv, "--kv-type", "f16,q8_0", "--modes", "plain,bos", "--tasks", questions)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("bos - plain") == 2 and "\x1b" not in shown.stdout and "acc of 1" in shown.stdout
    assert "smol q8_0 bos ..." in shown.stderr.splitlines()
    as_json = run(*small, "--prefix", smol.ikv, "--kv-type", "q8_0", "--modes", "bos", "--json")
    assert as_json.stderr == ""
    (row,) = json.loads(as_json.stdout)["results"]
    assert row["mode"] == "bos" and row["kv_type"] == "q8_0" and len(row["kld"]["by_chunk"]) == 2
    for arguments, code, reason in (
        ([*small, "--prefix", smol.ikv, "--modes", "sideways"], 2, "no mode 'sideways'"),
        ([*small, "--prefix", smol.ikv, "--kv-type", "q9"], 2, "q9"),
        ([*small, "--prefix", smol.ikv, "--tasks", tmp_path / "none.jsonl"], 2, "none.jsonl"),
        ([*small[:-1], tmp_path / "none.txt"], 2, "none.txt"),
        ([smol.reference, smol.reference], 2, "has no prefix"),
    ):
        failed = run(*arguments)
        assert failed.returncode == code and reason in failed.stderr.splitlines()[-1], failed.stderr
        assert failed.stdout == ""


def test_a_terminal_gets_a_bar_and_styles(smol: Smol) -> None:
    arguments = ["eval", smol.reference, smol.gguf, "--prefix", smol.ikv, "--modes", "plain", "--kv-type", "q8_0"]
    arguments += ["--chunks", "2", "--tokens", "16", "--threads", "2"]
    out = bytearray()
    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "intactkv_export", *map(str, arguments)])
    try:
        while data := os.read(fd, 4096):
            out.extend(data)
    except OSError:  # the other end is closed
        pass
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and b"\x1b[" in out and "━".encode() in out
