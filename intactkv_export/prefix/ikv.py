"""Prefix files (`.ikv`): build, read, find, and embed in a GGUF. docs/reference/format.md has the bytes.

    a llama.cpp sequence-state file with F16 rows    libllama/state.py; stock llama_state_seq_load_file loads it
    manifest, UTF-8 JSON                             manifest.py
    u64 manifest length, SHA-256 of all bytes before that length, 8 bytes "INTACTKV"

Of the state's freedoms a prefix file uses none: sequence 0, F16 rows, V not transposed, no intact cells marked. K rows
are after RoPE. In a GGUF the whole file lies behind the tensors: embedding.py.

Extra cells stand for no token (virtual tokens, as others call them): K and V that were trained, behind those of the
tokens. They are all at the first token's position, 0, so whoever loads the state goes on right behind the tokens.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import state
from intactkv_export.models import KEY_REFERENCE, check_same_reference, gguf_file
from intactkv_export.prefix import embedding, outputs
from intactkv_export.prefix import manifest as manifests
from intactkv_export.work import atomic

KEY_FORMAT = "intactkv.format"
KEY_FILE_TYPE = "general.file_type"  # llama.cpp's own: how a GGUF is quantized, a number of its enum llama_ftype

_TRAILER_MAGIC = embedding.END
_TRAILER = struct.Struct("<Q32s8s")
_DOWNLOAD = "get it again"


@dataclass(frozen=True)
class Layer:
    """K and V of a layer: float16 [len(positions), n_head_kv, head_dim_k or head_dim_v].

    positions: of the cells that are kept; in files made here the tokens' come first, ascending. A sliding window keeps
    the last ones. cells: which they are: token i is cell i, and extra cells are counted behind all tokens.
    """

    il: int
    positions: np.ndarray
    cells: np.ndarray
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

    @property
    def n_extra(self) -> int:
        """Extra cells: those that stand for no token."""
        return manifests.n_extra(self.manifest)

    @property
    def n_cells(self) -> int:
        """Cells that it takes in a KV cache: a token each, and the extra ones."""
        return len(self.tokens) + self.n_extra

    @property
    def contents(self) -> str:
        """For messages: how many tokens, and extra cells if there are some."""
        n, n_extra = len(self.tokens), self.n_extra
        extra = f" and {n_extra} extra cell{'' if n_extra == 1 else 's'}" if n_extra else ""
        return f"{n} token{'' if n == 1 else 's'}{extra}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a conversation begins with so that its tokens begin with the prefix.

        Empty for a prefix of the first token only, which every conversation begins with, and where the prefix is the
        system prompt that the model's chat template writes itself.
        """
        return [dict(message) for message in self.manifest["messages"] or []]


def build(
    model: Mapping[str, Any],
    tokens: Sequence[int],
    K: Mapping[int, np.ndarray],
    V: Mapping[int, np.ndarray],
    manifest: Mapping[str, Any],
) -> bytes:
    """The bytes of a prefix file.

    model: the description of the model (bindings.describe). K, V: {layer: float16 [n_cells, n_head_kv, head_dim]},
    K after RoPE in llama.cpp's layout: of the tokens in order, and behind them of the extra cells, as at position 0;
    rows that a sliding window has left behind are not stored. manifest: its other fields, extra_cells among them if
    there are some; format, tokens and model are filled in. Raises IntactKVError if anything does not fit or is not
    finite.
    """
    text = manifests.encode({"format": manifests.FORMAT, "tokens": list(tokens), "model": dict(model), **manifest})
    n_extra = manifests.n_extra(manifest)
    caches = (state.f16_section(cache, len(tokens), n_extra, K, V) for cache in state.shapes(model))
    body = b"".join([state.file_header(tokens), *caches, text])
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
    path = gguf_file.first_part(source)
    embedded = gguf_file.is_gguf(path)
    data = embedding.data(path) if embedded else _file_bytes(path)
    try:
        return _parse(data, path, embedded)
    except IntactKVError as error:
        raise IntactKVError(f"{path}: {error}") from error


def find(model_path: str | os.PathLike[str]) -> Path | None:
    """Where the prefix of a model is: embedded in the GGUF, or the file convert put beside it, or None.

    Beside NAME.gguf, or its parts NAME-00001-of-00003.gguf, that is NAME.ikv; beside NAME-TYPE.gguf also NAME.ikv, if
    made from the same reference. A GGUF whose embedded prefix was lost is the last to be named: read() says why.
    """
    path = gguf_file.first_part(model_path)
    header = gguf_file.read(path)
    embedded = embedding.has(header)
    if embedded and not embedding.lost(header):
        return path
    whole = gguf_file.whole_name(path)
    for own in dict.fromkeys((path.with_suffix(".ikv"), path.with_name(f"{whole}.ikv"))):
        if own.is_file():
            return own
    name, dash, _ = whole.rpartition("-")
    shared = path.with_name(f"{name}.ikv")
    if dash and shared.is_file():
        if read(shared).manifest["reference"]["sha256"] == header.values.get(KEY_REFERENCE):
            return shared
    return path if embedded else None


