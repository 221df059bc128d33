"""What is particular to one architecture, where its GGUF differs from a plain Llama's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from intactkv_export.torch_model.from_gguf.header import Header


def _nothing(header: Header) -> dict[str, Any]:
    return {}


def _as_it_is(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    return weight


def _one(header: Header, name: str) -> list[str]:
    return [name]


def _all_proven(header: Header) -> str:
    return ""


def renamed(theirs: str, ours: str) -> Callable[[Header, str], list[str]]:
    """parts of a Family: gguf-py knows a tensor by another name than transformers has."""
    return lambda header, name: [name.replace(theirs, ours)]


def other_than(**values: Any) -> Callable[[Header], str]:
    """unproven of a Family: keys with other values than these; a dot of a key is written __."""

    def unproven(header: Header) -> str:
        for name, proven in values.items():
            key = name.replace("__", ".")
            found = header.get(key, proven) if f"{header.arch}.{key}" in header.values else proven
            if found != proven:
                return f"{key} {found}" if found is not None else key
        return ""

    return unproven


def another_base(header: Header) -> str:
    """unproven of a Family: RoPE of layers with a sliding window that has another base than that of the others."""
    base = header.get("rope.freq_base", 1e4)
    own = header.get("rope.freq_base_swa", base)
    return "" if own == base else f"rope.freq_base_swa {own} and rope.freq_base {base}"


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name. own: keys of its configuration that others have not, or in another way, as
    llama.cpp's src/models/ARCH.cpp reads them. in_order: undoes what upstream's converter does to a tensor, given by
    transformers' name. parts: names that gguf-py knows of the tensors whose rows, one below the other, are such a one.
    joined: how they make it, if another way. unproven: what this model has that is not proven, in words; "" for
    nothing. scaled: own() knows what the outputs of experts are multiplied by. partly: it knows how many values of a
    head RoPE turns, or that there is none. grouped: it knows groups of experts. only_plain: it is proven as its
    checkpoints mostly are: RoPE that is not scaled, no sliding window, no matrices that are not there. one_more: the
    converter adds 1 to the weights of norms. interleaved: of experts, rows of gate and up alternate, and their matrices
    are transposed."""

    model_type: str
    own: Callable[[Header], dict[str, Any]] = _nothing
    in_order: Callable[[Header, str, np.ndarray], np.ndarray] = _as_it_is
    parts: Callable[[Header, str], list[str]] = _one
    unproven: Callable[[Header], str] = _all_proven
    scaled: bool = False
    partly: bool = False
    grouped: bool = False
    only_plain: bool = False
    one_more: bool = False
    interleaved: bool = False
    joined: Callable[[list[np.ndarray]], np.ndarray] = np.concatenate
