"""Importance matrices of upstream's llama-imatrix, for its quantizer. Both formats: GGUF, and the older .dat."""

from __future__ import annotations

import ctypes
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file

_SUMS, _COUNTS = ".in_sum2", ".counts"
_F32 = 0


@dataclass(frozen=True)
class Imatrix:
    """Mean squared activation of each input of each tensor, float32 [n_experts * n_inputs], by tensor name."""

    path: Path
    values: dict[str, np.ndarray]
    dataset: str
    n_chunks: int

    def attach(self, params: Any) -> Any:
        """Set it in llama_model_quantize_params, with the notes upstream's llama-quantize leaves in the file.

        Returns what must stay alive until the quantizer is done.
        """
        L = library.load()
        data = (L.llama_model_imatrix_data * (len(self.values) + 1))()
        for entry, (name, values) in zip(data, self.values.items(), strict=False):
            entry.name, entry.size = name.encode(), len(values)
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        notes: list[tuple[str, str | int]] = [("file", self.path.name)]
        notes += [("dataset", self.dataset)] if self.dataset else []
        notes += [("entries_count", len(self.values))]
        notes += [("chunks_count", self.n_chunks)] if self.n_chunks > 0 else []
        overrides = (L.llama_model_kv_override * (len(notes) + 1))()
        for override, (key, note) in zip(overrides, notes, strict=False):
            override.key = f"quantize.imatrix.{key}".encode()
            if isinstance(note, int):
                override.tag, override.value.val_i64 = L.LLAMA_KV_OVERRIDE_TYPE_INT, note
            else:
                override.tag, override.value.val_str = L.LLAMA_KV_OVERRIDE_TYPE_STR, note.encode()[:127]
        params.imatrix, params.kv_overrides = data, overrides
        return data, overrides, self.values


def read(path: str | os.PathLike[str]) -> Imatrix:
    """Read an importance matrix as upstream does (common/imatrix-loader.cpp). Raises IntactKVError."""
    path = Path(path)
    imatrix = _from_gguf(path) if gguf_file.is_gguf(path) else _from_dat(path)
    for name, values in imatrix.values.items():
        if not np.isfinite(values).all():
            raise IntactKVError(f"{path} has NaN or infinity for tensor {name}: compute the importance matrix again")
    if not imatrix.values:
        raise IntactKVError(f"{path} has no importance matrix in it: give the output of llama-imatrix")
    return imatrix


def _from_gguf(path: Path) -> Imatrix:
    header = gguf_file.read(path, arrays=True)
    size = path.stat().st_size
    raw: dict[str, np.ndarray] = {}
    for tensor in header.tensors:
        n = int(np.prod(tensor.shape))
        if tensor.type != _F32 or n < 0 or tensor.offset + 4 * n > size:
            raise IntactKVError(f"{path} is no importance matrix: tensor {tensor.name} is not whole or not F32")
        raw[tensor.name] = np.fromfile(path, "<f4", n, offset=tensor.offset)
    values = {}
    for name in sorted(n.removesuffix(_SUMS) for n in raw if n.endswith(_SUMS)):
        sums, counts = raw[name + _SUMS], raw.get(name + _COUNTS)
        if counts is None or not len(counts) or len(sums) % len(counts):
            raise IntactKVError(f"{path} has sums for tensor {name} without matching counts: compute it again")
        per_expert, counts = sums.reshape(len(counts), -1), np.rint(counts)[:, None]
        # an expert that never ran: all its inputs count the same
        means = np.where(counts > 0, per_expert / np.maximum(counts, 1), 1)
        values[name] = np.ascontiguousarray(means.ravel(), np.float32)
    datasets = header.values.get("imatrix.datasets") or [""]
    return Imatrix(path, values, str(datasets[0]), int(header.values.get("imatrix.chunk_count", 0)))


def _from_dat(path: Path) -> Imatrix:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntactKVError(f"cannot read {path}: {os.strerror(error.errno or 0)}: check the path") from error
    at = 0

    def take(n: int) -> bytes:
        nonlocal at
        if n < 0 or n > len(data) - at:
            raise IntactKVError(
                f"{path} is no importance matrix, or cut off: {n} bytes are needed at byte {at} of {len(data)}: give "
                "the output of llama-imatrix"
            )
        at += n
        return data[at - n : at]

    def number() -> int:
        return struct.unpack("<i", take(4))[0]

    values = {}
    for _ in range(number()):
        name = take(number()).decode("utf-8", "replace")
        n_calls = number()
        sums = np.frombuffer(take(4 * number()), "<f4").astype(np.float32)
        values[name] = sums / np.float32(n_calls) if n_calls > 0 else sums
    n_chunks, dataset = 0, ""
    if at < len(data):  # older files end here
        n_chunks = number()
        dataset = take(number()).decode("utf-8", "replace") if at < len(data) else ""
    return Imatrix(path, values, dataset, n_chunks)
