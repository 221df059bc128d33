"""Evaluation: its arithmetic, its ways to give the prefix, and that it finds what IntactKV changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from smol import Smol, smol  # noqa: F401

from intactkv_export import bindings, evaluate, prefix_file
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.runtime import IntactLlama, L

# ruff: noqa: F811  (pytest's fixtures are arguments of the same name)


def test_summary_and_paired_difference() -> None:
    made = evaluate.summary([1.0, 2.0, 3.0])
    assert made.mean == 2 and made.error == pytest.approx(1 / np.sqrt(3))
    paired = evaluate.difference([1.1, 2.1, 3.1], [1.0, 2.0, 3.0])
    assert paired.mean == pytest.approx(0.1) and paired.error < 1e-9, "the chunks' own spread does not count"


def state_of(llama: IntactLlama) -> bytes:
    data = (L.llama_cpp.ctypes.c_uint8 * L.llama_state_seq_get_size(llama.ctx, 0))()
    return bytes(data[: L.llama_state_seq_get_data(llama.ctx, data, len(data), 0)])


def test_a_state_without_intact_cells_is_one_that_never_had_any(smol: Smol) -> None:
    llama = IntactLlama(smol.gguf, smol.ikv, "q4_0", n_ctx=256, n_threads=2)
    llama.eval([*smol.tokens, 504, 6354])
    mixed = state_of(llama)
    ordinary = evaluate.without_intact_cells(mixed)
    assert len(mixed) > len(ordinary) > 26 * 30 * 2 * 192 * 0.5
    assert evaluate.without_intact_cells(ordinary) == ordinary
    data = (L.llama_cpp.ctypes.c_uint8 * len(ordinary)).from_buffer_copy(ordinary)
    assert L.llama_state_seq_set_data(llama.ctx, data, len(data), 0) == len(data)
    assert llama.intact_cells == 0 and state_of(llama) == ordinary


def test_first_token_is_the_prefix_of_bos(smol: Smol) -> None:
    ours, theirs = prefix_file.read(evaluate.first_token(prefix_file.read(smol.ikv))), prefix_file.read(smol.bos)
    assert ours.tokens == theirs.tokens and ours.manifest["bos_only"]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        np.testing.assert_allclose(a.K, b.K, rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(a.V, b.V, rtol=2e-3, atol=2e-3)


def test_a_model_is_at_no_distance_from_itself_and_a_prefix_shortens_it(smol: Smol) -> None:
    settings = {"n_chunks": 2, "n_tokens": 48, "n_threads": 2}
    itself = [smol.reference]
    (same,) = evaluate.evaluate(smol.reference, itself, smol.ikv, kv_types=["f16"], modes=["plain"], **settings)
    assert max(same.kld) < 1e-6 and same.top1 == [1.0, 1.0] and same.mode == "plain"
    found = {r.mode: r for r in evaluate.evaluate(smol.reference, [smol.gguf], smol.ikv, kv_types=["q4_0"], **settings)}
    assert list(found) == list(evaluate.MODES)
    assert len({tuple(r.kld) for r in found.values()}) == 4, "four different ways"
    gain = evaluate.difference(found["prompt"].kld, found["plain"].kld)
    assert gain.mean < 0 and 0.05 < evaluate.summary(found["prompt"].kld).mean < 1
    text = evaluate.table(list(found.values()))
    assert "prompt" in text and f"{gain.mean:.4f}" in text


def test_what_cannot_be_evaluated(smol: Smol, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sideways"):
        next(evaluate.evaluate(smol.reference, [smol.gguf], smol.ikv, modes=["sideways"]))
    with pytest.raises(IntactKVError, match="needs? 3072|need 3072"):
        next(evaluate.evaluate(smol.reference, [smol.gguf], smol.ikv, text="too short"))


def test_command_line(smol: Smol, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(smol.reference), str(smol.gguf), "--prefix", str(smol.ikv), "--modes", "bos", "--chunks", "2"]
    evaluate.main([*arguments, "--tokens", "16", "--threads", "2", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["mode"] == "bos" and row["kv_type"] == "q8_0" and len(row["kld"]) == 2


def test_bindings_see_no_intact_cell_after_rounding(smol: Smol, model: Callable[[str], Path]) -> None:
    settings = {"n_ctx": 256, "n_batch": 128, "n_threads": 2}
    student = evaluate._Evaluated(smol.gguf, smol.ikv, "q8_0", smol.tokens, settings)
    intact = student.log_probs([504, 6354])
    assert bindings.n_cells(student.llama.ctx) == 24
    student.round_prefix()
    rounded = student.log_probs([504, 6354])
    assert bindings.n_cells(student.llama.ctx) == 0
    np.testing.assert_allclose(np.exp(rounded).sum(-1), 1, rtol=1e-4)
    assert 0 < np.abs(intact - rounded).max() < 3
