"""Prefixes with extra cells, cells that stand for no token, as a training would begin: rows of real text, moved to
position 0 by llama.cpp's own position shift."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from intactkv_export.libllama import state
from intactkv_export.prefix import ikv
from tests.support import lowlevel
from tests.support.lowlevel import Context, L


def text_rows(
    gguf: Path, first: int = 20, n: int = 16, moved: bool = True
) -> tuple[list[int], dict[int, np.ndarray], dict[int, np.ndarray]]:
    """(tokens, K, V) of a text: by layer, float32 [n, n_head_kv, head_dim], of its tokens first..first+n-1.

    moved: K as at position 0, not as where the tokens are. Of a model without sliding windows.
    """
    model = lowlevel.load_model(gguf)
    tokens = [1, *lowlevel.tokenize(model, topics["assert"], special=False)[: first + n - 1]]
    ctx = Context(model, "f32", n_ctx=256, n_batch=256, n_ubatch=256)
    ctx.decode(tokens, 0)
    L.llama_memory_seq_rm(ctx.memory, 0, 0, first)
    if moved:
        for pos in range(first, first + n):
            L.llama_memory_seq_add(ctx.memory, 0, pos, pos + 1, -pos)
        ctx.decode(tokens[:1], 1)  # a shift is done with the next batch
        L.llama_memory_seq_rm(ctx.memory, 0, 1, -1)
    (cache,) = state.shapes(_description(ctx))
    (section,) = state.sections(ctx.save())
    assert section.positions.tolist() == ([0] * n if moved else list(range(first, first + n)))
    K, V = (
        {
            layer.il: rows.values(n).reshape(n, layer.n_head_kv, -1).astype(np.float32)
            for layer, rows in zip(cache.layers, side, strict=True)
        }
        for side in (section.K, section.V)
    )
    return tokens, K, V


def with_extra(prefix: ikv.Prefix, K: dict[int, np.ndarray], V: dict[int, np.ndarray]) -> bytes:
    """The file of a prefix without extra cells, and behind its tokens those of these rows: by layer, [n, n_head_kv,
    head_dim]. Where its window left rows of tokens behind, zeros go in, which are not stored."""
    n, n_extra = len(prefix.tokens), len(next(iter(K.values())))

    def whole(rows: np.ndarray, cells: np.ndarray, extra: np.ndarray) -> np.ndarray:
        full = np.zeros((n + n_extra, *rows.shape[1:]), np.float16)
        full[cells], full[n:] = rows, extra
        return full

    rest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    return ikv.build(
        prefix.manifest["model"],
        prefix.tokens,
        {x.il: whole(x.K, x.cells, K[x.il]) for x in prefix.layers},
        {x.il: whole(x.V, x.cells, V[x.il]) for x in prefix.layers},
        {**rest, "extra_cells": n_extra},
    )


def write(prefix: Path, gguf: Path, out: Path, n: int = 16) -> ikv.Prefix:
    """A prefix file of SmolLM2 with n extra cells of real text, and what it holds."""
    _, K, V = text_rows(gguf, n=n)
    out.write_bytes(with_extra(ikv.read(prefix), K, V))
    return ikv.read(out)


def _description(ctx: Context) -> dict[str, object]:
    from tests.support.cache_rows import describe

    return describe(ctx.ptr)
