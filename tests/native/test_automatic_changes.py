"""Automatic prefixes beside everything else that is done to a sequence: what is there is told by the cells."""

from __future__ import annotations

import ctypes
import time
from typing import Any

import numpy as np
import pytest

from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support import lowlevel
from tests.support.automatic import by_hand, context, evaluate, n_cells, some_text
from tests.support.lowlevel import Context, L, kl
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def text(f16: Any) -> list[int]:
    return some_text(f16)


@pytest.fixture(scope="module")
def prefix(smol: Smol) -> ikv.Prefix:
    return ikv.read(smol.ikv)


def held(f16: Any, smol: Smol, kv: str = "q8_0", **params: Any) -> Context:
    return context(f16, kv, smol.ikv, **params)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_back_into_the_prefix(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], kv: str) -> None:
    """As servers do it: the cells that the next prompt begins with too are kept."""
    n, tokens = len(prefix.tokens), prefix.tokens + text[:10]
    ctx = held(f16, smol, kv)
    want = evaluate(ctx, tokens, 64, 0, n)
    for keep in (n, n - 1, 12, 1, 0):
        L.llama_memory_seq_rm(ctx.memory, 0, keep, -1)
        loaded = ctx.n_not_computed()
        np.testing.assert_array_equal(evaluate(ctx, tokens, 64, keep, n), want)
        assert ctx.n_not_computed() - loaded == n - keep and n_cells(ctx) == len(tokens)
    L.llama_memory_seq_rm(ctx.memory, 0, 12, -1)  # and leaves it there
    got = ctx.decode(text, 12)
    np.testing.assert_array_equal(got, by_hand(f16, kv, prefix, 12).decode(text, 12))


def test_cleared_and_begun_again(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int]) -> None:
    tokens = prefix.tokens + text
    ctx = held(f16, smol)
    want = evaluate(ctx, tokens, 64, 0, 24)
    for data in (True, False):
        L.llama_memory_clear(ctx.memory, data)
        assert ctx.n_intact() == 0
        np.testing.assert_array_equal(evaluate(ctx, tokens, 64, 0, 24), want)
    L.llama_memory_seq_rm(ctx.memory, 0, 0, 5)  # what is left is no beginning
    L.llama_memory_seq_add(ctx.memory, 0, 5, -1, -5)
    assert ctx.batch([(text[0], len(tokens) - 5, [0], True)]) == 0


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_copy_goes_on(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], kv: str, unified: bool) -> None:
    """Copied in the middle of the prefix; between streams the copy is pending when the next batch comes."""
    n, tokens = len(prefix.tokens), prefix.tokens + text[:10]
    want = evaluate(by_hand(f16, kv, prefix), tokens, 64, n, n)
    ctx = held(f16, smol, kv, n_seq_max=2, kv_unified=unified, n_ctx=1024)
    assert ctx.batch([(tokens[pos], pos, [0], False) for pos in range(10)]) == 0
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    for seq in (1, 0):
        got = evaluate(ctx, tokens, 64, 10, n, seq)
        assert kl(np.stack(want), np.stack(got)) < 1e-5
    assert ctx.n_not_computed() == 10 + 14 + 14
    assert n_cells(ctx) == (n + 20 if unified else n + 10)


