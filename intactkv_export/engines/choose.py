"""Which engine computes a reference model's prefix, and whether torch has the device that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from intactkv_export import extras
from intactkv_export.errors import IntactKVError, UsageError, first_line
from intactkv_export.libllama import Rope
from intactkv_export.models import Reference, why_not

NAMES = ("auto", "llama", "torch")


def choose(name: str, reference: Reference, rope: Rope | None = None) -> str:
    """The engine for a reference model: "llama" or "torch".

    auto: torch for a Hugging Face directory whose K/V layout is proven (models/proven.py) when torch is installed,
    llama for all others, and for RoPE settings other than the model's own. Raises UsageError if the engine asked for
    cannot do it.
    """
    if name not in NAMES:
        raise UsageError(f"unknown engine {name!r}: give one of {', '.join(NAMES)}")
    if name == "llama":
        return name
    why_not = _why_not_torch(reference, rope)
    if name == "torch" and why_not:
        raise UsageError(f"the torch engine cannot be used: {why_not}: use the llama engine")
    return "llama" if why_not else "torch"


def check_device(device: str) -> None:
    """Raises UsageError if torch, which is installed, cannot compute on a device."""
    if device == "cpu":
        return
    import torch

    try:
        (torch.ones(1, device=device) + 1).item()
    except Exception as error:  # of each backend another: not compiled in, no such device, no driver
        raise UsageError(
            f"torch {torch.__version__} cannot compute on the device {device!r} ({first_line(error)}): give cpu, or "
            "install a torch that is made for it"
        ) from error


def check_in_torch(reference: Reference, gguf: Path, device: str, for_: str, states: bool = True) -> None:
    """Whether torch can run a reference and a model quantized from it, before any work. for_: what needs it.

    gguf: the quantized model, or a GGUF with its header alone. states: whether what needs it carries the states of
    recurrent layers. Raises UsageError for what is missing here,
    IntactKVError for a model that torch cannot run.
    """
    extras.require("torch", for_=for_)
    check_device(device)
    from intactkv_export.torch_model import from_gguf

    from_gguf.check_header(gguf, reference.path, states)
    if not reference.is_gguf and choose("auto", reference) != "torch":
        raise IntactKVError(f"{for_} needs the reference in torch, and {_why_not_torch(reference, None)}")


def _why_not_torch(reference: Reference, rope: Rope | None) -> str:
    if reference.is_gguf:
        return f"{reference.path} is a GGUF, and it reads Hugging Face directories"
    if rope:
        return f"it knows no RoPE settings other than the model's own, and {rope} is given"
    if missing := extras.missing("torch"):
        return extras.sentence(missing, "it")
    reason = why_not(_config(reference))
    return f"{reason} ({reference.path})" if reason else ""


def _config(reference: Reference) -> dict[str, Any]:
    return json.loads(Path(reference.path, "config.json").read_text(encoding="utf-8"))
