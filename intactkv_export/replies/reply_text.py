"""The text of a reply, built token by token: nothing lost, no character broken, the same work for every token."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from intactkv_export import library
from intactkv_export.libllama import token_bytes

library.load()  # before anything else imports llama_cpp: on the patched libraries

from llama_cpp.llama_tokenizer import BaseLlamaTokenizer, LlamaTokenizer  # noqa: E402

_REPLACEMENT = "\ufffd"  # what stands for bytes that are no character
_MAX_WAITING = 16  # tokens; no character is made of more


class Tokenizer(LlamaTokenizer):
    """The model's own tokenizer, with every token's text, however long."""

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The text of tokens. special: control tokens too. Without the space that a text after BOS begins with."""
        vocab = self._model.vocab
        text = b"".join(token_bytes(vocab, int(token), special) for token in tokens)
        return text[1:] if len(tokens) > 0 and tokens[0] == self._model.token_bos() and text[:1] == b" " else text


class Decoder(Protocol):
    """Tokens to characters. A character of several tokens comes with the last of them."""

    def add(self, token: int) -> str:
        """The characters that this token completes."""

    def end(self) -> str:
        """What stands for a last character that was never completed."""

    @property
    def waits(self) -> bool:
        """Whether the last token left a character incomplete."""


class _Bytes:
    """Of the model's own tokenizer: a token is some bytes."""

    def __init__(self, vocab: Any, begins_text: bool) -> None:
        self._vocab, self._begins_text = vocab, begins_text
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        piece = token_bytes(self._vocab, int(token), False)
        if self._begins_text and piece:
            piece, self._begins_text = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)

    @property
    def waits(self) -> bool:
        return bool(self._utf8.getstate()[0])


class _Texts:
    """Of another tokenizer (Llama(tokenizer=...)), which knows only the text of several tokens together."""

    def __init__(self, tokenizer: BaseLlamaTokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._waiting = list(prompt[-_MAX_WAITING:]), list[int]()

    def add(self, token: int) -> str:
        self._waiting.append(int(token))
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._waiting) < _MAX_WAITING:
            return ""
        self._before, self._waiting = self._waiting, []
        return text

    def end(self) -> str:
        text, self._waiting = self._text() if self._waiting else "", []
        return text

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def _text(self) -> str:
        return self._tokenizer.detokenize(self._waiting, prev_tokens=self._before).decode("utf-8", "replace")


def decoder(tokenizer: BaseLlamaTokenizer, prompt: Sequence[int], begins_text: bool) -> Decoder:
    """For the reply to a prompt. begins_text: nothing is before it, so a first space is the tokenizer's."""
    if isinstance(tokenizer, Tokenizer):
        return _Bytes(tokenizer._model.vocab, begins_text)
    return _Texts(tokenizer, prompt)


class ReplyText:
    """What a reply says up to its first stop string. Lengths and places are in characters.

    Text is `certain` when it will be a part of the reply whatever comes: the rest could still become a stop string.
    Bytes that are no UTF-8, an incomplete character at the end too, become U+FFFD, as bytes.decode(errors="replace")
    has it for the whole.
    """

    def __init__(self, decoder: Decoder, stops: Iterable[str]) -> None:
        self._decoder = decoder
        self._stops = [stop for stop in stops if stop]  # "" is a model's end token when it has none
        self._ready, self._held = list[str](), ""
        self.length = 0
        self.certain = 0
        self.stopped = False  # a stop string came: the text ends before it

    @property
    def waits(self) -> bool:
        """Whether the last token left a character incomplete."""
        return self._decoder.waits

    def add(self, token: int) -> str:
        """Take a token; returns the characters that it completes, certain or not."""
        return self._take(self._decoder.add(token))

    def end(self) -> str:
        """No more tokens; returns what stands for an incomplete character. All text is certain then."""
        text = "" if self.stopped else self._take(self._decoder.end())
        if not self.stopped:
            self._let_go(len(self._held))
        return text

    def ready(self) -> str:
        """Text that became certain since the last call."""
        text = "".join(self._ready)
        self._ready.clear()
        return text

    def _take(self, text: str) -> str:
        self.length += len(text)
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._let_go(min(found))
            self.stopped = True
        else:
            self._let_go(len(self._held) - max(map(self._begun, self._stops), default=0))
        return text

    def _begun(self, stop: str) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _let_go(self, n: int) -> None:
        if n:
            self._ready.append(self._held[:n])
            self._held = self._held[n:]
            self.certain += n
