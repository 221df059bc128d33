"""Quantized GGUF models with an intact F16 KV-cache prefix (IntactKV, arXiv 2403.01241) for llama.cpp.

    from intactkv_export import convert, IntactLlama, library_path

Importing the package is cheap: each of these names is loaded when it is first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["IntactLlama", "convert", "library_path"]

_HOME = {"IntactLlama": "runtime", "convert": "convert", "library_path": "library"}


class _Package(ModuleType):
    """This package as a module whose public names are looked up on first use.

    `convert` is the function although a submodule has the same name: Python binds a submodule to its package when
    it is imported, by whomever, and that must not change what `from intactkv_export import convert` gives.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
