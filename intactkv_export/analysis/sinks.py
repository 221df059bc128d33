"""Pivot tokens and attention sinks of the reference: data of the figures "magnitudes" and "attention".

A few tokens, the first above all, have activations many times larger than all others, and most of the attention goes
to them (figure 1 of the paper). Those are what quantization damages most and an intact prefix protects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv_export.torch_model import TorchModel

# A token is a pivot whose largest activation is so many times the median token's. `inspect` has no activations and
# judges by the norms of K and V (prefix/inspection.py): the two may name others.
PIVOT_ACTIVATION = 5.0
_SHOWN = 32, 16  # tokens of the prefix and of the text in the figures
_ROWS = 96  # of the channels' view: each row is the largest of neighbouring channels
_QUERIES = 256  # tokens whose attention is held at a time


def magnitudes(outputs: Sequence[np.ndarray], n_prefix: int, pieces: Sequence[str]) -> dict[str, Any]:
    """outputs: by layer, [n_tokens, n_embd], of the prefix and a text behind it; pieces: the text of each token."""
    maximum = np.stack([np.abs(x).max(1) for x in outputs])  # [n_layer, n_tokens]
    peak = maximum.max(0)
    ratio = peak / np.median(peak)
    shown = _shown(n_prefix, len(pieces))
    n_layer, n_embd = len(outputs), outputs[0].shape[1]
    together = -(-n_embd // _ROWS)
    at = [int(i) for i in np.argsort(-peak, kind="stable") if ratio[i] >= PIVOT_ACTIVATION]
    return {
        **_tokens(n_prefix, len(pieces)),
        "tokens": [pieces[i] for i in shown],
        "n_embd": n_embd,
        "maximum": short(maximum[:, shown]),
        "median": short([np.median(np.abs(x)) for x in outputs]),
        "layers": [
            {"il": il, "channels_per_row": together, "values": short(_pooled(outputs[il][shown], together))}
            for il in _spread(n_layer, 3)
        ],
        "pivots": [
            {
                "token": i,
                "text": pieces[i],
                "maximum": short(peak[i]),
                "times_median": short(ratio[i]),
                "layer": (il := int(maximum[:, i].argmax())),
                "channel": int(np.abs(outputs[il][i]).argmax()),
            }
            for i in at
        ],
    }


def attention(model: TorchModel, tokens: Sequence[int], n_prefix: int) -> dict[str, Any]:
    """Who looks at whom, tokens being a prefix of n_prefix and a text. The model's attention must be "eager".

    A layer's weights are held for _QUERIES tokens at a time: [n_head, _QUERIES, n_tokens], float32.
    """
    import torch

    from intactkv_export.torch_model import layers

    shown = _shown(n_prefix, len(tokens))
    chosen = _spread(model.n_layer, 4)
    maps = {il: np.zeros((len(shown), len(shown))) for il in chosen}
    n_head = model.net.config.get_text_config(decoder=True).num_attention_heads
    first, prefix = np.zeros((2, model.n_layer, n_head))  # summed over the tokens of the text
    start = 0

    def look(il: int, weights: Tensor) -> None:
        seen = weights[0].float().cpu().numpy()  # [n_head, queries, keys]; a sliding window may keep the last keys only
        wide = np.zeros((*seen.shape[:2], len(tokens)), np.float32)
        end = start + seen.shape[1]
        wide[..., end - seen.shape[2] : end] = seen
        of_text = wide[:, max(n_prefix - start, 0) :]
        first[il] += of_text[:, :, 0].sum(1)
        prefix[il] += of_text[:, :, :n_prefix].sum((1, 2))
        if il in maps:
            rows = [i for i, token in enumerate(shown) if start <= token < end]
            maps[il][rows] = wide.mean(0)[[shown[i] - start for i in rows]][:, shown]

    hooks = [
        layer.self_attn.register_forward_hook(lambda module, inputs, output, il=il: look(il, output[1]))
        for il, layer in enumerate(model.decoder_layers)
    ]
    cache = layers.empty_cache(model)
    try:
        with torch.inference_mode():
            for start in range(0, len(tokens), _QUERIES):
                model.decode([tokens[start : start + _QUERIES]], cache)
    finally:
        for hook in hooks:
            hook.remove()
    n_text = len(tokens) - n_prefix
    return {
        **_tokens(n_prefix, len(tokens)),
        "maps": [{"il": il, "values": short(maps[il])} for il in chosen],
        "first": short(first / n_text),
        "prefix": short(prefix / n_text),
    }


def _pooled(outputs: np.ndarray, together: int) -> np.ndarray:
    """[n_tokens, n_embd] -> [rows, n_tokens]: the largest magnitude of each `together` neighbouring channels."""
    padded = np.pad(np.abs(outputs), ((0, 0), (0, -outputs.shape[1] % together)))
    return padded.reshape(len(outputs), -1, together).max(2).T


def _tokens(n_prefix: int, n_tokens: int) -> dict[str, Any]:
    return {
        "n_prefix": n_prefix,
        "n_prefix_shown": min(n_prefix, _SHOWN[0]),
        "n_tokens": n_tokens,
        "positions": _shown(n_prefix, n_tokens),
    }


def _shown(n_prefix: int, n_tokens: int) -> list[int]:
    """The first tokens of the prefix and the first ones of the text: more have no room in a figure."""
    return [*range(min(n_prefix, _SHOWN[0])), *range(n_prefix, min(n_prefix + _SHOWN[1], n_tokens))]


def _spread(n_layer: int, n: int) -> list[int]:
    """n layers from the first to the last."""
    return sorted({round(i * (n_layer - 1) / (n - 1)) for i in range(n)})


def short(values: Any) -> Any:
    """Numbers for JSON: lists and arrays as nested lists, four digits each; a figure shows no more."""
    if isinstance(values, list | tuple | np.ndarray):
        return [short(value) for value in values]
    return float(f"{float(values):.4g}")
