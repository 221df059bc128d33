"""Which cells a token sees, where transformers' own mask would not do: behind extra cells, cells in sight, and a tail.

Extra cells, which stand for no token, are at the first token's position: a sliding window leaves them with it, and it
is as wide for the tokens behind as if they were not there. transformers takes a row's number for its position.

A prefix in sight is seen through every window, however far behind it has been left.

A mixed cache with a tail returns rounded rows for all cells, and behind them intact rows for the newest. All tokens of
a pass are computed at once, but each sees what it would if they had come one by one: itself and the tail - 1 cells
before it intact, older ones rounded, the prefix as it is. So the mask is the model's own, over both halves, and each
cell is visible in exactly one of them. The scores are up to twice as many as without a tail.

And how one token a text attends on a CPU, where PyTorch's own way reads K and V several times: one_token().
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from intactkv_export.torch_model.caches import MixedCache
from intactkv_export.torch_model.from_huggingface import attention_layers, layer_type


def build(net: Any, cache: MixedCache, batch: int, n_new: int) -> Tensor | dict[str, Tensor]:
    """The argument attention_mask of a transformers model for n_new tokens behind what is in the cache.

    [batch, 1, n_new, rows that update() will return], bool, or for eager attention 0 and the lowest number; for a model
    with several kinds of layers a dictionary, by kind.
    """
    text = net.config.get_text_config(decoder=True)
    positions = cache.positions(n_new)
    with_rows = attention_layers(text)
    # layers that attend to nothing want no mask: it would hide tokens from them
    masks: dict[str, Any] = {layer_type(text, il): None for il in range(text.num_hidden_layers) if il not in with_rows}
    kinds = {layer_type(text, il) for il in with_rows}
    if "hybrid" in kinds:  # attention and a recurrence in one layer
        kinds, masks["linear_attention"] = kinds - {"hybrid"} | {"full_attention"}, None
    for kind in kinds:
        window = text.sliding_window if kind == "sliding_attention" else None
        n_in_sight = cache.n_prefix if cache.in_sight else 0
        seen = _visible(positions, cache.n_prefix, n_new, cache.tail, window, n_in_sight).to(net.device)
        if text._attn_implementation == "eager":
            lowest = torch.finfo(net.dtype).min
            seen = torch.zeros(seen.shape, dtype=net.dtype, device=net.device).masked_fill_(~seen, lowest)
        masks[kind] = seen.expand(batch, 1, -1, -1)
    return masks if len(masks) > 1 else masks.popitem()[1]


def needed(net: Any, cache: MixedCache) -> bool:
    """Whether build() says anything else than transformers' own mask."""
    text = net.config.get_text_config(decoder=True)
    windows = any(layer_type(text, il) == "sliding_attention" for il in range(text.num_hidden_layers))
    return cache.tail > 0 or ((cache.n_extra > 0 or cache.in_sight) and windows)


def n_intact(n_appended: int, n_new: int, tail: int) -> int:
    """For how many cells there are intact rows: those that the first of n_new tokens sees, and the other new ones.

    n_appended: cells behind the prefix, the new ones included.
    """
    return min(n_appended, tail - 1 + n_new)


def one_token(tokens: Tensor) -> AbstractContextManager[object]:
    """Within, a forward pass of tokens [batch, n]; of one token each, on a CPU, it attends as _Grouped says."""
    return _Grouped() if tokens.shape[1] == 1 and tokens.device.type == "cpu" else nullcontext()


class _Grouped(TorchFunctionMode):
    """Query heads that share a KV head are that head's queries, so that one matrix product reads its rows once.

    PyTorch's kernel for CPUs reads them once for each query head. In bfloat16, 3 heads to a KV head, 32 texts of 900
    tokens: 14 ms a layer against 3.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        whole = options.get("attn_mask") is None and not options.get("is_causal")
        if func is not scaled_dot_product_attention or not options.get("enable_gqa") or not whole:
            return func(*args, **options)
        query, key, value = args
        batch, n_head, n_tokens, head_dim = query.shape
        assert n_tokens == 1
        grouped = query.reshape(batch, key.shape[1], n_head // key.shape[1], head_dim)
        return func(grouped, key, value, **{**options, "enable_gqa": False}).reshape(batch, n_head, 1, -1)


def _visible(
    positions: Tensor, n_prefix: int, n_new: int, tail: int, window: int | None, n_in_sight: int = 0
) -> Tensor:
    """bool [n_new, n_cells + n_intact]. positions: [n_cells]. n_in_sight: the first cells, which no window hides."""
    n_cells = len(positions)
    distance = positions[-n_new:, None] - positions
    near = distance < (window or n_cells)
    near[:, :n_in_sight] = True
    seen = (distance >= 0) & near
    if not tail:
        return seen
    intact = (distance < tail) & (torch.arange(n_cells) >= n_prefix)
    newest = n_cells - n_intact(n_cells - n_prefix, n_new, tail)
    return torch.cat([seen & ~intact, (seen & intact)[:, newest:]], 1)
