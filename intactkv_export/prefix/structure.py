"""The parts of a prefix file, each checked: trailer, header, layers. Nothing in a file is trusted before."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import state
from intactkv_export.prefix import embedding

DOWNLOAD = "get it again"
_TRAILER_MAGIC = embedding.END
_TRAILER = struct.Struct("<Q32s8s")


@dataclass(frozen=True)
class Layer:
    """K and V of a layer: float16 [len(positions), n_head_kv, head_dim_k or head_dim_v]; of latents V has no values.

    positions: of the cells that are kept; in files made here the tokens' come first, ascending. A sliding window keeps
    the last ones. cells: which they are: token i is cell i, and extra cells are counted behind all tokens.
    """

    il: int
    positions: np.ndarray
    cells: np.ndarray
    K: np.ndarray
    V: np.ndarray


def trailer(body: bytes, n_manifest: int) -> bytes:
    """What follows the state and the manifest, `body`; n_manifest: bytes of the manifest."""
    return _TRAILER.pack(n_manifest, hashlib.sha256(body).digest(), _TRAILER_MAGIC)


def check_trailer(data: bytes) -> tuple[memoryview, bytes, str]:
    """(state, manifest, SHA-256 of the whole file), after the checksum was found right."""
    size = len(data) - _TRAILER.size
    if size < 0:
        raise IntactKVError(f"the prefix file has {len(data)} bytes and its trailer alone {_TRAILER.size}: {DOWNLOAD}")
    length, checksum, magic = _TRAILER.unpack_from(data, size)
    if magic != _TRAILER_MAGIC:
        raise IntactKVError(
            f"the prefix file ends in {magic.hex()}, not {_TRAILER_MAGIC.hex()} (INTACTKV), so it is cut off or no "
            f"prefix file: {DOWNLOAD}"
        )
    if length > size:
        raise IntactKVError(f"its manifest should have {length} bytes and only {size} are before it: {DOWNLOAD}")
    body = memoryview(data)[:size]
    actual = hashlib.sha256(body)
    if actual.digest() != checksum:
        raise IntactKVError(
            f"the prefix file is damaged: its bytes have the SHA-256 {actual.hexdigest()} and byte {size + 8} says "
            f"{checksum.hex()}: {DOWNLOAD}"
        )
    actual.update(memoryview(data)[size:])  # what was hashed already is not hashed again
    return body[: size - length], bytes(body[size - length :]), actual.hexdigest()


def check_header(data: bytes, end: int, tokens: Sequence[int]) -> int:
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


def checked_layers(section: state.Section, cache: state.CacheShape, tokens: Sequence[int], n_extra: int) -> list[Layer]:
    """A cache's layers, after everything in its section was found to be as the manifest says."""
    n_tokens = len(tokens)
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
    if section.ext is not None:
        _check_ext(section, section.ext, tokens)
    if section.v_trans:
        state.refuse("flag for a transposed V", section.v_trans, section.layers_at, 0)
    if section.n_layer != len(cache.layers) or section.flags:
        flagged = section.n_layer | section.flags
        state.refuse("number of layers", flagged, section.layers_at + 4, len(cache.layers))
    cells, layers, values = state.which_cells(section.positions, n_tokens), [], iter(section.V)
    for x, k in zip(cache.layers, section.K, strict=True):
        K = _finite(cells, n_tokens, k, f"K of layer {x.il}", x.n_head_kv, x.head_dim_k)
        V = np.empty((len(cells), x.n_head_kv, 0), np.float16)
        if x.head_dim_v > 0:
            V = _finite(cells, n_tokens, next(values), f"V of layer {x.il}", x.n_head_kv, x.head_dim_v)
        layers.append(Layer(x.il, section.positions, cells, K, V))
    return layers


def _check_ext(section: state.Section, ext: np.ndarray, tokens: Sequence[int]) -> None:
    wanted = state.ext_of(tokens, section.positions)
    for i, j in np.argwhere(ext != wanted)[:1].tolist():
        name = ("x of a cell", "y of a cell", "token of a cell")[j]
        state.refuse(name, int(ext[i, j]), section.cells[i][0] + 8 + 4 * j, int(wanted[i, j]))


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
