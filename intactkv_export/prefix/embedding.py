"""Prefix files inside a GGUF: their bytes behind the last tensor, found by a few keys of the metadata.

    intactkv.state.offset    uint64: bytes from the beginning of the tensor data, as the offsets of tensors are
    intactkv.state.size      uint64: bytes of the prefix file, which is whole (prefix/ikv.py)

That is the first one, the default, which readers of before find. Where there are more, or where it has a name of its
own, three arrays of one length name them all, the first one first:

    intactkv.prefix.names                             strings, all different
    intactkv.prefix.offsets, intactkv.prefix.sizes    uint64, as above; the files lie one behind the other, aligned

One without a name is called `first-token` if it has one token, else `prompt`. Programs that read tensors by their
offsets never touch these bytes, and the metadata stays small. A program that writes the model again and knows nothing
of them (a split, a quantization, gguf-py) copies the keys and leaves the bytes behind: that is found out here. Files of
before have them in the metadata, as the uint8 array `intactkv.state`; they are read, not written. Where both are, the
array is the newer one: an old version embedded again.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import state
from intactkv_export.models import gguf_file
from intactkv_export.work import atomic

KEY_STATE = "intactkv.state"
KEY_OFFSET = "intactkv.state.offset"
KEY_SIZE = "intactkv.state.size"
KEY_NAMES = "intactkv.prefix.names"
KEY_OFFSETS = "intactkv.prefix.offsets"
KEY_SIZES = "intactkv.prefix.sizes"
END = b"INTACTKV"  # of a prefix file, which begins with state.MAGIC
FIRST_TOKEN, PROMPT = "first-token", "prompt"

_KEYS = (KEY_STATE, KEY_OFFSET, KEY_SIZE, KEY_NAMES, KEY_OFFSETS, KEY_SIZES)
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_AGAIN = "embed the prefix again"


@dataclass(frozen=True)
class Embedded:
    """A prefix in a file, unverified: its name, and where its bytes are or should be."""

    name: str
    path: Path
    start: int
    n_bytes: int

    def read(self) -> bytes:
        """Its bytes. Raises IntactKVError if the file cannot be read."""
        return gguf_file.read_bytes(self.path, self.start, self.n_bytes)

    @property
    def n_tokens(self) -> int:
        """As its header says."""
        return _n_tokens(gguf_file.read_bytes(self.path, self.start, 12))

    @property
    def tokens(self) -> list[int]:
        """As its header says: magic number, version, number of tokens, the tokens; all of them uint32."""
        n = min(self.n_tokens, self.n_bytes // 4)
        return list(struct.unpack(f"<{n}I", gguf_file.read_bytes(self.path, self.start + 12, 4 * n)))


def has(gguf: gguf_file.Gguf) -> bool:
    """Whether a GGUF says that a prefix is embedded in it, be it there or not (lost())."""
    return KEY_STATE in gguf.values or KEY_OFFSET in gguf.values


def lost(gguf: gguf_file.Gguf) -> bool:
    """Whether a GGUF says so, and some of the bytes are not there."""
    if not has(gguf) or KEY_STATE in gguf.values:
        return False
    return not all(_is_there(gguf, start, n) for _, start, n in _said(gguf))


def embedded(path: str | os.PathLike[str]) -> list[Embedded]:
    """All prefixes of a GGUF, the default first; none if it says that it has none.

    Raises IntactKVError if its keys are wrong, or the bytes are not where they say.
    """
    gguf = gguf_file.read(gguf_file.first_part(path))
    if KEY_STATE in gguf.values:
        return [_array(gguf)]
    if KEY_OFFSET not in gguf.values:
        return []
    found = []
    for name, start, n_bytes in _said(gguf):
        if not _is_there(gguf, start, n_bytes):
            which = "the prefix" if name is None else f"the prefix {name}"
            raise IntactKVError(
                f"{which} embedded in {gguf.path} is lost: its {n_bytes} bytes should begin at byte {start} "
                f"of {gguf.n_bytes} and do not, another program has cut or written the file: embed it again with "
                "`intactkv-export embed`, or get the file again"
            )
        found.append(Embedded(name or _default_name(gguf, start), gguf.path, start, n_bytes))
    return found


def choose(path: str | os.PathLike[str], name: str | None = None) -> Embedded:
    """The prefix of this name, or the default. Raises IntactKVError if there is none, or they cannot be read."""
    there = embedded(path)
    if not there:
        raise IntactKVError(
            f"{path} has no prefix embedded: name an .ikv file, or embed one with `intactkv-export embed`"
        )
    if name is None:
        return there[0]
    for one in there:
        if one.name == name:
            return one
    raise IntactKVError(f"{path} has no prefix named {name!r}, it has {listed(there)}: give one of these")


def listed(there: Sequence[Embedded]) -> str:
    """Their names, for a sentence."""
    return ", ".join(one.name for one in there)


def is_name(text: str) -> bool:
    """Whether a prefix can be called so."""
    return _NAME.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raises UsageError if a prefix cannot be called so."""
    if not is_name(name):
        raise UsageError(f"a prefix cannot be called {name!r}: give 1 to 64 of the characters A-Z a-z 0-9 . _ -")


