"""A hybrid architecture whose layers all are attention: llama.cpp gives it a hybrid memory with an empty recurrent
part. It carries a prefix as any other model does, in a file of format 1. With recurrent layers: test_recurrent.py."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import convert
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv, inspection
from tests.support import lowlevel, tiny_ggufs
from tests.support.lowlevel import Context, L

ROPE = {"rope.scaling.finetuned": True}  # without it Granite's hybrids have no positions at all
TOKENS = [1, *(int(t) for t in np.random.default_rng(2).integers(3, tiny_ggufs.N_VOCAB, 59))]
N = 20
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"


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


def test_convert_makes_a_prefix(gguf: Path, tmp_path: Path) -> None:
    made = convert(gguf, tmp_path / "out", quant="Q8_0", bos_only=True, engine="llama")
    data = Path(made.prefix).read_bytes()
    assert ikv.read(data).manifest["format"] == 1
    ctx = context(lowlevel.load_model(made.outputs[0].path), "q8_0")
    load = L.llama_cpp._lib.intactkv_load
    load.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int32]
    assert load(ctx.ptr, data, len(data), 0) == ctx.n_intact() == 1
    assert np.isfinite(ctx.decode(TOKENS[1:], 1)).all()


def test_convert_one_with_recurrent_layers(tmp_path: Path) -> None:
    """Whole, and its first token alone, whose state is the one after it; both loaded by IntactLlama and inspected."""
    mixed = tiny_ggufs.write(
        tmp_path / "mixed.gguf", "granitehybrid", n_head_kv=[0, 2, 0], chat_template=TEMPLATE, **ROPE
    )
    made = convert(mixed, tmp_path / "out", quant="Q8_0", system_prompt="Be brief.", engine="llama", embed=True)
    prefix = ikv.read(made.prefix)
    assert prefix.manifest["format"] == 2 and sorted(prefix.states) == [0, 2] and len(prefix.tokens) > 9
    text = " ".join(" ".join(line.plain for line in inspection.report(prefix, None, None)).split())
    assert "2 layers, 0 to 2: 1,632 values of the convolution and 8,192 values of the recurrence, F32" in text
    shown = inspection.as_json(prefix)
    assert [x["il"] for x in shown["states"]] == [0, 2] and len(shown["layers"]) == 1
    bos = ikv.read(convert(mixed, tmp_path / "bos", quant="Q8_0", bos_only=True).prefix)
    ctx, plain = (context(lowlevel.load_model(mixed), "f32") for _ in range(2))
    assert bindings.load(ctx.ptr, bos.data) == 1
    plain.decode(bos.tokens, 0)
    assert distance(ctx.decode(TOKENS[1:], 1), plain.decode(TOKENS[1:], 1)) < 1e-4


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ikv.Prefix]:
    """A model with recurrent layers and its prefix."""
    root = tmp_path_factory.mktemp("intact")
    mixed = tiny_ggufs.write(root / "mixed.gguf", "granitehybrid", n_head_kv=[0, 2, 0], chat_template=TEMPLATE, **ROPE)
    made = convert(mixed, root / "out", quant="Q8_0", system_prompt="Be brief.", engine="llama")
    return made.outputs[0].path, ikv.read(made.prefix)


def logits_of(llama: Any) -> np.ndarray:
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


def test_intact_llama_gives_all_of_it_or_nothing(converted: tuple[Path, ikv.Prefix]) -> None:
    from intactkv_export.runtime import IntactLlama

    path, prefix = converted
    llama = IntactLlama(path, prefix, n_ctx=256)
    tokens = [*prefix.tokens, *TOKENS[1:30]]
    by_hand = context(lowlevel.load_model(path), "q8_0", n_ubatch=128)
    bindings.load(by_hand.ptr, prefix.data)
    want = by_hand.decode(TOKENS[1:30], len(prefix.tokens))[-1]
    llama.eval(tokens)
    assert llama.prefix_stats["loads"] == 1 and distance(logits_of(llama), want) < 1e-5
    first = logits_of(llama)
    # back into the middle: there is no way back but from the beginning, behind the prefix again
    llama.n_tokens = len(prefix.tokens) + 4
    llama.eval(tokens[llama.n_tokens :])
    assert llama.prefix_stats["loads"] == 2
    np.testing.assert_array_equal(logits_of(llama), first)
    # and from a state, also one that is saved where the sequence went back to
    state = llama.save_state()
    llama.eval(TOKENS[1:5])
    after = logits_of(llama)
    llama.load_state(state)
    llama.eval(TOKENS[1:5])
    np.testing.assert_array_equal(logits_of(llama), after)
    llama.n_tokens = len(tokens)
    back = llama.save_state()
    llama.reset()
    llama.load_state(back)
    llama.eval(TOKENS[1:5])
    assert distance(logits_of(llama), after) < 1e-5
    # it leaves the prefix before its end: as without one
    other = [*prefix.tokens[:-1], 3, *TOKENS[1:30]]
    llama.reset()
    llama.eval(other)
    plain = IntactLlama(path, None, n_ctx=256)
    plain.eval(other)
    np.testing.assert_array_equal(logits_of(llama), logits_of(plain))
    # it ends with the prefix: the logits are those of computing it, and what follows has the prefix
    llama.reset()
    llama.eval(prefix.tokens)
    plain.reset()
    plain.eval(prefix.tokens)
    np.testing.assert_array_equal(logits_of(llama), logits_of(plain))
    llama.eval(TOKENS[1:30])
    assert distance(logits_of(llama), first) < 1e-5
    # and makes room behind it
    assert llama.shift_context(10) == 10
    assert llama.n_tokens == len(tokens) - 10
    assert distance(logits_of(llama), by_hand_of(by_hand, prefix, TOKENS[11:30])) < 1e-5


def by_hand_of(ctx: Context, prefix: ikv.Prefix, text: list[int]) -> np.ndarray:
    bindings.load(ctx.ptr, prefix.data)
    return ctx.decode(text, len(prefix.tokens))[-1]


def test_evaluated_behind_it(converted: tuple[Path, ikv.Prefix], tmp_path: Path) -> None:
    """Texts and choices one after the other: each begins where the prefix ends."""
    from intactkv_export.evaluation.model import Evaluated

    path, prefix = converted
    model = Evaluated(path, "q8_0", prefix.tokens, {"n_ctx": 256})
    for data, rounded in ((None, False), (prefix.data, False), (prefix.data, True)):
        model.begin(data, rounded)
        first = [np.concatenate([rows for _, rows in model.log_probs(TOKENS[1:30])]) for _ in range(2)]
        np.testing.assert_array_equal(*first)
        choices = [[5, 6], [7], [8, 9, 10]]
        assert model.likelihoods(TOKENS[1:9], choices) == model.likelihoods(TOKENS[1:9], choices)
    model.close()
