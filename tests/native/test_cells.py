"""Intact cells in a real model's cache: loading, saving, every sequence operation, both stream modes.

Precision is tested on the F16 model: with quantized weights, activations are rounded to 8 bits, and any change of
the input, however small, flips some of them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import lowlevel
from tests.support.lowlevel import SYSTEM, Context, L, kl
from tests.support.own_process import load_state, run

QUANTIZED = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "bf16"]


@pytest.fixture(scope="module")
def prefix(f16: Any) -> list[int]:
    return lowlevel.tokenize(f16, SYSTEM)


@pytest.fixture(scope="module")
def text(f16: Any) -> list[int]:
    from pydoc_data.topics import topics

    return lowlevel.tokenize(f16, topics["assert"] + topics["yield"], special=False)[:400]


@pytest.fixture(scope="module")
def state(f16: Any, prefix: list[int]) -> bytes:
    """The prefix as an F16 cache holds it."""
    ctx = Context(f16, "f16")
    ctx.decode(prefix, 0)
    return ctx.save()


def intact(f16: Any, state: bytes, kv: str = "q8_0", seq: int = 0, **params: Any) -> Context:
    ctx = Context(f16, kv, **params)
    assert ctx.restore(state, seq)
    return ctx


@pytest.mark.parametrize("kv", QUANTIZED)
def test_f16_state_becomes_intact(f16: Any, prefix: list[int], state: bytes, kv: str) -> None:
    ctx = Context(f16, kv)
    assert (ctx.n_intact(), ctx.arena_bytes(), ctx.attention()) == (0, 0, "fused")
    assert ctx.restore(state)
    n_layer, n_embd_gqa = 30, 192
    assert ctx.n_intact() == ctx.n_intact(0) == len(prefix)
    assert ctx.arena_bytes() == len(prefix) * n_layer * 2 * n_embd_gqa * 2
    assert ctx.attention() == "fused"


@pytest.mark.parametrize("kv", ["f16", "f32"])
def test_exact_cache_takes_ordinary_cells(f16: Any, prefix: list[int], text: list[int], state: bytes, kv: str) -> None:
    ctx = intact(f16, state, kv)
    assert (ctx.n_intact(), ctx.arena_bytes()) == (0, 0)
    assert ctx.attention() == ("fused" if kv == "f16" else "stock")  # the kernel does not read F32
    ref = Context(f16, "f16")
    ref.decode(prefix, 0)
    assert kl(ref.decode(text[:8], len(prefix)), ctx.decode(text[:8], len(prefix))) < 1e-4


@pytest.mark.parametrize("kv", ["q5_0", "q4_0"])  # with q8_0 it shows right behind the prefix only: the next test
def test_closer_to_f16_than_a_quantized_prefix(
    f16: Any, prefix: list[int], text: list[int], state: bytes, kv: str
) -> None:
    """Right behind the prefix, over twelve texts: one alone decides nothing, its cells' own rounding is chaotic."""
    mixed, rounded = 0.0, 0.0
    for first in range(0, 384, 32):
        tokens = text[first : first + 32]
        exact = intact(f16, state, "f16").decode(tokens, len(prefix))
        mixed += kl(exact, intact(f16, state, kv).decode(tokens, len(prefix)))
        ctx = Context(f16, kv)
        ctx.decode(prefix, 0)
        rounded += kl(exact, ctx.decode(tokens, len(prefix)))
    assert mixed < 0.95 * rounded  # 0.74 and 0.73 measured