@pytest.mark.parametrize("whole", [True, False])
def test_saved_and_restored(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], whole: bool) -> None:
    n, tokens = len(prefix.tokens), prefix.tokens + text
    for kv in ("q8_0", "f16"):
        for there in (10, n + 5):
            ctx = held(f16, smol, kv)
            ctx.batch([(tokens[pos], pos, [0], False) for pos in range(there)])
            saved = ctx.save(None if whole else 0)
            want = ctx.decode(tokens[there:], there)[-10:]
            again = held(f16, smol, kv)
            evaluate(again, prefix.tokens[:there], 64, 0, 64)  # what is replaced
            assert again.restore(saved, None if whole else 0) and again.n_intact() == (
                min(there, n) if kv == "q8_0" else 0
            )
            got = again.decode(tokens[there:], there)[-10:]
            assert kl(want, got) < 3e-3
            assert again.n_not_computed() == min(there, n)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_shift_moves_only_its_own(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], kv: str) -> None:
    """A sequence that drops the first half of the shared prefix and moves up: the others' cells stay where they are."""
    n, tokens = len(prefix.tokens), prefix.tokens + text[:20]
    ctx = held(f16, smol, kv, n_seq_max=3, kv_unified=True)
    for seq in range(3):
        evaluate(ctx, tokens, 64, 0, 64, seq)
    assert n_cells(ctx) == n + 60
    gone = 10
    L.llama_memory_seq_rm(ctx.memory, 1, 1, 1 + gone)
    L.llama_memory_seq_add(ctx.memory, 1, 1 + gone, -1, -gone)
    shifted = by_hand(f16, kv, prefix)
    shifted.batch([(tokens[pos], pos, [0], False) for pos in range(n, len(tokens))])
    L.llama_memory_seq_rm(shifted.memory, 0, 1, 1 + gone)
    L.llama_memory_seq_add(shifted.memory, 0, 1 + gone, -1, -gone)
    want = shifted.decode(text[20:30], len(tokens) - gone)
    plain = by_hand(f16, kv, prefix)
    plain.batch([(tokens[pos], pos, [0], False) for pos in range(n, len(tokens))])
    others = plain.decode(text[20:30], len(tokens))
    limit = 1e-4 if kv == "f16" else 5e-3
    assert kl(want, ctx.decode(text[20:30], len(tokens) - gone, 1)) < limit
    for seq in (0, 2):
        assert kl(others, ctx.decode(text[20:30], len(tokens), seq)) < limit
    assert n_cells(ctx) == n + 60 + 30 + n - 1 - gone
    L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)  # and again from the beginning, with the rows as they were
    assert (
        kl(np.stack(evaluate(ctx, tokens, 64, 0, n, 1)), np.stack(evaluate(held(f16, smol, kv), tokens, 64, 0, n)))
        < limit
    )


def test_a_prefix_that_a_program_loads_itself(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int]) -> None:
    ctx = held(f16, smol)
    for times in (1, 2):
        assert bindings.load(ctx.ptr, prefix.data) == 24 and ctx.n_intact() == 24
        got = ctx.decode(text, 24)
        assert n_cells(ctx) == 24 + len(text) and ctx.n_not_computed() == 0, times
    np.testing.assert_array_equal(got, by_hand(f16, "q8_0", prefix).decode(text, 24))


@pytest.mark.parametrize("tail", [0, 4, 128])
def test_a_tail(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], tail: int) -> None:
    """The prefix's cells are not the tail's, also those that were computed for their logits."""
    n, tokens = len(prefix.tokens), prefix.tokens + text
    for size, wanted in ((64, n), (7, n), (64, n - 1), (7, 3)):
        hand = by_hand(f16, "q4_0", prefix, tail=tail)
        want = evaluate(hand, tokens, size, n, n)
        ctx = held(f16, smol, "q4_0", tail=tail)
        got = evaluate(ctx, tokens, size, 0, wanted)[n - wanted :]
        assert kl(np.stack(want), np.stack(got)) < 0.02
        assert ctx.n_intact() - ctx.n_tail() == n and ctx.n_tail() == hand.n_tail()


def test_a_cache_that_is_full(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int]) -> None:
    """No room: status 1, and nothing was done; with a smaller batch it goes on, as upstream says."""
    ctx = held(f16, smol, n_seq_max=2, kv_unified=True, n_ctx=256, n_batch=256, n_ubatch=256)
    assert ctx.batch([(text[i % 40], i, [0], False) for i in range(220)]) == 0
    entries = [(token, pos, [1], pos == 39) for pos, token in enumerate(prefix.tokens + text[:16])]
    assert ctx.batch(entries) == 1
    assert L.llama_memory_seq_pos_max(ctx.memory, 1) == -1 and n_cells(ctx) == 220 and ctx.n_not_computed() == 0
    assert ctx.batch(entries[:20]) == 0 and ctx.n_not_computed() == 20
    L.llama_memory_seq_rm(ctx.memory, 0, 200, -1)
    assert ctx.batch(entries[20:]) == 0 and ctx.n_not_computed() == 24


