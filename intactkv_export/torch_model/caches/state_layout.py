"""The states of recurrent layers as transformers has them, and as llama.cpp does.

transformers has for such a layer the last inputs of its convolution, [channels, kernel], and the recurrence: Mamba's
[d_inner, d_state], Mamba 2's [n_head, head_dim, d_state], a gated delta net's [n_head, head_dim_k, head_dim_v].
llama.cpp (llama_memory_recurrent) keeps two rows of F32, r and s, which prefix files hold:

- r is the convolution's inputs without the oldest, which the next token pushes out: [channels, kernel - 1];
- s is the recurrence in the same order (build_mamba_layer, build_mamba2_layer), that of delta nets transposed,
  [n_head, head_dim_v, head_dim_k] (build_delta_net); short convolutions (LFM2) have none.

Upstream's converter puts Qwen 3.5's heads of V in another order (_LinearAttentionVReorderBase): those that share a head
of K lie apart, so that heads of K meet their heads of V by repeating all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CONVOLUTION = {"lfm2", "lfm2_moe"}
_TILED = {"qwen3_5_text", "qwen3_5_moe_text"}
_DELTA = _TILED | {"qwen3_next"}
# Model type -> names of a configuration: heads, values in one, groups of B and C, states, width of the convolution
_PREFIXED = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
_MAMBA2 = {
    "granitemoehybrid": _PREFIXED,
    "falcon_h1": _PREFIXED,
    "nemotron_h": ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"),
    "mamba2": ("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
}
# Model types for which a prefix can be trained. Of Mamba 1, and so of Jamba, transformers begins every pass of several
# tokens with an empty recurrence; Mamba 2 alone has no K and V.
STATES = _CONVOLUTION | _DELTA | _MAMBA2.keys() - {"mamba2"}


@dataclass(frozen=True)
class StateLayout:
    """Of one model: inputs of the convolution that the next token sees, [n_channel, n_input], and the recurrence in
    llama.cpp's order, () if there is none.

    transposed: transformers has the last two axes of the recurrence in the other order. n_head_k: of a delta net whose
    heads of V llama.cpp has by what comes first in each head of K, then second; transformers all of one head of K, then
    of the next. 0: both have one order.
    """

    inputs: tuple[int, int]
    recurrence: tuple[int, ...] = ()
    transposed: bool = False
    n_head_k: int = 0

    @classmethod
    def of(cls, text: Any) -> StateLayout:
        """text: a configuration, of a model type of models.RECURRENT."""
        kind = text.model_type
        if kind in _CONVOLUTION:
            return cls((text.hidden_size, text.conv_L_cache - 1))
        if kind in _DELTA:
            n_k, n_v = text.linear_num_key_heads, text.linear_num_value_heads
            size_k, size_v = text.linear_key_head_dim, text.linear_value_head_dim
            inputs = 2 * n_k * size_k + n_v * size_v, text.linear_conv_kernel_dim - 1
            return cls(inputs, (n_v, size_v, size_k), True, n_k if kind in _TILED else 0)
        if kind in _MAMBA2:
            n_head, size, groups, n_state, width = (getattr(text, name) for name in _MAMBA2[kind])
            return cls((n_head * size + 2 * groups * n_state, width - 1), (n_head, size, n_state))
        if kind == "jamba":
            n_inner = text.mamba_expand * text.hidden_size
            return cls((n_inner, text.mamba_d_conv - 1), (n_inner, text.mamba_d_state))
        return cls((text.intermediate_size, text.conv_kernel - 1), (text.intermediate_size, text.state_size))

    def to_cache(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """llama.cpp's rows [n_r], [n_s] as transformers' states, of one sequence: [1, ...]."""
        inputs = self._of_v(r.view(self.inputs), self._by_k)
        if not self.recurrence:
            return inputs[None], None
        state = self._by_k(s.view(self.recurrence))
        return inputs[None], (state.transpose(-1, -2) if self.transposed else state)[None]

    def to_rows(self, inputs: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The inverse of to_cache(); there may be inputs before those that the next token sees."""
        r = self._of_v(inputs[0, :, -self.inputs[1] :], self._tiled).reshape(-1)
        if state is None:
            return r, r.new_empty(0)
        state = state[0].transpose(-1, -2) if self.transposed else state[0]
        return r, self._tiled(state).reshape(-1)

    def empty(self) -> tuple[Tensor, Tensor]:
        """r and s before the first token."""
        n_s = torch.Size(self.recurrence).numel() if self.recurrence else 0
        return torch.zeros(torch.Size(self.inputs).numel()), torch.zeros(n_s)

    def _of_v(self, inputs: Tensor, order: Any) -> Tensor:
        """Inputs [n_channel, n] with those of V, the last ones, in another order of heads."""
        if not self.n_head_k:
            return inputs
        n_head, size, _ = self.recurrence
        n_v = n_head * size
        heads = order(inputs[-n_v:].reshape(n_head, size, -1)).reshape(n_v, -1)
        return torch.cat([inputs[:-n_v], heads])

    def _by_k(self, heads: Tensor) -> Tensor:
        """Heads of V [n_head, ...], those of one head of K together."""
        return self._swapped(heads, -1, self.n_head_k)

    def _tiled(self, heads: Tensor) -> Tensor:
        """The inverse: the first of every head of K, then the second of each."""
        return self._swapped(heads, self.n_head_k, -1)

    def _swapped(self, heads: Tensor, n: int, m: int) -> Tensor:
        return heads.reshape(n, m, *heads.shape[1:]).transpose(0, 1).reshape(heads.shape) if self.n_head_k else heads
