"""The states of recurrent layers after a prompt, from transformers' cache to llama.cpp's layout.

transformers has for such a layer the last inputs of its convolution, [channels, kernel], and the recurrence: Mamba's
[d_inner, d_state], Mamba 2's [n_head, head_dim, d_state], a gated delta net's [n_head, head_dim_k, head_dim_v].
llama.cpp (llama_memory_recurrent) keeps two rows of F32, r and s:

- r is the convolution's inputs without the oldest, which the next token pushes out: [channels, kernel - 1];
- s is the recurrence in the same order (build_mamba_layer, build_mamba2_layer), that of delta nets transposed,
  [n_head, head_dim_v, head_dim_k] (build_delta_net); short convolutions (LFM2) have none.

Upstream's converter puts Qwen 3.5's heads of V in another order (_LinearAttentionVReorderBase): those that share a head
of K lie apart, so that heads of K meet their heads of V by repeating all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import States, state

_TILED = {"qwen3_5_text", "qwen3_5_moe_text"}
_DELTA = _TILED | {"qwen3_next"}
# transformers begins every pass of several tokens with an empty recurrence (mamba_selective_scan)
_ONE_PASS = {"mamba", "falcon_mamba", "jamba"}


def in_one_pass(text: Any) -> bool:
    """Whether a prompt cannot be computed piece by piece. text: the configuration."""
    return text.model_type in _ONE_PASS


def states(cache: Any, text: Any) -> States:
    """{layer: (r, s)} of a transformers cache of one sequence, float32; s is empty where there is none.

    text: the configuration.
    """
    found: States = {}
    for il, layer in enumerate(cache.layers):
        if getattr(layer, "conv_states", None):
            inputs, state = (None if x is None else x[0].float().cpu().numpy() for x in _both(layer))
            s = np.empty(0, np.float32) if state is None else _recurrence(state, text)
            found[il] = _convolution(inputs, text).reshape(-1), s.reshape(-1)
    return found


def check(states: States, model: Mapping[str, Any], hf_dir: str) -> None:
    """Raises IntactKVError if layers or sizes are not those of the description of the model that will read them."""
    described = {layer.il: (layer.n_r, layer.n_s) for layer in state.recurrent(model).layers}
    found = {il: (len(r), len(s)) for il, (r, s) in states.items()}
    for il in sorted(found.keys() | described.keys()):
        ours, theirs = (x.get(il, (0, 0)) for x in (found, described))
        if ours != theirs:
            raise IntactKVError(
                f"layer {il} has a state of {ours[0]} and {ours[1]} values in {hf_dir}, {theirs[0]} and {theirs[1]} in "
                "the GGUF: use the GGUF made from this checkpoint"
            )


def _both(layer: Any) -> tuple[Any, Any]:
    return layer.conv_states[0], layer.recurrent_states[0]


def _convolution(inputs: Any, text: Any) -> np.ndarray:
    kept = np.ascontiguousarray(inputs[:, 1:])
    if text.model_type in _TILED:
        n_v = text.linear_num_value_heads * text.linear_value_head_dim
        heads = kept[-n_v:].reshape(text.linear_num_value_heads, -1)
        kept[-n_v:] = _tiled(heads, text).reshape(n_v, -1)
    return kept


def _recurrence(state: np.ndarray, text: Any) -> np.ndarray:
    if text.model_type in _TILED:
        state = _tiled(state, text)
    return np.ascontiguousarray(state.swapaxes(-1, -2) if text.model_type in _DELTA else state)


def _tiled(heads: np.ndarray, text: Any) -> np.ndarray:
    """Heads of V [n_head, ...]: the first of every head of K, then the second of each, and so on."""
    by_k = heads.reshape(text.linear_num_key_heads, -1, *heads.shape[1:])
    return by_k.swapaxes(0, 1).reshape(heads.shape)
