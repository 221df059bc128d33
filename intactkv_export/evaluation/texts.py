"""What models are evaluated on: chunks of text, and questions, that stand right behind the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from intactkv_export import extras
from intactkv_export.errors import UsageError
from intactkv_export.evaluation import multiple_choice
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import Reference, gguf_file
from intactkv_export.prefix import Prefix, Rendering, chat_template_of
from intactkv_export.texts import Turns, cut_text, cut_windows, default_text, sample_from
from intactkv_export.work import Stages

SELF = "self"
_SEED = 20_240_304  # nobody calibrates with it by chance


@dataclass(frozen=True)
class Texts:
    """n_chunks chunks of n_tokens tokens, each evaluated right behind the prefix or, at depths, behind as many more
    tokens of text, and questions.

    window: texts are windows of that many tokens, as llama-perplexity cuts them, without the first: in_windows().
    text: what is cut into chunks, tokenized without special tokens; None: Python's language reference (default_text);
    SELF: conversations that the reference writes, with a seed of their own: not those that calibration is given.
    tokens: the chunks themselves, instead of a text. questions: multiple_choice.read(). Raises UsageError.
    """

    n_chunks: int = 12
    n_tokens: int = 256
    text: str | None = None
    tokens: Sequence[Sequence[int]] | None = None
    questions: Sequence[multiple_choice.Question] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        if self.text is not None and self.tokens is not None:
            raise UsageError("both a text and the tokens of chunks are given: give one of them")
        if self.n_chunks < 1 or self.n_tokens < 2:
            raise UsageError(
                f"{self.n_chunks} chunks of {self.n_tokens} tokens measure nothing: give one or more, of two or more"
            )

    def in_windows(self, n_tokens: int) -> tuple[Texts, int]:
        """The same text in windows of n_tokens tokens, the second half of each measured; and how many tokens of text
        are before that half. Raises UsageError."""
        if n_tokens < 8:
            raise UsageError(f"a window of {n_tokens} tokens measures nothing: give 8 or more, as 512")
        if self.tokens is not None or self.as_conversation:
            raise UsageError("windows are cut from a text: give one, or leave the windows out")
        half = n_tokens // 2
        return replace(self, n_tokens=n_tokens - 1 - half, window=n_tokens), half - 1

    def longest(self, n_before: int = 0) -> int:
        """Tokens of the longest chunk, with n_before more."""
        return n_before + self.n_tokens if self.tokens is None else max(map(len, self.tokens), default=0)

    @property
    def as_conversation(self) -> bool:
        """Whether they are turns of a conversation, and so depend on what exactly stands before them."""
        return self.text == SELF or bool(self.questions)

    def chunks(
        self, work: Stages, reference: Reference, gguf: Path, prefix: Prefix, n_before: int = 0
    ) -> list[list[int]]:
        """The chunks behind a prefix, as tokens. gguf: the reference as one, for its tokenizer.

        n_before: how many more tokens each has, before those that are measured; of given tokens, they are the first.

        Raises IntactKVError if the text is too short, UsageError if torch is missing for SELF.
        """
        if self.tokens is not None:
            if short := [len(chunk) for chunk in self.tokens if len(chunk) < n_before + 2]:
                raise UsageError(
                    f"a chunk of {short[0]} tokens has none to measure behind {n_before}: give longer ones, or "
                    "smaller depths"
                )
            return [list(chunk) for chunk in self.tokens]
        if self.text == SELF:
            extras.require("torch", for_="text of the reference's own", otherwise="give a text file")
            return work.run(
                "sample conversations",
                sample_from,
                reference.path,
                gguf,
                prefix.data,
                counted=True,
                n=self.n_chunks,
                n_tokens=n_before + self.n_tokens,
                seed=_SEED,
            )
        text = default_text(whole=n_before > 0) if self.text is None else self.text
        if self.window is not None:
            return cut_windows(gguf, text, self.n_chunks, self.window)
        return cut_text(gguf, text, self.n_chunks, self.n_tokens, n_before)

    def items(self, gguf: Path, prefix: Prefix) -> list[multiple_choice.Item]:
        """The questions as tokens behind a prefix, by the tokenizer and the chat template of a GGUF."""
        if not self.questions:
            return []
        with Vocabulary(gguf) as vocabulary:
            template = chat_template_of(gguf_file.read(gguf).values, Rendering.of(prefix.manifest))
            return multiple_choice.encode(self.questions, Turns(prefix, vocabulary, template))
