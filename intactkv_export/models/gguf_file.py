"""GGUF files as far as they are needed here: metadata, the list of tensors, and copies with other metadata.

A copy keeps every other byte: metadata, tensor list and tensor data are not interpreted, so tensor types that are
newer than this code pass through. Format: ggml/include/gguf.h of llama.cpp, versions 2 and 3, little endian. A model
may be split into parts, NAME-00001-of-0000N.gguf to NAME-0000N-of-0000N.gguf; the first has the metadata of all.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

from intactkv_export.errors import IntactKVError

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_UINT8, _UINT32, _STRING, _ARRAY, _UINT64 = 0, 4, 8, 9, 10
_COPY_BLOCK = 1 << 22  # bytes read and written at a time
_SETTLED = 2_000_000_000  # ns; what was written this long ago will not change without a change of its times
_OURS = "intactkv."  # arrays of such keys are decoded in any case: they are short, but for the one of uint8
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


class Uint64(int):
    """A value that copy() writes as uint64; another int is a uint32."""


Value = int | str | Sequence[str] | Sequence[Uint64]  # that copy() writes; a sequence becomes an array


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor list. shape: as in the file, fastest dimension first; offset: in bytes, in the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class Gguf:
    """The header of a GGUF file. `values` decodes scalars, strings, and arrays of our own; others are None unless they
    were asked for.

    data: where the tensor data begins, n_bytes: the size of the file, both in bytes.
    """

    path: Path
    version: int
    alignment: int
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    data: int
    n_bytes: int
    _entries: Mapping[str, tuple[int, int]] = field(repr=False)  # key -> its bytes in the file, [start, end)
    _arrays: Mapping[str, tuple[int, int]] = field(repr=False)  # key of a uint8 array -> its elements, likewise
    _tensor_list: tuple[int, int] = field(repr=False)

    def uint8_array(self, key: str) -> tuple[int, int] | None:
        """Where in the file the elements of a uint8 array are, [start, end); None: the key is none."""
        return self._arrays.get(key)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins with GGUF's magic. False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def read(path: str | os.PathLike[str], arrays: bool = False) -> Gguf:
    """Read the header of a GGUF file; with `arrays`, all arrays are decoded too (token lists take a while).

    Raises IntactKVError if the file cannot be read, is no GGUF, or is damaged.
    """
    global _last
    path = Path(path)
    with _opened(path) as file:
        stat = os.fstat(file.fileno())
        seen = (path, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if not arrays and _last is not None and _last[0] == seen:
            return _last[1]
        with _mapped(file, path) as data:
            header = _Parser(path, data, arrays).gguf()
    if not arrays and time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED:
        _last = seen, header
    return header


# The last header that was read, and its file as it was then: opening a chat asks for the model's five times.
_last: tuple[tuple[object, ...], Gguf] | None = None


def shards(path: str | os.PathLike[str]) -> list[Path]:
    """All files of a model: [path], or every part if `path` is one of them, whichever. Raises IntactKVError if one is
    missing."""
    path = Path(path)
    number, n = part_of(path)
    if n == 0:
        return [path]
    if not 1 <= number <= n:
        raise IntactKVError(f"{path} cannot be part {number} of {n}: give the first part, or rename it as it was")
    files = [part(path, i, n) for i in range(1, n + 1)]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise IntactKVError(f"{path} is one of {len(files)} parts and {missing[0]} is not beside it: get all parts")
    return files


@dataclass(frozen=True)
class LongRope:
    """LongRoPE of a model: contexts of more than n_ctx_orig tokens take the long factors, others the short ones.

    key: of the header, what holds n_ctx_orig. sha256: hex, of the long factors' bytes, as a model description has it.
    """

    key: str
    n_ctx_orig: int
    sha256: str


def longrope(path: str | os.PathLike[str]) -> LongRope | None:
    """None: the model has no LongRoPE factors. Raises IntactKVError as read()."""
    header = read(path)
    for part in (header, *map(read, shards(path)[1:])):
        tensor = next((t for t in part.tensors if t.name == "rope_factors_long.weight"), None)
        if tensor is not None:
            arch = header.values.get("general.architecture")
            key = f"{arch}.rope.scaling.original_context_length"
            n_ctx_orig = header.values.get(key) or header.values.get(f"{arch}.context_length") or 0
            with open(part.path, "rb") as file:
                file.seek(tensor.offset)
                data = file.read(4 * math.prod(tensor.shape))  # float32
            return LongRope(key, int(n_ctx_orig), hashlib.sha256(data).hexdigest())
    return None


def first_part(path: str | os.PathLike[str]) -> Path:
    """The file with a model's metadata: `path`, or the first part if it is another one. Raises IntactKVError if that
    is not there."""
    path = Path(path)
    number, n = part_of(path)
    if number <= 1 or not path.is_file():
        return path
    first = part(path, 1, n)
    if not first.is_file():
        raise IntactKVError(f"{path} is one of {n} parts and {first.name} is not beside it: get all parts")
    return first


def part_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(i, n) of a name that ends in -0000i-of-0000n.gguf, else (0, 0)."""
    match = _PART.fullmatch(Path(path).name)
    return (int(match[2]), int(match[3])) if match else (0, 0)


