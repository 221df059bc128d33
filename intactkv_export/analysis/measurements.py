"""The measurements of an analysis: each runs in a process of its own and gives the data of its figures, for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intactkv_export.analysis import sinks
from intactkv_export.analysis.sinks import short
from intactkv_export.conversion import intact_tokens
from intactkv_export.evaluation import REFERENCE, Texts, evaluate
from intactkv_export.prefix import Prefix, ikv
from intactkv_export.work import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv_export.torch_model import MixedCache

TOKENS = 128  # of each text whose divergence is measured
_BINS = 16  # of positions


def of_reference(
    path: Path,
    source: Path,
    chunks: Sequence[Sequence[int]],
    pieces: Sequence[str],
    device: str,
    out: Path,
    progress: Steps,
) -> dict[str, dict[str, Any]]:
    """Data of the figures "magnitudes" and "attention".

    source: of the prefix; chunks: texts behind it; pieces: the text of each token of the prefix and the first chunk.
    What of_quantized() compares with is written to `out`. Raises IntactKVError if torch cannot load the model.
    """
    import torch

    from intactkv_export import torch_model
    from intactkv_export.torch_model import layers

    given = ikv.read(source)
    tokens, factors = given.tokens, torch_model.prefix_factors(given)
    model = torch_model.load(path, device=device, attention="eager", rope_factors=factors)
    progress(1, 4)
    outputs, cache = layers.alone(model, tokens, chunks)
    rows = {"K": [layer.keys.cpu() for layer in cache.layers], "V": [layer.values.cpu() for layer in cache.layers]}
    prefix = layers.cached_rows(model, cache, len(tokens))
    torch.save({"outputs": outputs, "rows": rows, "prefix": prefix}, out)
    del outputs, cache, rows
    progress(2, 4)
    own, _ = layers.alone(model, [], [[*tokens, *chunks[0]]])
    made = {"magnitudes": sinks.magnitudes([x[0].numpy() for x in own], len(tokens), pieces)}
    del own
    progress(3, 4)
    made["attention"] = sinks.attention(model, [*tokens, *chunks[0]], len(tokens))
    progress(4, 4)
    return made


def of_quantized(
    gguf: Path,
    source: Path,
    chunks: Sequence[Sequence[int]],
    kv_type: str,
    device: str,
    expected: Path,
    progress: Steps,
) -> dict[str, dict[str, Any]]:
    """Data of the figures "curve" and "kv_error". source: of the prefix. expected: what of_reference() has written.

    The curve's intact tokens are the reference's own also where the prefix is calibrated.
    """
    import torch

    from intactkv_export import torch_model
    from intactkv_export.torch_model import layers

    given, theirs = ikv.read(source), torch.load(expected, mmap=True)
    model = torch_model.load(gguf, device=device, rope_factors=torch_model.prefix_factors(given))
    kv: dict[str, dict[str, Any]] = {where: {"K": {}, "V": {}} for where in ("prefix", "text")}
    K, V = theirs["prefix"]
    tokens = given.tokens

    def error(n: int) -> list[float]:
        outputs, cache = layers.with_intact(model, tokens, chunks, K, V, n, kv_type)
        if n == 0:
            _add_kv_errors(kv, "plain", cache, theirs["rows"], len(tokens))
        return layers.errors(outputs, theirs["outputs"])

    made = intact_tokens.measure_curve(error, len(tokens), intact_tokens.counted(progress, len(tokens)))
    own_k, own_v = ([torch.from_numpy(np.array(x)) for x in rows] for rows in torch_model.prefix_rows(given))
    _, cache = layers.with_intact(model, tokens, chunks, own_k, own_v, len(tokens), kv_type, given.in_sight)
    _add_kv_errors(kv, _name(given), cache, theirs["rows"], len(tokens))
    text = {"n_chunks": len(chunks), "n_tokens": len(chunks[0])}
    return {
        "curve": {**made.to_dict(), "tolerance": intact_tokens.FLAT, **text},
        "kv_error": {"with_prefix": _name(given), **kv, **text},
    }


def of_text(
    reference: Path, model: Path, source: Path, chunks: Sequence[Sequence[int]], kv_type: str, progress: Steps
) -> dict[str, Any]:
    """Data of the figure "divergence": for each way to give the prefix, KL divergence by position (evaluation).

    chunks: texts of TOKENS tokens. mean, error: over the texts, of the mean of each bin of positions, and its standard
    error; total: of whole texts; difference: of these from plain, text by text.
    """
    configurations: list[dict[str, Any]] = []
    plain = np.zeros(0)
    texts = Texts(len(chunks), TOKENS, tokens=chunks)
    runs = evaluate(
        reference,
        [model],
        source,
        kv_types=[kv_type],
        texts=texts,
        progress=lambda stage, done, total, note="": progress(done, total),
    )
    for run in runs:
        if run.mode == REFERENCE:
            continue
        by_bin = run.kld_by_token.reshape(len(chunks), _BINS, -1).mean(2)
        by_text = by_bin.mean(1)
        if run.mode == "plain":
            plain = by_text
        configurations.append(
            {
                "name": run.mode,
                "mean": short(by_bin.mean(0)),
                "error": short(by_bin.std(0, ddof=1) / np.sqrt(len(chunks))),
                "total": _estimate(by_text),
                "difference": _estimate(by_text - plain),
            }
        )
    width = TOKENS / _BINS
    return {
        "n_chunks": len(chunks),
        "n_tokens": TOKENS,
        "kv_type": kv_type,
        "positions": [width * (i + 0.5) for i in range(_BINS)],
        "configurations": configurations,
    }


def _add_kv_errors(
    kv: dict[str, dict[str, Any]], name: str, cache: MixedCache, rows: dict[str, list[Tensor]], n_prefix: int
) -> None:
    """Adds by layer ||ours - theirs|| / ||theirs|| over all tokens and heads, of the prefix and of the texts."""
    for what, attribute in (("K", "keys"), ("V", "values")):
        ours = [_of_tokens(getattr(layer, attribute).cpu(), cache) for layer in cache.layers]
        for where, part in (("prefix", slice(0, n_prefix)), ("text", slice(n_prefix, None))):
            kv[where][what][name] = short(
                [
                    float((a[:, :, part] - b[:, :, part]).norm() / b[:, :, part].norm())
                    for a, b in zip(ours, rows[what], strict=True)
                ]
            )


def _of_tokens(rows: Tensor, cache: MixedCache) -> Tensor:
    """Of rows [batch, n_head_kv, n, head_dim] those that stand for a token."""
    extra = range(cache.n_prefix - cache.n_extra, cache.n_prefix)
    return rows[:, :, [i for i in range(rows.shape[2]) if i not in extra]]


def _estimate(by_text: np.ndarray) -> list[float]:
    """Mean and standard error of independent texts."""
    return short([by_text.mean(), by_text.std(ddof=1) / np.sqrt(len(by_text))])


def _name(prefix: Prefix) -> str:
    """Of the configuration that the prefix makes, as in plots.CONFIGURATIONS."""
    return "prompt" if prefix.manifest["calibrated"] is None else "calibrated"
