"""The tokenizer of a GGUF: llama.cpp's own, which the runtime uses, without loading the weights."""

from __future__ import annotations

import ctypes
import os
from types import TracebackType
from typing import Any

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama.kv_types import WITHOUT_FLASH
from intactkv_export.libllama.log import errors_logged
from intactkv_export.libllama.reason import reason

_INDEXED = ("glm5-next", "qwen4exp")  # those with upstream's llama_memory_hybrid_idx


def token_bytes(vocab: Any, token: int, special: bool) -> bytes:
    """The bytes of a token's text, however many; a character may go on in the next token.

    vocab: a llama_vocab *. special: control tokens as they are written, else they have no text. -1, llama.cpp's "no
    token", has none either. Raises IntactKVError for an id that is not in the vocabulary, where llama.cpp aborts.
    """
    llama_cpp: Any = library.load()
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
    if token == -1:
        return b""
    if not 0 <= token < n_vocab:
        raise IntactKVError(f"{token} is no token of this model: its vocabulary has the tokens 0 to {n_vocab - 1}")
    size = 64  # bytes; enough for nearly all
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = llama_cpp.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n  # what it needs


class Vocabulary:
    """Tokens of a model: text to tokens and back. Also what the model's header says about it.

    A context manager: frees the model. Raises IntactKVError if llama.cpp cannot load the vocabulary.
    """

    def __init__(self, gguf: str | os.PathLike[str]) -> None:
        self._llama_cpp: Any = library.load()
        self.path = gguf
        with errors_logged() as lines:
            params = self._llama_cpp.llama_model_default_params()
            params.vocab_only = True
            self._model = self._llama_cpp.llama_model_load_from_file(os.fsencode(gguf), params)
        if not self._model:
            raise IntactKVError(
                f"llama.cpp cannot load the vocabulary of {gguf} ({reason(lines)}): convert the model again"
            )
        self._vocab = self._llama_cpp.llama_model_get_vocab(self._model)

    def __enter__(self) -> Vocabulary:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._llama_cpp.llama_model_free(self._model)

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Tokens of a text without an added BOS. special: text of control tokens becomes these tokens."""
        raw, size = text.encode(), len(text.encode()) + 8  # enough for nearly all
        for _ in range(2):
            out = (self._llama_cpp.llama_token * size)()
            n = self._llama_cpp.llama_tokenize(self._vocab, raw, len(raw), out, size, False, special)
            size = max(size, -n)  # what it needs: where SPM's mark of a blank is no token, it becomes three bytes'
            if n >= 0:
                break
        if n < 0:
            raise IntactKVError(f"llama.cpp cannot tokenize a text of {len(raw)} bytes with {self.path}")
        return list(out[:n])

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens too."""
        return b"".join(token_bytes(self._vocab, token, True) for token in tokens).decode("utf-8", "replace")

    def token_name(self, token: int) -> str:
        """The token as the vocabulary writes it; "" for -1 (llama.cpp's "the model has none")."""
        return "" if token < 0 else self._llama_cpp.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        return bool(self._llama_cpp.llama_vocab_is_control(self._vocab, token))

    def ends_reply(self, token: int) -> bool:
        """Whether generation ends with this token: end of turn, of message, of text (llama_vocab_is_eog)."""
        return bool(self._llama_cpp.llama_vocab_is_eog(self._vocab, token))

    @property
    def bos(self) -> int:
        """-1: the model has none."""
        return int(self._llama_cpp.llama_vocab_bos(self._vocab))

    @property
    def eos(self) -> int:
        """-1: the model has none."""
        return int(self._llama_cpp.llama_vocab_eos(self._vocab))

    @property
    def adds_bos(self) -> bool:
        """Whether plain text is given a BOS in front."""
        return bool(self._llama_cpp.llama_vocab_get_add_bos(self._vocab))

    def refusal(self) -> str:
        """Why this model cannot carry a prefix, as far as the header tells; "" if it may."""
        if self._llama_cpp.llama_model_has_encoder(self._model):
            return "its encoder sees the whole prompt, so no part of it can be computed ahead"
        arch = self.header("general.architecture")
        if arch in _INDEXED:
            return "beside its KV cache and its recurrent states it has an indexer's cache"
        if self.header(f"{arch}.attention.indexer.top_k") not in ("", "0"):
            return "an indexer with a cache of its own chooses the tokens that are attended (sparse attention)"
        if arch in WITHOUT_FLASH:
            return "llama.cpp computes it without flash attention only, which a prefix needs"
        return ""

    def header(self, key: str) -> str:
        """A value of the GGUF's header as text, up to 255 bytes; "" if it has none."""
        buffer = self._llama_cpp.ctypes.create_string_buffer(256)
        n = self._llama_cpp.llama_model_meta_val_str(self._model, key.encode(), buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace") if n > 0 else ""
