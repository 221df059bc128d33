"""A text that is being written, a token at a time: what is forced, what the model says, and whose turn it is."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from intactkv_export.texts.seeds import FOLLOW_UPS
from intactkv_export.texts.turns import Turns

PROMPT_TOKENS = 96  # of a system prompt that the model writes, at most


@dataclass
class Growing:
    """A conversation or a document that is being written behind a prefix.

    forced: tokens that come next whatever the model says. user: the model writes the user's turn (or the document with
    which it begins). after_prompt: the model writes the system prompt, and these tokens follow it. more: what comes
    when a text has ended, one of these.
    """

    turns: Turns
    choose: random.Random
    forced: deque[int]
    user: bool = False
    after_prompt: list[int] | None = None
    more: Sequence[str] = tuple(FOLLOW_UPS)
    tokens: list[int] = field(default_factory=list)
    n_turns: int = 0

    def take(self, drawn: int, ends: bool) -> int:
        """The next token: a forced one, or the one that was drawn, unless it ends the turn."""
        if not self.forced and (ends or self._ends(drawn)):
            self.forced.extend(self._between())
        token = self.forced.popleft() if self.forced else drawn
        self.tokens.append(token)
        return token

    def _ends(self, drawn: int) -> bool:
        """Whether the model ends what it writes in the user's or the system's name by what the template puts next."""
        if self.after_prompt is not None:
            return drawn == self.after_prompt[0] or len(self.tokens) >= PROMPT_TOKENS
        return self.user and drawn in self.turns.to_reply[:1]

    def _between(self) -> list[int]:
        if self.after_prompt is not None:
            following, self.after_prompt = self.after_prompt, None
            return following
        if self.user:
            self.user = False
            return self.turns.to_reply
        self.n_turns += 1
        self.user = self.n_turns % 2 == 0
        return self.turns.to_user if self.user else self.turns.next(self.choose.choice(self.more))
