"""The same model, its weights off the grid that they were quantized to: a reference that no quantized type flatters.

    python -m benchmarks.off_grid IN.gguf OUT.gguf [--seed 0] [--sigma 0.25] [--f32] [--allow-requantize]

Weights that come from a quantized file lie on its grid: types with the same blocks look better on them than they are.
Every matrix that can be is scaled by random vectors, s = exp(sigma * normal), and what stands before or behind it by
their inverse, so that the function stays the same to rounding and no block lies on a grid any more:

    gain of an RMSNorm * s        columns of the matrices that read it / s
    rows of up * s                columns of down / s
    rows of V * s, by KV head     columns of O / s, of all query heads that read that KV head

Q and K are scaled as readers of their norm only: RoPE mixes their rows. The norm behind the last layer stays as it is
where the token embedding is the output matrix too, and the embedding itself stays on its grid: every layer adds to it.

IN: architecture llama or gemma3 (whose other norms come behind the matrices and stay), F16, BF16 or F32; a quantized
file with --allow-requantize: it is widened, and what it lost is lost. OUT: F16, or F32 with --f32, its metadata as it
was but for the file type.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import gguf_file, tensor_types, weights

ARCHITECTURES = ("llama", "gemma3")
# Tensors that the rules above know; a model with others may read a norm by a matrix that they would miss.
_GLOBAL = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
_LAYER = {
    *(f"{name}.{part}" for part in ("weight", "bias") for name in (
        "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
    )),
    *(f"{name}.weight" for name in (
        "attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm", "post_attention_norm", "post_ffw_norm",
    )),
}  # fmt: skip
_LARGEST = float(np.finfo(np.float16).max)


@dataclass
class Scales:
    """Of one tensor, F64: what its rows and its columns are multiplied by. A vector has rows only."""

    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    def apply(self, tensor: np.ndarray) -> None:
        """Of F32 [rows, columns] or [rows], in place."""
        scaled = tensor.astype(np.float64)
        if self.rows is not None:
            scaled *= self.rows.reshape(-1, *[1] * (tensor.ndim - 1))
        if self.columns is not None:
            scaled *= self.columns
        tensor[...] = scaled


def scales(model: gguf_file.Gguf, rng: np.random.Generator, sigma: float) -> dict[str, Scales]:
    """By name, of a model that check() has passed."""
    found: dict[str, Scales] = {}
    shapes = {t.name: t.shape for t in model.tensors}

    def vector(n: int) -> np.ndarray:
        return np.exp(sigma * rng.standard_normal(n))

    def norm(gain: str, readers: list[str]) -> None:
        s = vector(shapes[gain][0])
        found[gain] = Scales(rows=s)
        for name in readers:
            found.setdefault(name, Scales()).columns = 1 / s

    def pair(writer: str, reader: str, rows: np.ndarray, columns: np.ndarray) -> None:
        found.setdefault(f"{writer}.weight", Scales()).rows = rows
        found.setdefault(f"{reader}.weight", Scales()).columns = 1 / columns
        if f"{writer}.bias" in shapes:
            found[f"{writer}.bias"] = Scales(rows=rows)

    for il in range(_of_layer(model, "block_count", 0)):
        at = f"blk.{il}"
        norm(f"{at}.attn_norm.weight", [f"{at}.attn_{name}.weight" for name in "qkv"])
        norm(f"{at}.ffn_norm.weight", [f"{at}.ffn_gate.weight", f"{at}.ffn_up.weight"])
        s = vector(shapes[f"{at}.ffn_up.weight"][1])
        pair(f"{at}.ffn_up", f"{at}.ffn_down", s, s)
        n_head, n_head_kv = (_of_layer(model, f"attention.head_count{kv}", il) for kv in ("", "_kv"))
        s = vector(shapes[f"{at}.attn_v.weight"][1])
        by_query_head = s.reshape(n_head_kv, -1).repeat(n_head // n_head_kv, axis=0)
        pair(f"{at}.attn_v", f"{at}.attn_output", s, by_query_head.ravel())
    if "output.weight" in shapes:
        norm("output_norm.weight", ["output.weight"])
    return found


def check(model: gguf_file.Gguf, allow_requantize: bool) -> None:
    """Raises UsageError for a model that this cannot be done to exactly."""
    arch = model.values.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UsageError(f"{model.path} is of the architecture {arch}: this knows {', '.join(ARCHITECTURES)}")
    if keys := [key for key in model.values if key.startswith("intactkv.")]:
        raise UsageError(
            f"{model.path} has {keys[0]}, it belongs to a prefix of its weights: give the reference itself"
        )
    for tensor in model.tensors:
        if tensor.name not in _GLOBAL and re.sub(r"^blk\.\d+\.", "", tensor.name) not in _LAYER:
            raise UsageError(f"{model.path} has a tensor {tensor.name}, which this does not know: give a plain model")
        if (kind := tensor_types.type_name(tensor.type)) not in tensor_types.PLAIN and not allow_requantize:
            raise UsageError(f"{model.path} is quantized, {tensor.name} is {kind}: --allow-requantize widens it")


def off_grid(
    source: Path, out: Path, *, seed: int = 0, sigma: float = 0.25, f32: bool = False, allow_requantize: bool = False
) -> None:
    """Write `out`: module docstring. Raises UsageError for a model that this cannot be done to, IntactKVError."""
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"{out} is the model itself: give another name for the output")
    model = gguf_file.read(source, arrays=True)
    check(model, allow_requantize)
    factors = scales(model, np.random.default_rng(seed), sigma)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        wide, made = Path(folder) / "wide.gguf", Path(folder) / "made.gguf"
        weights.quantize(
            source, wide, "F32", allow_requantize=allow_requantize
        )  # so that every weight is rounded once, behind its factors
        for name, tensor in _tensors(wide):
            if name in factors:
                factors[name].apply(tensor)
                if not np.abs(tensor).max() < _LARGEST:
                    raise IntactKVError(
                        f"{name} of {source} does not fit F16 any more: give a smaller --sigma, or --f32"
                    )
        if not f32:
            weights.quantize(wide, made, "F16")
        (wide if f32 else made).replace(out)


def _tensors(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The F32 tensors of a file, [rows, columns] or [rows], to be written to."""
    for tensor in gguf_file.read(path).tensors:
        if tensor_types.type_name(tensor.type) == "F32":
            yield tensor.name, np.memmap(path, np.float32, "r+", tensor.offset, tuple(reversed(tensor.shape)))


def _of_layer(model: gguf_file.Gguf, key: str, il: int) -> int:
    """A number of the metadata that may be a list by layer."""
    arch = model.values["general.architecture"]
    value: Any = model.values.get(f"{arch}.{key}")
    if value is None:  # head_count_kv may be left out where every head has its own
        value = model.values[f"{arch}.{key.removesuffix('_kv')}"]
    return int(value[il] if isinstance(value, list) else value)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigma", type=float, default=0.25, help="spread of the factors, of their logarithm")
    parser.add_argument("--f32", action="store_true", help="write F32 instead of F16")
    parser.add_argument("--allow-requantize", action="store_true", help="take a quantized model, widened")
    args = parser.parse_args()
    try:
        settings = {"seed": args.seed, "sigma": args.sigma, "f32": args.f32}
        off_grid(args.source, args.out, **settings, allow_requantize=args.allow_requantize)
    except IntactKVError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"{error}\n")
    print(f"written: {args.out}, {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
