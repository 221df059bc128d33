"""The types that a KV cache can have, in one list."""

from __future__ import annotations

from intactkv_export.errors import UsageError

# name -> ggml_type (ggml.h), in the order in which help lists them
KV_TYPES = {"f16": 1, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "q4_0": 2, "bf16": 30, "iq4_nl": 20, "f32": 0}
QUANTIZED = KV_TYPES.keys() - {"f16", "bf16", "f32"}
EXACT = {"f16", "f32"}  # hold a prefix exactly: its cells are ordinary ones
WITHOUT_FLASH = {"grok"}  # architectures: llama_init_from_model turns it off; no prefix, no quantized V without
TAIL = 128  # tokens; see default_tail()
TAIL_MAX = 2**31 - 1  # of the C API's int32_t


def kv_pair(kv_type: str | tuple[str, str]) -> tuple[str, str]:
    """The types of K and V: of "q8_0", of "q8_0,q4_0" or "q8_0/q4_0", or of a pair. Raises UsageError for others."""
    names = kv_type.replace("/", ",").split(",") if isinstance(kv_type, str) else kv_type
    pair = tuple(name.strip() for name in names)
    pair = pair * 2 if isinstance(kv_type, str) and len(pair) == 1 else pair
    if len(pair) != 2 or not set(pair) <= KV_TYPES.keys():
        raise UsageError(f"kv_type={kv_type!r}: give one of {', '.join(KV_TYPES)}, or a pair of them for K and V")
    return pair[0], pair[1]


def default_tail(pair: tuple[str, str]) -> int:
    """How many of the newest cells stay intact unless somebody says otherwise: TAIL if K or V has less than 8 bits.

    pair: of kv_pair(). There the newest cells do most of the harm; in a q8_0 cache they do little.
    """
    return TAIL if set(pair) & (QUANTIZED - {"q8_0"}) else 0
