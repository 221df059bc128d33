"""The mixed KV cache in torch: an intact prefix, and behind it rows rounded as llama.cpp's KV type rounds them.

A transformers cache, so every architecture and attention implementation works on it unchanged. Gradients reach the
prefix's K and V, and pass the rounding of the other rows straight through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from intactkv_export.torch_model.rope_pairs import halves_to_neighbours, neighbours_to_halves
from intactkv_export.torch_model.rounding import rotate, rotation, rounded, straight


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays out K and V of a head. interleaved: K's RoPE pairs are neighbours (RoPE type "norm")."""

    n_head_kv: int
    head_dim: int
    interleaved: bool

    def to_cache(self, rows: Tensor, kind: str) -> Tensor:
        """llama.cpp's rows [..., n, n_head_kv, head_dim] as transformers' [..., n_head_kv, n, head_dim].

        kind: "K" or "V".
        """
        if kind == "K" and self.interleaved:
            rows = neighbours_to_halves(rows)
        return rows.transpose(-2, -3)

    def to_rows(self, cached: Tensor, kind: str) -> Tensor:
        """The inverse of to_cache()."""
        rows = cached.transpose(-2, -3)
        return halves_to_neighbours(rows) if kind == "K" and self.interleaved else rows

    def as_cached(self, states: Tensor, kind: str, kv_type: str) -> Tensor:
        """K or V [batch, n_head_kv, n, head_dim] as a cache of this type returns them: same shape and dtype."""

        def round_trip(x: Tensor) -> Tensor:
            size = rotation(kv_type, self.head_dim, kind == "V")
            rows = rotate(self.to_rows(x.float(), kind), size)
            back = rotate(rounded(rows.flatten(-2), kv_type).view_as(rows), size)
            return self.to_cache(back, kind).to(x.dtype)

        return states if kv_type == "f32" else straight(states, round_trip)


class MixedLayer(DynamicLayer):
    """One layer's K and V. It begins with the prefix's rows; update() rounds what is appended."""

    def __init__(self, K: Tensor, V: Tensor, layout: Layout, kv_type: tuple[str, str], grows: bool) -> None:
        super().__init__()
        self.keys, self.values = K, V
        self.dtype, self.device = K.dtype, K.device
        self.is_initialized = True
        self._layout, self._kv_type, self._grows = layout, kv_type, grows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All K and V so far with these appended, each [batch, n_head_kv, n, head_dim]."""
        k = self._layout.as_cached(key_states, "K", self._kv_type[0])
        v = self._layout.as_cached(value_states, "V", self._kv_type[1])
        keys, values = torch.cat([self.keys, k], -2), torch.cat([self.values, v], -2)
        if self._grows:
            self.keys, self.values = keys, values
        return keys, values


class MixedCache(Cache):
    """A cache that begins with an intact prefix.

    K, V: by layer, tensors in transformers' layout [batch, n_head_kv, n_prefix, head_dim], which may require a
    gradient. kv_type: of K and of V, names of libllama.KV_TYPES. grows: keep what is appended, to go on generating;
    else every forward pass begins right behind the prefix, and can be repeated (gradient checkpointing does).

    No layer forgets what left its sliding window; the model's mask hides it.
    """

    def __init__(
        self, K: Sequence[Tensor], V: Sequence[Tensor], layout: Layout, kv_type: tuple[str, str], grows: bool = True
    ) -> None:
        super().__init__(layers=[MixedLayer(k, v, layout, kv_type, grows) for k, v in zip(K, V, strict=True)])
