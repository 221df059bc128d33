"""The header and the tensors of one GGUF model, which may be in several files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import dequantize

from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file

LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # LongRoPE's, float32 [n_rot/2]
INSTEAD = (
    "calibrate, analyze and --prefix-tokens auto, which run the quantized GGUF in torch, cannot be used with it; a "
    "prefix without training can be made"
)


class Header:
    """What the files of a model say. path: what errors call it.

    Raises IntactKVError if a file is damaged or missing.
    """

    def __init__(self, path: str | Path, name: str | Path | None = None) -> None:
        files = [gguf_file.read(file) for file in gguf_file.shards(path)]
        self.path, self.file = Path(name or path), files[0].path
        self.values = files[0].values
        self.tensors = {tensor.name: (file.path, tensor) for file in files for tensor in file.tensors}
        self.arch = str(self.values.get("general.architecture"))

    @property
    def n_layer(self) -> int:
        """Without those that only predict further tokens."""
        return int(self.get("block_count") - self.get("nextn_predict_layers", 0))

    @property
    def head_dim(self) -> int:
        return int(self.get("attention.key_length", self.get("embedding_length") // self.get("attention.head_count")))

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the header, below the architecture's name."""
        value = self.values.get(f"{self.arch}.{key}", default)
        if value is None and default is None:
            raise IntactKVError(f"{self.path} does not give {self.arch}.{key} as one number: convert the model again")
        return value

    def array(self, key: str) -> list[Any]:
        """An array of the header, below the architecture's name; [] if it has none of this name, or one number."""
        value = self._arrays.get(f"{self.arch}.{key}")
        return [] if value is None or np.isscalar(value) else list(value)

    @cached_property
    def _arrays(self) -> Mapping[str, Any]:
        """All values, arrays too: those of the vocabulary take a while."""
        return gguf_file.read(self.file, arrays=True).values

    def dequantized(self, name: str, index: int | None = None) -> np.ndarray:
        """float32, slowest dimension first. index: along that dimension; None: all of the tensor."""
        path, tensor = self.tensors[name]
        kind = self.kind(tensor)
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = tensor.shape if index is None else tensor.shape[:-1]
        size = prod(shape) // block * n_bytes
        at = tensor.offset + (index or 0) * size
        raw = np.fromfile(path, np.uint8, size, offset=at)
        if len(raw) < size:
            raise IntactKVError(f"{path} is cut off inside {name}, {size} bytes from byte {at}: get it again")
        try:
            return dequantize(raw.reshape(*reversed(shape[1:]), -1), kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise self._unknown(tensor) from error

    def kind(self, tensor: gguf_file.Tensor) -> gguf.GGMLQuantizationType:
        try:
            return gguf.GGMLQuantizationType(tensor.type)
        except ValueError as error:
            raise self._unknown(tensor) from error

    def _unknown(self, tensor: gguf_file.Tensor) -> IntactKVError:
        return IntactKVError(
            f"{self.path} holds {tensor.name} in type {tensor.type}, and gguf-py {version('gguf')} cannot read it: "
            "use another quantization type"
        )
