"""A user's texts as sequences of tokens behind the prefix: records in JSON (records.py), or plain text."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import read_text
from intactkv_export.prefix import Prefix
from intactkv_export.texts.records import Unusable, turns_or_text
from intactkv_export.texts.turns import Turns


def read_user_file(
    path: str | Path, prefix: Prefix, vocabulary: Vocabulary, chat_template: str | None, *, n_tokens: int
) -> list[list[int]]:
    """The texts of a file as sequences of n_tokens tokens behind the prefix.

    NAME.jsonl: a record a line, in a shape of records.py. NAME.json: an array of those. Else plain text. A long
    conversation gives several sequences, short ones are joined as further turns; what is left at an end and fills no
    sequence is left out. Records that cannot be used are left out too, and a warning counts and names them.

    Raises UsageError if there is no such file, IntactKVError that names the first line if none can be used, or if the
    file is too short for one sequence.
    """
    return _one_length(path, _parts(Path(path), prefix, vocabulary, chat_template), n_tokens)


def read_two_lengths(
    path: str | Path,
    prefix: Prefix,
    vocabulary: Vocabulary,
    chat_template: str | None,
    *,
    short: int,
    long: int,
    seed: int,
) -> tuple[list[list[int]], list[list[int]]]:
    """The texts of a file as sequences of two lengths, about half of its tokens in each, none of them in both: what is
    held out among the short ones is not in a long one that is trained on. The seed decides which go where.

    Of a text longer than `long` what is left at the end goes among the short ones. A file that is too short for two of
    each has long ones only. Otherwise as read_user_file().
    """
    whole: list[list[int]] = []
    rests: list[list[int]] = []
    parts = _parts(Path(path), prefix, vocabulary, chat_template)
    for part in parts:
        units = [part[start : start + long] for start in range(0, len(part), long)]
        rests += [units.pop()] if len(units) > 1 and len(units[-1]) < long else []
        whole += units
    n_tokens, chosen = 0, set[int]()
    enough = max(2 * long, sum(map(len, parts)) / 2)
    for i in np.random.default_rng(seed).permutation(len(whole)).tolist():
        if n_tokens < enough:
            chosen.add(i)
            n_tokens += len(whole[i])
    longs = _sequences([unit for i, unit in enumerate(whole) if i in chosen], long)
    shorts = _sequences([*(unit for i, unit in enumerate(whole) if i not in chosen), *rests], short)
    if min(len(longs), len(shorts)) < 2:
        return [], _one_length(path, parts, long)
    return shorts, longs


def _one_length(path: str | Path, parts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
    found = _sequences(parts, n_tokens)
    if not found:
        raise IntactKVError(
            f"{path} has {sum(map(len, parts))} tokens and one sequence needs {n_tokens}: give more text, or shorter "
            "sequences"
        )
    return found


def _sequences(parts: Sequence[list[int]], n_tokens: int) -> list[list[int]]:
    sequences: list[list[int]] = []
    pending: list[int] = []
    for part in parts:
        pending = pending + part
        n_whole = len(pending) // n_tokens
        sequences += [pending[i * n_tokens : (i + 1) * n_tokens] for i in range(n_whole)]
        pending = [] if n_whole else pending  # the next sequence begins where a conversation begins
    return sequences


def _parts(path: Path, prefix: Prefix, vocabulary: Vocabulary, chat_template: str | None) -> list[list[int]]:
    """Each conversation or text of a file, as tokens behind the prefix."""
    text = read_text(path)
    if path.suffix not in (".json", ".jsonl"):
        return [vocabulary.tokenize(text, special=False)]
    turns, left_out = Turns(prefix, vocabulary, chat_template), _LeftOut(path)
    parts = [
        turns.whole(found) if isinstance(found, list) else vocabulary.tokenize(f"{found}\n\n", special=False)
        for found in left_out.usable(text)
    ]
    left_out.report(bool(parts))
    return parts


@dataclass
class _LeftOut:
    """What of a file could not be used: how often, by reason, and where first."""

    path: Path
    n_records: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    parts: Counter[str] = field(default_factory=Counter)  # of messages that were used without them

    def usable(self, text: str) -> Iterator[list[str] | str]:
        for where, read in _records(self.path, text):
            self.n_records += 1
            try:
                yield turns_or_text(json.loads(read) if isinstance(read, str) else read[0], self.parts)
            except (Unusable, ValueError, RecursionError) as error:
                unusable = isinstance(error, Unusable)
                why = str(error) if unusable else "not JSON"
                self.counts[why] += 1
                self.first.setdefault(why, where if unusable else f"{where}, {error}")

    def report(self, some: bool) -> None:
        """Warn of what was left out. Raises IntactKVError if that is all."""
        what = [f"{n} {why} (the first is {self.first[why]})" for why, n in self.counts.most_common(4)]
        more = len(self.counts) - len(what)
        what += [f"{more} kinds more"] if more > 0 else []
        if not some:
            raise IntactKVError(
                f"{self.path} has no record that can be used, of {self.n_records}: {', '.join(what) or 'it is empty'}: "
                "see --data in the help"
            )
        if what:
            n = self.counts.total()
            warnings.warn(
                f"{n} of {self.n_records} records of {self.path} are left out: {', '.join(what)}", stacklevel=3
            )
        if self.parts:
            kinds = ", ".join(f"{n} times a {kind}" for kind, n in self.parts.most_common(4))
            warnings.warn(f"what has no text is left out of the messages of {self.path}: {kinds}", stacklevel=3)


def _records(path: Path, text: str) -> Iterator[tuple[str, str | tuple[Any]]]:
    """(where it is, its JSON, or itself in a tuple) of each record."""
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            if len(text.strip().splitlines()) < 2 or not _is_json(text.strip().splitlines()[0]):
                raise IntactKVError(f"{path} is not JSON ({error}): correct it") from error
        else:
            records = whole if isinstance(whole, list) else [whole]
            yield from ((f"entry {number}", (record,)) for number, record in enumerate(records, 1))
            return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _is_json(line: str) -> bool:
    """Whether a .json file's first line is a record already: then it is one of lines."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
