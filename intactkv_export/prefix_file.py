"""Prefix files (`.ikv`): build, read, find, and embed in a GGUF. The only Python module that knows the bytes.

    a llama.cpp sequence-state file with F16 rows    what llama_state_seq_load_file of stock llama.cpp loads
    manifest, UTF-8 JSON                             manifest.py
    u64 manifest length, SHA-256 of all bytes before that length, 8 bytes "INTACTKV"

The state, little endian (llama_context::state_seq_save_file, llama_kv_cache::state_write of llama.cpp):

    u32 magic 'ggsq', u32 version 3, u32 n_tokens, i32 tokens[n_tokens]
    per KV cache:  u32 n_stream = 1, u32 n_cells, per cell { i32 pos, u32 n_seq_id = 1, i32 seq_id = 0 },
                   u32 v_trans = 0, u32 n_layer,
                   per layer { i32 type = F16, u64 row_bytes, n_cells rows of K }, the same for V

K rows are after RoPE. In a GGUF the whole file is the uint8 array `intactkv.state`.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export import atomic, gguf_file
from intactkv_export import manifest as manifests
from intactkv_export.errors import IntactKVError
from intactkv_export.manifest import CacheShape

KEY_FORMAT = "intactkv.format"
KEY_REFERENCE = "intactkv.reference.sha256"
KEY_STATE = "intactkv.state"
KEY_FILE_TYPE = "general.file_type"  # llama.cpp's own: how a GGUF is quantized, a number of its enum llama_ftype

_STATE_MAGIC, _STATE_VERSION, _F16 = 0x67677371, 3, 1
_TRAILER_MAGIC = b"INTACTKV"
_TRAILER = struct.Struct("<Q32s8s")
_REMAKE = "make the prefix again with this version of intactkv-export"
_DOWNLOAD = "get it again"


@dataclass(frozen=True)
class Layer:
    """K and V of a layer: float16 [len(positions), n_head_kv, head_dim_k or head_dim_v].

    positions: of the tokens whose rows are kept, ascending in files made here; a sliding window keeps the last ones.
    """

    il: int
    positions: np.ndarray
    K: np.ndarray
    V: np.ndarray


@dataclass(frozen=True)
class Prefix:
    """A prefix file that was read and verified. `layers` are views into `data`, ascending by il."""

    tokens: list[int]
    manifest: dict[str, Any]
    layers: list[Layer]
    sha256: str
    source: Path | None  # None: read from bytes
    embedded: bool  # source is a GGUF
    data: bytes = field(repr=False)


def build(
    model: Mapping[str, Any],
    tokens: Sequence[int],
    K: Mapping[int, np.ndarray],
    V: Mapping[int, np.ndarray],
    manifest: Mapping[str, Any],
) -> bytes:
    """The bytes of a prefix file.

    model: the description of the model (bindings.describe). K, V: {layer: float16 [n_tokens, n_head_kv, head_dim]},
    K after RoPE in llama.cpp's layout; rows that a sliding window has left behind are not stored. manifest: its other
    fields; format, tokens and model are filled in. Raises IntactKVError if anything does not fit or is not finite.
    """
    text = manifests.encode({"format": manifests.FORMAT, "tokens": list(tokens), "model": dict(model), **manifest})
    parts = [struct.pack(f"<III{len(tokens)}i", _STATE_MAGIC, _STATE_VERSION, len(tokens), *tokens)]
    for cache in manifests.shapes(model):
        parts += _cache_bytes(cache, len(tokens), K, V)
    body = b"".join([*parts, text])
    data = body + _TRAILER.pack(len(text), hashlib.sha256(body).digest(), _TRAILER_MAGIC)
    read(data)  # what is written can be read: finite, complete, and as the manifest says
    return data


def read(source: str | os.PathLike[str] | bytes) -> Prefix:
    """Read and verify a prefix: an `.ikv` file, a GGUF with one embedded, or the bytes of an `.ikv`.

    Checksum, manifest, structure and finite values are checked; nothing in the file is trusted before. Whether it
    fits a model is for bindings.verify. Raises IntactKVError, one sentence.
    """
    if isinstance(source, bytes):
        return _parse(source, None, False)
    path = Path(source)
    embedded = gguf_file.is_gguf(path)
    data = _embedded_bytes(path) if embedded else _file_bytes(path)
    try:
        return _parse(data, path, embedded)
    except IntactKVError as error:
        raise IntactKVError(f"{path}: {error}") from error


def find(model_path: str | os.PathLike[str]) -> Path | None:
    """Where the prefix of a model is: embedded in the GGUF, or the file convert put beside it, or None.

    Beside NAME.gguf that is NAME.ikv; beside NAME-TYPE.gguf also NAME.ikv, if made from the same reference.
    """
    path = Path(model_path)
    values = gguf_file.read(path).values
    if KEY_STATE in values:
        return path
    own = path.with_suffix(".ikv")
    if own.is_file():
        return own
    name, dash, _ = path.stem.rpartition("-")
    shared = path.with_name(f"{name}.ikv")
    if dash and shared.is_file() and read(shared).manifest["reference"]["sha256"] == values.get(KEY_REFERENCE):
        return shared
    return None


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write the bytes of a prefix file: whole, or not at all. Raises IntactKVError."""
    with atomic.output(path) as file:
        file.write(data)


