"""Latents (MLA) in a transformers cache: of a token one row, from which each head's K and V are worked out.

llama.cpp's row is the latent and behind it the values that RoPE turns, one head of K; V is the latent, and has no row.
transformers caches the two parts as what a layer calls keys and values: so does MixedLayer. A quantized cache of
llama.cpp rounds such rows as they are, not rotated, so each part is rounded for itself: the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intactkv_export.errors import IntactKVError
from intactkv_export.torch_model.caches.mixed import Layout

_BLOCK = 32  # of all types of a cache


@dataclass(frozen=True)
class LatentLayout(Layout):
    """head_dim: of a row. n_still: of the latent."""

    @classmethod
    def of(cls, text: Any, interleaved: bool) -> LatentLayout:
        """text: a configuration. Raises IntactKVError for parts of a row that share a block."""
        latent, turned = text.kv_lora_rank, text.qk_rope_head_dim
        if latent % _BLOCK or turned % _BLOCK:
            raise IntactKVError(
                f"a latent of {latent} values with {turned} that RoPE turns is not what torch can hold in a cache, "
                f"multiples of {_BLOCK}: use a prefix that is not trained"
            )
        return cls(1, latent + turned, interleaved, latent)

    def cached(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """llama.cpp's rows as a layer's keys and values: the latent, and what RoPE turns."""
        row = self.to_cache(K, "K")
        return row[..., : self.n_still], row[..., self.n_still :]

    def rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        K = self.to_rows(torch.cat([keys, values], -1), "K")
        return K, K[..., :0]

    def _round_trip(self, states: Tensor, kind: str, kv_type: str, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        part = _Part(1, self.head_dim, self.interleaved and kind == "V")
        return part._round_trip(states, "K", kv_type, rounding)


class _Part(Layout):
    """Of a row of K, whatever a layer calls it."""

    def _rotation(self, kv_type: str, kind: str) -> int:
        return 0
