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

    kv_type: of its cache. settings: of IntactLlama.
    """

    def __init__(self, model: str | Path, kv_type: str, tokens: list[int], settings: dict[str, Any]) -> None:
        from intactkv_export.runtime import IntactLlama, L

        self.llama, self._L = IntactLlama(model, None, kv_type, **settings), L
        self.tokens = tokens
        self._steps_back = not self.llama._has_states
        self._saved: dict[int, bytes] = {}  # of a model that cannot step back: the sequence at these positions

    def close(self) -> None:
        """Free the context and the model, without what llama.cpp remarks on the buffers of a long context."""
        with errors_logged():
            self.llama.close()

    def begin(self, prefix: bytes | None, rounded: bool = False) -> None:
        """Give it the prefix, replacing what was there.

        prefix: the bytes of a prefix file with the tokens or the first of them, whose rows are loaded; the others are
        computed. None: all are computed. rounded: the rows that are loaded are rounded to the KV type as those of
        other cells, before any other token reads them.
        """
        self._L.llama_memory_clear(self._L.llama_get_memory(self.llama.ctx), True)
        with errors_logged():
            done = 0 if prefix is None else bindings.load(self.llama.ctx, prefix)
        if rounded:
            self._round()
        self._saved = {}
        self._decode(self.tokens[done:], done, _last(len(self.tokens) - done))
        self._save(len(self.tokens))

    def log_probs(self, text: Sequence[int], measured: np.ndarray | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """After each measured token of a text right behind the prefix, log probabilities of the next: (rows, F32 [rows,
        n_vocab]), a block of rows at a time. measured: bool [len(text)]; None: all tokens are. Rows count measured
        tokens: of the others no logits are computed."""
        measured = np.ones(len(text), bool) if measured is None else measured
        n_batch, done = self.llama.n_batch, 0
        for start in range(0, len(text), n_batch):
            part = slice(start, start + n_batch)
            logits = self._decode(text[part], len(self.tokens) + start, measured[part])
            for first in range(0, len(logits), _BLOCK):
                rows = logits[first : first + _BLOCK]
                yield slice(done + first, done + first + len(rows)), _log_softmax(rows)
            done += len(logits)

    def likelihoods(self, context: list[int], choices: list[list[int]]) -> list[float]:
        """Log-likelihood, nats, of each of several continuations of a context right behind the prefix."""
        first = _log_softmax(self._decode(context, len(self.tokens), _last(len(context))))[0]
        self._save(len(self.tokens) + len(context))
        found = []
        for choice in choices:
            total = float(first[choice[0]])
            if len(choice) > 1:
                every = np.ones(len(choice) - 1, bool)
                rows = _log_softmax(self._decode(choice[:-1], len(self.tokens) + len(context), every))
                total += float(rows[np.arange(len(rows)), choice[1:]].sum(dtype=np.float64))
            found.append(total)
        return found

    def _decode(self, tokens: Sequence[int], at: int, wanted: np.ndarray) -> np.ndarray:
        """Evaluate tokens at a position, forgetting what was there; logits [some, n_vocab], valid until the next call.

        wanted: bool [len(tokens)], those that have logits; all of them among the tokens of the last n_batch.
        """
        llama = self.llama
        if not llama._ctx.kv_cache_seq_rm(0, at, -1):
            self._set_state(self._saved[at], "state of a sequence that it has saved")
        for start in range(0, len(tokens), llama.n_batch):
            part = slice(start, start + llama.n_batch)
            llama._batch.set_batch(batch=tokens[part], n_past=at + start, logits_all=False)
            for i, logits in enumerate(wanted[part].tolist()):
                llama._batch.batch.logits[i] = logits
            llama._ctx.decode(llama._batch)
        shape = (int(wanted.sum()), llama.n_vocab())
        return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=shape) if shape[0] else np.empty(shape, np.float32)

    def _save(self, at: int) -> None:
        if not self._steps_back:
            self._saved[at] = sequence_state(self.llama.ctx)

    def _set_state(self, sequence: bytes, what: str) -> None:
        data = (ctypes.c_uint8 * len(sequence)).from_buffer_copy(sequence)
        if self._L.llama_state_seq_set_data(self.llama.ctx, data, len(data), 0) == 0:
            raise IntactKVError(f"llama.cpp refused the {what}")

    def _round(self) -> None:
        """Make the intact cells ordinary: from now on attention reads their rounded copies."""
        ctx = self.llama.ctx
        rounded = state.without_intact_cells(sequence_state(ctx), bindings.describe(ctx))
        self._set_state(rounded, "rounded copy of the prefix")
        if self.llama.intact_cells:
            raise IntactKVError("llama.cpp kept cells intact in the rounded copy of the prefix")


def _last(n: int) -> np.ndarray:
    """Of n tokens, the last alone: bool [n]."""
    return np.arange(n) == n - 1


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows [n, n_vocab]."""
    shifted = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
