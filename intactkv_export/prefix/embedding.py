"""A prefix file inside a GGUF: its bytes behind the last tensor, found by two keys of the metadata.

    intactkv.state.offset    uint64: bytes from the beginning of the tensor data, as the offsets of tensors are
    intactkv.state.size      uint64: bytes of the prefix file, which is whole (prefix/ikv.py)

Programs that read tensors by their offsets never touch these bytes, and the metadata stays small. A program that
writes the model again and knows nothing of them (a split, a quantization, gguf-py) copies the keys and leaves the
bytes behind: that is found out here. Files of before have them in the metadata, as the uint8 array `intactkv.state`;
they are read, not written. Where both are, the array is the newer one: an old version embedded again.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import state
from intactkv_export.models import gguf_file
from intactkv_export.work import atomic

KEY_STATE = "intactkv.state"
KEY_OFFSET = "intactkv.state.offset"
KEY_SIZE = "intactkv.state.size"
END = b"INTACTKV"  # of a prefix file, which begins with state.MAGIC


@dataclass(frozen=True)
class _Place:
    """Where the bytes are in the file, or should be."""

    start: int
    n_bytes: int


def has(gguf: gguf_file.Gguf) -> bool:
    """Whether a GGUF says that a prefix is embedded in it, be it there or not (lost())."""
    return KEY_STATE in gguf.values or KEY_OFFSET in gguf.values


def lost(gguf: gguf_file.Gguf) -> bool:
    """Whether a GGUF says so, and the bytes are not there."""
    return has(gguf) and KEY_STATE not in gguf.values and _behind(gguf) is None


def data(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the prefix file embedded in a GGUF, unverified. Raises IntactKVError if there is none."""
    gguf = gguf_file.read(gguf_file.first_part(path))
    place = _array(gguf) if KEY_STATE in gguf.values else _behind(gguf)
    if place is None:
        if KEY_OFFSET not in gguf.values:
            raise IntactKVError(
                f"{path} has no prefix embedded: name an .ikv file, or embed one with `intactkv-export embed`"
            )
        said = _said(gguf)
        raise IntactKVError(
            f"the prefix embedded in {gguf.path} is lost: its {said.n_bytes} bytes should begin at byte {said.start} "
            f"of {gguf.n_bytes} and do not, another program has cut or written the file: embed it again with "
            "`intactkv-export embed`, or get the file again"
        )
    return gguf_file.read_bytes(gguf.path, place.start, place.n_bytes)


def write(
    gguf: str | os.PathLike[str],
    out: str | os.PathLike[str],
    changes: dict[str, int | str | None],
    prefix: bytes | None,
) -> None:
    """Write a GGUF with some keys set or removed (gguf_file.copy) and a prefix embedded; one that is there already is
    replaced, or with None removed. Raises IntactKVError."""
    source = gguf_file.read(gguf)
    before = _behind(source) if KEY_OFFSET in source.values else None
    # The old prefix goes if it is what the file ends with, as we leave it; if others have added bytes, theirs stay.
    is_end = before is not None and before.start + before.n_bytes == source.n_bytes
    kept = (before.start if before is not None and is_end else source.n_bytes) - source.data
    kept = max(kept, 0)  # a vocabulary without tensors may end before the data that it does not have
    padding = -kept % source.alignment
    changes = {**changes, KEY_STATE: None, KEY_OFFSET: None, KEY_SIZE: None}
    if prefix is not None:
        changes |= {KEY_OFFSET: gguf_file.Uint64(kept + padding), KEY_SIZE: gguf_file.Uint64(len(prefix))}
    with atomic.output(out) as file:
        gguf_file.copy(gguf, file, changes, kept)
        if prefix is not None:
            file.write(b"\0" * padding)
            file.write(prefix)


def _array(gguf: gguf_file.Gguf) -> _Place:
    span = gguf.uint8_array(KEY_STATE)
    if span is None:
        raise IntactKVError(f"the key {KEY_STATE} of {gguf.path} is not an array of uint8: embed the prefix again")
    return _Place(span[0], span[1] - span[0])


def _said(gguf: gguf_file.Gguf) -> _Place:
    """Where the keys say it is. Raises IntactKVError if they are not what embed() writes."""
    numbers = []
    for key in (KEY_OFFSET, KEY_SIZE):
        number = gguf.values.get(key)
        if type(number) is not int or number < 0:
            raise IntactKVError(f"the key {key} of {gguf.path} is {number!r}, not a number: embed the prefix again")
        numbers.append(number)
    return _Place(gguf.data + numbers[0], numbers[1])


def _behind(gguf: gguf_file.Gguf) -> _Place | None:
    """The bytes behind the tensors, or None: no keys, or at that place is something else."""
    if KEY_OFFSET not in gguf.values:
        return None
    place = _said(gguf)
    begin, end = struct.pack("<I", state.MAGIC), END
    last_tensor = max((tensor.offset for tensor in gguf.tensors), default=0)
    if place.start + place.n_bytes > gguf.n_bytes or place.n_bytes < len(begin + end) or place.start <= last_tensor:
        return None
    found = gguf_file.read_bytes(gguf.path, place.start, len(begin))
    found += gguf_file.read_bytes(gguf.path, place.start + place.n_bytes - len(end), len(end))
    return place if found == begin + end else None
