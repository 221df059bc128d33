"""`inspect`: a prefix file for the eye. What it holds, and where its pivot tokens are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from intactkv_export.escapes import shown
from intactkv_export.libllama import Vocabulary, rope_of
from intactkv_export.models import gguf_file
from intactkv_export.prefix.ikv import Prefix

WIDTH = 80
# How far a norm is from the median of its layer, in factors of two: below 1/4, 1/2, 1, 2, and beyond
_STEPS = (0.25, 0.5, 1.0, 2.0)
_SMALLER, _LARGER = " ░▒▓█", " +*#@"
_STYLE_SMALLER, _STYLE_LARGER = ("", "blue", "blue", "cyan", "bold cyan"), ("", "red", "red", "yellow", "bold yellow")
# Distance of a token, see distances(), from which it counts as a pivot: by K and V, all that a prefix file holds.
# `analyze` has the activations and judges by those, as the paper does (analysis/sinks.py): the two may name others.
PIVOT_DISTANCE = 1.0
_ROWS = 32  # tokens shown, unless all are asked for


def norms(prefix: Prefix) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean norms over all heads of K and V, each [n_layer, n_cells]; NaN where a sliding window left a cell."""
    K = np.full((len(prefix.layers), prefix.n_cells), np.nan)
    V = K.copy()
    for i, layer in enumerate(prefix.layers):
        for rows, out in ((layer.K, K), (layer.V, V)):
            out[i, layer.cells] = np.linalg.norm(rows.astype(np.float64).reshape(len(rows), -1), axis=1)
    return K, V