def part(path: str | os.PathLike[str], number: int, n: int) -> Path:
    """The name of part `number` of `n` of the model that `path` is, or is a part of."""
    path = Path(path)
    match = _PART.fullmatch(path.name)
    ending = match[4] if match else path.suffix
    return path.with_name(f"{whole_name(path)}-{number:05d}-of-{n:05d}{ending}")


def whole_name(path: str | os.PathLike[str]) -> str:
    """NAME of NAME.gguf, or of its part NAME-00001-of-00003.gguf."""
    match = _PART.fullmatch(Path(path).name)
    return match[1] if match else Path(path).stem


def copy(
    source: str | os.PathLike[str], out: IO[bytes], changes: Mapping[str, Value | None], cut: int | None = None
) -> None:
    """Write `source` to `out` with some keys set (int: uint32, or Uint64; str; a sequence: an array) or removed (None).

    Everything else stays byte for byte, also what lies behind the last tensor: up to `cut`, bytes from the beginning of
    the tensor data, None: all of it. Raises IntactKVError if the source is damaged, OSError if writing fails.
    """
    gguf = read(source)
    with _opened(gguf.path) as file, _mapped(file, gguf.path) as data:
        kept = [span for key, span in gguf._entries.items() if key not in changes]
        new = [_entry(key, value) for key, value in changes.items() if value is not None]
        out.write(struct.pack("<4sIqq", MAGIC, gguf.version, len(gguf.tensors), len(kept) + len(new)))
        for start, end in kept:
            out.write(data[start:end])
        for entry in new:
            out.write(entry)
        out.write(data[slice(*gguf._tensor_list)])
        out.write(b"\0" * (-out.tell() % gguf.alignment))
    copy_bytes(gguf.path, out, gguf.data, max(gguf.n_bytes - gguf.data, 0) if cut is None else cut)


def copy_bytes(path: Path, out: IO[bytes], start: int, n: int) -> None:
    """Write n bytes of a file to another, a block at a time. Raises IntactKVError if it cannot be read."""
    with _opened(path) as file:
        file.seek(start)
        while n and (block := file.read(min(n, _COPY_BLOCK))):
            out.write(block)
            n -= len(block)


def read_bytes(path: Path, start: int, n: int) -> bytes:
    """Some bytes of a file. Raises IntactKVError if it cannot be read."""
    with _opened(path) as file:
        file.seek(start)
        return file.read(n)


def _entry(key: str, value: Value) -> bytes:
    name = struct.pack("<Q", len(key.encode())) + key.encode()
    if isinstance(value, int | str):
        kind, raw = _encoded(value)
        return name + struct.pack("<i", kind) + raw
    elements = [_encoded(element) for element in value]
    head = struct.pack("<iiQ", _ARRAY, elements[0][0], len(elements))
    return name + head + b"".join(raw for _, raw in elements)


def _encoded(value: int | str) -> tuple[int, bytes]:
    """Type and bytes of a value that is no array."""
    if isinstance(value, Uint64):
        return _UINT64, struct.pack("<Q", value)
    if isinstance(value, int):
        return _UINT32, struct.pack("<I", value)
    text = value.encode()
    return _STRING, struct.pack("<Q", len(text)) + text


