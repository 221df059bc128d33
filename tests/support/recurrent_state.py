"""The state of a sequence of a hybrid or recurrent model, as llama.cpp writes it, without our reader."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from intactkv_export import library
from tests.support.cache_rows import Llama, state_of

L = library.load()
KV = dict[int, np.ndarray]


@dataclass
class State:
    """K, V: {layer: float32 [n_tokens, n_values]}; states: {layer: (r, s)}; n_layer: of the model."""

    K: KV
    V: KV
    states: dict[int, tuple[np.ndarray, np.ndarray]]
    n_layer: int


def after(path: Path, tokens: list[int], attention: list[int], recurrent: list[int], ext: bool) -> State:
    """The state after tokens, F32 cache, no flash attention.

    attention, recurrent: the layers that have K and V, and states. ext: cells have a place and a token (M-RoPE).
    """
    llama = Llama(path)
    try:
        data = raw(llama, tokens)
    finally:
        L.llama_model_free(llama.model)
    return _parsed(data, len(tokens), attention, recurrent, ext)


def raw(llama: Llama, tokens: list[int]) -> bytes:
    """The state after tokens: F32 cache, no flash attention."""
    p = L.llama_context_default_params()
    p.n_ctx = p.n_batch = p.n_ubatch = 512
    p.n_seq_max = p.n_threads = p.n_threads_batch = 1
    p.type_k = p.type_v = p.flash_attn_type = 0
    ctx = L.llama_init_from_model(llama.model, p)
    assert ctx
    try:
        llama._decode(ctx, tokens, 0)
        return state_of(ctx)
    finally:
        L.llama_free(ctx)


def _parsed(data: bytes, n_tokens: int, attention: list[int], recurrent: list[int], ext: bool) -> State:
    at = 8

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from("<" + layout, data, at)
        at += struct.calcsize("<" + layout)
        return values

    def row(n: int) -> np.ndarray:
        nonlocal at
        values = np.frombuffer(data, "<f4", n // 4, at)
        at += n
        return values

    K: KV = {}
    V: KV = {}
    if attention:
        assert take("II") == (1, n_tokens)
        for pos in range(n_tokens):
            assert take("iI" + ("iii" if ext else "") + "i")[:2] == (pos, 1)
        v_trans, n_layer = take("II")
        assert n_layer == len(attention)
        for il in attention:
            kind, width = take("iQ")
            assert kind == 0
            K[il] = row(n_tokens * width).reshape(n_tokens, -1)
        for il in attention:
            assert v_trans
            kind, _, width = take("iII")
            assert kind == 0
            V[il] = row(4 * n_tokens * width).reshape(width, n_tokens).T
    assert take("Iii") == (1, n_tokens - 1, 0)
    s_trans, n_layer = take("II")
    assert s_trans == 0
    r, s = {}, {}
    for side in (r, s):
        for il in recurrent:
            kind, width = take("iQ")
            assert kind == 0
            side[il] = row(width)
    assert at == len(data)
    return State(K, V, {il: (r[il], s[il]) for il in recurrent}, n_layer)