def of_model(model: str | os.PathLike[str], given: str | os.PathLike[str] | None = None) -> Prefix:
    """The prefix of a model: the one given, or else where find() finds it. Raises UsageError if there is none."""
    path = find(model) if given is None else Path(given)
    if path is None:
        raise UsageError(
            f"{model} has no prefix, neither embedded nor beside it: make one with `intactkv-export prefix`, or name "
            "one with --prefix"
        )
    return read(path)


def load(path: str | os.PathLike[str]) -> Prefix:
    """A prefix from an `.ikv`, a GGUF with one embedded, or a GGUF beside its `.ikv`. Raises IntactKVError."""
    return read((find(path) if gguf_file.is_gguf(path) else None) or path)


def check_reference(prefix: Prefix, sha256: str | None, name: str) -> None:
    """Raises IntactKVError if what `name` says belongs to another reference model than the prefix; None passes."""
    own = f"the prefix {prefix.source}" if prefix.source else "the prefix"
    check_same_reference(own, prefix.manifest["reference"]["sha256"], name, sha256)


def calibrated_for_another(prefix: Prefix, file_type: int | str | None) -> str | None:
    """The model that a prefix was calibrated for, if its file type (general.file_type) is not this one."""
    about = (prefix.manifest["calibrated"] or {}).get("model")
    if not isinstance(about, dict):
        return None
    wanted = about.get("file_type")
    return str(about.get("name")) if None not in (wanted, file_type) and str(wanted) != str(file_type) else None


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write the bytes of a prefix file: whole, or not at all. Raises UsageError if another kind of file is there,
    IntactKVError if it cannot be written."""
    outputs.check_prefix_file(path)
    with atomic.output(path) as file:
        file.write(data)


def embed(gguf: str | os.PathLike[str], prefix: Prefix, out: str | os.PathLike[str] | None = None) -> Path:
    """Store a prefix in a GGUF, replacing one that is there; everything else of the GGUF stays byte for byte.

    out: where to write; None: the GGUF itself. Of a model in parts the first gets it; with `out`, NAME or the name of a
    part, the others are copied to NAME-0000i-of-0000n.gguf too. Returns the file that has it. Raises UsageError if
    another model is there, IntactKVError if the GGUF was made from another reference, is damaged, or cannot be written.
    """
    source = gguf_file.first_part(gguf)
    ours = prefix.manifest["reference"]["sha256"]
    check_reference(prefix, gguf_file.read(source).values.get(KEY_REFERENCE), str(gguf))
    targets = {source: source} if out is None else outputs.of_parts(source, out)
    for part, target in targets.items():
        outputs.check_gguf(target, part)
    for part, target in reversed(targets.items()):
        if part == source:
            embedding.write(source, target, {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: ours}, prefix.data)
        elif not outputs.same_file(part, target):
            with atomic.output(target) as file:
                gguf_file.copy(part, file, {})
    return targets[source]


def embed_file(gguf: Path, prefix: Path, out: Path) -> None:
    """As embed(), of a prefix file: a stage of its own."""
    embed(gguf, read(prefix), out)


def extract(gguf: str | os.PathLike[str], out: str | os.PathLike[str]) -> Prefix:
    """Write the prefix embedded in a GGUF to a file of its own, verified. Raises IntactKVError."""
    prefix = _parse(embedding.data(gguf), Path(gguf), True)
    write(out, prefix.data)
    return prefix


def stamp(gguf: str | os.PathLike[str], reference_sha256: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Note in a GGUF which reference it was quantized from; a prefix embedded before is removed."""
    path = Path(gguf if out is None else out)
    embedding.write(gguf, path, {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: reference_sha256}, None)
    return path


