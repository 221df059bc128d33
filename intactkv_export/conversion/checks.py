"""What can be refused before any work: types, names of files, space on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from intactkv_export import work
from intactkv_export.errors import UsageError
from intactkv_export.models import Reference, gguf_file, weights
from intactkv_export.prefix import outputs
from intactkv_export.work import atomic

_WEIGHT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def quantization_types(quant: str | Sequence[str], imatrix: object) -> list[str]:
    """Upstream's names of the types asked for, each once. Raises UsageError for one that cannot be made."""
    names = quant.split(",") if isinstance(quant, str) else quant
    types = list(dict.fromkeys(weights.type_name(name) for name in names))
    if not types:
        raise UsageError("no quantization type given: give one or more, for example Q4_K_M")
    starved = [name for name in types if name in weights.NEEDS_IMATRIX]
    if starved and imatrix is None:
        raise UsageError(f"{starved[0]} needs an importance matrix: give one with --imatrix, or a larger type")
    return types


def check_targets(targets: Sequence[Path], found: Reference, others: Sequence[Path] = ()) -> None:
    """Raises UsageError if an output cannot be a file there, is the reference itself, or one of the other inputs."""
    for target in targets:
        atomic.destination(target)
        if any(outputs.same_file(target, file) for file in found.files):
            raise UsageError(f"{target} is the reference model itself: choose another name for the output")
        outputs.check_not_input(target, others)
        if target.suffix == ".ikv":
            outputs.check_prefix_file(target)


def check_space(directory: Path, found: Reference, types: Sequence[str], widen: bool) -> None:
    """Refuse what cannot fit, by a lower bound of what will lie on the disk at once."""
    if found.is_gguf:
        n_weights = sum(prod(t.shape) for file in found.files for t in gguf_file.read(file).tensors)
    else:
        n_weights = found.n_bytes // _WEIGHT_BYTES.get(found.dtype, 1)
    sizes = [int(n_weights * weights.least_bits(name) / 8) for name in types]
    converted = 0 if found.is_gguf else 2 * n_weights
    widened = 4 * n_weights if widen and found.dtype != "F32" else 0
    need = converted + sum(sizes) + max(widened, max(sizes, default=0))
    otherwise = "make room, or choose another directory"
    work.check_space(directory.parent, need, "the conversion needs at least", otherwise)
