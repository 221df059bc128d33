"""Where in a text a model is measured, and how the text before that is evaluated.

Behind much text a cache is as it is in use: most cells are old, and quantized. The newest are in the tail, and tokens
of one ubatch see each other at F16 there, so a text in one ubatch would show a cache that nobody decodes with. At a
depth it is evaluated as a reply is, some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from intactkv_export.errors import UsageError
from intactkv_export.libllama import EXACT, TAIL_MAX, kv_pair

DECODE_BATCH = 16  # tokens at a time, at most: a reply with drafts, or replies of several sequences
# Of the reference. Its cache is F16 whatever the ubatch: a long one differs in last bits only, and is several times
# faster. Not longer, though: llama.cpp keeps room for the logits of a whole ubatch, 1 MB a token with 262,144 words.
REFERENCE_UBATCH = 128


@dataclass(frozen=True)
class Way:
    """How a model's context is made. ubatch: its longest; None: a whole text. tail: tokens that are kept intact while
    they are the newest; None: the library's default."""

    ubatch: int | None = None
    tail: int | None = 0

    @property
    def words(self) -> list[str]:
        """What differs from a whole text at once without a tail, for the eye."""
        tail = "" if self.tail is None else f"tail {self.tail}"
        return [] if self.ubatch is None else [f"ubatch {self.ubatch}", *([tail] if tail else [])]


@dataclass(frozen=True)
class Depths:
    """behind: how many tokens of text are before those that are measured, ascending; (): none, and a text is evaluated
    in one ubatch. ubatches, tails: of Way, each with each."""

    behind: tuple[int, ...] = ()
    ubatches: tuple[int | None, ...] = (None,)
    tails: tuple[int | None, ...] = (0,)

    @classmethod
    def of(cls, depths: Sequence[int], decode_batch: int | None, ubatch: int | None, tails: Sequence[int]) -> Depths:
        """As evaluate() takes them. Raises UsageError for settings that measure nothing."""
        if not depths:
            if decode_batch is not None or ubatch is not None or tails:
                raise UsageError(
                    "the longest ubatch and the tail matter behind a text that is evaluated as a reply is, and no "
                    "depths are given: give --depths too, 0 for right behind the prefix"
                )
            return cls()
        decode_batch = DECODE_BATCH if decode_batch is None else decode_batch
        for what, least, values in (
            ("depth", 0, depths),
            ("tail", 0, tails),
            ("longest ubatch", 1, [decode_batch] if ubatch is None else [decode_batch, ubatch]),
        ):
            if min(values, default=least) < least:
                raise UsageError(f"a {what} of {min(values)} tokens measures nothing: give {least} or more")
        if max(tails, default=0) > TAIL_MAX:
            raise UsageError(f"a tail of {max(tails)} tokens is longer than any context: give {TAIL_MAX} at most")
        ubatches = dict.fromkeys([decode_batch] if ubatch is None else [decode_batch, ubatch])
        return cls(tuple(sorted(set(depths))), tuple(ubatches), tuple(dict.fromkeys(tails)) or (None,))

    @property
    def deepest(self) -> int:
        """Tokens before those that are measured last."""
        return max(self.behind, default=0)

    def ways(self, kv_type: str) -> Iterator[Way]:
        """In the order of rows. A cache that is exact anyway has no tail."""
        tails = (0,) if set(kv_pair(kv_type)) <= EXACT else self.tails
        return (Way(ubatch, tail) for ubatch in self.ubatches for tail in tails)


@dataclass(frozen=True)
class Windows:
    """The tokens of a text that are measured: n_tokens behind each depth, which may overlap; all, if there are none."""

    depths: tuple[int, ...]
    n_tokens: int

    @property
    def behind_text(self) -> bool:
        """Whether texts are evaluated as replies are. Each begins with a prefix given anew then: going back over a
        long text would not bring back what a sliding window or a tail has left behind."""
        return bool(self.depths)

    @property
    def measured(self) -> np.ndarray:
        """Of each token of a text, bool [deepest + n_tokens]: whether it is in a window."""
        inside = np.zeros(max(self.depths, default=0) + self.n_tokens, bool)
        for depth in self.depths or (0,):
            inside[depth : depth + self.n_tokens] = True
        return inside

    def each(self) -> Iterator[tuple[int, slice]]:
        """(depth, where among the measured tokens its window is)."""
        before = np.cumsum(self.measured)
        for depth in self.depths or (0,):
            start = int(before[depth]) - 1
            yield depth, slice(start, start + self.n_tokens)
