"""The states of recurrent layers after a prompt: transformers' cache as llama.cpp's rows (caches/state_layout.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import States, state

# transformers begins every pass of several tokens with an empty recurrence (mamba_selective_scan)
_ONE_PASS = {"mamba", "falcon_mamba", "jamba"}


def in_one_pass(text: Any) -> bool:
    """Whether a prompt cannot be computed piece by piece. text: the configuration."""
    return text.model_type in _ONE_PASS


def states(cache: Any, text: Any) -> States:
    """{layer: (r, s)} of a transformers cache of one sequence, float32; s is empty where there is none.

    text: the configuration.
    """
    from intactkv_export.torch_model import StateLayout

    found: States = {}
    for il, layer in enumerate(cache.layers):
        if getattr(layer, "conv_states", None):
            both = layer.conv_states[0], layer.recurrent_states[0]
            rows = StateLayout.of(text).to_rows(*(None if x is None else x.float().cpu() for x in both))
            found[il] = rows[0].numpy(), rows[1].numpy()
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
