"""Automatic prefixes: what a sequence gets that begins with one, in any batch, is what loading it by hand gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.engines import llama_engine as engine
from intactkv_export.prefix import ikv
from tests.support import extra_cells
from tests.support.automatic import by_hand, context, evaluate, n_cells, some_text
from tests.support.lowlevel import Context, L, kl
from tests.support.smol import Smol

N_EXTRA = 4

# How far logits are from one another that were computed in other batches, KL divergence: a value that is rounded to the
# other side moves all that follows. By hand it is as much.
NOISE = {"f16": 2e-5, "q8_0": 2e-3, "q4_0": 0.1}
KINDS = ["f16", "q8_0", "q4_0", ("q8_0", "f16"), "f32"]


@pytest.fixture(scope="module")
def text(f16: Any) -> list[int]:
    return some_text(f16)


@pytest.fixture(scope="module")
def prompt(smol: Smol) -> ikv.Prefix:
    return ikv.read(smol.ikv)


def remade(prefix: ikv.Prefix, out: Path, factor: float, calibrated: bool, n: int | None = None) -> ikv.Prefix:
    """Its first n tokens, with other rows: as if they had been trained, which `calibrated` says."""
    rest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    rows = [{x.il: (getattr(x, side)[:n] * factor).astype(np.float16) for x in prefix.layers} for side in "KV"]
    data = ikv.build(
        prefix.manifest["model"],
        prefix.tokens[:n],
        *rows,
        {**rest, "calibrated": {"by": "tests"} if calibrated else None},
    )
    out.write_bytes(data)
    return ikv.read(out)


@pytest.fixture(scope="module")
def files(smol: Smol, f16: Any, text: list[int], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ikv.Prefix]:
    """prompt, bos; trained, trained_bos: with other rows, trained together; long: 16 tokens of the text more; extra,
    extra_bos: with cells that stand for no token."""
    root = tmp_path_factory.mktemp("prefixes")
    whole, bos = ikv.read(smol.ikv), ikv.read(smol.bos)
    made = {
        "prompt": whole,
        "bos": bos,
        "trained": remade(whole, root / "trained.ikv", 0.9, True),
        "trained_bos": remade(bos, root / "trained-bos.ikv", 0.8, True),
        "extra": extra_cells.write(smol.ikv, smol.reference, root / "extra.ikv", N_EXTRA),
        "extra_bos": extra_cells.write(smol.bos, smol.reference, root / "extra-bos.ikv", N_EXTRA),
    }
    tokens = whole.tokens + text[:16]
    description, K, V, _ = engine.compute(smol.reference, tokens, n_threads=2)
    rest = {k: v for k, v in whole.manifest.items() if k not in ("format", "tokens", "model")}
    (root / "long.ikv").write_bytes(ikv.build(description, tokens, K, V, rest))
    made["long"] = ikv.read(root / "long.ikv")
    return made


Make = Callable[..., Context]


@pytest.fixture
def holding(f16: Any, files: dict[str, ikv.Prefix]) -> Make:
    """holding(kv, names of prefixes, **params): a context that holds them."""

    def make(kv: str | tuple[str, str], *names: str, **params: Any) -> Context:
        paths = [files[name].source for name in names]
        assert all(path is not None for path in paths)
        ctx = context(f16, kv, *(path for path in paths if path is not None), **params)
        assert ctx.n_prefixes() == len(names)
        return ctx

    return make


def n_marked(kv: Any, n: int) -> int:
    """Cells that are intact where n are a prefix's."""
    return 0 if kv in ("f16", "f32") else n


# Batches


@pytest.mark.parametrize(
    ("kv", "size"),
    [*((kv, 64) for kv in KINDS), *((kv, size) for kv in ("f16", "q8_0") for size in (5, 23, 24, 25)), ("q4_0", 1)],
    ids=str,
)
def test_whole_and_in_pieces(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: Any, size: int
) -> None:
    prefix = files["prompt"]
    n, tokens = len(prefix.tokens), prefix.tokens + text
    want = evaluate(by_hand(f16, kv, prefix), tokens, size, n, n)
    ctx = holding(kv, "prompt")
    np.testing.assert_array_equal(evaluate(ctx, tokens, size, 0, n), want)
    assert (ctx.n_not_computed(), ctx.n_intact(), n_cells(ctx)) == (n, n_marked(kv, n), len(tokens))


