"""The llama engine: IntactKV of a GGUF, computed by llama.cpp itself and read from the sequence's state.

How exact it is depends on three things. Measured on SmolLM2-135M (F16 weights), 24 tokens, against the torch engine
in F32, relative error ||a - b|| / ||b|| of K and V, mean over the layers:

    weights F16, cache F16, fused attention       K 5.3e-4  V 1.05e-3
    weights F16, cache F32, no flash attention    K 5.1e-4  V 1.0e-3
    weights F32, cache F32, no flash attention    K 2.0e-4  V 2.1e-4    the one rounding to F16, nothing else

because ggml rounds activations to the type of the weights (BF16: 8 bits!); upstream's own flash attention also works in
F16 inside (K 6.0e-4, V 1.3e-3).
So the weights should be widened to F32 first (weights.quantize to "F32": exact), and that is what convert does.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export import bindings, library, manifest
from intactkv_export.child import Progress
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.llama_log import errors_logged

KV = dict[int, np.ndarray]

CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml_type
_DTYPES: dict[int, np.dtype[Any]] = {0: np.dtype("<f4"), 1: np.dtype("<f2")}
_BATCH = 512  # tokens


def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    return {"intactkv": bindings.version(), "llama_cpp_python": library.load().__version__}


def describe(gguf: str | os.PathLike[str], n_ctx: int = 0) -> dict[str, Any]:
    """The description of a model (bindings.describe) in a context of n_ctx tokens. Raises IntactKVError."""
    with _Context(gguf, n_ctx, "f16", None) as context:
        return bindings.describe(context.ptr)


def compute(
    gguf: str | os.PathLike[str],
    tokens: Sequence[int],
    *,
    cache_dtype: str = "f32",
    n_threads: int | None = None,
    n_ctx: int = 0,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], KV, KV]:
    """(model description, K, V) of `tokens` at positions 0.., K and V {layer: float16 [n_tokens, n_head_kv, head_dim]}.

    Rows that a sliding window has left behind are zero. cache_dtype: "f32": no flash attention, rounded once; "f16":
    flash attention, as most programs run. n_ctx: of the context, at least the prefix; LongRoPE models choose their
    factors by it. progress counts tokens. Raises IntactKVError if the model cannot be loaded, cannot carry a prefix,
    or has K or V beyond float16.
    """
    if cache_dtype not in CACHE_TYPES:
        raise UsageError(f"unknown cache type {cache_dtype!r}: give one of {', '.join(CACHE_TYPES)}")
    with _Context(gguf, max(n_ctx, len(tokens) + 1), cache_dtype, n_threads) as context:
        model = bindings.describe(context.ptr)
        for start in range(0, len(tokens), _BATCH):
            context.decode(tokens[start : start + _BATCH], start)
            if progress is not None:
                progress(min(start + _BATCH, len(tokens)), len(tokens))
        K, V = _rows(context.state(), model, len(tokens))
    return model, _rounded(K, "K"), _rounded(V, "V")


class _Context:
    """A model in llama.cpp on the CPU, with a context for one sequence."""

    def __init__(self, gguf: str | os.PathLike[str], n_ctx: int, cache_dtype: str, n_threads: int | None) -> None:
        self._L = L = library.load()
        self._model, self.ptr = None, None
        if not Path(gguf).is_file():
            raise IntactKVError(f"no model at {gguf}: give the path of a GGUF file")
        with errors_logged() as lines:
            model = L.llama_model_default_params()
            model.n_gpu_layers, model.use_extra_bufts = 0, False
            self._model = L.llama_model_load_from_file(os.fsencode(gguf), model)
            if self._model:
                context = L.llama_context_default_params()
                context.n_ctx, context.n_seq_max = n_ctx or _BATCH, 1
                context.n_batch = context.n_ubatch = _BATCH
                context.n_threads = context.n_threads_batch = n_threads or os.cpu_count() or 1
                context.type_k = context.type_v = CACHE_TYPES[cache_dtype]
                context.flash_attn_type = int(cache_dtype == "f16")
                context.offload_kqv = context.op_offload = False  # a GPU would round in its own ways
                self.ptr = L.llama_init_from_model(self._model, context)
        if not self.ptr:
            self.close()
            reason = lines[-1].rstrip(".") if lines else "no reason given"
            raise IntactKVError(f"llama.cpp cannot run {gguf} ({reason}): check the file and the free memory")

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        with errors_logged():
            if self.ptr:
                self._L.llama_free(self.ptr)
            if self._model:
                self._L.llama_model_free(self._model)
        self.ptr = self._model = None

    def decode(self, tokens: Sequence[int], start: int) -> None:
        """Evaluate tokens at positions start.. of sequence 0."""
        batch = self._L.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
            with errors_logged() as lines:
                status = self._L.llama_decode(self.ptr, batch)
            if status:
                reason = lines[-1].rstrip(".") if lines else f"status {status}"
                raise IntactKVError(f"llama.cpp cannot evaluate tokens {start} to {start + len(tokens) - 1} ({reason})")
        finally:
            self._L.llama_batch_free(batch)

    def state(self) -> bytes:
        """The KV state of sequence 0: llama_state_seq_get_data without the 8 bytes of its header."""
        size = self._L.llama_state_seq_get_size(self.ptr, 0)
        buffer = (ctypes.c_uint8 * size)()
        n = self._L.llama_state_seq_get_data(self.ptr, buffer, size, 0)
        return memoryview(buffer).cast("B")[8:n].tobytes()


def _rows(state: bytes, model: dict[str, Any], n_tokens: int) -> tuple[KV, KV]:
    """K and V from a state (llama_kv_cache::state_write), in the cache's own type."""
    at = 0

    def take(layout: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from("<" + layout, state, at)
        at += struct.calcsize("<" + layout)
        return values

    K: KV = {}
    V: KV = {}
    for cache in manifest.shapes(model):
        _, n_cells = take("II")
        positions = [take("iIi")[0] for _ in range(n_cells)]
        v_trans, _ = take("II")
        rows: KV
        for rows, head_dim, transposed in ((K, "head_dim_k", False), (V, "head_dim_v", bool(v_trans))):
            for layer in cache.layers:
                shape = n_tokens, layer.n_head_kv, getattr(layer, head_dim)
                dtype = _DTYPES[take("i")[0]]
                take("II" if transposed else "Q")  # size and number of columns; size of a row
                values = np.frombuffer(state, dtype, n_cells * shape[1] * shape[2], at)
                at += values.nbytes
                values = values.reshape(-1, n_cells).T if transposed else values.reshape(n_cells, -1)
                rows[layer.il] = np.zeros(shape, np.float32)
                rows[layer.il][positions] = values.reshape(n_cells, *shape[1:])
    return K, V


def _rounded(rows: KV, name: str) -> KV:
    """To float16, to nearest even. Raises IntactKVError for a value that float16 cannot hold."""
    for il, x in rows.items():
        with np.errstate(over="ignore"):
            rows[il] = x.astype(np.float16)
        finite = np.isfinite(rows[il])
        if not finite.all():
            token, head, i = (int(n) for n in np.argwhere(~finite)[0])
            raise IntactKVError(
                f"{name} of layer {il}, token {token}, head {head} is {x[token, head, i]:g}, beyond float16 (largest "
                f"{np.finfo(np.float16).max:g}): this model's prefix cannot be stored as F16"
            )
    return rows