def embed(gguf: str | os.PathLike[str], prefix: Prefix, out: str | os.PathLike[str] | None = None) -> Path:
    """Store a prefix in a GGUF, replacing one that is there; everything else of the GGUF stays byte for byte.

    out: where to write; None: the GGUF itself. Returns it. Raises IntactKVError if the GGUF was made from another
    reference, is damaged, or cannot be written.
    """
    ours, theirs = prefix.manifest["reference"]["sha256"], gguf_file.read(gguf).values.get(KEY_REFERENCE)
    if theirs not in (None, ours):
        raise IntactKVError(
            f"the prefix was computed from the reference model {ours} and {gguf} was quantized from {theirs}: "
            "make a prefix from that model's reference"
        )
    return rewrite(gguf, {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: ours, KEY_STATE: prefix.data}, out)


def extract(gguf: str | os.PathLike[str], out: str | os.PathLike[str]) -> Prefix:
    """Write the prefix embedded in a GGUF to a file of its own, verified. Raises IntactKVError."""
    prefix = _parse(_embedded_bytes(Path(gguf)), Path(gguf), True)
    write(out, prefix.data)
    return prefix


def stamp(gguf: str | os.PathLike[str], reference_sha256: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Note in a GGUF which reference it was quantized from; a prefix embedded before is removed."""
    return rewrite(gguf, {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: reference_sha256, KEY_STATE: None}, out)


def rewrite(
    gguf: str | os.PathLike[str],
    changes: Mapping[str, int | str | bytes | None],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a GGUF again with some keys set or removed (None): to `out`, or in its own place."""
    path = Path(gguf if out is None else out)
    with atomic.output(path) as file:
        gguf_file.copy(gguf, file, changes)
    return path


def _cache_bytes(
    cache: CacheShape, n_tokens: int, K: Mapping[int, np.ndarray], V: Mapping[int, np.ndarray]
) -> list[bytes]:
    positions = cache.positions(n_tokens)
    parts = [struct.pack("<II", 1, len(positions))]
    parts += [struct.pack("<iIi", pos, 1, 0) for pos in positions]
    parts.append(struct.pack("<II", 0, len(cache.layers)))
    for name, rows, head_dim in (("K", K, "head_dim_k"), ("V", V, "head_dim_v")):
        for layer in cache.layers:
            shape = n_tokens, layer.n_head_kv, getattr(layer, head_dim)
            array = rows.get(layer.il)
            if array is None or array.shape != shape or array.dtype != np.float16:
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise IntactKVError(f"{name} of layer {layer.il} is {found} and must be float16 {shape}")
            parts.append(struct.pack("<iQ", _F16, 2 * shape[1] * shape[2]))
            parts.append(np.ascontiguousarray(array[positions], "<f2").tobytes())
    return parts


def _file_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntactKVError(f"cannot read {path}: {os.strerror(error.errno or 0)}: check the path") from error
    if not data:
        raise IntactKVError(f"{path} is empty: {_DOWNLOAD}")
    if data[:4] != struct.pack("<I", _STATE_MAGIC):
        raise IntactKVError(
            f"{path} is neither a prefix file nor a GGUF: it begins with the bytes {data[:4].hex()}: check the path"
        )
    return data


def _embedded_bytes(path: Path) -> bytes:
    values = gguf_file.read(path).values
    if KEY_STATE not in values:
        raise IntactKVError(
            f"{path} has no prefix embedded: name an .ikv file, or embed one with `intactkv-export embed`"
        )
    data = values[KEY_STATE]
    if not isinstance(data, bytes):
        raise IntactKVError(f"the key {KEY_STATE} of {path} is not an array of uint8: embed the prefix again")
    return data


def _parse(data: bytes, source: Path | None, embedded: bool) -> Prefix:
    body, text = _check_trailer(data)
    manifest = manifests.decode(text)
    tokens: list[int] = manifest["tokens"]
    state = _State(data, len(body))
    for value, name in ((_STATE_MAGIC, "magic number"), (_STATE_VERSION, "state version"), (len(tokens), "n_tokens")):
        state.expect("I", value, name)
    for token in tokens:
        state.expect("i", token, "token")
    layers: list[Layer] = []
    for cache in manifests.caches(manifest):
        layers += _read_cache(state, cache, len(tokens))
    if state.at != state.end:
        raise IntactKVError(f"its state ends at byte {state.at} and its manifest begins at {state.end}: {_REMAKE}")
    layers.sort(key=lambda layer: layer.il)
    return Prefix(tokens, manifest, layers, hashlib.sha256(data).hexdigest(), source, embedded, data)


def _check_trailer(data: bytes) -> tuple[memoryview, bytes]:
    """(state, manifest), after the checksum was found right."""
    size = len(data) - _TRAILER.size
    if size < 0:
        raise IntactKVError(f"the prefix file has {len(data)} bytes and its trailer alone {_TRAILER.size}: {_DOWNLOAD}")
    length, checksum, magic = _TRAILER.unpack_from(data, size)
    if magic != _TRAILER_MAGIC:
        raise IntactKVError(
            f"the prefix file ends in {magic.hex()}, not {_TRAILER_MAGIC.hex()} (INTACTKV), so it is cut off or no "
            f"prefix file: {_DOWNLOAD}"
        )
    if length > size:
        raise IntactKVError(f"its manifest should have {length} bytes and only {size} are before it: {_DOWNLOAD}")
    body = memoryview(data)[:size]
    actual = hashlib.sha256(body)
    if actual.digest() != checksum:
        raise IntactKVError(
            f"the prefix file is damaged: its bytes have the SHA-256 {actual.hexdigest()} and byte {size + 8} says "
            f"{checksum.hex()}: {_DOWNLOAD}"
        )
    return body[: size - length], bytes(body[size - length :])


class _State:
    """Reads the state of a file forwards; every read is checked against where the manifest begins."""

    def __init__(self, data: bytes, end: int) -> None:
        self.data, self.end, self.at = data, end, 0

    def take(self, n: int, name: str) -> int:
        """Skip n bytes and return where they begin."""
        if n > self.end - self.at:
            raise IntactKVError(
                f"its state ends inside {name}: {n} bytes are needed at byte {self.at} and {self.end - self.at} are "
                f"left: {_REMAKE}"
            )
        self.at += n
        return self.at - n

    def get(self, layout: str, name: str) -> int:
        return struct.unpack_from("<" + layout, self.data, self.take(struct.calcsize("<" + layout), name))[0]

    def expect(self, layout: str, value: int, name: str) -> None:
        at = self.at
        found = self.get(layout, name)
        if found != value:
            raise IntactKVError(f"its {name} is {found} at byte {at} and must be {value}: {_REMAKE}")


def _read_cache(state: _State, cache: CacheShape, n_tokens: int) -> list[Layer]:
    missing = set(cache.positions(n_tokens))
    n_cells = len(missing)
    state.expect("I", 1, "number of streams")
    state.expect("I", n_cells, "number of cells")
    positions = np.empty(n_cells, np.int32)
    for i in range(n_cells):
        at = state.at
        positions[i] = pos = state.get("i", "position of a cell")
        if pos not in missing:
            raise IntactKVError(
                f"its cell {i} has position {pos} at byte {at}, which is given twice or not among the {n_cells} that a "
                f"prefix of {n_tokens} tokens has in this cache: {_REMAKE}"
            )
        missing.remove(pos)
        state.expect("I", 1, "number of sequences of a cell")
        state.expect("i", 0, "sequence of a cell")
    state.expect("I", 0, "flag for a transposed V")
    state.expect("I", len(cache.layers), "number of layers")
    K = [_read_rows(state, "K", x.il, positions, x.n_head_kv, x.head_dim_k) for x in cache.layers]
    V = [_read_rows(state, "V", x.il, positions, x.n_head_kv, x.head_dim_v) for x in cache.layers]
    return [Layer(x.il, positions, k, v) for x, k, v in zip(cache.layers, K, V, strict=True)]


def _read_rows(state: _State, name: str, il: int, positions: np.ndarray, n_head_kv: int, head_dim: int) -> np.ndarray:
    state.expect("i", _F16, "type of a layer's rows")
    state.expect("Q", 2 * n_head_kv * head_dim, "row size of a layer")
    n = len(positions) * n_head_kv * head_dim
    at = state.take(2 * n, "the rows of a layer")
    rows = np.frombuffer(state.data, "<f2", n, at).reshape(len(positions), n_head_kv, head_dim)
    finite = np.isfinite(rows).all(axis=(1, 2))
    if not finite.all():
        token = int(positions[np.argmin(finite)])
        raise IntactKVError(
            f"it has NaN or infinity in {name} of layer {il}, token {token}, where all values must be finite: compute "
            "it again with the engine in F32"
        )
    return rows
