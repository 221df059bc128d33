"""Contexts with automatic prefixes, and what must come out of them: the prefix loaded by hand, the rest computed."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support.lowlevel import Context, L, tokenize

PREFIXES_VARIABLE = "LLAMA_INTACTKV"


def some_text(model: Any) -> list[int]:
    """Tokens that may stand behind any prefix."""
    return tokenize(model, topics["yield"], special=False)[:40]


@contextmanager
def environment(value: str | None) -> Iterator[None]:
    """LLAMA_INTACTKV with this value; None: unset."""
    before = os.environ.get(PREFIXES_VARIABLE)
    _set(value)
    try:
        yield
    finally:
        _set(before)


def _set(value: str | None) -> None:
    os.environ.pop(PREFIXES_VARIABLE, None)
    if value is not None:
        os.environ[PREFIXES_VARIABLE] = value


def context(model: Any, kv: str | tuple[str, str], *prefixes: Path, **params: Any) -> Context:
    """A context that holds these prefixes and no other."""
    k, v = (kv, kv) if isinstance(kv, str) else kv
    with environment(os.pathsep.join(map(str, prefixes)) if prefixes else "off"):
        return Context(model, k, v, **params)


def by_hand(model: Any, kv: str | tuple[str, str], prefix: ikv.Prefix | None, n: int = 0, **params: Any) -> Context:
    """A context whose sequence 0 has the prefix, by intactkv_load(); n: its first n tokens only."""
    ctx = context(model, kv, **params)
    if prefix is not None:
        bindings.load(ctx.ptr, prefix.data)
        if n:
            L.llama_memory_seq_rm(ctx.memory, 0, n, -1)
    return ctx


def parts(n: int, size: int) -> Iterator[range]:
    """0..n-1 in batches."""
    for start in range(0, n, size):
        yield range(start, min(start + size, n))


def evaluate(
    ctx: Context, tokens: Sequence[int], size: int, start: int = 0, wanted: int = 0, seq: int = 0
) -> list[np.ndarray]:
    """Logits of the tokens from position `wanted` on, evaluated in the batches of `size` that the whole sequence falls
    into; those before `start` are there already."""
    got = []
    for part in parts(len(tokens), size):
        here = [pos for pos in part if pos >= start]
        if here:
            assert ctx.batch([(tokens[pos], pos, [seq], pos >= wanted) for pos in here]) == 0
        for i, pos in enumerate(here):
            logits = ctx.logits(i)
            assert (logits is not None) == (pos >= wanted)
            if logits is not None:
                got.append(logits)
    return got


def n_cells(ctx: Context) -> int:
    """Cells in use: of the first stream of the first cache."""
    data = ctx.save(None)
    at = 4 + struct.unpack_from("<I", data)[0]  # behind the architecture's name
    return int(struct.unpack_from("<II", data, at)[1])