def ratios(norm: np.ndarray) -> np.ndarray:
    """log2 of each norm over the median of its layer, [n_layer, n_cells]; 0 where all of a layer is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log2(norm / np.nanmedian(norm, axis=1, keepdims=True))
    return np.clip(np.where(np.isnan(ratio) & ~np.isnan(norm), 0.0, ratio), -16, 16)


def distances(prefix: Prefix) -> np.ndarray:
    """How far each cell is from the others, [n_cells]: mean over layers of |log2 ratio| of K and of V, added up."""
    if not prefix.layers:
        return np.zeros(prefix.n_cells)
    k, v = (np.abs(ratios(norm)) for norm in norms(prefix))
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(np.nanmean(k, axis=0) + np.nanmean(v, axis=0))


def as_json(prefix: Prefix) -> dict[str, Any]:
    """Everything there is to know, for a program."""
    K, V = ([[None if np.isnan(x) else round(float(x), 4) for x in row] for row in norm] for norm in norms(prefix))
    distance = distances(prefix)
    return {
        "file": str(prefix.source),
        "embedded": prefix.embedded,
        "name": prefix.name,
        "bytes": len(prefix.data),
        "sha256": prefix.sha256,
        "extra_cells": prefix.n_extra,
        "manifest": prefix.manifest,
        "layers": [
            {"il": x.il, "cells": len(x.positions), "K_bytes": x.K.nbytes, "V_bytes": x.V.nbytes}
            | {"K_norm": k, "V_norm": v}
            for x, k, v in zip(prefix.layers, K, V, strict=True)
        ],
        "states": [
            {"il": il, "r": r.size, "s": s.size, "bytes": r.nbytes + s.nbytes} for il, (r, s) in _states(prefix)
        ],
        "pivots": [i for i, x in enumerate(distance[: len(prefix.tokens)]) if x >= PIVOT_DISTANCE],
    }


def report(prefix: Prefix, pieces: Sequence[str] | None, fits: str | None, every: bool = False) -> list[Text]:
    """The lines to print, 80 columns wide.

    pieces: text of each token, if a vocabulary was at hand. fits: a sentence on a model it was compared with.
    every: show all tokens, not only the first ones and the pivots.
    """
    return [*_facts(prefix, fits), *([Text(), *_heat_map(prefix, pieces, every)] if prefix.layers else [])]


def listing(prefixes: Sequence[Prefix]) -> list[Text]:
    """A line for each of several in one file, the default first."""
    width = max(len(str(prefix.name)) for prefix in prefixes)
    lines = [Text(f"{len(prefixes)} prefixes in {prefixes[0].source}, the first is the default:")]
    for prefix in prefixes:
        text = repr(prefix.manifest["text"])[1:-1]
        what = _one_line(f"{prefix.contents}, {len(prefix.data):,} bytes: {text}")
        lines.append(Text(f"  {prefix.name or '':{width}}  {_cut(what, WIDTH - width - 4)}"))
    return lines


def token_texts(prefix: Prefix, model: Path | None) -> list[str] | None:
    """Text of each token, from a GGUF with its vocabulary: `model`, or the one the prefix is embedded in."""
    gguf = model or (prefix.source if prefix.embedded else None)
    if gguf is None:
        return None
    with Vocabulary(gguf_file.first_part(gguf)) as vocabulary:
        return [vocabulary.text([token]) for token in prefix.tokens]


def _facts(prefix: Prefix, fits: str | None) -> list[Text]:
    m = prefix.manifest
    model, reference, engine, rope = m["model"], m["reference"], m["engine"], m["model"]["rope"]
    versions = ", ".join(f"{name} {version}" for name, version in engine["versions"].items())
    where = f", embedded as {prefix.name}" if prefix.embedded else ""
    facts = [
        ("prefix", f"{prefix.source}{where}: {prefix.contents}, {len(prefix.data):,} bytes"),
        ("prompt", repr(m["text"])[1:-1] + (" (BOS only)" if m["bos_only"] else "")),
        *_rendering(m),
        ("reference", f"{reference['name']}, {reference['dtype']}"
                      f"{', itself quantized' if reference['quantized'] else ''}, weights {reference['sha256'][:16]}"),
        ("engine", f"{engine['name']}, {engine['dtype']}{f' ({versions})' if versions else ''}"),
        ("model", f"{model['arch']}, vocabulary of {model['n_vocab']:,} tokens, {model['vocab_sha256'][:16]}"),
        ("RoPE", f"{rope['type']}, {rope['n_rot']} dimensions, scaling {rope['scaling']}, scale {rope['scale']:g}, "
                 f"factors {str(rope['factors'])[:16]}"
                 + (f", to be used with {rope_of(m['rope_options'])}" if "rope_options" in m else "")),
        *(("layers", text) for text in _layer_groups(prefix)),
        *(("states", text) for text in _state_groups(prefix)),
        ("SHA-256", f"{prefix.sha256} (checked)"),
        ("calibrated", _calibration(m["calibrated"])),
        *_keeping(prefix),
        ("made by", m["created_by"]),
    ]  # fmt: skip
    if fits is not None:
        facts.append(("fits", fits))
    lines = []
    for name, value in facts:
        for i, part in enumerate(_wrap(_one_line(value), WIDTH - 12)):
            lines.append(Text(f"{name if i == 0 else '':11} ", style="dim") + Text(part, style="default"))
    return lines


def _keeping(prefix: Prefix) -> list[tuple[str, str]]:
    """Of one that no reference has computed."""
    if prefix.kept is None:
        return []
    made = f"by {prefix.kept['model']} while it was served, itself, not by the reference; {prefix.kept['requests']}"
    return [("kept", f"{made} requests began so")]


def _rendering(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """With what else conversations are rendered, a line each."""
    lines = []
    if tools := manifest.get("tools"):
        lines.append(("tools", f"{len(tools)}: {', '.join(tool['function']['name'] for tool in tools)}"))
    if "date" in manifest:
        lines.append(("date", f"{manifest['date']}, in every conversation behind it"))
    if "template_args" in manifest:
        args = manifest["template_args"]
        given = f" with {json.dumps(args, ensure_ascii=False)}" if args else ""
        lines.append(("rendered", f"as llama-server does{given}"))
    return lines


def _calibration(made: dict[str, Any] | None) -> str:
    """In a sentence: how, for which model, and what came of it. A file of another make may lack any of it."""
    if made is None:
        return "no"
    try:
        held_out = made["held_out"]
        tail = f" with a tail of {made['kv_tail']}" if made.get("kv_tail") else ""
        sight = ", in sight of every token behind it" if made.get("in_sight") else ""
        return (
            f"{made['objective']}, step {made['best_step']} of {made['steps']}, {made['data']['n_tokens']:,} tokens of "
            f"{made['data']['kind']}, for {made['model']['type']} behind a {made['kv_type']} cache{tail}{sight}: "
            f"held-out KL divergence {held_out['before']:.4f} -> {held_out['after']:.4f}"
        )
    except (KeyError, TypeError, ValueError):
        return str(made)


def _layer_groups(prefix: Prefix) -> list[str]:
    """Runs of layers of the same size and RoPE base, each as one line."""
    base = {x["il"]: x["rope_base"] for cache in prefix.manifest["model"]["caches"] for x in cache["layers"]}
    lines = []
    for (cells, k, v, rope_base), group in groupby(
        prefix.layers, key=lambda x: (len(x.positions), x.K.shape[1:], x.V.shape[1:], base[x.il])
    ):
        layers = list(group)
        first, last, size = layers[0].il, layers[-1].il, layers[0].K.nbytes + layers[0].V.nbytes
        which = str(first) if first == last else f"{first}-{last}"
        heads = f"{k[0]} KV heads of {k[1]}" if k == v else f"{k[0]} KV heads of {k[1]} (K) and {v[1]} (V)"
        heads = heads if v[1] else f"a latent of {k[0] * k[1]} values"
        held = "cells" if prefix.n_extra else "tokens"
        lines.append(f"{which}: {cells} {held}, {heads}, F16, {size:,} bytes each, RoPE base {rope_base:g}")
    return lines


def _states(prefix: Prefix) -> list[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    return sorted(prefix.states.items())


def _state_groups(prefix: Prefix) -> list[str]:
    """Runs of recurrent layers whose states have the same sizes, each as one line."""
    lines = []
    for (n_r, n_s), group in groupby(_states(prefix), key=lambda x: (x[1][0].size, x[1][1].size)):
        layers = [il for il, _ in group]
        which = str(layers[0]) if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"
        parts = [f"{n:,} values of the {name}" for n, name in ((n_r, "convolution"), (n_s, "recurrence")) if n]
        lines.append(f"{which}: {' and '.join(parts)}, F32, {4 * (n_r + n_s):,} bytes each, after the last token")
    return lines


def _heat_map(prefix: Prefix, pieces: Sequence[str] | None, every: bool) -> list[Text]:
    """A row for each cell, a column for each layer (or few neighbouring ones), K left and V right."""
    names = [repr(piece)[1:-1] for piece in pieces] if pieces else [f"id {token}" for token in prefix.tokens]
    names += ["(no token)"] * prefix.n_extra
    what = "cells" if prefix.n_extra else "tokens"
    name_width = min(max(map(len, names)), 13)
    index_width = len(str(len(names) - 1))
    columns = (WIDTH - index_width - name_width - 6) // 2
    k, v = (_columns(ratios(norm), columns) for norm in norms(prefix))
    distance = distances(prefix)
    n_layer, side = len(prefix.layers), len(k)
    margin = " " * (index_width + name_width + 3)
    sides = ("K", "V") if any(layer.V.size for layer in prefix.layers) else ("K", "")  # of latents
    heads = [f"{name}, layers 0-{n_layer - 1}"[: max(side, 1)] if name else "" for name in sides]
    lines = [
        Text(f"Norms of {' and '.join(filter(None, sides))} against the median of their layer:"),
        Text("  smaller by 1.2 ░  1.4 ▒  2 ▓  4 █    larger by 1.2 +  1.4 *  2 #  4 @"),
        Text("  * before a token: a pivot, far from the others over all layers"),
        Text(f"{margin}{heads[0]:{side}}  {heads[1]}".rstrip(), style="dim"),
    ]
    shown = _shown(distance, every)
    for before, i in zip([-1, *shown], shown, strict=False):
        if i > before + 1:
            lines.append(Text(f"{margin}... {i - before - 1} {what} that stand out less", style="dim"))
        pivot = distance[i] >= PIVOT_DISTANCE and i < len(prefix.tokens)
        label = f"{'*' if pivot else ' '}{i:>{index_width}} {_cut(names[i], name_width):{name_width}} "
        row = Text(label, style="bold" if pivot else "")
        row += _cells(k[:, i]) + Text("  ") + _cells(v[:, i])
        row.rstrip()
        lines.append(row)
    if shown[-1] < len(names) - 1:
        lines.append(Text(f"{margin}... {len(names) - 1 - shown[-1]} {what} that stand out less", style="dim"))
    return lines


def _columns(ratio: np.ndarray, n: int) -> np.ndarray:
    """At most n rows of a [n_layer, n_tokens] array: of neighbouring layers the largest deviation is kept."""
    if len(ratio) <= n:
        return ratio
    groups = np.array_split(ratio, n)
    return np.stack([np.take_along_axis(g, np.abs(g).argmax(0)[None], 0)[0] for g in map(np.nan_to_num, groups)])


def _shown(distance: np.ndarray, every: bool) -> list[int]:
    n = len(distance)
    if every or n <= _ROWS:
        return list(range(n))
    first = set(range(_ROWS // 2))
    return sorted(first | set(np.argsort(-distance, kind="stable")[: _ROWS // 2].tolist()))


def _cells(ratio: np.ndarray) -> Text:
    text = Text()
    for x in ratio:
        step = 0 if np.isnan(x) else int(np.searchsorted(_STEPS, abs(x), side="right"))
        smaller = x < 0
        text.append((_SMALLER if smaller else _LARGER)[step], (_STYLE_SMALLER if smaller else _STYLE_LARGER)[step])
    return text


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _one_line(text: str) -> str:
    """Of a manifest or a name: nothing that a terminal obeys, and no second line that looks like a fact of ours."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def _wrap(text: str, width: int) -> list[str]:
    lines = []
    while len(text) > width:
        cut = text.rfind(" ", 0, width) + 1 or width
        lines.append(text[:cut].rstrip())
        text = text[cut:]
    return [*lines, text]
