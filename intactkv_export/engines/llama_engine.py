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

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from intactkv_export import library
from intactkv_export.engines.rows import to_float16
from intactkv_export.errors import UsageError
from intactkv_export.libllama import KV, N_BATCH, Context, Rope, States, bindings, state
from intactkv_export.models import gguf_file
from intactkv_export.work import Steps

CACHE_TYPES = ("f32", "f16")


def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    return {"intactkv": bindings.version(), "llama_cpp_python": library.load().__version__}


def describe(gguf: str | os.PathLike[str], n_ctx: int = 0, rope: Rope | None = None) -> dict[str, Any]:
    """The description of a model (bindings.describe) in a context of n_ctx tokens. Raises IntactKVError."""
    with _context(gguf, n_ctx, 1, "f16", None, rope) as context:
        return bindings.describe(context.ptr)


def compute(
    gguf: str | os.PathLike[str],
    tokens: Sequence[int],
    *,
    cache_dtype: str = "f32",
    n_threads: int | None = None,
    n_ctx: int = 0,
    rope: Rope | None = None,
    progress: Steps | None = None,
    n_automatic: int = 0,
) -> tuple[dict[str, Any], KV, KV, States]:
    """(model description, K, V, states) of `tokens` at positions 0..: K and V {layer: float16 [n_tokens, n_head_kv,
    head_dim]}, and the states of the recurrent layers after the last token, float32.

    Rows that a sliding window has left behind are zero. cache_dtype: "f32": no flash attention, rounded once; "f16":
    flash attention, as most programs run. n_ctx: of the context that the prefix will be used in; LongRoPE models choose
    their factors by it. rope: settings that it will be used with. progress counts tokens. n_automatic: cells of an
    automatic prefix that the model is to be given, as in any program, instead of none. Raises IntactKVError if
    the model cannot be loaded, cannot carry a prefix, or has K or V beyond float16.
    """
    if cache_dtype not in CACHE_TYPES:
        raise UsageError(f"unknown cache type {cache_dtype!r}: give one of {', '.join(CACHE_TYPES)}")
    needed = max(len(tokens), n_automatic) + 1
    with _context(gguf, n_ctx, needed, cache_dtype, n_threads, rope, automatic=n_automatic > 0) as context:
        model = bindings.describe(context.ptr)
        for start in range(0, len(tokens), N_BATCH):
            context.decode(tokens[start : start + N_BATCH], start)
            if progress is not None:
                progress(min(start + N_BATCH, len(tokens)), len(tokens))
        data = context.state()
        K, V = state.rows_by_layer(data, model, len(tokens))
        states = state.states_by_layer(data, model, len(tokens))
    return model, to_float16(K, "K"), to_float16(V, "V"), states


def _context(
    gguf: str | os.PathLike[str],
    n_ctx: int,
    needed: int,
    cache_type: str,
    n_threads: int | None,
    rope: Rope | None,
    *,
    automatic: bool = False,
) -> Context:
    """A context of the tokens needed that has the LongRoPE factors of one of n_ctx: a large cache would be for nothing.

    llama.cpp takes the long factors where the context is longer than the model's original one. So that a short context
    takes them too, that length is overridden by 1, and given again where else it is used.
    """
    long = gguf_file.longrope(gguf) if n_ctx > needed else None
    if long is None or not _padded(needed) <= long.n_ctx_orig < _padded(n_ctx):
        return Context(gguf, needed, cache_type, n_threads, rope, automatic=automatic)
    rope = rope or Rope()
    rope = replace(rope, yarn_orig_ctx=rope.yarn_orig_ctx or long.n_ctx_orig)
    return Context(gguf, needed, cache_type, n_threads, rope, {long.key: 1}, automatic=automatic)


def _padded(n_ctx: int) -> int:
    """What llama.cpp makes of a context's size."""
    return -(-n_ctx // 256) * 256
