"""Replies that are known beforehand: a logits processor that leaves one token, and a model that needs no evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from intactkv_export.runtime import IntactLlama, L


def forced(n_prompt: int, tokens: Sequence[int], then: int) -> Any:
    """Logits processors by which the model says these tokens behind a prompt, then `then` again and again."""

    def processor(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        place = len(ids) - n_prompt
        only = np.full_like(logits, -np.inf)
        only[tokens[place] if place < len(tokens) else then] = 0.0
        return only

    return L.LogitsProcessorList([processor])


class Scripted(IntactLlama):
    """Says `script`, then the end token, without any evaluation: what Python does for a reply, and only that."""

    script: Sequence[int] = ()

    def generate(self, tokens: Sequence[int], **settings: Any) -> Iterator[int]:
        yield from self.script
        yield self.token_eos()

    def whole(self, script: Sequence[int], **settings: Any) -> str:
        """The text of the script as one reply."""
        self.script = script
        return self.create_completion([1], **{"max_tokens": 0, **settings})["choices"][0]["text"]

    def streamed(self, script: Sequence[int], **settings: Any) -> list[str]:
        """The same in the chunks of a stream."""
        self.script = script
        chunks = list(self.create_completion([1], stream=True, **{"max_tokens": 0, **settings}))
        assert [c["choices"][0]["finish_reason"] is None for c in chunks] == [True] * (len(chunks) - 1) + [False]
        return [chunk["choices"][0]["text"] for chunk in chunks]
