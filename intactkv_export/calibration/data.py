"""The texts that a calibration trains on, and what the reference says after each of their tokens.

Texts are of one length, or of two: half of the tokens in texts of SHORT tokens, half in texts of seq_len. What is
gained on short texts alone fades behind long ones. They are kept in parts, each a file with texts of one length and
their targets, so that an interruption costs one part. Where the reference writes the texts, its targets are what it
says while it writes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intactkv_export.calibration import targets
from intactkv_export.calibration.targets import Targets
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prefix, Rendering, chat_template_of
from intactkv_export.texts import Growing, batch_size, begin, read_two_lengths, read_user_file, token_hash, write
from intactkv_export.work import Steps, atomic

if TYPE_CHECKING:
    from intactkv_export.torch_model import TorchModel

SHORT = 256  # tokens in a short text
_HELD_OUT = 8  # one of so many texts of a length is not trained on
_PART = 16  # texts in a file, where they are read


@dataclass(frozen=True)
class Source:
    """Where texts come from. data: "self" or a file; at most `sequences` of them, the longest of seq_len tokens.

    mixed: half of the tokens in short ones. all_targets: of all texts; else of those that are held out.
    """

    data: str
    sequences: int
    seq_len: int
    seed: int
    mixed: bool = True
    all_targets: bool = True

    def lengths(self) -> list[tuple[int, int]]:
        """(how many texts, of how many tokens), short ones first."""
        ratio = self.seq_len // SHORT
        if not self.mixed or ratio < 2:
            return [(self.sequences, self.seq_len)]
        n_long = max(2, round(self.sequences / (1 + ratio)))
        n_short = self.sequences - n_long
        return [(n_short, SHORT), (n_long, self.seq_len)] if n_short >= 2 else [(self.sequences, self.seq_len)]


@dataclass(frozen=True)
class Text:
    """tokens: int32 [n], which follow the prefix. targets: of each token; None: not asked for."""

    tokens: np.ndarray
    targets: Targets | None


@dataclass(frozen=True)
class Data:
    """Texts, those of one length in a row. held_out: indices of those that are not trained on."""

    texts: list[Text]
    held_out: list[int]

    @classmethod
    def of(cls, groups: Sequence[Sequence[Text]]) -> Data:
        """groups: of one length each; of every one some are held out."""
        held_out: list[int] = []
        first = 0
        for group in groups:
            held_out += range(first, first + max(1, len(group) // _HELD_OUT))
            first += len(group)
        return cls([text for group in groups for text in group], held_out)

    @property
    def trained(self) -> list[int]:
        held_out = set(self.held_out)
        return [i for i in range(len(self.texts)) if i not in held_out]

    def n_tokens(self, index: Sequence[int]) -> int:
        return sum(len(self.texts[i].tokens) for i in index)

    def by_length(self, index: Sequence[int]) -> dict[int, list[int]]:
        """The same indices by the length of their texts, in the order of texts."""
        found: dict[int, list[int]] = {}
        for i in index:
            found.setdefault(len(self.texts[i].tokens), []).append(i)
        return found

    def sha256(self) -> str:
        return token_hash([text.tokens.tolist() for text in self.texts])


def same_source(directory: Path, source: Source, prefix: Prefix, dtype: str) -> None:
    """Note in a directory what its texts are of. Raises UsageError if they are there already, of other settings; a note
    that a failed start has left without texts does not count."""
    path = directory / "data.json"
    about = {
        **asdict(source),
        "dtype": dtype,
        "reference": prefix.manifest["reference"]["sha256"],
        "prefix": prefix.sha256,
    }
    if path.is_file() and any(directory.glob("texts-*.npz")):
        check_same(directory, json.loads(path.read_text()), about)
        return
    with atomic.output(path) as file:
        file.write(json.dumps(about).encode())


def gather(
    directory: Path, source: Source, prefix: Prefix, model: Path, reference: Callable[[], TorchModel], steps: Steps
) -> Data:
    """The texts and their targets: made, or found in the directory.

    model: the GGUF whose tokenizer and template are used. reference: gives the model that writes the texts and says
    what follows; called when a part is missing. steps counts tokens. Raises IntactKVError if there are too few texts to
    hold one out.
    """
    template = chat_template_of(gguf_file.read(model).values, Rendering.of(prefix.manifest))
    with Vocabulary(model) as vocabulary:
        kind = _Writing if source.data == "self" else _Reading
        work = kind(source, prefix, vocabulary, template, reference, steps)
        groups = [list(_kept(directory, number, group)) for number, group in enumerate(work.groups())]
    if min(map(len, groups)) < 2:
        raise IntactKVError(
            f"{source.data} gives one text of {source.seq_len} tokens, and one is held out: give more text, or a "
            "smaller --seq-len"
        )
    return Data.of(groups)


Part = tuple[np.ndarray, Targets]  # int32 [n, n_tokens]; of the first of them


def _kept(directory: Path, group: int, parts: Sequence[Callable[[], Part]]) -> Iterator[Text]:
    """The texts of a group's parts, each made once and kept in a file."""
    for number, make in enumerate(parts):
        path = directory / f"texts-{group}-{number:06d}.npz"
        if path.is_file():
            with np.load(path) as found:
                tokens, wanted = found["tokens"], Targets(found["ids"], found["log_p"], found["log_rest"])
        else:
            tokens, wanted = make()
            with atomic.output(path) as file:
                np.savez(file, tokens=tokens, ids=wanted.ids, log_p=wanted.log_p, log_rest=wanted.log_rest)
        for i, row in enumerate(tokens):
            yield Text(row, wanted[i] if i < len(wanted) else None)