def test_batches_that_upstream_refuses(f16: Any, smol: Smol, prefix: ikv.Prefix) -> None:
    ctx = held(f16, smol)
    tokens = prefix.tokens
    gap = [(tokens[0], 0, [0], False), (tokens[1], 5, [0], True)]
    unknown = [(tokens[0], 0, [0], False), (10**6, 1, [0], True)]
    for bad in (gap, unknown, [(tokens[0], 0, [3], True)]):
        assert ctx.batch(bad) == -1
        assert L.llama_memory_seq_pos_max(ctx.memory, 0) == -1 and n_cells(ctx) == 0
    assert ctx.batch([(token, pos, [0], True) for pos, token in enumerate(tokens)]) == 0


def test_many_cells_move_at_once(f16: Any, smol: Smol, text: list[int], tmp_path: Any) -> None:
    """What a shift takes of rows it takes once: two sequences that share 600 cells and move most of them."""
    from pydoc_data.topics import topics

    from intactkv_export.engines import llama_engine as engine

    whole = ikv.read(smol.ikv)
    tokens = whole.tokens + lowlevel.tokenize(f16, topics["assert"] + topics["class"], special=False)[:576]
    description, K, V, _ = engine.compute(smol.reference, tokens, n_threads=2)
    rest = {k: v for k, v in whole.manifest.items() if k not in ("format", "tokens", "model")}
    path = tmp_path / "long.ikv"
    path.write_bytes(ikv.build(description, tokens, K, V, rest))
    ctx = context(f16, "q8_0", path, n_seq_max=2, kv_unified=True, n_ctx=2048)
    for seq in (0, 1):
        evaluate(ctx, tokens + text, 1024, 0, len(tokens), seq)
    want = ctx.decode(text[:5], len(tokens) + len(text), 1)
    L.llama_memory_seq_rm(ctx.memory, 1, len(tokens) + len(text), -1)
    before = ctx.arena_bytes()
    gone = 100
    L.llama_memory_seq_rm(ctx.memory, 0, 1, 1 + gone)
    L.llama_memory_seq_add(ctx.memory, 0, 1 + gone, -1, -gone)
    start = time.perf_counter()
    ctx.decode(text[:5], len(tokens) + len(text) - gone)
    assert time.perf_counter() - start < 5
    assert ctx.arena_bytes() - before == (len(tokens) - 1 - gone) * 30 * 2 * 192 * 2
    assert kl(want, ctx.decode(text[:5], len(tokens) + len(text), 1)) < 1e-3


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_restored_behind_rows_that_are_held(
    f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int], unified: bool, whole: bool
) -> None:
    """As servers keep idle slots: a state that comes back takes no rows of its own, nor cells that others have."""
    n, tokens = len(prefix.tokens), prefix.tokens + text[:10]
    params: dict[str, Any] = {"n_seq_max": 4, "kv_unified": unified, "n_ctx": 2048, "tail": 4}
    ctx = held(f16, smol, "q4_0", **params)
    for seq in (0, 1):
        evaluate(ctx, tokens, 64, 0, n, seq)
    rows, want = ctx.arena_bytes(), ctx.save(0)
    states = [ctx.save(None)] if whole else [ctx.save(0), ctx.save(1)]
    again = held(f16, smol, "q4_0", **params)
    if not whole:
        evaluate(again, tokens, 64, 0, n, 3)
    for seq, saved in enumerate(states):
        assert again.restore(saved, None if whole else seq)
    n_seq = 2 if whole else 3
    assert n_cells(again) == (n + 10 * n_seq if unified else n + 10) and again.arena_bytes() == rows
    for seq in (0, 1):
        assert (again.n_intact(seq), again.n_tail(seq)) == (ctx.n_intact(seq), ctx.n_tail(seq))
    assert again.save(0) == want
    L.llama_memory_seq_rm(again.memory, 0, 12, -1)  # it is the beginning of the prefix still
    loaded = again.n_not_computed()
    got = evaluate(again, tokens, 64, 12, n, 0)
    assert again.n_not_computed() == loaded + n - 12
    assert kl(np.stack(evaluate(by_hand(f16, "q4_0", prefix, tail=4), tokens, 64, n, n)), np.stack(got)) < 0.02


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_samplers_in_the_backend(smol: Smol, f16: Any, kv: str) -> None:
    """One decode a batch, else the sampler would run twice: a token asked for inside the prefix has all of them
    computed, then taken over."""
    set_sampler, sampled = (L.llama_cpp._lib[f"llama_{name}"] for name in ("set_sampler", "get_sampled_token_ith"))
    set_sampler.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p]
    sampled.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    n = len(smol.tokens)
    plain, ctx = context(f16, kv), context(f16, kv, smol.ikv)
    entries = [(token, pos, [0], pos == 10) for pos, token in enumerate(smol.tokens)]
    assert plain.batch(entries) == 0
    expected = plain.logits(10)
    chain = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
    L.llama_sampler_chain_add(chain, L.llama_sampler_init_greedy())
    assert set_sampler(ctx.ptr, 0, ctypes.cast(chain, ctypes.c_void_p))
    assert ctx.batch(entries) == 0
    assert expected is not None
    assert sampled(ctx.ptr, 10) == expected.argmax()
    assert ctx.n_not_computed() == 0 and ctx.n_intact() == (n if kv == "q8_0" else 0)
    by_itself = by_hand(f16, kv, ikv.read(smol.ikv))
    assert by_itself.batch([(504, n, [0], True)]) == 0
    assert ctx.batch([(504, n, [0], True)]) == 0
    found = by_itself.logits(0)
    assert found is not None
    assert sampled(ctx.ptr, 0) == found.argmax()
    assert kv != "f16" or ctx.save() == by_itself.save()
    # where nothing is asked for inside, it is loaded as ever
    L.llama_memory_clear(ctx.memory, True)
    assert ctx.batch([(t, pos, [0], pos == n) for pos, t in enumerate([*smol.tokens, 504])]) == 0
    assert ctx.n_not_computed() == n
    assert sampled(ctx.ptr, n) == found.argmax()
    del ctx
    L.llama_sampler_free(chain)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kv", ["f16", "f32", "q8_0"])
