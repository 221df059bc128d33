"""Recurrent layers in a transformers cache: what their states are behind a prefix, and how they go on.

transformers writes into a layer's states, which would cut their gradient off and spoil them for the next pass: here
each pass makes new ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, LinearAttentionLayer


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


class RowsAndStates(StateLayer, CacheLayerMixin):
    """A layer with attention and a recurrence (Falcon-H1): rows of K and V, and states. rows: the layer that has K and
    V, of which transformers sees nothing else."""

    def __init__(self, rows: DynamicLayer, inputs: Tensor, state: Tensor | None, grows: bool = True) -> None:
        super().__init__(inputs, state, grows)
        self.rows = rows

    @property
    def keys(self) -> Any:
        return self.rows.keys

    @property
    def values(self) -> Any:
        return self.rows.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As that of the rows."""
        return self.rows.update(key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.rows.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.get_mask_sizes(query_length)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows.batch_repeat_interleave(repeats)

    def followed_by(self, rows: DynamicLayer) -> RowsAndStates:
        """As followed(), with rows that have gone on."""
        after = self.followed()
        return RowsAndStates(rows, after.conv_states[0], after.recurrent_states[0], self._grows)


class StatesCache(Cache):
    """A cache whose recurrent layers are StateLayers."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state before this pass; what a layer writes into it is the state after."""
        state = super().get_recurrent_state(layer_idx, state_idx)
        if state is None:
            return None
        handed = state.as_subclass(_Handed)
        handed.layer = self.layers[layer_idx]
        return handed


class _Handed(Tensor):
    """A state in the hands of a layer. For a single token, layers of Mamba 2 write the one after it with copy_()."""

    layer: StateLayer
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return self.layer.update_recurrent_state(source)
