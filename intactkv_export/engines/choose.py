"""Which engine computes a reference model's prefix."""

from __future__ import annotations

import json
from pathlib import Path

from intactkv_export import extras
from intactkv_export.errors import UsageError
from intactkv_export.models import Reference, supports

NAMES = ("auto", "llama", "torch")


def choose(name: str, reference: Reference) -> str:
    """The engine for a reference model: "llama" or "torch".

    auto: torch for a Hugging Face directory whose K/V layout is proven (models/proven.py) when torch is installed,
    llama for all others. Raises UsageError if the engine asked for cannot do it.
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
    if reference.is_gguf:
        return f"{reference.path} is a GGUF, and it reads Hugging Face directories"
    if missing := extras.missing("torch"):
        return extras.sentence(missing, "it")
    config = json.loads(Path(reference.path, "config.json").read_text(encoding="utf-8"))
    if not supports(config):
        return f"the K/V layout of {reference.path} (model type {config.get('model_type')!r}) is not proven for it"
    return ""
