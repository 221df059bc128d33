"""How many of a prefix's tokens need be intact: the layers' error against their number (figure 2 of the paper).

The quantized model in torch is given the first n tokens of the prefix as the reference computed them, rounded to F16;
it computes the others itself, and then a text behind them. What its layers give for the text is compared with what
the reference's give. Both models are never in memory at once: the reference's outputs and rows are kept meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.engines import Engine, longrope_factors
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import Reference
from intactkv_export.prefix import Prompt, first_tokens
from intactkv_export.texts import QUESTIONS
from intactkv_export.work import Stages, Steps

FLAT = 0.05  # of the whole drop
N_CHUNKS, N_TOKENS = 4, 64


@dataclass(frozen=True)
class Curve:
    """counts: numbers of intact tokens, ascending, from 0 to the whole prefix.

    mse: [len(counts)][n_layer], mean squared error of a layer's outputs for the text. relative: for each count their
    mean over the layers, divided by that with no intact token. median: that of the layers, each relative to itself
    (layers of large outputs, the last ones, weigh most in the mean). chosen: the smallest prefix from which on the
    curve is flat (smallest_flat()); flat_below: the bound.
    """

    counts: list[int]
    mse: list[list[float]]
    relative: list[float]
    median: list[float]
    chosen: int
    flat_below: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_curve(error: Callable[[int], Sequence[float]], n_tokens: int, progress: Callable[[], None]) -> Curve:
    """The curve of a prefix of n_tokens tokens. error(n): by layer, the mean squared error with n intact tokens.

    Measured where counts() says, then by halving between the smallest of these that is flat and the one before it:
    so `chosen` is exact where the curve falls there. progress() is called after each measurement.
    """
    found: dict[int, Sequence[float]] = {}
    wanted = counts(n_tokens)
    while wanted:
        for n in wanted:
            found[n] = error(n)
            progress()
        made = build_curve(sorted(found), [found[n] for n in sorted(found)])
        before = max(n for n in found if n < made.chosen)
        wanted = [(before + made.chosen) // 2] if made.chosen - before > 1 else []
    return made


def build_curve(counts: Sequence[int], mse: Sequence[Sequence[float]]) -> Curve:
    """The curve of errors that were measured, the first with no intact token, the last with the whole prefix."""
    errors = np.asarray(mse, dtype=float)
    relative = (errors.mean(1) / (errors[0].mean() or 1.0)).tolist()
    by_layer = errors / np.where(errors[0] > 0, errors[0], 1.0)
    chosen, bound = smallest_flat(counts, relative)
    return Curve(list(counts), errors.tolist(), relative, np.median(by_layer, axis=1).tolist(), chosen, bound)


def smallest_flat(counts: Sequence[int], error: Sequence[float], tolerance: float = FLAT) -> tuple[int, float]:
    """The smallest number of intact tokens from which on the curve is flat, and the bound that says so.

    Flat: neither this error nor one further on lies above error[-1] + tolerance * (error[0] - error[-1]), that is,
    above the error of the whole prefix by more than this share of all that the prefix gains. Never fewer than one
    token, the first being the pivot; a curve that does not fall at all is flat from there.
    """
    bound = max(error) if error[0] <= error[-1] else error[-1] + tolerance * (error[0] - error[-1])
    chosen = counts[-1]
    for count, value in zip(reversed(counts[1:]), reversed(error[1:]), strict=True):
        if value > bound:
            break
        chosen = count
    return chosen, bound


def counts(n_tokens: int) -> list[int]:
    """Where the curve is measured first: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... and all n_tokens."""
    steps, step = {0, 1, 2, 3, n_tokens}, 4
    while step < n_tokens:
        steps |= {step, step * 3 // 2}
        step *= 2
    return sorted(count for count in steps if count <= n_tokens)


def for_prompt(
    reference: str | Path,
    gguf: str | Path,
    tokens: Sequence[int],
    chunks: Sequence[Sequence[int]],
    kv_type: str,
    device: str,
    rope_factors: str | None,
    progress: Steps,
) -> Curve:
    """The curve of a prefix and a quantized model. chunks: texts of one length that may stand behind the prefix.

    rope_factors: of torch_model.load().

    Raises IntactKVError if a model cannot be loaded in torch.
    """
    from intactkv_export import torch_model
    from intactkv_export.torch_model import layers

    model = torch_model.load(reference, device=device, rope_factors=rope_factors)
    expected, cache = layers.alone(model, tokens, chunks)
    K, V = layers.cached_rows(model, cache, len(tokens))
    del model, cache
    model = torch_model.load(gguf, device=device, rope_factors=rope_factors)

    def error(n: int) -> list[float]:
        return layers.errors(layers.with_intact(model, tokens, chunks, K, V, n, kv_type)[0], expected)

    return measure_curve(error, len(tokens), counted(progress, len(tokens)))


def counted(progress: Steps, n_tokens: int) -> Callable[[], None]:
    """Steps of measure_curve(), whose halvings come on top of the counts it begins with."""
    done, total = 0, len(counts(n_tokens))

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, max(done, total))

    return step


def shortest(
    work: Stages, engine: Engine, reference: Reference, models: Mapping[str, Path], made: Prompt
) -> tuple[Prompt, dict[str, Curve]]:
    """The shortest beginning of a prompt that does for each of the quantized models what all of it does.

    engine: that will compute the prefix. models: by name; returned with the curve that each was judged by
    (smallest_flat()), behind a q8_0 cache, on questions of our own. Raises IntactKVError if a model cannot be run in
    torch.
    """
    first = next(iter(models.values()))
    factors = longrope_factors(work, engine, first, made)
    with Vocabulary(first) as vocabulary:
        apart = len(QUESTIONS) // N_CHUNKS
        starts = (vocabulary.tokenize("\n".join(QUESTIONS[i * apart :]), False) for i in range(N_CHUNKS))
        chunks = [tokens[:N_TOKENS] for tokens in starts]
        curves = {
            name: work.run(
                f"choose tokens {name}", for_prompt, reference.path, path, made.tokens, chunks, "q8_0", engine.device,
                factors, counted=True,
            )
            for name, path in models.items()
        }  # fmt: skip
        return first_tokens(made, max(made_for.chosen for made_for in curves.values()), vocabulary), curves
