"""The C API of native/include/intactkv.h in Python: one function each, failures raised as IntactKVError.

`ctx` is a `llama_context *` as llama_cpp's functions take it (`Llama.ctx`). Every function needs the patched
libraries, and says so if the loaded ones are stock.
"""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from intactkv_export import library
from intactkv_export.errors import IntactKVError

Context = Any  # a llama_context *, as llama_cpp gives it: an int, or a ctypes pointer

_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "intactkv_version": (ctypes.c_char_p, []),
    "intactkv_error": (ctypes.c_char_p, []),
    "intactkv_describe": (ctypes.c_char_p, [ctypes.c_void_p]),
    "intactkv_load": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32]),
    "intactkv_load_file": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32]),
    "intactkv_verify": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "intactkv_n_cells": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
    "intactkv_n_tail_cells": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
    "intactkv_set_tail": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32]),
    "intactkv_tail": (ctypes.c_int32, [ctypes.c_void_p]),
    "intactkv_arena_bytes": (ctypes.c_size_t, [ctypes.c_void_p]),
    "intactkv_attention": (ctypes.c_char_p, [ctypes.c_void_p]),
    "intactkv_enable_automatic": (ctypes.c_bool, [ctypes.c_bool]),
    "intactkv_add_prefix": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]),
    "intactkv_load_held": (ctypes.c_int32, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "intactkv_set_automatic": (ctypes.c_bool, [ctypes.c_void_p, ctypes.c_bool]),
    "intactkv_n_prefixes": (ctypes.c_int32, [ctypes.c_void_p]),
    "intactkv_prefix_name": (ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_int32]),
    "intactkv_n_not_computed": (ctypes.c_uint64, [ctypes.c_void_p]),
}


def version() -> str:
    """Version of intactkv-export that the library was built from."""
    return _call("intactkv_version").decode()


def describe(ctx: Context) -> dict[str, Any]:
    """What a prefix must match to be loaded into this context: the "model" object of a manifest.

    Raises IntactKVError if the model cannot carry a prefix (sparse attention, encoder-decoder).
    """
    text = _call("intactkv_describe", ctx)
    if text is None:
        raise IntactKVError(last_error())
    return json.loads(text)


def load(ctx: Context, data: bytes, seq_id: int = 0) -> int:
    """Load the bytes of a prefix file into sequence `seq_id`, replacing it; returns the number of tokens.

    Everything is verified before one byte reaches the cache. Raises IntactKVError.
    """
    data = bytes(data)
    return _count(_call("intactkv_load", ctx, data, len(data), seq_id))


def load_file(ctx: Context, path: str | os.PathLike[str], seq_id: int = 0) -> int:
    """As load(), from a prefix file or from a GGUF with an embedded prefix. Raises IntactKVError."""
    return _count(_call("intactkv_load_file", ctx, os.fsencode(path), seq_id))


def verify(data: bytes, ctx: Context = None) -> int:
    """All checks of load() and nothing else; returns the number of tokens.

    Without a context: checksum and structure only. Raises IntactKVError.
    """
    data = bytes(data)
    return _count(_call("intactkv_verify", ctx, data, len(data)))


def n_cells(ctx: Context, seq_id: int = -1) -> int:
    """Number of intact cells of sequence `seq_id`, -1: of all; those of the tail are among them."""
    return _call("intactkv_n_cells", ctx, seq_id)


def n_tail_cells(ctx: Context, seq_id: int = -1) -> int:
    """Number of cells of sequence `seq_id`, -1: of all, that are intact for being new."""
    return _call("intactkv_n_tail_cells", ctx, seq_id)


def set_tail(ctx: Context, n_cells: int) -> int:
    """Keep the newest n_cells cells of each sequence intact, -1: as many as is the default of the cache's types.

    Returns how many it is now: 0 where the cache is F16 or F32. Cells that were evaluated before stay as they are.
    Raises IntactKVError: no memory, INTACTKV_ATTN=stock, or a model that can have no intact cells.
    """
    return _count(_call("intactkv_set_tail", ctx, n_cells))


def tail(ctx: Context) -> int:
    """How many of the newest cells of each sequence are intact; 0: none are for being new."""
    return _call("intactkv_tail", ctx)


def arena_bytes(ctx: Context) -> int:
    """Bytes allocated for the F16 rows of intact cells, all layers together."""
    return _call("intactkv_arena_bytes", ctx)


def attention(ctx: Context) -> str:
    """Which attention the next batch will use: "stock", "portable" or "fused"."""
    return _call("intactkv_attention", ctx).decode()


@contextmanager
def no_automatic_prefixes() -> Iterator[None]:
    """Contexts that this thread makes meanwhile hold no prefix: not the model's, not those of LLAMA_INTACTKV.

    For what measures, or computes, a model without one. On stock libraries nothing has to be done.
    """
    if not library.is_patched():
        yield
        return
    before = _call("intactkv_enable_automatic", False)
    try:
        yield
    finally:
        _call("intactkv_enable_automatic", before)


def add_prefix(ctx: Context, data: bytes, name: str = "") -> int:
    """Have a context hold one more prefix, the bytes of a prefix file, for all sequences that begin with it.

    Returns its number among prefix_names(). Everything is verified before. Raises IntactKVError.
    """
    data = bytes(data)
    return _count(_call("intactkv_add_prefix", ctx, data, len(data), os.fsencode(name)))


def load_held(ctx: Context, i: int, seq_id: int = 0) -> int:
    """Load prefix i of those that a context holds into sequence `seq_id`, replacing it; returns the number of tokens.

    As load(), but verified when it was added. Raises IntactKVError.
    """
    return _count(_call("intactkv_load_held", ctx, i, seq_id))


def set_automatic(ctx: Context, automatic: bool) -> bool:
    """Whether a context gives its prefixes to sequences by itself when tokens are evaluated; returns what it was."""
    return _call("intactkv_set_automatic", ctx, automatic)


def prefix_names(ctx: Context) -> list[str]:
    """The prefixes that a context holds: "NAME of PATH", or the path of a file that has one only."""
    return [os.fsdecode(_call("intactkv_prefix_name", ctx, i)) for i in range(_call("intactkv_n_prefixes", ctx))]


def n_not_computed(ctx: Context) -> int:
    """Number of tokens so far that were in a batch and did not have to be computed: their cells were loaded."""
    return _call("intactkv_n_not_computed", ctx)


def last_error() -> str:
    """The last failure on this thread, one sentence, also of a context that llama.cpp did not make."""
    return _call("intactkv_error").decode("utf-8", "replace")


def _call(name: str, *args: Any) -> Any:
    return _function(name)(*args)


def _count(result: int) -> int:
    if result < 0:
        raise IntactKVError(last_error())
    return result


@cache
def _function(name: str) -> Callable[..., Any]:
    native = library.load().llama_cpp
    if not hasattr(native._lib, "intactkv_version"):
        raise IntactKVError(
            f"the llama.cpp libraries in {native._base_path} are stock, they have no intact cells: "
            f"unset {library.VARIABLE}, or set it to the output of `python -m intactkv_export.library`"
        )
    function = native._lib[name]  # item access: a function object of our own, nobody else's argtypes
    function.restype, function.argtypes = _SIGNATURES[name]
    return function
