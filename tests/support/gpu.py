"""Whether llama.cpp sees a GPU, and models and contexts that are there in part or whole, or on the CPU alone."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import library
from tests.support import automatic
from tests.support.lowlevel import Context, L

GPU_TYPES = 1, 2  # ggml_backend_dev_type: GPU, integrated GPU
PLACES: dict[str, dict[str, Any]] = {
    "all": {"n_gpu_layers": 99},
    "two layers": {"n_gpu_layers": 2},
    "ten layers": {"n_gpu_layers": 10},
    "all but the cache": {"n_gpu_layers": 99, "offload_kqv": False},
}


def devices() -> list[str]:
    """Names of the GPUs that the libraries see."""
    lib = Path(os.environ[library.VARIABLE])
    try:
        ggml, base = (ctypes.CDLL(str(lib / f"lib{name}.so")) for name in ("ggml", "ggml-base"))
    except OSError:  # another system's names: macOS has its GPU in tests of its own
        return []
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype, ggml.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base.ggml_backend_dev_type.argtypes = base.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_name.restype = ctypes.c_char_p
    found = [ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count())]
    return [base.ggml_backend_dev_name(dev).decode() for dev in found if base.ggml_backend_dev_type(dev) in GPU_TYPES]


class Place:
    """Models and contexts on the CPU alone (None), or as PLACES says."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.models: dict[Path, Any] = {}

    def model(self, path: Path) -> Any:
        if path not in self.models:
            p = L.llama_model_default_params()
            none = (ctypes.c_void_p * 1)(None)
            if self.name is None:  # no device: prompts would be multiplied on the GPU otherwise
                p.devices, p.n_gpu_layers, p.use_extra_bufts = ctypes.addressof(none), 0, False
            else:
                p.n_gpu_layers = PLACES[self.name]["n_gpu_layers"]
            self.models[path] = L.llama_model_load_from_file(str(path).encode(), p)
            assert self.models[path]
        return self.models[path]

    def context(self, path: Path, kv: str, *prefixes: Path, **params: Any) -> Context:
        """On the CPU with the same ops as elsewhere."""
        k, _, v = kv.partition(",")
        params.setdefault("offload_kqv", PLACES[self.name].get("offload_kqv", True) if self.name else True)
        with pytest.MonkeyPatch.context() as patch:
            if self.name is None:
                patch.setenv("INTACTKV_ATTN", "portable")
            return automatic.context(self.model(path), (k, v or k), *prefixes, **params)

    def close(self) -> None:
        while self.models:
            L.llama_model_free(self.models.popitem()[1])
