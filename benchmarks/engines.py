"""How near the torch engine's K, V and recurrent states are to llama.cpp's, for every family that it is proven for.

    python -m benchmarks.engines [NAME ...] [--tokens 96] [--as-ggml]

Tiny models with random weights (tests/support), as a Hugging Face directory and as an F32 GGUF that upstream's
converter made of it. Both engines compute in float32; llama.cpp's cache is F32, without flash attention, which works in
F16 inside. --as-ggml: torch computes GELU as ggml does, by a table of F16, and the deviation in Gemma 3n's activations
of n - 1 values: what is left is rounding. Of each layer and side the relative error ||a - b|| / ||b||: the worst and
the median over the layers. A table in Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from intactkv_export.engines import torch_engine
from intactkv_export.libllama import N_BATCH, Context, bindings, state
from tests.support import random_families, random_hybrids, random_latents, random_models

SIDES = ("K", "V", "r", "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of tests/support/random_*.py; default: all")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--as-ggml", action="store_true")
    args = parser.parse_args()
    if args.as_ggml:
        compute_as_ggml()
    print("| model | layers | " + " | ".join(f"{side}: worst, median" for side in SIDES) + " |")
    print("| --- | --- |" + " --- |" * len(SIDES))
    with tempfile.TemporaryDirectory() as root:
        for name, directory in built(Path(root), args.names).items():
            found = errors(directory, directory.with_name(f"{name}.gguf"), args.tokens)
            n_layer = len({il for side in found.values() for il in side})
            cells = " | ".join(_cell(list(found[side].values())) for side in SIDES)
            print(f"| {name} | {n_layer} | {cells} |", flush=True)


def compute_as_ggml() -> None:
    """From now on, in this process."""
    import torch
    from torch.nn.functional import gelu
    from transformers.models.gemma3n import modeling_gemma3n

    from intactkv_export.torch_model import from_huggingface

    class TableGelu(torch.nn.Module):  # GGML_GELU_FP16 of ggml's CPU backend
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            looked_up = gelu(x.half().float(), approximate="tanh").half().float()
            return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))

    def of_sample(mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        factor = torch.distributions.Normal(0, 1).icdf(torch.tensor(mlp.activation_sparsity))
        return torch.relu(x - x.mean(-1, keepdim=True) - factor * x.std(-1, keepdim=True, unbiased=True))

    load = from_huggingface.load

    def load_as_ggml(*args: object, **kwargs: object) -> torch.nn.Module:
        net: torch.nn.Module = load(*args, **kwargs)
        for module in list(net.modules()):
            for name, child in module.named_children():
                if "gelu" in type(child).__name__.lower():
                    setattr(module, name, TableGelu())
        return net

    from_huggingface.load = load_as_ggml
    modeling_gemma3n.Gemma3nTextMLP._gaussian_topk = of_sample


def built(root: Path, names: list[str]) -> dict[str, Path]:
    """{name: Hugging Face directory}, each with its GGUF beside it."""
    makers: dict[str, Callable[[str, Path], Path]] = {name: random_models.build for name in random_models.MODELS}
    makers |= {name: random_families.build for name in random_families.MODELS}
    makers |= {name: random_latents.build for name in random_latents.MODELS}
    makers |= {name: random_hybrids.build for name in random_hybrids.MODELS}
    chosen = [name for name in makers if name in (names or makers)]
    return random_models.build_all(lambda name, directory: makers[name](name, directory), chosen, root)


def errors(directory: Path, gguf: Path, n_tokens: int) -> dict[str, dict[int, float]]:
    """{side: {layer: relative error}} of what llama.cpp still holds after the tokens."""
    tokens = [1, *np.random.default_rng(0).integers(6, random_models.VOCAB - 16, n_tokens - 1).tolist()]
    with Context(gguf, n_tokens + 1, "f32", 1) as context:
        about = bindings.describe(context.ptr)
        for start in range(0, n_tokens, N_BATCH):
            context.decode(tokens[start : start + N_BATCH], start)
        data = context.state()
    K, V = state.rows_by_layer(data, about, n_tokens)
    states = state.states_by_layer(data, about, n_tokens)
    got_K, got_V, got = torch_engine.compute_float32(directory, tokens, about)
    found: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for cache in state.shapes(about):
        held = cache.positions(n_tokens)
        for layer in cache.layers:
            for side, got_rows, rows in (("K", got_K, K), ("V", got_V, V)):
                if rows[layer.il].size:
                    found[side][layer.il] = _error(got_rows[layer.il][held], rows[layer.il][held])
    for il, both in states.items():
        for side, ours, theirs in zip("rs", got[il], both, strict=True):
            if len(theirs):
                found[side][il] = _error(ours, theirs)
    return found


def _error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b)))


def _cell(values: list[float]) -> str:
    return f"{max(values):.1e}, {median(values):.1e}" if values else ""


if __name__ == "__main__":
    main()
