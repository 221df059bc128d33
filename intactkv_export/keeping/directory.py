"""The directory of `serve --keep`: which prefixes are in it, which fit a model, and which have to go.

    kept-0123456789abcdef.ikv    made by a served model; the longest unused one goes first when room is needed
    NAME.ikv                     anything else: the user's, never removed. So a kept one that is renamed is pinned
    0123456789abcdef.tokens      what the library has seen come again, its rows yet to be computed
    .lock                        held by the server that keeps here

When a prefix was last used is its file's time of modification, which the library sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.keeping.model import ServedModel
from intactkv_export.prefix import Prefix, has_windows, ikv
from intactkv_export.work import atomic, lock

_KEPT = re.compile(r"kept-[0-9a-f]{16}\.ikv")
_NOTE = re.compile(r"[0-9a-f]{16}\.tokens")
_LEFT = re.compile(r"\.(?:(?P<kept>kept-[0-9a-f]{16}\.ikv)\.tmp-[0-9a-f]+|[0-9a-f]{16}\.tokens\.tmp)")
_FORGOTTEN = 30 * 24 * 3600  # seconds: tokens noted for a model that is not served here any more
_MOST = 512  # files that are loaded: each is named to the library, and held in memory


@dataclass(frozen=True)
class Entry:
    """A file of the directory. prefix: without its rows; None: it cannot be read, and problem says why. used: when, in
    seconds since 1970."""

    path: Path
    n_bytes: int
    used: float
    prefix: Prefix | None
    problem: str = ""

    @property
    def pinned(self) -> bool:
        """Whether it is the user's: of a name of theirs, or not made by a served model."""
        return not _KEPT.fullmatch(self.path.name) or (self.prefix is not None and self.prefix.kept is None)


@dataclass(frozen=True)
class Wanted:
    """Tokens that so many requests began with, and their note."""

    path: Path
    tokens: list[int]
    requests: int


def entries(directory: Path) -> Iterator[Entry]:
    """Each .ikv of a directory, read and verified one after the other. Raises IntactKVError if it cannot be read."""
    try:
        paths = sorted(directory.glob("*.ikv"))
    except OSError as error:
        raise IntactKVError(f"cannot read the directory {directory} ({error.strerror}): check the path") from error
    for path in paths:
        with suppress(FileNotFoundError):  # gone meanwhile
            found = path.stat()
            try:
                prefix, problem = replace(ikv.read(path), layers=[], data=b""), ""
            except IntactKVError as error:
                prefix, problem = None, str(error).removeprefix(f"{path}: ")
            yield Entry(path, found.st_size, found.st_mtime, prefix, problem)


