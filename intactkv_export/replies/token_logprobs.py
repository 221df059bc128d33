"""Logprobs of a reply's tokens, in the form of llama_cpp's completions: a token's text, its own, the best others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from intactkv_export.replies.reply_text import ReplyText, decoder

Logprobs = dict[str, list[Any]]  # tokens, text_offset, token_logprobs, top_logprobs: lists of one length


@dataclass
class _Token:
    """A token of the reply. place: in the sequence. start: where its text begins in the reply, in characters."""

    token: int
    place: int
    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class TokenLogprobs:
    """Takes the tokens of a reply, gives each with its logprobs as soon as its text is certain (ReplyText).

    A token's text is what it adds to the reply: a character of several tokens is the text of the last of them, so
    the texts together are the reply. Needs logits_all=True. text_offset: characters before the reply.
    """

    def __init__(self, llama: Any, reply: ReplyText, n_best: int) -> None:
        self._llama, self._reply, self._n_best = llama, reply, n_best
        self._waiting: deque[_Token] = deque()
        self.text_offset = 0

    def add(self, token: int, place: int, text: str) -> None:
        """A token at a place of the sequence, and what it added to the text."""
        self._waiting.append(_Token(token, place, self._reply.length - len(text), text))

    def ready(self) -> Iterator[tuple[str, Logprobs]]:
        """(text, logprobs) of the tokens whose text is certain."""
        while self._waiting and self._waiting[0].end <= self._reply.certain:
            if self._reply.stopped or (len(self._waiting) == 1 and self._reply.waits):
                return  # rest() knows the end of its text
            yield self._given(self._waiting.popleft())

    def rest(self, text: str) -> Iterator[tuple[str, Logprobs]]:
        """The other tokens, at the end, up to a stop string. text: what the last one adds to its own."""
        if self._waiting:
            self._waiting[-1].text += text
        while self._waiting:
            one = self._waiting.popleft()
            if not self._reply.stopped or one.start < self._reply.certain:
                one.text = one.text[: self._reply.certain - one.start]
                yield self._given(one)

    def of_prompt(self, tokens: Sequence[int]) -> Logprobs:
        """Of the tokens of the prompt, but BOS. The first has no logprobs, as OpenAI's has none."""
        made: list[Logprobs] = []
        characters, offset = decoder(self._llama.tokenizer_, [], True), 0
        for place, token in enumerate(tokens):
            text = characters.add(token)
            if place == len(tokens) - 1:
                text += characters.end()
            if token != self._llama.token_bos():
                made.append(self._of(token, place if made else 0, text, offset))
            offset += len(text)
        return {key: [x for one in made for x in one[key]] for key in made[0]} if made else _form([], [], [], [])

    def _given(self, one: _Token) -> tuple[str, Logprobs]:
        return one.text, self._of(one.token, one.place, one.text, self.text_offset + one.start)

    def _of(self, token: int, place: int, text: str, offset: int) -> Logprobs:
        if place == 0:  # nothing before it
            return _form([text], [offset], [None], [None])
        logprobs = self._llama.logits_to_logprobs(self._llama._scores[place - 1])
        best: dict[str, float] = {}
        for other in _highest(logprobs, self._n_best):
            best.setdefault(text if other == token else self._own_text(other), float(logprobs[other]))
        best[text] = own = float(logprobs[token])
        return _form([text], [offset], [own], [best])

    def _own_text(self, token: int) -> str:
        return self._llama.detokenize([token]).decode("utf-8", "replace")


def _form(tokens: list[Any], text_offset: list[Any], token_logprobs: list[Any], top_logprobs: list[Any]) -> Logprobs:
    return {
        "tokens": tokens,
        "text_offset": text_offset,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
    }


def _highest(values: np.ndarray, n: int) -> list[int]:
    """Places of the n highest values, the highest first."""
    n = min(n, len(values))
    if n <= 0:
        return []
    places = np.argpartition(values, len(values) - n)[len(values) - n :]
    return places[np.argsort(-values[places], kind="stable")].tolist()
