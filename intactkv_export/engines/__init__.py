"""Engines compute IntactKV: K and V of the prefix, all layers, F16, by the reference model.

llama.py: a GGUF in llama.cpp. torch.py: a Hugging Face directory in transformers. Both give
{layer: float16 [n_tokens, n_head_kv, head_dim]} in llama.cpp's layout, computed in float32 and rounded once.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from intactkv_export.errors import UsageError

if TYPE_CHECKING:
    from intactkv_export.reference import Reference

NAMES = ("auto", "llama", "torch")


def choose(name: str, reference: Reference) -> str:
    """The engine for a reference model: "llama" or "torch".

    auto: torch for a Hugging Face directory whose K/V layout is proven (torch.PROVEN) when torch is installed, llama
    for all others. Raises UsageError if the engine asked for cannot do it.
    """
    if name not in NAMES:
        raise UsageError(f"unknown engine {name!r}: give one of {', '.join(NAMES)}")
    if name == "llama":
        return name
    why_not = _why_not_torch(reference)
    if name == "torch" and why_not:
        raise UsageError(f"the torch engine cannot be used: {why_not}: use the llama engine")
    return "llama" if why_not else "torch"


def _why_not_torch(reference: Reference) -> str:
    from intactkv_export.engines import torch as engine

    if reference.is_gguf:
        return f"{reference.path} is a GGUF, and it reads Hugging Face directories"
    if missing := missing_for_torch():
        return f"{missing} is not installed (pip install 'intactkv-export[convert]')"
    config = json.loads(Path(reference.path, "config.json").read_text(encoding="utf-8"))
    if not engine.supports(config):
        return f"the K/V layout of {reference.path} (model type {config.get('model_type')!r}) is not proven for it"
    return ""


def missing_for_torch() -> str:
    """The first package that torch models need and that is not installed; "" if all are."""
    return next((name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None), "")
