"""What quantization does to a model behind a prefix, and what the intact prefix undoes: the data of five figures.

    the reference in torch      activations, attention, its K and V, its layers' outputs     magnitudes, attention
    the quantized one in torch  the same text behind 0, 1, 2, ... intact tokens              curve, kv_error
    llama.cpp                   KL divergence of every token of a text (evaluate.py)         divergence

Each line is a process of its own, so one model is in memory at a time, at float32 4 bytes a weight: 28 GB for 7B.
Beside it lie the reference's outputs and rows for 4 x 64 tokens of text, 2 x 4 bytes x n_layer x n_embd a token and
less (0.3 GB for 7B), and one layer's attention for 256 tokens, 4 bytes x n_head x 256 x tokens of prefix and text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intactkv_export import curve
from intactkv_export.child import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv_export.mixed_cache import MixedCache
    from intactkv_export.student import TorchModel

PIVOT = 5.0  # a token whose largest activation is so many times the median token's
_SHOWN = 32, 16  # tokens of the prefix and of the text in the figures of tokens
_ROWS = 96  # of the channels' view: each row is the largest of neighbouring channels
_QUERIES = 256  # tokens whose attention is held at a time


def of_reference(
    path: str | Path,
    tokens: Sequence[int],
    chunks: Sequence[Sequence[int]],
    pieces: Sequence[str],
    device: str,
    out: str | Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Data of the figures "magnitudes" and "attention".

    tokens: the prefix; chunks: texts behind it; pieces: the text of each token of the prefix and the first chunk.
    What of_quantized() compares with is written to `out`, for torch.load. Raises IntactKVError if torch cannot load
    the model.
    """
    import torch

    from intactkv_export import student

    model = student.load(path, device=device, attention="eager")
    progress(1, 4)
    outputs, cache = curve.alone(model, tokens, chunks)
    rows = {"K": [layer.keys.cpu() for layer in cache.layers], "V": [layer.values.cpu() for layer in cache.layers]}
    prefix = curve.prefix_rows(model, cache, len(tokens))
    torch.save({"outputs": outputs, "rows": rows, "prefix": prefix}, out)
    del outputs, cache, rows
    progress(2, 4)
    own, _ = curve.alone(model, [], [[*tokens, *chunks[0]]])
    made = {"magnitudes": _magnitudes([x[0].numpy() for x in own], len(tokens), pieces)}
    del own
    progress(3, 4)
    made["attention"] = _attention(model, [*tokens, *chunks[0]], len(tokens))
    progress(4, 4)
    return made