def test_a_batch_that_is_loaded_whole_has_no_outputs(holding: Make, files: dict[str, Any], text: list[int]) -> None:
    ctx, tokens = holding("q8_0", "prompt"), files["prompt"].tokens
    assert ctx.batch([(text[0], 0, [0], True)]) == 0 and ctx.logits(0) is not None
    L.llama_memory_clear(ctx.memory, True)
    assert ctx.batch([(token, i, [0], False) for i, token in enumerate(tokens)]) == 0
    assert all(ctx.logits(i) is None for i in (0, len(tokens) - 1, -1))
    assert L.llama_memory_seq_pos_max(ctx.memory, 0) == len(tokens) - 1


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_the_last_token_is_computed_for_its_logits_and_taken_over(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str
) -> None:
    prefix = files["prompt"]
    n = len(prefix.tokens)
    hand = by_hand(f16, kv, prefix, n - 1)
    want = hand.decode(prefix.tokens[-1:], n - 1)
    for pieces in (n, 7):
        ctx = holding(kv, "prompt")
        np.testing.assert_array_equal(evaluate(ctx, prefix.tokens, pieces, 0, n - 1), want)
        assert ctx.n_not_computed() == n - 1 and ctx.n_intact() == n_marked(kv, n)
        np.testing.assert_array_equal(ctx.decode(text, n), by_hand(f16, kv, prefix).decode(text, n))


def test_batches_as_upstream_makes_them(f16: Any, holding: Make, files: dict[str, Any], text: list[int]) -> None:
    """llama_batch_get_one(): no positions, no sequences, logits of the last token."""
    prefix = files["prompt"]
    tokens = prefix.tokens + text
    ctx = holding("q8_0", "prompt")
    for part in (tokens[:10], tokens[10:30], tokens[30:]):
        array = (L.llama_token * len(part))(*part)
        assert L.llama_decode(ctx.ptr, L.llama_batch_get_one(array, len(part))) == 0
    want = by_hand(f16, "q8_0", prefix)
    want.decode(tokens[24:30], 24)
    last = ctx.logits(-1)
    assert last is not None and kl(want.decode(tokens[30:], 30)[-1:], last[None]) < NOISE["q8_0"]
    assert ctx.n_not_computed() == 23  # the tenth token had logits


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_logits_of_all_tokens(f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str) -> None:
    """Each token of the prefix sees intact cells before it; those behind it see the prefix."""
    prefix = files["prompt"]
    n = len(prefix.tokens)
    ctx = holding(kv, "prompt")
    got = ctx.decode(prefix.tokens + text, 0)
    for pos in (0, 1, 11, n - 1):
        hand = by_hand(f16, kv, prefix, pos) if pos else context(f16, kv)
        np.testing.assert_array_equal(got[pos], hand.decode(prefix.tokens[pos : pos + 1], pos)[0])
    np.testing.assert_array_equal(got[n:], by_hand(f16, kv, prefix).decode(text, n))
    np.testing.assert_array_equal(ctx.logits(5), got[5])
    assert ctx.n_intact() == n_marked(kv, n)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_sequences_in_one_batch(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str, unified: bool
) -> None:
    """One behind the prefix, one that leaves it, one without, one with logits inside, mixed; each as alone."""
    prefix = files["prompt"].tokens
    texts = [prefix + text[:10], prefix[:9] + text[:20], text[:12], prefix, prefix + text[5:9]]
    wanted = [len(prefix), 9, 0, len(prefix) - 1, len(prefix) + 3]
    ctx = holding(kv, "prompt", n_seq_max=5, kv_unified=unified, n_ctx=1280)
    entries = [
        (tokens[pos], pos, [seq], pos >= wanted[seq])
        for pos in range(40)
        for seq, tokens in enumerate(texts)
        if pos < len(tokens)
    ]
    assert ctx.batch(entries) == 0
    got: dict[int, list[np.ndarray]] = {}
    for i, (_, _, (seq,), has_logits) in enumerate(entries):
        logits = ctx.logits(i)
        assert (logits is not None) == has_logits
        if logits is not None:
            got.setdefault(seq, []).append(logits)
    for seq, tokens in enumerate(texts):
        alone = evaluate(holding(kv, "prompt"), tokens, 64, 0, wanted[seq])
        assert kl(np.stack(alone), np.stack(got[seq])) < NOISE[kv], seq
        assert ctx.n_intact(seq) == n_marked(kv, (24, 9, 0, 24, 24)[seq])