class Directory:
    """Of one server: the end of the `with` block lets others have it.

    path: made if it is not there, for this user alone. n_bytes: for all that is kept, whichever model's. Raises
    UsageError if it is no directory, IntactKVError if another server keeps its prompts there.
    """

    def __init__(self, path: Path, model: ServedModel, n_bytes: int, say: Callable[[str], None]) -> None:
        self.path, self.model, self.n_bytes, self._say = path.absolute(), model, n_bytes, say
        self.served: list[Prefix] = []  # beside what is kept: the reference's, or trained
        self._n_ctx: int | None = None
        with atomic.explained(self.path / ".lock"):
            if path.exists() and not path.is_dir():
                raise UsageError(f"{path} is no directory to keep prompts in: give another with --keep")
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock: IO[bytes] = open(self.path / ".lock", "ab")
        if lock.take(self._lock.fileno()) is False:
            self._lock.close()
            raise IntactKVError(f"another server keeps its prompts in {path}: give this one another directory")
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            say(f"{path} can be read by others on this machine, and prompts are kept there: chmod 700 keeps them out")
        self._remove_left()

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()

    def fitting(self, served: Sequence[Prefix] = (), n_ctx: int | None = None) -> list[Prefix]:
        """Those of this model, the user's first, then the newest; what is said of the others is why they are not.

        served: what the model is served with from elsewhere. n_ctx: tokens of a conversation's context.
        """
        found: list[Entry] = []
        there = list(entries(self.path))
        self.model.recognize(entry.prefix.manifest for entry in there if entry.prefix is not None)
        self.served, self._n_ctx = [prefix for prefix in served if prefix.kept is None], n_ctx
        known = {prefix.source.resolve() for prefix in self.served if prefix.source is not None}
        for entry in there:
            why = entry.problem
            if entry.prefix is not None:
                try:
                    self.model.check(entry.prefix.manifest)
                    found.append(entry)
                    if entry.prefix.kept is None and entry.path.resolve() not in known:
                        self.served.append(entry.prefix)
                    continue
                except IntactKVError as error:
                    why = str(error)
            self._say(f"{entry.path} is left out: {why}")
        found.sort(key=lambda entry: (not entry.pinned, -entry.used))
        found = [entry for entry in self._without_spare(found) if not self._say_why(entry)]
        if len(found) > _MOST:
            self._say(f"{len(found) - _MOST} prefixes in {self.path} are left out: {_MOST} are loaded, the newest")
        return [entry.prefix for entry in found[:_MOST] if entry.prefix is not None]

    def wanted(self) -> Iterator[Wanted]:
        """What this model's library has noted; notes that nobody will read any more are removed."""
        for path in sorted(self.path.glob("*.tokens")):
            if not _NOTE.fullmatch(path.name) or path.is_dir():
                continue  # the user's
            try:
                note = json.loads(path.read_bytes())
                mine = note["model"] == str(self.model.path.absolute())
                old = time.time() - path.stat().st_mtime > _FORGOTTEN
                wanted = Wanted(path, [int(token) for token in note["tokens"]], int(note["requests"]))
                if note["format"] != 1 or not wanted.tokens:
                    raise ValueError("of another version")
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError, TypeError) as error:
                with suppress(OSError):
                    path.unlink()
                    self._say(f"{path} is no note of tokens ({type(error).__name__}), and removed")
                continue
            if mine:
                yield wanted
            elif old:
                with suppress(OSError):
                    path.unlink()

    def behind(self, tokens: Sequence[int]) -> Prefix | None:
        """Of what is served, the prefix whose rows sequences of these tokens begin with, as the library chooses."""
        best, rank = None, (0, False)
        for prefix in self.served:
            n = _n_common(prefix.tokens, tokens)
            whole = n == len(prefix.tokens)
            if (n, whole) > rank and (whole or prefix.manifest["calibrated"] is None):
                best, rank = prefix, (n, whole)
        return best

    def has(self, tokens: Sequence[int]) -> bool:
        """Whether a prefix of this model that is here serves sequences that begin with these tokens."""
        return any(
            entry.prefix is not None and self._fits(entry.prefix) and self._serves(entry, tokens)
            for entry in entries(self.path)
        )

    def make_room(self, new: Path) -> list[Path]:
        """Remove what a new prefix makes spare, then what was not used for longest, until all that is kept is no
        larger than n_bytes. Returns what was removed: `new` itself if it alone is larger."""
        found = list(entries(self.path))
        own = [e for e in found if e.prefix is not None and self._fits(e.prefix)]
        own.sort(key=lambda entry: (not entry.pinned, -len(entry.prefix.tokens) if entry.prefix else 0))
        left = {entry.path for entry in self._without_spare(own)} | {e.path for e in found if e not in own}
        removed = [entry.path for entry in found if entry.path not in left]
        kept = [entry for entry in found if not entry.pinned and entry.path in left]
        kept.sort(key=lambda entry: (entry.path == new, entry.used))  # the new one goes last
        size = sum(entry.n_bytes for entry in kept)
        for entry in kept:
            if size <= self.n_bytes:
                break
            entry.path.unlink(missing_ok=True)
            removed.append(entry.path)
            size -= entry.n_bytes
        return removed

    def _without_spare(self, found: Sequence[Entry]) -> list[Entry]:
        """Without kept ones whose tokens one before them has too: those are removed."""
        left: list[Entry] = []
        for entry in found:
            tokens = [] if entry.prefix is None else entry.prefix.tokens
            if not entry.pinned and any(self._serves(x, tokens) for x in left):
                entry.path.unlink(missing_ok=True)
            else:
                left.append(entry)
        return left

    def _why_not_now(self, prefix: Prefix) -> str:
        """Why it is not to be served today, though it is of this model; "": it is."""
        if self._n_ctx is not None and prefix.n_cells >= self._n_ctx:
            return f"it takes {prefix.n_cells} tokens and the context has {self._n_ctx}"
        served = None if prefix.kept is None else self.behind(prefix.tokens)
        if served is None or prefix.behind == served.sha256:
            return ""
        if prefix.behind is None:  # the model's own would take the place of the reference's
            return f"its first rows are not those of {served.source}, which is served now"
        if served.manifest["calibrated"] is not None:
            return f"its first rows are another prefix's, and {served.source} was trained since"
        return ""

    def _say_why(self, entry: Entry) -> bool:
        why = "" if entry.prefix is None else self._why_not_now(entry.prefix)
        if why:
            self._say(f"{entry.path} is left out: {why}")
        return bool(why)

    def _serves(self, entry: Entry, tokens: Sequence[int]) -> bool:
        return entry.prefix is not None and _serves(entry.prefix, tokens) and not self._why_not_now(entry.prefix)

    def _fits(self, prefix: Prefix) -> bool:
        try:
            self.model.check(prefix.manifest)
        except IntactKVError:
            return False
        return True

    def _remove_left(self) -> None:
        """What a killed process has left half written."""
        for entry in list(self.path.iterdir()):
            if match := _LEFT.fullmatch(entry.name):
                if match["kept"]:
                    atomic.remove_stale(self.path / match["kept"])
                else:
                    with suppress(OSError):
                        entry.unlink()


def _serves(prefix: Prefix, tokens: Sequence[int]) -> bool:
    """Whether a prefix gives a sequence of these tokens all of them: a longer one does, unless its rows were trained as
    a whole, a sliding window has left some of them behind, or its model has recurrent layers."""
    if prefix.tokens == tokens:
        return True
    spoilt = prefix.manifest["calibrated"] is not None or has_windows(prefix.manifest) or bool(prefix.states)
    return not spoilt and prefix.tokens[: len(tokens)] == tokens


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def write(path: Path, data: bytes) -> None:
    """A prefix for this user's eyes alone, whole or not at all. Raises IntactKVError."""
    with atomic.output(path) as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(data)


def file_name(weights_sha256: str, tokens: Sequence[int]) -> str:
    """Of what a model keeps of these tokens."""
    text = f"{weights_sha256} {','.join(map(str, tokens))}"
    return f"kept-{hashlib.sha256(text.encode()).hexdigest()[:16]}.ikv"


def facts(entry: Entry) -> dict[str, Any]:
    """For programs."""
    prefix = entry.prefix
    about: dict[str, Any] = {"file": str(entry.path), "bytes": entry.n_bytes, "used": entry.used}
    if prefix is None:
        return about | {"problem": entry.problem}
    manifest = prefix.manifest
    return about | {
        "tokens": len(prefix.tokens),
        "pinned": entry.pinned,
        "kept": prefix.kept,
        "reference": manifest["reference"],
        "text": manifest["text"],
    }