def of_quantized(
    gguf: str | Path,
    tokens: Sequence[int],
    chunks: Sequence[Sequence[int]],
    given: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
    given_name: str,
    kv_type: str,
    device: str,
    expected: str | Path,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """Data of the figures "curve" and "kv_error". given: K and V of the prefix file, by layer, llama.cpp's rows.

    given_name: "prompt", or "calibrated", whose rows are not the reference's: the curve's always are. expected: what
    of_reference() has written.
    """
    import torch

    from intactkv_export import student

    theirs = torch.load(expected, mmap=True)
    model = student.load(gguf, device=device)
    kv: dict[str, dict[str, Any]] = {where: {"K": {}, "V": {}} for where in ("prefix", "text")}
    K, V = theirs["prefix"]

    def error(n: int) -> list[float]:
        outputs, cache = curve.with_intact(model, tokens, chunks, K, V, n, kv_type)
        if n == 0:
            _add_kv_errors(kv, "plain", cache, theirs["rows"], len(tokens))
        return curve.errors(outputs, theirs["outputs"])

    made = curve.measure(error, len(tokens), curve.counted(progress, len(tokens)))
    own_k, own_v = ([torch.from_numpy(np.array(x)) for x in rows] for rows in given)
    _, cache = curve.with_intact(model, tokens, chunks, own_k, own_v, len(tokens), kv_type)
    _add_kv_errors(kv, given_name, cache, theirs["rows"], len(tokens))
    text = {"n_chunks": len(chunks), "n_tokens": len(chunks[0])}
    return {
        "curve": {**made.to_dict(), "tolerance": curve.FLAT, **text},
        "kv_error": {"with_prefix": given_name, **kv, **text},
    }


def _magnitudes(outputs: Sequence[np.ndarray], n_prefix: int, pieces: Sequence[str]) -> dict[str, Any]:
    """outputs: by layer, [n_tokens, n_embd], of the prefix and a text."""
    size = np.stack([np.abs(x) for x in outputs])  # [n_layer, n_tokens, n_embd]
    maximum = size.max(2)
    peak = maximum.max(0)
    ratio = peak / np.median(peak)
    shown = _shown(n_prefix, len(pieces))
    n_layer, _, n_embd = size.shape
    together = -(-n_embd // _ROWS)
    padded = np.pad(size[:, shown], ((0, 0), (0, 0), (0, -n_embd % together)))
    pooled = padded.reshape(n_layer, len(shown), -1, together).max(3)
    at = [int(i) for i in np.argsort(-peak, kind="stable") if ratio[i] >= PIVOT]
    return {
        **_tokens(n_prefix, len(pieces)),
        "tokens": [pieces[i] for i in shown],
        "n_embd": n_embd,
        "maximum": _short(maximum[:, shown]),
        "median": _short(np.median(size, axis=(1, 2))),
        "layers": [
            {"il": il, "channels_per_row": together, "values": _short(pooled[il].T)} for il in _spread(n_layer, 3)
        ],
        "pivots": [
            {
                "token": i,
                "text": pieces[i],
                "maximum": _short(peak[i]),
                "times_median": _short(ratio[i]),
                "layer": int(maximum[:, i].argmax()),
                "channel": int(size[maximum[:, i].argmax(), i].argmax()),
            }
            for i in at
        ],
    }


def _attention(model: TorchModel, tokens: Sequence[int], n_prefix: int) -> dict[str, Any]:
    """Who looks at whom. The weights of a layer exist for _QUERIES tokens at a time."""
    import torch

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
    cache = curve.empty_cache(model)
    try:
        with torch.inference_mode():
            for start in range(0, len(tokens), _QUERIES):
                curve.decode(model, [tokens[start : start + _QUERIES]], cache)
    finally:
        for hook in hooks:
            hook.remove()
    n_text = len(tokens) - n_prefix
    return {
        **_tokens(n_prefix, len(tokens)),
        "maps": [{"il": il, "values": _short(maps[il])} for il in chosen],
        "first": _short(first / n_text),
        "prefix": _short(prefix / n_text),
    }


def _add_kv_errors(
    kv: dict[str, dict[str, Any]], name: str, cache: MixedCache, rows: dict[str, list[Tensor]], n_prefix: int
) -> None:
    """Adds by layer ||ours - theirs|| / ||theirs|| over all tokens and heads, of the prefix and of the texts."""
    for what, attribute in (("K", "keys"), ("V", "values")):
        ours = [getattr(layer, attribute).cpu() for layer in cache.layers]
        for where, part in (("prefix", slice(0, n_prefix)), ("text", slice(n_prefix, None))):
            kv[where][what][name] = _short(
                [
                    float((a[:, :, part] - b[:, :, part]).norm() / b[:, :, part].norm())
                    for a, b in zip(ours, rows[what], strict=True)
                ]
            )


def _tokens(n_prefix: int, n_tokens: int) -> dict[str, int]:
    return {"n_prefix": n_prefix, "n_prefix_shown": min(n_prefix, _SHOWN[0]), "n_tokens": n_tokens}


def _shown(n_prefix: int, n_tokens: int) -> list[int]:
    """The first tokens of the prefix and the first ones of the text: more have no room in a figure."""
    return [*range(min(n_prefix, _SHOWN[0])), *range(n_prefix, min(n_prefix + _SHOWN[1], n_tokens))]


def _spread(n_layer: int, n: int) -> list[int]:
    """n layers from the first to the last."""
    return sorted({round(i * (n_layer - 1) / (n - 1)) for i in range(n)})


def _short(values: Any) -> Any:
    """Numbers for JSON, four digits each: a figure shows no more."""
    if isinstance(values, list | tuple | np.ndarray):
        return [_short(value) for value in values]
    return float(f"{float(values):.4g}")
