"""Quantized GGUF models with an intact F16 KV-cache prefix (IntactKV, arXiv 2403.01241) for llama.cpp.

    from intactkv_export import convert, IntactLlama, library_path

Importing the package is cheap: each of these names is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["IntactLlama", "convert", "library_path"]

_HOME = {"IntactLlama": "runtime", "convert": "conversion", "library_path": "library"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