def default_name(n_tokens: int, taken: Collection[str] = ()) -> str:
    """What a prefix is called that was given no name."""
    usual = FIRST_TOKEN if n_tokens == 1 else PROMPT
    return next(name for i in count(1) if (name := usual if i == 1 else f"{usual}-{i}") not in taken)


def write(
    gguf: str | os.PathLike[str],
    out: str | os.PathLike[str],
    changes: Mapping[str, gguf_file.Value | None],
    prefixes: Sequence[tuple[str, bytes | Embedded]],
) -> None:
    """Write a GGUF with some keys set or removed (gguf_file.copy) and these prefixes in it, and no others.

    prefixes: name, and the bytes or where they are in a file (which may be `gguf` itself); the first is the default.
    Raises IntactKVError.
    """
    source = gguf_file.read(gguf)
    kept = max(_end_without(source) - source.data, 0)  # a vocabulary without tensors may end before its data
    at, places = kept, []
    for _, prefix in prefixes:
        at += -at % source.alignment
        places.append((at, len(prefix) if isinstance(prefix, bytes) else prefix.n_bytes))
        at += places[-1][1]
    with atomic.output(out) as file:
        gguf_file.copy(gguf, file, {**changes, **dict.fromkeys(_KEYS), **_keys(prefixes, places)}, kept)
        at = kept
        for (_, prefix), (offset, n_bytes) in zip(prefixes, places, strict=True):
            file.write(b"\0" * (offset - at))
            if isinstance(prefix, bytes):
                file.write(prefix)
            else:
                gguf_file.copy_bytes(prefix.path, file, prefix.start, n_bytes)
            at = offset + n_bytes


def _keys(
    prefixes: Sequence[tuple[str, bytes | Embedded]], places: Sequence[tuple[int, int]]
) -> dict[str, gguf_file.Value]:
    """Of the metadata. One that has no name but the usual one is written as it ever was."""
    if not prefixes:
        return {}
    offsets, sizes = ([gguf_file.Uint64(place[i]) for place in places] for i in (0, 1))
    keys: dict[str, gguf_file.Value] = {KEY_OFFSET: offsets[0], KEY_SIZE: sizes[0]}
    name, only = prefixes[0]
    if len(prefixes) > 1 or name != default_name(_n_tokens(only) if isinstance(only, bytes) else only.n_tokens):
        keys |= {KEY_NAMES: [name for name, _ in prefixes], KEY_OFFSETS: offsets, KEY_SIZES: sizes}
    return keys


def _end_without(gguf: gguf_file.Gguf) -> int:
    """Where the file ends without its prefixes: they go if they are what it ends with, as we leave them; if others have
    added bytes, theirs stay."""
    end = gguf.n_bytes
    if KEY_OFFSET not in gguf.values:
        return end
    try:
        said = _said(gguf)
    except IntactKVError:
        return end  # keys that are no ours: nobody knows what is where
    for _, start, n_bytes in sorted(said, key=lambda place: -place[1]):
        padding = end - (start + n_bytes)
        if not _is_there(gguf, start, n_bytes) or not 0 <= padding < (1 if end == gguf.n_bytes else gguf.alignment):
            break
        end = start
    return end