@dataclass
class _Work(ABC):
    """Parts of texts that are still to be made."""

    source: Source
    prefix: Prefix
    vocabulary: Vocabulary
    template: str | None
    reference: Callable[[], TorchModel]
    steps: Steps

    @abstractmethod
    def groups(self) -> Iterator[list[Callable[[], Part]]]:
        """For each length of texts, how its parts are made."""

    def _with_targets(self, first: int, size: int, n: int) -> int:
        """How many texts of a part have targets: of n texts of the group, it has `size` from the first one."""
        return size if self.source.all_targets else min(size, max(0, max(1, n // _HELD_OUT) - first))


class _Writing(_Work):
    """Texts that the reference writes."""

    def groups(self) -> Iterator[list[Callable[[], Part]]]:
        lengths, done = self.source.lengths(), 0
        total = sum(n * n_tokens for n, n_tokens in lengths)
        for n, n_tokens in lengths:
            seed = self.source.seed + done  # groups and parts differ
            texts = begin(self.prefix, self.vocabulary, self.template, n=n, seed=seed, documents=True)
            size = batch_size(self.prefix, len(self.prefix.tokens) + n_tokens)
            parts = []
            for first in range(0, n, size):
                some = texts[first : first + size]
                wanted = self._with_targets(first, len(some), n)
                parts.append(self._part(some, n_tokens, seed + first, wanted, (done + first * n_tokens, total)))
            done += n * n_tokens
            yield parts

    def _part(
        self, texts: list[Growing], n_tokens: int, seed: int, n_targets: int, counted: tuple[int, int]
    ) -> Callable[[], Part]:
        done, total = counted

        def make() -> Part:
            said: list[Targets] = []
            write(
                self.reference(),
                self.prefix,
                self.vocabulary,
                texts,
                n_tokens=n_tokens,
                seed=seed,
                observe=lambda _, logits: said.append(targets.of_logits(logits[:n_targets])),
                written=lambda n: self.steps(done + n * len(texts), total),
            )
            tokens = np.array([text.tokens for text in texts], np.int32)
            return tokens, targets.joined(said, partial(np.stack, axis=1))

        return make


class _Reading(_Work):
    """Texts of a file."""

    def groups(self) -> Iterator[list[Callable[[], Part]]]:
        chosen = []
        for number, (n, found) in enumerate(self._read()):
            order = np.random.default_rng(self.source.seed + number).permutation(len(found))[:n]
            chosen.append([found[i] for i in order])
        done, total = 0, sum(len(texts) * len(texts[0]) for texts in chosen)
        for texts in chosen:
            parts = []
            for first in range(0, len(texts), _PART):
                some = texts[first : first + _PART]
                parts.append(self._part(some, self._with_targets(first, len(some), len(texts)), (done, total)))
                done += len(some) * len(some[0])
            yield parts

    def _read(self) -> list[tuple[int, list[list[int]]]]:
        """(How many are wanted, texts of one length)."""
        lengths, about = self.source.lengths(), (self.source.data, self.prefix, self.vocabulary, self.template)
        if len(lengths) > 1:
            (n_short, short), (n_long, long) = lengths
            shorts, longs = read_two_lengths(*about, short=short, long=long, seed=self.source.seed)
            return [(n_short, shorts), (n_long, longs)] if shorts else [(self.source.sequences, longs)]
        return [(n, read_user_file(*about, n_tokens=n_tokens)) for n, n_tokens in lengths]

    def _part(self, texts: list[list[int]], n_targets: int, counted: tuple[int, int]) -> Callable[[], Part]:
        done, total = counted

        def make() -> Part:
            made = targets.make(
                self.reference(),
                self.prefix.tokens,
                texts[: max(1, n_targets)],
                progress=lambda n: self.steps(done + n * len(texts[0]), total),
            )
            return np.array(texts, np.int32), made[:n_targets]

        return make


def check_same(path: Path, kept: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises UsageError if what a file or directory keeps was made with other settings."""
    other = next((name for name, value in about.items() if kept.get(name) != value), None)
    if other is not None:
        raise UsageError(
            f"{path} holds a calibration with other settings ({other} is {kept.get(other)!r} there and "
            f"{about[other]!r} here): give the same ones to go on with it, or remove it"
        )