def rewrite(
    gguf: str | os.PathLike[str],
    changes: Mapping[str, int | str | None],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a GGUF again with some keys set or removed (None): to `out`, or in its own place. A prefix stays in it."""
    path = Path(gguf if out is None else out)
    with atomic.output(path) as file:
        gguf_file.copy(gguf, file, changes)
    return path


def _file_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntactKVError(f"cannot read {path}: {os.strerror(error.errno or 0)}: check the path") from error
    if not data:
        raise IntactKVError(f"{path} is empty: {_DOWNLOAD}")
    if data[:4] != struct.pack("<I", state.MAGIC):
        raise IntactKVError(
            f"{path} is neither a prefix file nor a GGUF: it begins with the bytes {data[:4].hex()}: check the path"
        )
    return data


def _parse(data: bytes, source: Path | None, embedded: bool) -> Prefix:
    body, text, sha256 = _check_trailer(data)
    manifest = manifests.decode(text)
    tokens: list[int] = manifest["tokens"]
    start = _check_header(data, len(body), tokens)
    layers: list[Layer] = []
    end = start
    found = state.sections(data, start, len(body))
    for cache in manifests.caches(manifest):
        section = next(found, None)
        if section is None:
            raise IntactKVError(f"its state ends at byte {end}, before its last KV cache: {state.REMAKE}")
        layers += _checked_layers(section, cache, len(tokens), manifests.n_extra(manifest))
        end = section.end
    if end != len(body):
        raise IntactKVError(f"its state ends at byte {end} and its manifest begins at {len(body)}: {state.REMAKE}")
    layers.sort(key=lambda layer: layer.il)
    return Prefix(tokens, manifest, layers, sha256, source, embedded, data)


def _check_trailer(data: bytes) -> tuple[memoryview, bytes, str]:
    """(state, manifest, SHA-256 of the whole file), after the checksum was found right."""
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
    actual.update(memoryview(data)[size:])  # what was hashed already is not hashed again
    return body[: size - length], bytes(body[size - length :]), actual.hexdigest()


def _check_header(data: bytes, end: int, tokens: Sequence[int]) -> int:
    """Compare what a state file begins with; returns where the first cache begins."""
    wanted = state.file_header(tokens)
    if end < len(wanted):
        raise IntactKVError(
            f"its state has {end} bytes, the tokens of its manifest alone need {len(wanted)}: {state.REMAKE}"
        )
    names = ("magic number", "state version", "n_tokens")
    found, expected = np.frombuffer(data, "<i4", len(wanted) // 4), np.frombuffer(wanted, "<i4")
    for i in np.flatnonzero(found != expected)[:1].tolist():
        state.refuse(names[i] if i < 3 else "token", int(found[i]), 4 * i, int(expected[i]))
    return len(wanted)


def _checked_layers(section: state.Section, cache: state.CacheShape, n_tokens: int, n_extra: int) -> list[Layer]:
    """A cache's layers, after everything in its section was found to be as the manifest says."""
    expected = cache.positions(n_tokens, n_extra)
    if section.n_cells != len(expected):
        state.refuse("number of cells", section.n_cells, section.at + 4, len(expected))
    missing = Counter(expected)
    for i, (pos, (at, sequences)) in enumerate(zip(section.positions.tolist(), section.cells, strict=True)):
        if not missing[pos]:
            of_extra = f" and {n_extra} extra cells" if n_extra else ""
            raise IntactKVError(
                f"its cell {i} has position {pos} at byte {at}, which is given too often or not among the "
                f"{len(expected)} that a prefix of {n_tokens} tokens{of_extra} has in this cache: {state.REMAKE}"
            )
        missing[pos] -= 1
        if sequences != [0]:
            raise IntactKVError(
                f"its cell {i} at byte {at} is of the sequences {sequences} and must be of 0: {state.REMAKE}"
            )
    if section.v_trans:
        state.refuse("flag for a transposed V", section.v_trans, section.layers_at, 0)
    if section.n_layer != len(cache.layers) or section.intact is not None:
        flagged = section.n_layer | (state.INTACT if section.intact is not None else 0)
        state.refuse("number of layers", flagged, section.layers_at + 4, len(cache.layers))
    cells, layers = state.which_cells(section.positions, n_tokens), []
    for x, k, v in zip(cache.layers, section.K, section.V, strict=True):
        K = _finite(cells, n_tokens, k, f"K of layer {x.il}", x.n_head_kv, x.head_dim_k)
        V = _finite(cells, n_tokens, v, f"V of layer {x.il}", x.n_head_kv, x.head_dim_v)
        layers.append(Layer(x.il, section.positions, cells, K, V))
    return layers


def _finite(cells: np.ndarray, n_tokens: int, rows: state.Rows, name: str, n_head_kv: int, head_dim: int) -> np.ndarray:
    """K or V of a layer, float16 [n_cells, n_head_kv, head_dim]."""
    if rows.type != state.F16:
        state.refuse("type of a layer's rows", rows.type, rows.at, state.F16)
    if rows.row_bytes != 2 * n_head_kv * head_dim:
        state.refuse("row size of a layer", rows.row_bytes, rows.at + 4, 2 * n_head_kv * head_dim)
    values = np.frombuffer(rows.data, "<f2").reshape(len(cells), n_head_kv, head_dim)
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        cell = int(cells[np.argmin(finite)])
        which = f"token {cell}" if cell < n_tokens else f"extra cell {cell - n_tokens}"
        raise IntactKVError(
            f"it has NaN or infinity in {name}, {which}, where all values must be finite: compute it again with the "
            "engine in F32"
        )
    return values
