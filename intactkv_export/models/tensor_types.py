"""Tensor types of GGUF files, as the llama.cpp that is loaded knows them."""

from __future__ import annotations

import ctypes
from functools import cache
from math import prod
from typing import Any

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.models.gguf_file import Gguf, Tensor

PLAIN = {"F32", "F16", "BF16", "F64"}  # not quantized


@cache
def type_name(kind: int) -> str:
    """E.g. "F16", "Q4_K". Raises IntactKVError for a type that this llama.cpp does not have."""
    lib = _lib()
    name = lib.ggml_type_name(kind) if 0 <= kind < 1 << 16 else None
    if not name or name == b"NONE" or lib.ggml_blck_size(kind) <= 0:
        raise IntactKVError(f"tensor type {kind} is unknown to this version of llama.cpp: convert the model again")
    return name.decode().upper()


def tensor_bytes(tensor: Tensor) -> int:
    """Size of a tensor's data. Raises IntactKVError for an unknown type, or rows that do not fill its blocks."""
    lib = _lib()
    name = type_name(tensor.type)
    row = tensor.shape[0] if tensor.shape else 1
    if min(tensor.shape, default=1) < 0 or row % lib.ggml_blck_size(tensor.type):
        raise IntactKVError(f"tensor {tensor.name!r} has shape {tensor.shape}, impossible for {name}: get it again")
    return lib.ggml_row_size(tensor.type, row) * prod(tensor.shape[1:])


def bits_per_weight(gguf: Gguf) -> float:
    """Bits of tensor data for each element, over all tensors: what upstream calls BPW."""
    n = sum(prod(t.shape) for t in gguf.tensors)
    return 8 * sum(map(tensor_bytes, gguf.tensors)) / n


def check_complete(gguf: Gguf) -> None:
    """Raises IntactKVError if the file ends before its last tensor does."""
    end = max((t.offset + tensor_bytes(t) for t in gguf.tensors), default=0)
    size = gguf.path.stat().st_size
    if size < end:
        raise IntactKVError(f"{gguf.path} is cut off: its tensors end at byte {end} and it has {size}: get it again")


@cache
def _lib() -> Any:
    llama = library.load().llama_cpp._lib  # ggml-base is one of its dependencies: its functions are found through it
    lib = ctypes.CDLL(llama._name)
    lib.ggml_type_name.restype, lib.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    lib.ggml_blck_size.restype, lib.ggml_blck_size.argtypes = ctypes.c_int64, [ctypes.c_int]
    lib.ggml_row_size.restype, lib.ggml_row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    return lib
