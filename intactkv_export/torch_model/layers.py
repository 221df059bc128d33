"""What the decoder layers of a model make of texts behind a prefix, of which some tokens are intact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intactkv_export.torch_model.caches import MixedCache
from intactkv_export.torch_model.model import TorchModel


def alone(model: TorchModel, tokens: Sequence[int], chunks: Sequence[Sequence[int]]) -> tuple[list[Tensor], MixedCache]:
    """The model computes everything itself, its cache at float32: outputs for the chunks, as layer_outputs(), cache."""
    cache = empty_cache(model, len(chunks))
    return layer_outputs(model, tokens, chunks, cache), cache


def with_intact(
    model: TorchModel,
    tokens: Sequence[int],
    chunks: Sequence[Sequence[int]],
    K: Sequence[Tensor],
    V: Sequence[Tensor],
    n: int,
    kv_type: str,
    in_sight: bool = False,
) -> tuple[list[Tensor], MixedCache]:
    """The model is given the first n tokens' K and V, and those of extra cells: outputs for the chunks, cache.

    K, V: by layer, llama.cpp's rows, of all tokens and behind them of the extra cells (prefix_rows()). in_sight: of the
    prefix (MixedCache).
    """
    n_extra = len(K[0]) - len(tokens)
    k, v = ([torch.cat([rows[:n], rows[len(tokens) :]]) for rows in side] for side in (K, V))
    cache = model.cache(k, v, kv_type, batch=len(chunks), extra=n_extra, in_sight=in_sight)
    return layer_outputs(model, tokens[n:], chunks, cache), cache


def layer_outputs(
    model: TorchModel, tokens: Sequence[int], chunks: Sequence[Sequence[int]], cache: MixedCache
) -> list[Tensor]:
    """Outputs of the decoder layers for the chunks, each chunk behind the cache and `tokens`.

    By layer, [n_chunks, n_tokens, n_embd] in float32, in main memory.
    """
    outputs: list[Tensor] = []
    n = len(chunks[0])
    with torch.inference_mode(), model.outputs_of_layers(lambda states: outputs.append(states[:, -n:].float().cpu())):
        model.decode([[*tokens, *chunk] for chunk in chunks], cache)
    return outputs


def empty_cache(model: TorchModel, batch: int = 1) -> MixedCache:
    """A cache at float32 that nothing is in."""
    nothing = [torch.empty(0, model.n_head_kv, model.head_dim)] * model.n_layer
    return model.cache(nothing, nothing, "f32", batch)


def cached_rows(
    model: TorchModel, cache: MixedCache, n_tokens: int, exact: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """K and V of the first n_tokens tokens in a cache, rounded to F16 unless exact: by layer, llama.cpp's rows."""
    kept = ([x[:1, :, :n_tokens] for x in (layer.keys, layer.values)] for layer in cache.layers)
    rows = [[(x if exact else x.half())[0].cpu() for x in model.layout.rows(*both)] for both in kept]
    return [K for K, _ in rows], [V for _, V in rows]


def errors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Mean squared error of each layer's outputs."""
    return [float((a - b).square().mean()) for a, b in zip(outputs, expected, strict=True)]