@contextmanager
def _mapped(file: IO[bytes], path: Path) -> Iterator[mmap.mmap]:
    if os.fstat(file.fileno()).st_size == 0:
        raise IntactKVError(f"{path} is empty: get the GGUF file again")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise IntactKVError(f"cannot read {path}: {reason}: check the path") from error


class _Parser:
    def __init__(self, path: Path, data: mmap.mmap, arrays: bool) -> None:
        self.path, self.data, self.arrays, self.at, self.size = path, data, arrays, 0, len(data)
        self.elements: int | None = None  # where those of a uint8 array begin, after value()
        self.decode = arrays  # the arrays of the key at hand

    def gguf(self) -> Gguf:
        if self.take(4) != MAGIC:
            self.refuse(f"it begins with {self.data[:4]!r}, not {MAGIC!r}: give a GGUF file")
        version = self.number("I")
        if version not in (2, 3):
            self.refuse(f"its GGUF version is {version}, 2 and 3 can be read: convert the model again")
        n_tensors, n_kv = self.number("q"), self.number("q")
        values: dict[str, Any] = {}
        entries: dict[str, tuple[int, int]] = {}
        arrays: dict[str, tuple[int, int]] = {}
        for _ in range(n_kv):
            start = self.at
            key = self.string()
            if key in entries:
                self.refuse(f"it has the key {key} twice: get the file again")
            self.decode = self.arrays or key.startswith(_OURS)
            values[key] = self.value(self.number("i"))
            entries[key] = start, self.at
            if self.elements is not None:
                arrays[key] = self.elements, self.at
        start = self.at
        infos = []
        for _ in range(n_tensors):
            name = self.string()
            shape = tuple(self.number("q") for _ in range(self.number("I")))
            infos.append((name, shape, self.number("i"), self.number("Q")))
        end = self.at
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            self.refuse(f"its alignment is {alignment!r}, not a power of two: get the file again")
        data = end + -end % alignment
        if infos and data + max(info[3] for info in infos) > self.size:
            self.refuse(f"its tensors end behind its {self.size} bytes: get the whole file")
        tensors = tuple(Tensor(name, shape, kind, data + offset) for name, shape, kind, offset in infos)
        return Gguf(self.path, version, alignment, values, tensors, data, self.size, entries, arrays, (start, end))

    def value(self, kind: int) -> Any:
        self.elements = None
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            self.refuse(f"a value before byte {self.at} has type {kind}, which GGUF does not have: get the file again")
        kind, n = self.number("i"), self.number("Q")
        if kind == _UINT8:
            self.elements = self.at
            if self.arrays:
                return self.take(n)
            self.skip(n)
            return None
        if kind in _SCALARS:
            layout = f"<{n}{_SCALARS[kind]}" if n <= self.size else ""
            raw = self.take(n * struct.calcsize("<" + _SCALARS[kind]))
            return list(struct.unpack(layout, raw)) if self.decode else None
        if kind != _STRING:
            self.refuse(f"an array before byte {self.at} has elements of type {kind}: get the file again")
        if self.decode:
            return [self.string() for _ in range(n)]
        self.skip_strings(n)
        return None

    def skip_strings(self, n: int) -> None:
        """Token lists have hundreds of thousands: no calls of ours for each."""
        length, at, last = struct.Struct("<Q").unpack_from, self.at, self.size - 8
        for _ in range(n):
            if at > last:
                break
            at += 8 + length(self.data, at)[0]
        else:
            if at <= self.size:
                self.at = at
                return
        for _ in range(n):  # cut off: this says where
            self.skip(self.number("Q"))

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def number(self, layout: str) -> Any:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0]

    def take(self, n: int) -> bytes:
        start = self.at
        self.skip(n)
        return self.data[start : self.at]

    def skip(self, n: int) -> None:
        if n > self.size - self.at:
            left = self.size - self.at
            self.refuse(f"{n} bytes are needed at byte {self.at} and {left} are left: get the whole file")
        self.at += n

    def refuse(self, why: str) -> NoReturn:
        raise IntactKVError(f"{self.path} is not a whole GGUF file: {why}")