def _array(gguf: gguf_file.Gguf) -> Embedded:
    span = gguf.uint8_array(KEY_STATE)
    if span is None:
        raise IntactKVError(f"the key {KEY_STATE} of {gguf.path} is not an array of uint8: {_AGAIN}")
    return Embedded(_default_name(gguf, span[0]), gguf.path, span[0], span[1] - span[0])


def _said(gguf: gguf_file.Gguf) -> list[tuple[str | None, int, int]]:
    """(name, first byte in the file, bytes) of each, as the keys say. Raises IntactKVError if they are not what write()
    leaves."""
    first = _place(gguf, (KEY_OFFSET, gguf.values.get(KEY_OFFSET)), (KEY_SIZE, gguf.values.get(KEY_SIZE)))
    given = [key for key in (KEY_NAMES, KEY_OFFSETS, KEY_SIZES) if key in gguf.values]
    if not given:
        return [(None, gguf.data + first[0], first[1])]
    names, offsets, sizes = (_list(gguf, key, given[0]) for key in (KEY_NAMES, KEY_OFFSETS, KEY_SIZES))
    if not len(names) == len(offsets) == len(sizes):
        raise IntactKVError(
            f"{gguf.path} names {len(names)} prefixes, with {len(offsets)} offsets and {len(sizes)} sizes: embed them "
            "again"
        )
    pairs = zip(offsets, sizes, strict=True)
    places = [_place(gguf, (KEY_OFFSETS, offset), (KEY_SIZES, size)) for offset, size in pairs]
    for i, name in enumerate(names):
        if not isinstance(name, str) or not is_name(name):
            raise IntactKVError(f"prefix {i} of {gguf.path} is named {name!r}, which is no name: {_AGAIN}")
        if name in names[:i]:
            raise IntactKVError(f"{gguf.path} has two prefixes named {name!r}: {_AGAIN}")
    if places[0] != first:
        raise IntactKVError(
            f"the first prefix of {gguf.path} has {places[0][1]} bytes at offset {places[0][0]} by {KEY_OFFSETS}, and "
            f"{first[1]} at {first[0]} by {KEY_OFFSET}, an old version has embedded another: embed all of them again"
        )
    for (start, n_bytes), (after, _) in pairwise(sorted(places)):
        if start + n_bytes > after:
            raise IntactKVError(
                f"two prefixes of {gguf.path} overlap, one of {n_bytes} bytes at offset {start} and the next at "
                f"{after}: embed the prefixes again"
            )
    return [(name, gguf.data + start, n) for name, (start, n) in zip(names, places, strict=True)]


def _list(gguf: gguf_file.Gguf, key: str, beside: str) -> list[Any]:
    values = gguf.values.get(key)
    if not isinstance(values, list) or not values:
        raise IntactKVError(f"{gguf.path} has the key {beside}, and {key} is no array beside it: {_AGAIN}")
    return values


def _place(gguf: gguf_file.Gguf, *said: tuple[str, object]) -> tuple[int, int]:
    """Offset and size, each given with its key."""
    numbers = []
    for key, number in said:
        if type(number) is not int or number < 0:
            raise IntactKVError(f"the key {key} of {gguf.path} is {number!r}, not a number: {_AGAIN}")
        numbers.append(number)
    return numbers[0], numbers[1]


def _is_there(gguf: gguf_file.Gguf, start: int, n_bytes: int) -> bool:
    """Whether a prefix lies there, behind the tensors, and not something else."""
    begin = struct.pack("<I", state.MAGIC)
    last_tensor = max((tensor.offset for tensor in gguf.tensors), default=0)
    if start + n_bytes > gguf.n_bytes or n_bytes < len(begin + END) or start <= last_tensor:
        return False
    found = gguf_file.read_bytes(gguf.path, start, len(begin))
    return found + gguf_file.read_bytes(gguf.path, start + n_bytes - len(END), len(END)) == begin + END


def _default_name(gguf: gguf_file.Gguf, start: int) -> str:
    return default_name(_n_tokens(gguf_file.read_bytes(gguf.path, start, 12)))


def _n_tokens(prefix: bytes) -> int:
    """As its header says, unverified: magic number, version, number of tokens."""
    return int.from_bytes(prefix[8:12], "little")
