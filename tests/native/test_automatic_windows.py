"""Automatic prefixes of a model with sliding windows: two caches, of which one forgets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.prefix import ikv
from tests.support import lowlevel, random_models
from tests.support.automatic import by_hand, context, evaluate, n_cells
from tests.support.lowlevel import L

WINDOW = 8
TOKENS = [1, *(int(t) for t in np.random.default_rng(1).integers(6, 400, 60))]
ORIGIN = {
    "text": "", "messages": None, "bos_only": False, "chat_template_sha256": None, "calibrated": None,
    "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
}  # fmt: skip

Make = Callable[..., ikv.Prefix]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("windows")
    random_models.to_gguf([random_models.build("gemma3", root / "gemma3")])
    return root / "gemma3.gguf"


@pytest.fixture(scope="module")
def gemma3(gguf: Path) -> Any:
    return lowlevel.load_model(gguf)


@pytest.fixture(scope="module")
def prefix(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """prefix(n tokens, n_extra): its rows are noise, so that they can be told from what is computed."""
    root, made = tmp_path_factory.mktemp("prefixes"), {}

    def make(n: int, n_extra: int = 0) -> ikv.Prefix:
        path = root / f"{n}-{n_extra}.ikv"
        if path not in made:
            description, K, V, _ = llama_engine.compute(gguf, TOKENS[:n], n_threads=1)
            noise = np.random.default_rng(2).standard_normal
            for rows in (K, V):
                for il, own in rows.items():
                    rows[il] = noise((n + n_extra, *own.shape[1:])).astype(np.float16)
            extra = {"extra_cells": n_extra} if n_extra else {}
            path.write_bytes(ikv.build(description, TOKENS[:n], K, V, {**ORIGIN, **extra}))
            made[path] = ikv.read(path)
        return made[path]

    return make


def params(full: bool, **more: Any) -> dict[str, Any]:
    return {
        "swa_full": full,
        "n_ctx": 256,
        "n_batch": 256,
        "n_ubatch": 32,
        "n_threads": 1,
        "n_threads_batch": 1,
        **more,
    }


def same(want: list[np.ndarray], got: list[np.ndarray]) -> bool:
    """Of the first tokens behind a prefix, which see all of it."""
    return float(np.abs(np.stack(want[:3]) - np.stack(got[:3])).max()) < 0.02


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("n", [5, WINDOW, 20])
def test_loaded_and_taken_over(gemma3: Any, prefix: Make, full: bool, kv: str, n: int) -> None:
    """Behind the window's length pieces are computed: only the end of the prefix has all that a next token sees."""
    p = prefix(n)
    for size, wanted in ((64, n), (3, n), (1, n), (64, n - 1), (7, n - 1), (64, 2), (4, 0)):
        want = evaluate(by_hand(gemma3, kv, p, **params(full)), TOKENS, size, n, n)
        ctx = context(gemma3, kv, p.source, **params(full))
        got = evaluate(ctx, TOKENS, size, 0, wanted)[n - wanted :]
        assert same(want, got), (size, wanted)
        assert not same(evaluate(context(gemma3, kv, **params(full)), TOKENS, 64, 0, n), got), "else it shows nothing"
        assert ctx.n_intact() == (n if kv == "q8_0" else 0) and n_cells(ctx) == len(TOKENS)
        if wanted == n and (size >= n or n <= WINDOW):
            assert ctx.n_not_computed() == n


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("n", [WINDOW, 20])
def test_left_in_the_middle(gemma3: Any, prefix: Make, full: bool, n: int) -> None:
    p = prefix(n)
    for k in (1, 4, n - 1):
        tokens = TOKENS[:k] + TOKENS[30:]
        for size in (64, 3):
            ctx = context(gemma3, "q8_0", p.source, **params(full))
            got = evaluate(ctx, tokens, size, 0, k)
            assert ctx.n_intact() == k and n_cells(ctx) == len(tokens) and np.isfinite(got).all()
            if n <= WINDOW:
                assert same(evaluate(by_hand(gemma3, "q8_0", p, k, **params(True)), tokens, size, k, k), got)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("unified", [True, False])
def test_sequences_go_far_beyond_the_window(gemma3: Any, prefix: Make, full: bool, unified: bool) -> None:
    """The window's cache has room for each sequence's window, and no cell of it is kept for another."""
    p = prefix(WINDOW)
    n_seq = 3
    ctx = context(gemma3, "q8_0", p.source, **params(full, n_seq_max=n_seq, kv_unified=unified, n_ctx=768))
    for seq in range(n_seq):
        assert same(
            evaluate(by_hand(gemma3, "q8_0", p, **params(full)), TOKENS, 32, 8, 8), evaluate(ctx, TOKENS, 32, 0, 8, seq)
        )
    for turn in range(4):
        for seq in range(n_seq):
            at = len(TOKENS) + 32 * turn
            assert ctx.batch([(TOKENS[10 + i], at + i, [seq], i == 31) for i in range(32)]) == 0
    shared = (n_seq - 1) * WINDOW if unified else (n_seq - 1) * (len(TOKENS) + 128)
    assert n_cells(ctx) == n_seq * (len(TOKENS) + 128) - shared


@pytest.mark.parametrize("full", [True, False])
def test_extra_cells(gemma3: Any, prefix: Make, full: bool) -> None:
    p = prefix(1, 5)
    for size in (64, 3, 1):
        want = evaluate(by_hand(gemma3, "q8_0", p, **params(full)), TOKENS, size, 1, 1)
        ctx = context(gemma3, "q8_0", p.source, **params(full))
        assert same(want, evaluate(ctx, TOKENS, size, 0, 1)) and n_cells(ctx) == len(TOKENS) + 5


def test_extra_cells_without_room(gemma3: Any, prefix: Make) -> None:
    from intactkv_export.libllama import bindings
    from tests.support.automatic import environment

    p = L.llama_context_default_params()
    p.n_ctx, p.n_batch, p.n_ubatch, p.swa_full, p.flash_attn_type = 512, 512, 248, False, 1
    with environment(str(prefix(1, 5).source)):
        assert not L.llama_init_from_model(gemma3, p)
        assert "no room in the cache of the sliding window" in bindings.last_error()
        p.n_ubatch = 244
        ctx = L.llama_init_from_model(gemma3, p)
        assert ctx
        L.llama_free(ctx)
