"""Drafts: tokens that a cheap model guesses (draft_model=...), evaluated together, kept as far as they are right.

llama_cpp's own way keeps the logits of every position, n_ctx * n_vocab floats, in an array it makes for n_batch rows.
The sampler reads them from the context, so here none are kept, and those of a prompt are not computed.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from intactkv_export import library

library.load()  # before anything else imports llama_cpp: on the patched libraries

from llama_cpp.llama_speculative import LlamaDraftModel  # noqa: E402


class Drafts(LlamaDraftModel):
    """A draft model, and how many tokens it guessed last. `model`: the one that was given."""

    def __init__(self, model: LlamaDraftModel, llama: Any) -> None:
        self.model = model
        self._llama = weakref.proxy(llama)  # a model is freed when its last user drops it, not at a collection
        self._n_last = 0

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        """The next tokens as guessed, at most a batch with the one before; none inside llama.no_drafts_in."""
        whole = self._llama.no_drafts_in
        if len(input_ids) <= len(whole) and input_ids.tolist() == whole[: len(input_ids)]:
            return np.array([], dtype=np.intc)
        guessed = self.model(input_ids, **kwargs)[: self._llama.n_batch - 1]
        self._n_last = len(guessed)
        return guessed

    def are_in(self, tokens: list[int]) -> bool:
        """Whether these tokens, about to be evaluated, are a sampled one and what was guessed after it."""
        n, self._n_last = self._n_last, 0
        return 1 < len(tokens) <= 1 + n


def evaluate(llama: Any, tokens: list[int]) -> None:
    """As Llama.eval(), of one batch, with logits of every token in the context."""
    first, end = llama.n_tokens, llama.n_tokens + len(tokens)
    llama._ctx.kv_cache_seq_rm(-1, first, -1)
    llama._batch.set_batch(batch=tokens, n_past=first, logits_all=True)
    llama._ctx.decode(llama._batch)
    llama.input_ids[first:end] = tokens
    llama.n_tokens = end
    llama._requires_eval = False


def forget_from(llama: Any, n_tokens: int) -> None:
    """Drop guessed tokens that did not become a part of the reply: those from place n_tokens on."""
    if llama.n_tokens > n_tokens and llama._ctx.kv_cache_seq_rm(-1, n_tokens, -1):
        llama.n_tokens = n_tokens
        llama._requires_eval = True
