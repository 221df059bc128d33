"""A saved sequence: what it holds, what it belongs to, and whether it is whole.

The bytes that llama.cpp saves name an architecture and nothing else: another model's cells of the same shape, or
those of another prefix, are taken without a word. So a state of IntactLlama says which model, prefix and settings
its cells were computed with, and is refused everywhere else.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import LlamaState  # by the time this module is imported, intact_llama has chosen the libraries
from llama_cpp.llama_cache import BaseLlamaCache

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, errors_logged, reason
from intactkv_export.models import gguf_file

_SAMPLE = 4096  # bytes
_ROPE = ("rope_scaling_type", "rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor",
         "yarn_beta_fast", "yarn_beta_slow", "yarn_orig_ctx")  # fmt: skip


class IntactState(LlamaState):
    """What IntactLlama.save_state() gives: of the tokens evaluated so far, their cells, and their logits if kept.

    llama_state_size counts all of it in bytes, which is what llama_cpp's caches go by.
    """

    def __init__(self, belongs_to: dict[str, str], ids: np.ndarray, scores: np.ndarray, cells: bytes, seed: int,
                 batches: list[int], from_prefix: bool) -> None:  # fmt: skip
        size = len(cells) + ids.nbytes + scores.nbytes
        super().__init__(ids, scores, len(ids), cells, size, seed)
        self.belongs_to = belongs_to
        self.batches = batches
        self.from_prefix = from_prefix
        self.checksum = self._checksum()

    def _checksum(self) -> str:
        digest = hashlib.blake2b(self.llama_state, digest_size=16)
        for array in (self.input_ids, self.scores):
            digest.update(np.ascontiguousarray(array).data)
        digest.update(repr((self.n_tokens, self.batches, self.from_prefix, self.belongs_to)).encode())
        return digest.hexdigest()


def check(state: Any, belongs_to: Mapping[str, str]) -> None:
    """Raises IntactKVError if a state was saved for something else, or is not what was saved."""
    theirs = getattr(state, "belongs_to", None)
    if not isinstance(state, IntactState) or not isinstance(theirs, dict):
        raise IntactKVError(
            "this state does not say which model and prefix it belongs to: use one that IntactLlama.save_state() made"
        )
    for name, ours in belongs_to.items():
        if theirs.get(name) != ours:
            raise IntactKVError(
                f"this state was saved with {name} {theirs.get(name)}, and here {name} is {ours}: "
                "use it where it was saved, or evaluate its tokens again"
            )
    try:
        whole = state._checksum() == state.checksum
    except (AttributeError, TypeError, ValueError, BufferError):
        whole = False
    if not whole:
        raise IntactKVError("this state is damaged, its bytes are not those that were saved: evaluate its tokens again")


def read_cells(L: Any, ctx: Any) -> bytes:
    """The cells of sequence 0, and nothing else. Raises IntactKVError if llama.cpp cannot save them."""
    with errors_logged() as lines:
        data = np.empty(L.llama_state_seq_get_size(ctx, 0), np.uint8)
        n = L.llama_state_seq_get_data(ctx, data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8)), len(data), 0)
    if n == 0 or n > len(data):
        raise IntactKVError(f"llama.cpp cannot save the state ({lines[-1] if lines else 'no reason given'})")
    return data[:n].tobytes()


def write_cells(L: Any, ctx: Any, cells: bytes) -> None:
    """Put saved cells into sequence 0, replacing it. Raises IntactKVError; then the cache is empty."""
    memory = L.llama_get_memory(ctx)
    L.llama_memory_clear(memory, True)
    with errors_logged() as lines:
        array = (ctypes.c_uint8 * len(cells)).from_buffer_copy(cells)
        n = L.llama_state_seq_set_data(ctx, array, len(cells), 0)
    if n != len(cells):
        L.llama_memory_clear(memory, True)
        reason = lines[-1] if lines else f"{n} of {len(cells)} bytes read"
        raise IntactKVError(f"llama.cpp refused this state ({reason}): evaluate its tokens again")


def load_prefix_file(L: Any, ctx: Any, data: bytes) -> None:
    """Load a verified prefix by what stock llama.cpp has too: llama_state_seq_load_file. Raises IntactKVError."""
    with tempfile.NamedTemporaryFile(suffix=".ikv") as file, errors_logged() as lines:
        file.write(data)
        file.flush()
        tokens, n = (L.llama_token * L.llama_n_ctx(ctx))(), ctypes.c_size_t()
        if L.llama_state_seq_load_file(ctx, file.name.encode(), 0, tokens, len(tokens), ctypes.byref(n)) == 0:
            raise IntactKVError(f"llama.cpp refused the prefix: {reason(lines, 'it does not fit')}")


def owner(llama: Any) -> dict[str, str]:
    """What the cells of an IntactLlama depend on: name in a sentence -> value."""
    params = llama.context_params
    settings = {
        "rope": [getattr(params, name) for name in _ROPE],
        "swa_full": params.swa_full,
        "lora": [llama.lora_path, llama.lora_scale],
        "kv_overrides": llama.kv_overrides,
    }
    return {
        "model": f"{llama.metadata.get('general.name', 'without a name')} {_fingerprint(llama)}",
        "prefix": "none" if llama.prefix is None else llama.prefix.sha256[:16],
        "kv_type": "/".join(dict.fromkeys(llama.kv_type)),
        "n_ctx": str(llama.n_ctx()),
        "settings": json.dumps(settings, default=str),
        "llama.cpp": f"{library.load().__version__} {bindings.version() if library.is_patched() else 'stock'}",
    }


def _fingerprint(llama: Any) -> str:
    """Of a model's metadata and a piece of each of its tensors: another fine-tune has another."""
    digest = hashlib.sha256(json.dumps(llama.metadata, sort_keys=True).encode())
    for path in gguf_file.shards(llama.model_path):
        with open(path, "rb") as file:
            for tensor in gguf_file.read(path).tensors:
                digest.update(f"{tensor.name} {tensor.shape} {tensor.type}".encode())
                file.seek(tensor.offset)
                digest.update(file.read(_SAMPLE))
        digest.update(str(Path(path).stat().st_size).encode())
    return digest.hexdigest()[:16]


class OwnStates(BaseLlamaCache):
    """A cache of llama_cpp, shared or not, as one IntactLlama sees it: with the states that belong to it only.

    Keys are tokens behind a number that stands for the owner, so others' states are never looked at.
    """

    def __init__(self, cache: BaseLlamaCache, belongs_to: dict[str, str]) -> None:
        self.cache = cache
        self._belongs_to = belongs_to
        digest = hashlib.sha256(json.dumps(belongs_to).encode()).digest()
        self._mark = -1 - int.from_bytes(digest[:7], "little")

    @property
    def capacity_bytes(self) -> int:
        return self.cache.capacity_bytes

    @property
    def cache_size(self) -> int:
        return self.cache.cache_size

    def _key(self, key: Sequence[int]) -> tuple[int, ...]:
        return (self._mark, *key)

    def __getitem__(self, key: Sequence[int]) -> LlamaState:
        """Raises KeyError if there is none, or if it is damaged."""
        state = self.cache[self._key(key)]
        try:
            check(state, self._belongs_to)
        except IntactKVError as error:
            raise KeyError(str(error)) from error
        return state

    def __contains__(self, key: Sequence[int]) -> bool:
        return self._key(key) in self.cache

    def __setitem__(self, key: Sequence[int], value: LlamaState) -> None:
        self.cache[self._key(key)] = value