def test_restored_sequences_begin_with_it_too(smol: Smol, f16: Any, text: list[int], kv: str, whole: bool) -> None:
    """They share its cells, and one that ends within it goes on in it, though states of exact caches do not say which
    cells are whose."""
    n, m = len(smol.tokens), 10
    params = {"n_seq_max": 4, "kv_unified": True}
    ctx, again = (context(f16, kv, smol.ikv, **params) for _ in range(2))
    assert ctx.batch([(t, pos, [0], False) for pos, t in enumerate([*smol.tokens, *text])]) == 0
    assert ctx.batch([(t, pos, [1], False) for pos, t in enumerate(smol.tokens[:m])]) == 0
    if whole:
        assert again.restore(ctx.save(None), None)
    else:
        for seq in (0, 1):
            assert again.restore(ctx.save(seq), seq)
            assert ctx.restore(ctx.save(seq), seq + 2)
    assert again.batch([(t, pos, [1], False) for pos, t in enumerate(smol.tokens) if pos >= m]) == 0
    assert again.n_not_computed() == n - m and n_cells(again) == n + len(text)
    wanted, got = (c.batch([(504, n, [1], True)]) or c.logits(0) for c in (by(ctx, smol, m), again))
    assert n_cells(ctx) == n + (1 if whole else 2) * len(text) + 1
    assert isinstance(wanted, np.ndarray) and isinstance(got, np.ndarray) and kl(wanted[None], got[None]) < 2e-3


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_a_copy_over_what_was_restored_is_known_as_what_it_is(smol: Smol, f16: Any, text: list[int], kv: str) -> None:
    """Between streams it is pending when the next batch comes, and the restored rows are still there."""
    n, m = len(smol.tokens), 10
    logits = []
    for prefixes in ([], [smol.ikv]):
        ctx = context(f16, kv, *prefixes, n_seq_max=2, n_ctx=1024, kv_unified=False)
        assert ctx.batch([(t, pos, [0], False) for pos, t in enumerate(smol.tokens)]) == 0
        state = ctx.save(0)
        L.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
        assert ctx.batch([(t, pos, [0], False) for pos, t in enumerate(text[:m])]) == 0
        assert ctx.restore(state, 1)
        L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
        L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        for pos in range(m, n):
            assert ctx.batch([(smol.tokens[pos], pos, [1], pos == n - 1)]) == 0
        found = ctx.logits(0)
        assert found is not None
        logits.append(found)
    assert ctx.n_not_computed() == n
    np.testing.assert_array_equal(*logits)


def by(ctx: Context, smol: Smol, m: int) -> Context:
    """The same as it would have gone on where it was."""
    assert ctx.batch([(t, pos, [1], False) for pos, t in enumerate(smol.tokens) if pos >= m]) == 0
    return ctx
