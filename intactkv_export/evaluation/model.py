"""A model behind a prefix in llama.cpp: the prefix given in one way or another, and what it makes of what follows."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, errors_logged, sequence_state, state

_BLOCK = 16  # rows of logits at a time: they stay in the processor's cache


class Evaluated:
    """A model in llama.cpp that has a prefix's tokens in its cache, and says what it makes of what follows them.

    kv_type: of its cache. settings: of llama_cpp.Llama.
    """

    def __init__(self, model: str | Path, kv_type: str, tokens: list[int], settings: dict[str, Any]) -> None:
        from intactkv_export.runtime import IntactLlama, L

        self.llama, self._L = IntactLlama(model, None, kv_type, **settings), L
        self.tokens = tokens

    def begin(self, prefix: bytes | None, rounded: bool = False) -> None:
        """Give it the prefix, replacing what was there.

        prefix: the bytes of a prefix file with the tokens or the first of them, whose rows are loaded; the others are
        computed. None: all are computed. rounded: the rows are rounded to the KV type as those of other cells.
        """
        self._L.llama_memory_clear(self._L.llama_get_memory(self.llama.ctx), True)
        with errors_logged():
            done = 0 if prefix is None else bindings.load(self.llama.ctx, prefix)
        self._decode(self.tokens[done:], done, every=False)
        if rounded:
            self._round()

    def log_probs(self, chunk: Sequence[int]) -> Iterator[tuple[slice, np.ndarray]]:
        """After each token of a chunk right behind the prefix, log probabilities of the next: (rows, F32 [rows,
        n_vocab]), a block of rows at a time."""
        logits = self._decode(chunk, len(self.tokens), every=True)
        for start in range(0, len(chunk), _BLOCK):
            at = slice(start, min(start + _BLOCK, len(chunk)))
            yield at, _log_softmax(logits[at])

    def likelihoods(self, context: list[int], choices: list[list[int]]) -> list[float]:
        """Log-likelihood, nats, of each of several continuations of a context right behind the prefix."""
        first = _log_softmax(self._decode(context, len(self.tokens), every=False))[0]
        found = []
        for choice in choices:
            total = float(first[choice[0]])
            if len(choice) > 1:
                rows = _log_softmax(self._decode(choice[:-1], len(self.tokens) + len(context), every=True))
                total += float(rows[np.arange(len(rows)), choice[1:]].sum(dtype=np.float64))
            found.append(total)
        return found

    def _decode(self, tokens: Sequence[int], at: int, every: bool) -> np.ndarray:
        """Evaluate tokens at a position, forgetting what was there; logits after each (at most n_batch then) or
        after the last."""
        llama = self.llama
        llama._ctx.kv_cache_seq_rm(0, at, -1)
        n_batch, n = llama.n_batch, 0
        for start in range(0, len(tokens), n_batch):
            part = tokens[start : start + n_batch]
            llama._batch.set_batch(batch=part, n_past=at + start, logits_all=every)
            llama._ctx.decode(llama._batch)
            n = len(part) if every else 1
        shape = (n, llama.n_vocab())
        return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=shape) if n else np.empty(shape, np.float32)

    def _round(self) -> None:
        """Make the intact cells ordinary: from now on attention reads their rounded copies."""
        ctx = self.llama.ctx
        rounded = state.without_intact_cells(sequence_state(ctx))
        data = (ctypes.c_uint8 * len(rounded)).from_buffer_copy(rounded)
        if self._L.llama_state_seq_set_data(ctx, data, len(data), 0) == 0 or self.llama.intact_cells:
            raise IntactKVError("llama.cpp refused the rounded copy of the prefix")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows [n, n_vocab]."""
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
