"""Texts cut into chunks of equal length, each of which may stand right behind a prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary


def default_text(whole: bool = False) -> str:
    """Prose that every Python has: the language reference's topics (pydoc_data.topics), keys in order; whole: all of
    them, about 450,000 characters, else the first 60,000."""
    from pydoc_data import topics

    text = "\n".join(topics.topics[key] for key in sorted(topics.topics))
    return text if whole else text[:60000]


def cut_text(gguf: str | Path, text: str, n_chunks: int, n_tokens: int, n_before: int = 0) -> list[list[int]]:
    """The first n_chunks chunks of n_before + n_tokens tokens of a text, by the GGUF's tokenizer, without special
    tokens.

    Raises IntactKVError if the text is too short.
    """
    with Vocabulary(gguf) as vocabulary:
        tokens = vocabulary.tokenize(text, special=False)
    length = n_before + n_tokens
    if len(tokens) < n_chunks * length:
        enough = len(tokens) // length
        fewer = f"fewer (it is enough for {enough}) or " if enough else ""
        raise IntactKVError(
            f"the text has {len(tokens)} tokens, {n_chunks} chunks of {length} "
            + (f"({n_tokens} at a depth of {n_before}) " if n_before else "")
            + f"need {n_chunks * length}: give a longer text, or {fewer}shorter chunks"
            + (" or smaller depths" if n_before else "")
        )
    return [tokens[i * length : (i + 1) * length] for i in range(n_chunks)]


def cut_windows(gguf: str | Path, text: str, n_windows: int, n_tokens: int) -> list[list[int]]:
    """The first n_windows windows of n_tokens tokens of a text as upstream's llama-perplexity cuts it, by the tokenizer
    of a vocabulary that adds a first token, without two tokens of each: its first, in whose place llama-perplexity
    puts the vocabulary's first, and its last, behind which nothing is measured.

    Raises IntactKVError if the text is too short.
    """
    with Vocabulary(gguf) as vocabulary:
        # llama-perplexity takes one line break off the end of a file
        tokens = [-1, *vocabulary.tokenize(text.removesuffix("\n"), special=False)]
    if len(tokens) < n_windows * n_tokens:
        raise IntactKVError(
            f"the text has {len(tokens)} tokens, {n_windows} windows of {n_tokens} need {n_windows * n_tokens}: give a "
            f"longer text, or fewer (it is enough for {len(tokens) // n_tokens}) or shorter windows"
        )
    return [tokens[i * n_tokens + 1 : (i + 1) * n_tokens - 1] for i in range(n_windows)]


def token_hash(sequences: Sequence[Sequence[int]]) -> str:
    """SHA-256, hex, of the sequences: for each its length and its tokens, 32 bit little endian."""
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.asarray([len(sequence), *sequence], "<i4").tobytes())
    return digest.hexdigest()