def test_first_token_after_the_prefix(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    """With nothing but the prefix and the token's own cell in the cache, only that cell is not exact."""
    exact = intact(f16, state, "f16").decode(text[:1], len(prefix))
    mixed = intact(f16, state, "q8_0").decode(text[:1], len(prefix))
    rounded = Context(f16, "q8_0")
    rounded.decode(prefix, 0)
    assert np.abs(mixed - exact).max() < 0.1  # 0.047 measured
    assert kl(exact, mixed) < 0.5 * kl(exact, rounded.decode(text[:1], len(prefix)))


@pytest.mark.parametrize(("k", "v"), [("q4_0", "f16"), ("f16", "q4_0"), ("q4_0", "q8_0"), ("bf16", "iq4_nl")])
def test_k_and_v_of_different_types(f16: Any, prefix: list[int], text: list[int], state: bytes, k: str, v: str) -> None:
    ctx = Context(f16, k, v)
    assert ctx.restore(state)
    assert ctx.n_intact() == len(prefix)
    sides = (k != "f16") + (v != "f16")
    assert ctx.arena_bytes() == len(prefix) * 30 * 192 * 2 * sides
    exact = intact(f16, state, "f16").decode(text[:1], len(prefix))
    rounded = Context(f16, k, v)
    rounded.decode(prefix, 0)
    assert kl(exact, ctx.decode(text[:1], len(prefix))) < kl(exact, rounded.decode(text[:1], len(prefix)))


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_saved_state_gives_the_same_bits(
    f16: Any, prefix: list[int], text: list[int], state: bytes, kv: str, whole: bool
) -> None:
    ctx = intact(f16, state, kv)
    ctx.decode(text[:40], len(prefix))
    saved = ctx.save(None if whole else 0)
    again = Context(f16, kv)
    assert again.restore(saved, None if whole else 0)
    assert again.n_intact() == len(prefix)
    assert again.save(None if whole else 0) == saved
    n = len(prefix) + 40
    np.testing.assert_array_equal(again.decode(text[40:60], n), ctx.decode(text[40:60], n))


def test_damaged_state_is_refused_and_leaves_nothing(
    f16: Any, prefix: list[int], text: list[int], state: bytes
) -> None:
    ctx = intact(f16, state, "q8_0")
    ctx.decode(text[:8], len(prefix))
    saved = ctx.save()
    other = Context(f16, "q8_0")
    for size in [*range(0, len(saved), 9973), *range(len(saved) - 64, len(saved))]:
        assert not other.restore(saved[:size])
        assert other.n_intact() == 0
        assert L.llama_memory_seq_pos_max(other.memory, 0) == -1
    assert other.restore(saved)
    # a position of an intact cell that is out of range
    at = saved.rindex(struct.pack("<25I", len(prefix), *range(len(prefix))))
    for value in (0xFFFFFFFF, len(prefix) + 8, 0):
        bad = saved[: at + 8] + struct.pack("<I", value) + saved[at + 12 :]
        assert not other.restore(bad)
        assert other.n_intact() == 0


def test_every_way_a_cell_is_freed_takes_its_mark(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    ctx = intact(f16, state)
    n = len(prefix)
    L.llama_memory_seq_rm(ctx.memory, 0, n - 4, -1)
    assert ctx.n_intact() == n - 4
    ctx.decode(text[:4], n - 4)  # other tokens in the cells that were freed
    assert ctx.n_intact() == n - 4
    L.llama_memory_seq_rm(ctx.memory, -1, 0, 2)
    assert ctx.n_intact() == n - 6
    L.llama_memory_clear(ctx.memory, False)
    assert ctx.n_intact() == 0

    fresh = Context(f16, "q8_0")
    np.testing.assert_array_equal(ctx.decode(text[:50], 0), fresh.decode(text[:50], 0))

    assert ctx.restore(state)
    before = ctx.arena_bytes()
    assert ctx.restore(state)  # over itself: the same rows serve again
    assert (ctx.n_intact(), ctx.arena_bytes()) == (n, before)
    L.llama_memory_seq_add(ctx.memory, 0, 0, 3, -3)  # below zero: the cells are freed
    assert ctx.n_intact() == n - 3


def test_sequences_share_and_part(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    n = len(prefix)
    alone = intact(f16, state).decode(text[:20], n)
    ctx = intact(f16, state, n_seq_max=4, kv_unified=True)
    for seq in (1, 2):
        L.llama_memory_seq_cp(ctx.memory, 0, seq, -1, -1)
    assert [ctx.n_intact(seq) for seq in (-1, 0, 1, 2, 3)] == [n, n, n, n, 0]
    L.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
    assert [ctx.n_intact(seq) for seq in (-1, 0, 1)] == [n, 0, n]
    np.testing.assert_array_equal(ctx.decode(text[:20], n, seq=1), alone)
    np.testing.assert_allclose(ctx.decode(text[:20], n, seq=2), alone, atol=1e-3)  # other cells, other order of sums
    L.llama_memory_seq_keep(ctx.memory, 2)
    assert [ctx.n_intact(seq) for seq in (-1, 1, 2)] == [n, 0, n]
    # an intact and an ordinary sequence side by side
    ordinary = ctx.decode([*prefix, *text[:20]], 0, seq=3)[n:]
    fresh = Context(f16, "q8_0")
    assert kl(fresh.decode([*prefix, *text[:20]], 0)[n:], ordinary) < 1e-3
    assert ctx.n_intact(3) == 0


def test_streams_of_their_own(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    n = len(prefix)
    alone = intact(f16, state).decode(text[:20], n)
    # a state saved from a cache of one stream, into one of four
    ctx = intact(f16, state, seq=2, n_seq_max=4, kv_unified=False, n_ctx=4096)
    assert [ctx.n_intact(seq) for seq in (-1, 0, 2)] == [n, 0, n]
    L.llama_memory_seq_cp(ctx.memory, 2, 1, -1, -1)  # across streams: the copy has the mark and shares the row
    assert [ctx.n_intact(seq) for seq in (-1, 1, 2)] == [2 * n, n, n]
    assert ctx.arena_bytes() == n * 30 * 2 * 192 * 2
    for seq in (1, 2):
        np.testing.assert_array_equal(ctx.decode(text[:20], n, seq=seq), alone)
    saved = ctx.save(None)
    again = Context(f16, "q8_0", n_seq_max=4, kv_unified=False, n_ctx=4096)
    assert again.restore(saved, None)
    assert [again.n_intact(seq) for seq in (-1, 1, 2)] == [2 * n, n, n]
    expected = ctx.decode(text[20:40], n + 20, seq=1)
    np.testing.assert_array_equal(again.decode(text[20:40], n + 20, seq=1), expected)


def test_position_shift_rotates_the_rows(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    n, by = len(prefix), 100
    exact, mixed = intact(f16, state, "f16"), intact(f16, state, "q8_0")
    for ctx in (exact, mixed):
        L.llama_memory_seq_add(ctx.memory, 0, 0, -1, by)
    expected = exact.decode(text[:1], n + by)
    got = mixed.decode(text[:1], n + by)
    assert mixed.n_intact() == n
    # RoPE is relative: with everything shifted alike, the logits stay
    unshifted = intact(f16, state, "q8_0").decode(text[:1], n)
    # the control: the prefix stays where it was, the token is 100 positions away
    ctx = intact(f16, state, "q8_0")
    ctx.decode(text[:by], n)
    L.llama_memory_seq_rm(ctx.memory, 0, n, -1)
    L.llama_memory_seq_add(ctx.memory, 0, n - 1, n, by)  # the last one moves, so that positions go on from it
    apart = ctx.decode(text[:1], n + by)
    assert max(kl(expected, got), kl(unshifted, got)) < 2e-3 < kl(expected, apart) / 10


def test_shift_in_one_stream_leaves_the_other(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    n = len(prefix)
    ctx = intact(f16, state, n_seq_max=2, kv_unified=False, n_ctx=2048)
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    ctx.decode(text[:1], n, seq=0)  # the copy happens with the next batch
    L.llama_memory_seq_rm(ctx.memory, 0, n, -1)
    before = ctx.arena_bytes()
    L.llama_memory_seq_add(ctx.memory, 1, 0, -1, 50)
    shifted = ctx.decode(text[:1], n + 50, seq=1)
    assert ctx.arena_bytes() == 2 * before  # the shared rows were parted
    alone = intact(f16, state).decode(text[:20], n)
    np.testing.assert_array_equal(ctx.decode(text[:20], n, seq=0), alone)
    assert kl(alone[:1], shifted) < 1e-3


def test_reused_graphs_see_what_changed(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    """Token by token, llama.cpp reuses the last graph: across loading, clearing and growing of the cache."""
    n = len(prefix)
    ctx = Context(f16, "q8_0")
    plain = [ctx.decode([token], i) for i, token in enumerate(text[:12])]
    assert ctx.restore(state)
    ctx.decode(text[:225], n)
    one = [ctx.decode([token], n + 225 + i) for i, token in enumerate(text[225:237])]  # passes cell 256
    assert ctx.restore(state)
    ctx.decode(text[:225], n)
    for i, (token, logits) in enumerate(zip(text[225:237], one, strict=True)):
        np.testing.assert_array_equal(ctx.decode([token], n + 225 + i), logits)
    L.llama_memory_clear(ctx.memory, False)
    for i, (a, token) in enumerate(zip(plain, text[:12], strict=False)):
        np.testing.assert_array_equal(ctx.decode([token], i), a)
    fresh = intact(f16, state)
    assert kl(fresh.decode(text[:237], n)[-1:], one[-1]) < 1e-3


def test_attention_override(model: Any, state: bytes, tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(state)
    code = f"""
from tests.support import lowlevel
model = lowlevel.load_model({str(model("F16"))!r})
state = open({str(tmp_path / "state")!r}, "rb").read()
q8, f16 = lowlevel.Context(model, "q8_0"), lowlevel.Context(model, "f16")
print(f16.restore(state), q8.restore(state), q8.n_intact(), q8.attention())
"""
    assert run(code, INTACTKV_ATTN="stock").stdout.split() == ["True", "False", "0", "stock"]
    assert run(code, INTACTKV_ATTN="portable").stdout.split() == ["True", "True", "24", "portable"]
    assert run(code, INTACTKV_ATTN="typo").returncode != 0


BITS = """
import hashlib
from tests.support import lowlevel
from pydoc_data.topics import topics
model = lowlevel.load_model({path!r})
tokens = lowlevel.tokenize(model, topics["assert"] + topics["yield"], special=False)[:150]
for kv in ("f16", "q8_0", "q4_0"):
    ctx = lowlevel.Context(model, kv)
    h = hashlib.sha256(ctx.decode(tokens[:140], 0).tobytes())
    for i in range(140, 150):
        h.update(ctx.decode([tokens[i]], i).tobytes())
    h.update(ctx.save())
    print(kv, h.hexdigest())
"""


@pytest.mark.parametrize("weights", ["F16", "Q4_K_M"])
def test_with_stock_attention_bit_identical_to_unpatched(model: Any, stock_lib: Path, weights: str) -> None:
    code = BITS.format(path=str(model(weights)))
    ours, stock = run(code, INTACTKV_ATTN="stock"), run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert ours.stdout.count("\n") == 3 and ours.stdout == stock.stdout


def test_without_a_prefix_fused_attention_is_as_close_to_f16_as_stock(
    f16: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill in two batches, then token by token. With a quantized cache the smallest difference flips roundings of
    later layers' cells, so the two are compared by their distance from an F16 cache."""
    logits = {}
    for attention in ("stock", "fused"):
        monkeypatch.setenv("INTACTKV_ATTN", attention)
        for kv in ("f16", "q8_0", "q4_0"):
            ctx = Context(f16, kv)
            assert ctx.attention() == attention
            parts = [ctx.decode(text[:150], 0), ctx.decode(text[150:180], 150)]
            logits[kv, attention] = np.concatenate(parts + [ctx.decode([text[i]], i) for i in range(180, 190)])
    exact = logits["f16", "stock"]
    assert kl(exact, logits["f16", "fused"]) < 1e-4
    for kv in ("q8_0", "q4_0"):
        assert kl(exact, logits[kv, "fused"]) < 1.3 * kl(exact, logits[kv, "stock"])


def test_stock_refuses_a_mixed_state(
    f16: Any, model: Any, stock_lib: Path, prefix: list[int], state: bytes, tmp_path: Path
) -> None:
    ctx = intact(f16, state)
    path = tmp_path / "mixed.state"
    tokens = (L.llama_token * len(prefix))(*prefix)
    assert L.llama_state_seq_save_file(ctx.ptr, str(path).encode(), 0, tokens, len(prefix))
    ours, stock = (load_state(model("F16"), "q8_0", path, lib) for lib in (None, stock_lib))
    assert ours.stdout.startswith(f"True {len(prefix)}"), ours.stderr
    assert stock.stdout.startswith("False") and "494b0003" in stock.stdout, stock.stdout + stock.stderr


def test_a_sequence_fits_caches_of_other_streams(f16: Any, prefix: list[int], text: list[int], state: bytes) -> None:
    """Saved from one of four streams: a server with another number of slots reads its slots again."""
    ctx = Context(f16, "q4_0", n_seq_max=4)
    assert ctx.restore(state, 2)
    ctx.decode(text[:20], len(prefix), 2)
    saved = ctx.save(2)
    expected = ctx.decode(text[20:22], len(prefix) + 20, 2)
    for params in ({}, {"n_seq_max": 2}, {"n_seq_max": 8}, {"n_seq_max": 3, "kv_unified": True}):
        other = Context(f16, "q4_0", **params)
        assert other.restore(saved, 0), params
        assert other.n_intact(0) == len(prefix)
        assert np.array_equal(other.decode(text[20:22], len(prefix) + 20), expected)
    assert not Context(f16, "q4_0", n_seq_max=2).restore(ctx.save(None), None)
