"""Which types the KV cache of a model can have, by its head sizes and its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from intactkv_export.errors import UsageError
from intactkv_export.libllama import KV_TYPES, QUANTIZED, WITHOUT_FLASH

# llama_init_from_model: with flash attention the head size of every layer must be a multiple of the type's block. The
# block of all quantized types that a cache can have is 32 (QK8_0, QK5_1, QK5_0, QK4_1, QK4_0, QK4_NL of ggml-common.h).
_BLOCK = 32
_BEST = ("q8_0", "f16")  # the one to have, and the one that always fits
BEST_PAIR = (_BEST[0], _BEST[0])
_NO_FLASH = "llama.cpp computes this model without flash attention, which a quantized V needs"
WITH_TAIL = ("q8_0", "q4_0")  # with the default tail as near, in three quarters of the bytes (docs/results/tail.md)


def choose_kv_types(asked: tuple[str, str] | None, header: Mapping[str, Any]) -> tuple[tuple[str, str], str]:
    """The types of K and V that are asked for, or best_kv_types(). Raises UsageError as check_kv_types()."""
    if asked is None:
        return best_kv_types(header)
    check_kv_types(asked, header)
    return asked, ""


def best_kv_types(header: Mapping[str, Any]) -> tuple[tuple[str, str], str]:
    """The types of K and V to use where none are asked for, and why they are not q8_0 ("" if they are).

    header: the values of a GGUF's header.
    """
    if _without_flash_attention(header):
        return (_BEST[1], _BEST[1]), f"the KV cache is {_BEST[1]}: {_NO_FLASH}"
    sizes = head_sizes(header)
    k, v = (_BEST[0] if _fits(_BEST[0], of_one) else _BEST[1] for of_one in sizes)
    if (k, v) == BEST_PAIR:
        return (k, v), ""
    types = k if k == v else f"{k} for K and {v} for V"
    return (k, v), f"the KV cache is {types}: {_sizes(sizes)}, and {_BEST[0]} needs a multiple of {_BLOCK}"


def _without_flash_attention(header: Mapping[str, Any]) -> bool:
    return header.get("general.architecture") in WITHOUT_FLASH


def check_kv_types(pair: tuple[str, str], header: Mapping[str, Any]) -> None:
    """Raises UsageError if K or V of a model cannot have the type that is asked for; it names those that can."""
    if pair[1] in QUANTIZED and _without_flash_attention(header):
        raise UsageError(f"the V cache of this model cannot be {pair[1]}: {_NO_FLASH}: give f16 for V")
    sizes = head_sizes(header)
    if all(_fits(name, of_one) for name, of_one in zip(pair, sizes, strict=True)):
        return
    fitting = [
        f"{', '.join(name for name in KV_TYPES if _fits(name, of_one))} for {side}"
        for side, of_one in zip("KV", sizes, strict=True)
    ]
    which = fitting[0].removesuffix(" for K") if sizes[0] == sizes[1] else " and ".join(fitting)
    asked = pair[0] if pair[0] == pair[1] else ",".join(pair)
    raise UsageError(
        f"the KV cache of this model cannot be {asked}, {_sizes(sizes)} and quantized types need a multiple of "
        f"{_BLOCK}: give {which}"
    )


def head_sizes(header: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes that heads of K and of V have, of layers with a sliding window too, as llama.cpp reads them.

    Empty where the header does not say: then llama.cpp decides alone.
    """
    arch = header.get("general.architecture")
    heads, n_embd = (header.get(f"{arch}.{name}") for name in ("attention.head_count", "embedding_length"))
    default = n_embd // heads if isinstance(heads, int) and isinstance(n_embd, int) and heads > 0 else None

    def sizes(name: str) -> tuple[int, ...]:
        full = header.get(f"{arch}.attention.{name}_length", default)
        window = header.get(f"{arch}.attention.{name}_length_swa", full)
        return tuple(dict.fromkeys(size for size in (full, window) if isinstance(size, int) and size > 0))

    return sizes("key"), sizes("value")


def _fits(name: str, sizes: tuple[int, ...]) -> bool:
    return name not in QUANTIZED or all(size % _BLOCK == 0 for size in sizes)


def _sizes(sizes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    k, v = (" and ".join(map(str, of_one)) for of_one in sizes)
    return f"its heads are {k} values wide" if k == v else f"its heads are {k} (K) and {v} (V) values wide"
