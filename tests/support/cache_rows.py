"""Rows of K and V as llama.cpp's cache holds them, read from the state of a sequence."""

from __future__ import annotations

import ctypes
import json
import struct
from pathlib import Path

import numpy as np

from intactkv_export import library
from tests.support import random_models

L = library.load()


class Llama:
    """A GGUF in llama.cpp on the CPU: tokens in, rows of its cache out."""

    def __init__(self, path: Path, n_threads: int = 1) -> None:
        self.n_threads = n_threads  # more only make tiny models slower
        p = L.llama_model_default_params()
        p.use_extra_bufts = False
        self.model = L.llama_model_load_from_file(str(path).encode(), p)
        assert self.model, path

    def rows(self, tokens, *, n_ctx=512, step=None, kv_type=0, flash=False):
        """describe() of the context; K, V: {layer: float32 [n_tokens, n_head_kv, head_dim]}.

        The state leaves out what a sliding window masks, so `step` (at most the window) reads it as it grows.
        """
        p = L.llama_context_default_params()
        p.n_ctx = p.n_batch = p.n_ubatch = n_ctx
        p.n_seq_max, p.n_threads, p.n_threads_batch = 1, self.n_threads, self.n_threads
        p.type_k, p.type_v, p.flash_attn_type = kv_type, kv_type, int(flash)
        ctx = L.llama_init_from_model(self.model, p)
        assert ctx
        try:
            about = describe(ctx)
            K, V = {}, {}
            for start in range(0, len(tokens), step or len(tokens)):
                self._decode(ctx, tokens[start : start + (step or len(tokens))], start)
                _read_state(state_of(ctx), about, len(tokens), K, V)
            return about, K, V
        finally:
            L.llama_free(ctx)

    def tokenize(self, text):
        raw = text.encode()
        out = (L.llama_token * (len(raw) + 8))()
        n = L.llama_tokenize(L.llama_model_get_vocab(self.model), raw, len(raw), out, len(out), False, True)
        return list(out[:n])

    @staticmethod
    def _decode(ctx, tokens, start):
        b = L.llama_batch_init(len(tokens), 0, 1)
        b.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, start + i, 1, int(i == len(tokens) - 1)
            b.seq_id[i][0] = 0
        assert L.llama_decode(ctx, b) == 0
        L.llama_batch_free(b)


def describe(ctx):
    f = L.llama_cpp._lib.intactkv_describe
    f.restype, f.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    return json.loads(f(ctx))


def state_of(ctx) -> bytes:
    size = L.llama_state_seq_get_size(ctx, 0)
    buffer = (ctypes.c_uint8 * size)()
    assert L.llama_state_seq_get_data(ctx, buffer, size, 0) == size
    return bytes(buffer)


def _read_state(data, about, n_tokens, K, V):
    """llama_kv_cache::state_write of each cache, after 8 bytes of magic and sequence id."""
    at = 8

    def take(fmt):
        nonlocal at
        values = struct.unpack_from("<" + fmt, data, at)
        at += struct.calcsize("<" + fmt)
        return values

    cell = "iI3ii" if "mrope" in about["rope"]["type"] else "iIi"  # positions of three numbers, "imrope" too
    for cache in about["caches"]:
        n_stream, n_cells = take("II")
        assert n_stream == 1
        pos = [take(cell)[0] for _ in range(n_cells)]
        v_trans, n_layer = take("II")
        assert n_layer == len(cache["layers"])
        for kv, head_dim, transposed in ((K, "head_dim_k", False), (V, "head_dim_v", bool(v_trans))):
            for layer in cache["layers"]:
                dtype = np.dtype({0: "<f4", 1: "<f2"}[take("i")[0]])
                width = take("II")[1] if transposed else take("Q")[0] // dtype.itemsize
                values = np.frombuffer(data, dtype, n_cells * width, at)
                at += values.nbytes
                values = values.reshape(width, n_cells).T if transposed else values.reshape(n_cells, width)
                shape = n_tokens, layer["n_head_kv"], layer[head_dim]
                rows = kv.setdefault(layer["il"], np.full(shape, np.nan, np.float32))
                rows[pos] = values.reshape(n_cells, *shape[1:])
    assert at == len(data)


def random_tokens(n=96, n_vocab=random_models.VOCAB - 16):
    return [1, *(int(t) for t in np.random.default_rng(0).integers(6, n_vocab, n - 1))]
