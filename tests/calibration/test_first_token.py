"""One trained cell for every prompt: the first token alone, long texts in pieces, extra cells, a prompt behind it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.calibration import calibrate, extra_cells, passes, targets, training
from intactkv_export.calibration.data import SHORT, Data, Source, Text
from intactkv_export.calibration.training import Settings
from intactkv_export.conversion import convert, prefix
from intactkv_export.errors import UsageError
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.log_probs import divergence, llama_log_probs

QUICK: dict[str, Any] = {"steps": 4, "batch": 2, "seq_len": 16, "sequences": 16, "lr": 3e-2}
PROMPTS = ("You guard a gate.", "Sing.")


@pytest.fixture(scope="module")
def made(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """convert --calibrate without a system prompt, of a random-weight Llama; its prefix is trained and embedded."""
    reference = models["llama-gqa"].with_suffix(".gguf")
    out = tmp_path_factory.mktemp("first") / "tiny"
    return reference, convert(reference, out, quant="Q4_0", calibrate={**QUICK, "steps": 40})


def test_convert_calibrates_the_first_token(made: Any) -> None:
    _, result = made
    prefix = ikv.read(result.outputs[0].path)
    assert prefix.manifest["bos_only"] and len(prefix.tokens) == 1 and prefix.embedded
    about = result.calibrated["Q4_0"]
    assert about["after"] < about["before"] and [line["depth"] for line in about["by_depth"]] == [0]
    assert prefix.manifest["calibrated"]["first_token"] is None and prefix.manifest["calibrated"]["lr"] == 3e-2


def test_a_prompt_begins_with_the_trained_first_token(made: Any, tmp_path: Path) -> None:
    """And where no step is made the reference's own rows are the result."""
    reference, result = made
    gguf = result.outputs[0].path
    first = ikv.read(gguf)
    start = convert(reference, tmp_path / "prompt", quant="Q8_0", system_prompt=PROMPTS[0], embed=False).prefix
    settings = {**QUICK, "prefix": start, "out": tmp_path / "tuned.ikv"}
    seen: list[Any] = []
    original = training.train

    def watched(student: Any, K: Any, V: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((K, V, kwargs["before"]))
        return original(student, K, V, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "train", watched)
        calibrated = calibrate(reference, gguf, **{**settings, "steps": 0})
    K, _, (before, _, _) = seen[0]
    own, prompt = torch_model.prefix_rows(first)[0], torch_model.prefix_rows(ikv.read(start))[0]
    assert all(
        np.array_equal(a[0], b[0]) and np.array_equal(a[1:], c[1:]) for a, b, c in zip(K, own, prompt, strict=True)
    )
    assert all(np.array_equal(a, c) for a, c in zip(before, prompt, strict=True))
    assert calibrated.manifest["first_token"] == first.sha256
    kept = torch_model.prefix_rows(ikv.read(calibrated.out))[0]
    assert all(np.array_equal(a, c) for a, c in zip(kept, prompt, strict=True))


def test_a_calibrated_prompt_begins_as_it_is(made: Any, tmp_path: Path) -> None:
    """Its rows were trained together: the model's own first token would take the place of a trained one."""
    reference, result = made
    gguf = result.outputs[0].path
    start = convert(reference, tmp_path / "prompt", quant="Q8_0", system_prompt=PROMPTS[0], embed=False).prefix
    once = calibrate(reference, gguf, prefix=start, out=tmp_path / "once.ikv", **QUICK)
    twice = calibrate(reference, gguf, prefix=once.out, out=tmp_path / "twice.ikv", **{**QUICK, "steps": 1})
    assert once.manifest["first_token"] == ikv.read(gguf).sha256 and twice.manifest["first_token"] is None


def test_a_new_prefix_replaces_a_trained_one_only_by_name(made: Any, tmp_path: Path) -> None:
    reference, result = made
    gguf, beside = shutil.copy(result.outputs[0].path, tmp_path / "tiny.gguf"), tmp_path / "tiny.ikv"
    trained = ikv.read(gguf)
    with pytest.raises(UsageError, match="calibrated prefix, which this one would replace"):
        prefix(reference, gguf, bos_only=True)
    assert ikv.read(gguf).data == trained.data and not beside.exists()
    prefix(reference, gguf, system_prompt=PROMPTS[0], out=tmp_path / "other.ikv")
    assert ikv.read(gguf).data == trained.data
    prefix(reference, gguf, system_prompt=PROMPTS[0])  # a prompt comes beside the first token, as the model's own
    assert ikv.read(gguf).data == beside.read_bytes() and ikv.read(gguf, "first-token").data == trained.data
    prefix(reference, gguf, system_prompt=PROMPTS[1])
    assert ikv.read(gguf).data == beside.read_bytes() and ikv.read(gguf, "first-token").data == trained.data
    prefix(reference, gguf, system_prompt=PROMPTS[0], out=tmp_path / "other.ikv", embed=True)
    assert ikv.read(gguf).data == beside.read_bytes() and ikv.read(gguf, "other").tokens != ikv.read(beside).tokens
    beside.write_bytes(trained.data)
    with pytest.raises(UsageError, match="tiny.ikv holds a calibrated prefix, which this one would replace"):
        prefix(reference, gguf, system_prompt=PROMPTS[1])


def test_extra_cells_are_trained_and_loaded(made: Any, tmp_path: Path) -> None:
    reference, result = made
    gguf = result.outputs[0].path
    with pytest.MonkeyPatch.context() as patch:
        # What is best is not the question here: random weights have no use for more cells.
        values = iter(range(100, 0, -1))
        patch.setattr(training, "_held_out", lambda *_: (float(next(values)), [1.0]))
        calibrated = calibrate(reference, gguf, out=tmp_path / "cells.ikv", cells=3, **QUICK)
    made_of = ikv.read(calibrated.out)
    assert made_of.n_extra == 3 and made_of.manifest["extra_cells"] == 3 and "3 extra cells" in calibrated.contents
    llama = IntactLlama(gguf, calibrated.out, n_ctx=64)
    llama.eval([*made_of.tokens, 7, 8])
    assert llama.intact_cells == 4 and llama.prefix_stats["extra_cells"] == 3
    llama.close()
    chunks = [list(range(20, 44)), list(range(60, 84))]
    rows = llama_log_probs(gguf, calibrated.out, "f16", made_of.tokens, chunks)
    model = torch_model.load(gguf, round_activations=True)
    K, V = torch_model.prefix_rows(made_of)
    with torch.no_grad():
        logits = model.forward(chunks, model.cache(K, V, "f16", batch=2, extra=3))
    assert divergence(torch.log_softmax(logits, -1), rows) < 1e-4


def test_extra_cells_that_do_not_pay_are_not_kept(made: Any, tmp_path: Path) -> None:
    reference, result = made
    calibrated = calibrate(
        reference, result.outputs[0].path, out=tmp_path / "none.ikv", cells=2, **{**QUICK, "steps": 0}
    )
    assert ikv.read(calibrated.out).n_extra == 0 and calibrated.manifest["best_step"] == 0
    own = calibrate(
        reference, result.outputs[0].path, out=tmp_path / "own.ikv", cells=2, seq_len=16, sequences=16, steps=0
    )
    assert own.manifest["lr"] == training.peak(Settings(), own.before, 3), "of the rows that were trained, not kept"
    assert calibrated.contents == "1 token"


def test_extra_cells_begin_as_real_text(made: Any) -> None:
    """V is the text's; K has the text's length and lies as at position 0; a short text is read again."""
    reference, _ = made
    model = torch_model.load(reference)
    K, V = extra_cells.of_text(model, [1], [30, 40], 5)
    assert [rows.shape for rows in K] == [rows.shape for rows in V] == [(5, model.n_head_kv, model.head_dim)] * len(K)
    with torch.no_grad():
        cache = torch_model.layers.empty_cache(model)
        model.forward([[1, 30, 40, 30, 40, 30]], cache)
        rows, values = torch_model.layers.cached_rows(model, cache, 6)
    assert all(np.allclose(a, b[1:].float(), atol=1e-6) for a, b in zip(V, values, strict=True))
    for a, b in zip(K, rows, strict=True):
        assert np.allclose(np.linalg.norm(a, axis=-1), b[1:].float().norm(dim=-1), rtol=1e-3)
    assert np.allclose(K[0][0], K[0][2], atol=5e-3) and not np.allclose(rows[0][1], rows[0][3], atol=5e-3)


def long_task(reference: Any, n_tokens: int) -> Data:
    sequences = np.random.default_rng(2).integers(6, 490, (4, n_tokens)).astype(np.int32)
    wanted = targets.make(reference, [1], sequences.tolist(), top_k=64)
    return Data([Text(tokens, wanted[i]) for i, tokens in enumerate(sequences)], [0])


@pytest.mark.parametrize(("kv_type", "tail"), [("q8_0", 0), ("q4_0", 6)])
def test_pieces_give_what_the_whole_gives(made: Any, monkeypatch: pytest.MonkeyPatch, kv_type: str, tail: int) -> None:
    """The held-out divergence, to the last bits; and a gradient that points the same way, though not through cells of
    the pieces before."""
    reference, result = made
    prefix = ikv.read(result.prefix)
    model, data = torch_model.load(result.outputs[0].path), long_task(torch_model.load(reference), 48)
    settings = Settings(kv_type=(kv_type, kv_type), tail=tail)
    K, V = (torch.from_numpy(np.stack(x)) for x in torch_model.prefix_rows(prefix))
    whole = training._held_out(model, (K, V, []), 1, data, settings)
    gradients = []
    for size in (48, 16):
        monkeypatch.setattr(passes, "PIECE", size)
        run = training._Training.start(model, (list(K.numpy()), list(V.numpy())), (list(K), list(V)), [], 1, settings)
        for loss in training._losses(model, run, data, [1, 2], settings, None, ()):
            loss.backward()
        gradients.append(torch.cat([x.grad.flatten() for x in run.parameters]))
    assert training._held_out(model, (K, V, []), 1, data, settings)[0] == pytest.approx(whole[0], rel=1e-4)
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.8


def most_kept(losses: Any) -> int:
    """Values that are kept for a backward pass, of the loss that needs most."""
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    most = 0
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        for loss in losses:
            loss.backward()
            most = max(most, sum(kept))
            kept.clear()
    return most


def test_memory_does_not_grow_with_the_text(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a backward pass needs, a piece is kept at a time."""
    reference, result = made
    model, exact = torch_model.load(result.outputs[0].path), torch_model.load(reference)
    rows = torch_model.prefix_rows(ikv.read(result.prefix))
    most = {}
    for n_tokens, piece in ((32, 16), (128, 16), (128, 128)):
        monkeypatch.setattr(passes, "PIECE", piece)
        data, run = long_task(exact, n_tokens), training._Training.start(model, rows, rows, [], 1, Settings())
        most[n_tokens, piece] = most_kept(training._losses(model, run, data, [1], Settings(), None, ()))
    assert most[128, 16] < 1.25 * most[32, 16], "the weights count; keys and values grow, activations do not"
    assert most[128, 128] > 1.5 * most[128, 16]


def test_half_of_the_tokens_are_in_long_texts() -> None:
    (n_short, short), (n_long, long) = Source("self", 160, 1024, 0).lengths()
    assert (n_short, short, n_long, long) == (128, SHORT, 32, 1024)
    assert Source("self", 160, 256, 0).lengths() == [(160, 256)]
    assert Source("self", 160, 1024, 0, mixed=False).lengths() == [(160, 1024)]
    assert Source("self", 3, 1024, 0).lengths() == [(3, 1024)], "too few for both"


def test_a_step_has_texts_of_one_length_and_as_many_tokens() -> None:
    texts = [Text(np.zeros(n, np.int32), None) for n in [8] * 9 + [32] * 4]
    data = Data.of([texts[:9], texts[9:]])
    assert data.held_out == [0, 9] and data.n_tokens(data.held_out) == 40
    step = passes.steps(data, 4, 0)
    seen = [step(i) for i in range(20)]
    assert all(len({len(texts[i].tokens) for i in index}) == 1 for index in seen)
    assert {sum(len(texts[i].tokens) for i in index) for index in seen} == {32}
    assert {i for index in seen[:5] for i in index} == set(data.trained), "an epoch has every text"
    assert [passes.steps(data, 4, 0)(i) for i in (7, 3, 7)] == [seen[7], seen[3], seen[7]]
    assert [passes.steps(data, 4, 1)(i) for i in range(20)] != seen
