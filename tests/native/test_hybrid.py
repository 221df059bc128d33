"""A hybrid architecture whose layers all are attention: llama.cpp gives it a hybrid memory with an empty recurrent
part. It carries a prefix as any other model does; with one recurrent layer it is refused."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import convert
from intactkv_export.errors import IntactKVError
from tests.support import lowlevel, tiny_ggufs
from tests.support.lowlevel import Context, L

ROPE = {"rope.scaling.finetuned": True}  # without it Granite's hybrids have no positions at all
TOKENS = [1, *(int(t) for t in np.random.default_rng(2).integers(3, tiny_ggufs.N_VOCAB, 59))]
N = 20


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hybrid") / "attention.gguf"
    return tiny_ggufs.write(path, "granitehybrid", n_head_kv=[2, 2], **ROPE)


@pytest.fixture(scope="module")
def weights(gguf: Path) -> Any:
    return lowlevel.load_model(gguf)


def context(weights: Any, kv: str, **params: Any) -> Context:
    return Context(weights, kv, **{"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, **params})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_prefix_saved_and_loaded(weights: Any) -> None:
    exact = context(weights, "f16")
    exact.decode(TOKENS[:N], 0)
    mixed, rounded = context(weights, "q4_0"), context(weights, "q4_0")
    assert mixed.restore(exact.save())
    assert mixed.n_intact() == N and mixed.attention() == "fused"
    rounded.decode(TOKENS[:N], 0)
    expected = exact.decode(TOKENS[N : N + 1], N)
    got, plain = (ctx.decode(TOKENS[N : N + 1], N) for ctx in (mixed, rounded))
    assert distance(got, expected) < distance(plain, expected)
    # token by token on reused graphs, and again from the saved state, in another sequence: the same bits
    saved = mixed.save()
    again = context(weights, "q4_0", n_seq_max=2, kv_unified=True)
    assert again.restore(saved, 1) and again.n_intact(1) == N
    for i, token in enumerate(TOKENS[N + 1 : N + 9]):
        one, other = mixed.decode([token], N + 1 + i), again.decode([token], N + 1 + i, seq=1)
        np.testing.assert_array_equal(one, other)


def test_cut_back_cleared_and_shifted(weights: Any) -> None:
    """What a recurrent part could not do, and an empty one must not hinder."""
    exact = context(weights, "f16")
    exact.decode(TOKENS[:N], 0)
    ctx = context(weights, "q8_0")
    assert ctx.restore(exact.save())
    first = ctx.decode(TOKENS[N:], N)
    assert L.llama_memory_seq_rm(ctx.memory, 0, N, -1)
    assert (L.llama_memory_seq_pos_min(ctx.memory, 0), L.llama_memory_seq_pos_max(ctx.memory, 0)) == (0, N - 1)
    assert ctx.n_intact() == N
    np.testing.assert_array_equal(ctx.decode(TOKENS[N:], N), first)
    assert L.llama_memory_seq_rm(ctx.memory, 0, N, -1)
    L.llama_memory_seq_add(ctx.memory, 0, 0, -1, 30)
    assert distance(ctx.decode(TOKENS[N:], N + 30), first) < 0.02  # RoPE is relative
    assert L.llama_memory_seq_rm(ctx.memory, -1, -1, -1)
    assert (ctx.n_intact(), L.llama_memory_seq_pos_max(ctx.memory, 0)) == (0, -1)
    fresh = context(weights, "q8_0")
    np.testing.assert_array_equal(ctx.decode(TOKENS, 0), fresh.decode(TOKENS, 0))


def test_convert_makes_a_prefix_and_a_recurrent_layer_is_refused(gguf: Path, tmp_path: Path) -> None:
    made = convert(gguf, tmp_path / "out", quant="Q8_0", bos_only=True, engine="llama")
    data = Path(made.prefix).read_bytes()
    ctx = context(lowlevel.load_model(made.outputs[0].path), "q8_0")
    load = L.llama_cpp._lib.intactkv_load
    load.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32]
    assert load(ctx.ptr, data, len(data), 0) == ctx.n_intact() == 1
    assert np.isfinite(ctx.decode(TOKENS[1:], 1)).all()

    mixed = tiny_ggufs.write(tmp_path / "mixed.gguf", "granitehybrid", n_head_kv=[0, 2], **ROPE)
    with pytest.raises(IntactKVError, match="'granitehybrid' cannot carry a prefix: it is a hybrid, part of its"):
        convert(mixed, tmp_path / "no", quant="Q8_0", bos_only=True)
    describe = L.llama_cpp._lib.intactkv_describe
    describe.argtypes, describe.restype = [ctypes.c_void_p], ctypes.c_char_p
    L.llama_cpp._lib.intactkv_error.restype = ctypes.c_char_p
    other = context(lowlevel.load_model(mixed), "q8_0")
    assert describe(other.ptr) is None
    assert b"it is a hybrid, part of its memory is a recurrent state" in L.llama_cpp._lib.intactkv_error()
