"""How many of a prefix's tokens need be intact: the layers' error against their number (figure 2 of the paper).

The quantized model in torch is given the first n tokens of the prefix as the reference computed them, rounded to F16;
it computes the others itself, and then a text behind them. What its layers give for the text is compared with what
the reference's give. Both models are never in memory at once: the reference's outputs and rows are kept meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intactkv_export.child import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from intactkv_export.mixed_cache import MixedCache
    from intactkv_export.student import TorchModel

FLAT = 0.05  # of the whole drop
N_CHUNKS, N_TOKENS = 4, 64


@dataclass(frozen=True)
class Curve:
    """counts: numbers of intact tokens, ascending, from 0 to the whole prefix.

    mse: [len(counts)][n_layer], mean squared error of a layer's outputs for the text. relative: for each count their
    mean over the layers, divided by that with no intact token. median: that of the layers, each relative to itself
    (layers of large outputs, the last ones, weigh most in the mean). chosen: the smallest prefix from which on the
    curve is flat (choose()); flat_below: the bound.
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


def measure(error: Callable[[int], Sequence[float]], n_tokens: int, progress: Callable[[], None]) -> Curve:
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
        made = make(sorted(found), [found[n] for n in sorted(found)])
        before = max(n for n in found if n < made.chosen)
        wanted = [(before + made.chosen) // 2] if made.chosen - before > 1 else []
    return made


def make(counts: Sequence[int], mse: Sequence[Sequence[float]]) -> Curve:
    """The curve of errors that were measured, the first with no intact token, the last with the whole prefix."""
    errors = np.asarray(mse, dtype=float)
    relative = (errors.mean(1) / (errors[0].mean() or 1.0)).tolist()
    by_layer = errors / np.where(errors[0] > 0, errors[0], 1.0)
    chosen, bound = choose(counts, relative)
    return Curve(list(counts), errors.tolist(), relative, np.median(by_layer, axis=1).tolist(), chosen, bound)


def choose(counts: Sequence[int], error: Sequence[float], tolerance: float = FLAT) -> tuple[int, float]:
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
    progress: Progress,
) -> Curve:
    """The curve of a prefix and a quantized model. chunks: texts of one length that may stand behind the prefix.

    Raises IntactKVError if a model cannot be loaded in torch.
    """
    from intactkv_export import student

    model = student.load(reference, device=device)
    expected, cache = alone(model, tokens, chunks)
    K, V = prefix_rows(model, cache, len(tokens))
    del model, cache
    model = student.load(gguf, device=device)

    def error(n: int) -> list[float]:
        return errors(with_intact(model, tokens, chunks, K, V, n, kv_type)[0], expected)

    return measure(error, len(tokens), counted(progress, len(tokens)))


def alone(model: TorchModel, tokens: Sequence[int], chunks: Sequence[Sequence[int]]) -> tuple[list[Tensor], MixedCache]:
    """The model computes everything itself, its cache at float32: outputs for the chunks, as layer_outputs(), cache."""
    cache = empty_cache(model, len(chunks))
    return layer_outputs(model, tokens, chunks, cache), cache


def with_intact(
    model: TorchModel,
    tokens: Sequence[int],
    chunks: Sequence[Sequence[int]],
    K: Sequence[Tensor],
    V: Sequence[Tensor],
    n: int,
    kv_type: str,
) -> tuple[list[Tensor], MixedCache]:
    """The model is given the first n tokens' K and V (by layer, llama.cpp's rows): outputs for the chunks, cache."""
    cache = model.cache([k[:n] for k in K], [v[:n] for v in V], kv_type, batch=len(chunks))
    return layer_outputs(model, tokens[n:], chunks, cache), cache


def counted(progress: Progress, n_tokens: int) -> Callable[[], None]:
    """Progress of measure(), whose halvings come on top of the counts it begins with."""
    done, total = 0, len(counts(n_tokens))

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, max(done, total))

    return step


def layer_outputs(
    model: TorchModel, tokens: Sequence[int], chunks: Sequence[Sequence[int]], cache: MixedCache
) -> list[Tensor]:
    """Outputs of the decoder layers for the chunks, each chunk behind the cache and `tokens`.

    By layer, [n_chunks, n_tokens, n_embd] in float32, in main memory.
    """
    import torch

    outputs: list[Tensor] = []
    n = len(chunks[0])

    def keep(module: Any, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        outputs.append(states[:, -n:].float().cpu())

    hooks = [layer.register_forward_hook(keep) for layer in model.decoder_layers]
    try:
        with torch.inference_mode():
            decode(model, [[*tokens, *chunk] for chunk in chunks], cache)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def decode(model: TorchModel, sequences: Sequence[Sequence[int]], cache: MixedCache) -> None:
    """Run the decoder layers alone: the logits of a large vocabulary would take more memory than all else."""
    import torch

    ids = torch.tensor(sequences, device=model.device)
    model.net.get_decoder()(input_ids=ids, use_cache=True, **{model._cache_argument: cache})


def empty_cache(model: TorchModel, batch: int = 1) -> MixedCache:
    """A cache at float32 that nothing is in."""
    import torch

    nothing = [torch.empty(0, model.n_head_kv, model.head_dim)] * model.n_layer
    return model.cache(nothing, nothing, "f32", batch)


def prefix_rows(model: TorchModel, cache: MixedCache, n_tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """K and V of the first n_tokens tokens in a cache, rounded to F16: by layer, llama.cpp's rows."""
    K = [model.to_rows(layer.keys[:1, :, :n_tokens], "K").half().cpu() for layer in cache.layers]
    V = [model.to_rows(layer.values[:1, :, :n_tokens], "V").half().cpu() for layer in cache.layers]
    return K, V


def errors(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Mean squared error of each layer's outputs."""
    return [float((a - b).square().mean()) for a, b in zip(outputs, expected, strict=True)]
