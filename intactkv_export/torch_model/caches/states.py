"""The states of recurrent layers in a transformers cache: what they are behind a prefix, and how they go on.

The rows r and s are llama.cpp's, as a prefix file holds them (engines/recurrent.py makes them of transformers' own).
transformers writes into a layer's states, which would cut their gradient off and spoil them for the next pass: here
each pass makes new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

STATES = {"lfm2", "qwen3_5_text"}  # the model types whose states are known here
_DELTA = {"qwen3_5_text"}


@dataclass(frozen=True)
class StateLayout:
    """Of one model: inputs of the convolution that the next token sees, [n_channel, n_input], and the recurrence,
    [n_head, head_dim_v, head_dim_k] (llama.cpp's order; () if there is none).

    n_head_k: of a gated delta net. llama.cpp has its heads of V by what comes first in each head of K, then second;
    transformers all of one head of K, then of the next.
    """

    inputs: tuple[int, int]
    recurrence: tuple[int, ...] = ()
    n_head_k: int = 0

    @classmethod
    def of(cls, text: Any) -> StateLayout:
        """text: a configuration, of one of STATES."""
        if text.model_type in _DELTA:
            n_k, n_v = text.linear_num_key_heads, text.linear_num_value_heads
            size_k, size_v = text.linear_key_head_dim, text.linear_value_head_dim
            channels = 2 * n_k * size_k + n_v * size_v
            return cls((channels, text.linear_conv_kernel_dim - 1), (n_v, size_v, size_k), n_k)
        return cls((text.hidden_size, text.conv_L_cache - 1))

    def to_cache(self, r: Tensor, s: Tensor) -> tuple[Tensor, Tensor | None]:
        """llama.cpp's rows [n_r], [n_s] as transformers' states, of one sequence: [1, ...]."""
        inputs = r.view(self.inputs)
        if not self.recurrence:
            return inputs[None], None
        n_head, size_v, _ = self.recurrence
        n_v = n_head * size_v
        heads = self._by_k(inputs[-n_v:].reshape(n_head, size_v, -1)).reshape(n_v, -1)
        state = self._by_k(s.view(self.recurrence)).transpose(-1, -2)
        return torch.cat([inputs[:-n_v], heads])[None], state[None]

    def _by_k(self, heads: Tensor) -> Tensor:
        """Heads of V [n_head, ...], those of one head of K together."""
        return heads.reshape(-1, self.n_head_k, *heads.shape[1:]).transpose(0, 1).reshape(heads.shape)

    def empty(self) -> tuple[Tensor, Tensor]:
        """r and s before the first token."""
        n_s = torch.Size(self.recurrence).numel() if self.recurrence else 0
        return torch.zeros(torch.Size(self.inputs).numel()), torch.zeros(n_s)


class StateLayer(LinearAttentionLayer):
    """One recurrent layer. It begins with what is given: the convolution's last inputs [batch, n_channel, n_input] and
    the state of the recurrence, None if there is none. grows: see MixedCache."""

    def __init__(self, inputs: Tensor, state: Tensor | None, grows: bool = True) -> None:
        super().__init__()
        self.dtype, self.device = inputs.dtype, inputs.device
        self.conv_states[0], self.recurrent_states[0] = inputs, state
        self.is_conv_states_initialized[0] = self.is_recurrent_states_initialized[0] = True
        self.has_previous_state[0] = True
        self.record_past = True  # else one token alone would be written into the state
        self._grows = grows
        self._passed: list[Tensor | None] = [None, None]  # after the last pass

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """Inputs [batch, n_channel, n] behind those that are there: all that the new ones' outputs depend on."""
        before = self.conv_states[0]
        assert before is not None
        whole = torch.cat([before.to(conv_states.dtype), conv_states], -1)
        after = whole[..., -before.shape[-1] :]
        if self._grows:
            self.conv_states[0] = after
        else:
            self._passed[0] = after.detach()
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any) -> Tensor:
        """The state after this pass takes the place of the one before."""
        if self._grows:
            self.recurrent_states[0] = recurrent_states
        else:
            self._passed[1] = recurrent_states.detach()
        return recurrent_states

    def followed(self) -> StateLayer:
        """A layer that goes on where the last pass ended."""
        inputs, state = self._passed
        assert inputs is not None  # the caller's part of the contract
        return StateLayer(inputs, state, self._grows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence so many times, as transformers' other layers do it."""
        for states in (self.conv_states, self.recurrent_states):
            if states[0] is not None:
                states[0] = states[0].repeat_interleave(repeats, 0)