@pytest.mark.parametrize("size", [64, 6])
def test_sequences_share_cells(f16: Any, holding: Make, files: dict[str, Any], text: list[int], size: int) -> None:
    prefix = files["prompt"]
    n, tokens = len(prefix.tokens), prefix.tokens + text[:5]
    ctx = holding("q8_0", "prompt", n_seq_max=8, kv_unified=True)
    rows = ctx.arena_bytes()
    assert rows == holding("q8_0", "prompt").arena_bytes()
    (want,) = evaluate(by_hand(f16, "q8_0", prefix), tokens, size, n, len(tokens) - 1)
    for seq in range(8):
        (got,) = evaluate(ctx, tokens, size, 0, len(tokens) - 1, seq)
        assert kl(want[None], got[None]) < 1e-6
    assert n_cells(ctx) == n + 8 * 5 and ctx.arena_bytes() == rows and ctx.n_intact() == n
    for seq in range(7):  # the others' stay
        L.llama_memory_seq_rm(ctx.memory, seq, -1, -1)
    assert ctx.n_intact(7) == n and n_cells(ctx) == n + 5
    L.llama_memory_seq_rm(ctx.memory, 7, -1, -1)
    assert ctx.n_intact() == 0
    (got,) = evaluate(ctx, tokens, size, 0, len(tokens) - 1, 3)
    assert kl(want[None], got[None]) < 1e-6 and ctx.n_intact(3) == n


def test_many_sequences_fit_behind_one_prompt(holding: Make, files: dict[str, Any], text: list[int]) -> None:
    """8 times 40 tokens and 8 words in 256 cells; without the library's sharing 64 more were needed."""
    tokens = files["long"].tokens
    params = {"n_seq_max": 8, "kv_unified": True, "n_ctx": 256, "n_batch": 256, "n_ubatch": 256}
    plain = holding("q8_0", **params)
    held = holding("q8_0", "long", **params)
    for ctx, fits in ((plain, False), (held, True)):
        done = [
            ctx.batch([(token, pos, [seq], False) for pos, token in enumerate(tokens)])
            or ctx.batch([(text[20 + seq], len(tokens), [seq], True)])
            for seq in range(8)
        ]
        assert (done == [0] * 8) == fits
    assert n_cells(held) == len(tokens) + 8


def test_tokens_of_several_sequences(f16: Any, holding: Make, files: dict[str, Any], text: list[int]) -> None:
    """As llama-perplexity's tasks have them: a common beginning that belongs to all, then each its own."""
    prefix = files["prompt"]
    n = len(prefix.tokens)
    ctx = holding("q8_0", "prompt", n_seq_max=4, kv_unified=True)
    common = [(token, pos, [0, 1, 2], False) for pos, token in enumerate(prefix.tokens + text[:3])]
    own = [(text[10 + seq], n + 3, [seq], True) for seq in range(3)]
    assert ctx.batch(common + own) == 0
    for seq in range(3):
        want = by_hand(f16, "q8_0", prefix).decode([*text[:3], text[10 + seq]], n)[-1]
        got = ctx.logits(len(common) + seq)
        assert got is not None and kl(want[None], got[None]) < NOISE["q8_0"]
    assert (ctx.n_not_computed(), n_cells(ctx)) == (n, n + 6)


# What ends a match


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("size", [64, 4])
def test_what_matched_stays(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str, size: int
) -> None:
    prefix = files["prompt"]
    for k in (1, 2, 4, 13, 23):
        tokens = prefix.tokens[:k] + text[:12]
        want = evaluate(by_hand(f16, kv, prefix, k), tokens, size, k, k)
        ctx = holding(kv, "prompt")
        np.testing.assert_array_equal(evaluate(ctx, tokens, size, 0, k), want)
        assert (ctx.n_not_computed(), ctx.n_intact()) == (k, n_marked(kv, k))


@pytest.mark.parametrize(("kv", "size"), [("f16", 64), ("q8_0", 64), ("q8_0", 4), ("f16", 1)])
@pytest.mark.parametrize("bos", [True, False])
def test_rows_trained_together_are_left_out_together(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str, size: int, bos: bool
) -> None:
    """A sequence that leaves the prefix goes on behind the trained first token, or with nothing."""
    prefix, first = files["trained"], files["trained_bos"] if bos else None
    names = ["trained", "trained_bos"] if bos else ["trained"]
    for k in (1, 2, 23):
        tokens = prefix.tokens[:k] + text[:12]
        hand = by_hand(f16, kv, first)
        hand.batch([(tokens[pos], pos, [0], False) for pos in range(int(bos), k)]) if k > bos else None
        want = evaluate(hand, tokens, size, k, k)
        ctx = holding(kv, *names)
        got = evaluate(ctx, tokens, size, 0, k)
        assert kl(np.stack(want), np.stack(got)) < NOISE[kv], k
        assert ctx.n_intact() == n_marked(kv, int(bos)) and n_cells(ctx) == len(tokens)
    tokens = prefix.tokens + text
    ctx = holding(kv, *names)
    want = evaluate(by_hand(f16, kv, prefix), tokens, size, 24, 24)
    np.testing.assert_array_equal(evaluate(ctx, tokens, size, 0, 24), want)
    assert ctx.n_intact() == n_marked(kv, 24)


@pytest.mark.parametrize("size", [64, 10, 1])
def test_the_longest_of_several(f16: Any, holding: Make, files: dict[str, Any], text: list[int], size: int) -> None:
    long = files["long"].tokens
    for n, rest in ((40, text[16:]), (30, text[20:]), (10, text), (1, text)):
        ctx = holding("q8_0", "bos", "long", "prompt")
        tokens = long[:n] + rest
        got = evaluate(ctx, tokens, size, 0, n)
        want = evaluate(by_hand(f16, "q8_0", files["long"], n), tokens, size, n, n)
        assert ctx.n_intact() == n and kl(np.stack(want), np.stack(got)) < NOISE["q8_0"]
    ctx = holding("q8_0", "bos", "prompt")
    want = evaluate(by_hand(f16, "q8_0", files["prompt"]), long, size, 24, 24)
    got = evaluate(ctx, long, size, 0, 24)
    assert ctx.n_intact() == 24 and kl(np.stack(want), np.stack(got)) < NOISE["q8_0"]


@pytest.mark.parametrize("name", ["extra", "extra_bos"])
@pytest.mark.parametrize(("kv", "size"), [("f16", 64), ("f16", 5), ("q8_0", 64), ("q8_0", 1)])
def test_extra_cells(
    f16: Any, holding: Make, files: dict[str, Any], text: list[int], kv: str, name: str, size: int
) -> None:
    prefix = files[name]
    n, tokens = len(prefix.tokens), prefix.tokens + text
    want = evaluate(by_hand(f16, kv, prefix), tokens, size, n, n)
    ctx = holding(kv, name)
    got = evaluate(ctx, tokens, size, 0, n)
    assert kl(np.stack(want), np.stack(got)) < NOISE[kv]
    assert (ctx.n_intact(), n_cells(ctx)) == (n_marked(kv, n + N_EXTRA), len(tokens) + N_EXTRA)
    shared = holding(kv, name, n_seq_max=2, kv_unified=True)
    for seq in (0, 1):
        evaluate(shared, tokens, size, 0, n, seq)
    assert n_cells(shared) == n + N_EXTRA + 2 * len(text)
    first = holding(kv, name)  # computed without them: they are at its position
    np.testing.assert_array_equal(first.decode(tokens[:1], 0), context(f16, kv).decode(tokens[:1], 0))
    assert n_cells(first) == 1 + N_EXTRA
