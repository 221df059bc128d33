"""A sequence's state as llama.cpp writes it: the only reader and writer of these bytes in Python.

Little endian (llama_context::state_seq_save_file, llama_kv_cache::state_write, and write_state of native/src/cells).
A *file* of llama_state_seq_save_file begins

    u32 magic 'ggsq', u32 version 3, u32 n_tokens, i32 tokens[n_tokens]

a *buffer* of llama_state_seq_get_data with 8 bytes: u32 magic, i32 sequence. After either comes, per KV cache,

    u32 n_stream = 1, u32 n_cells, per cell { i32 pos, u32 n_seq_id, i32 seq_id[n_seq_id] },
    u32 v_trans, u32 n_layer, its highest bit set where some cells are intact, the next where some stay in sight
    per layer { i32 type, u64 row_bytes, n_cells rows of K }, the same for V of those layers that
        have it (MLA has none); or for a V that is transposed
    per layer { i32 type, u32 value_bytes, u32 n_embd, n_embd rows of n_cells values }
    intact cells, if the bit is set: u32 n, u32 index[n] into the cells, its highest bit set for a cell of the tail,
        per layer { u64 row_bytes, n F16 rows of K; u64 row_bytes, n F16 rows of V }
    cells in sight, if that bit is set: u32 n, u32 index[n] into the cells

Where positions have several dimensions (M-RoPE, IM-RoPE: has_cell_ext) a cell has more between n_seq_id and seq_id:
i32 x, i32 y, its place in a picture, for text both its position; i32 token, -1 if it is of none.

Behind the caches of a model with recurrent layers (llama_memory_recurrent::state_write) stands one state,

    u32 n_cells = 1, i32 pos, the last token's, u32 n_seq_id = 0, u32 s_trans = 0, u32 n_layer of the model
    per recurrent layer { i32 type, u64 bytes, the state of its convolution }, the same for the recurrence's

Nothing read is trusted: every length is compared with what is left.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from intactkv_export.errors import IntactKVError

KV = dict[int, np.ndarray]  # by layer: [n_tokens, n_head_kv, head_dim]
States = dict[int, tuple[np.ndarray, np.ndarray]]  # by recurrent layer: float32 [n_r], [n_s]

MAGIC, VERSION = 0x67677371, 3  # of a file
BUFFER_HEADER = 8
MAX_LAYERS = 4096
INTACT, SIGHT = 0x80000000, 0x40000000  # bits of n_layer
F32, F16 = 0, 1  # ggml_type
NO_TOKEN = -1
SEVERAL_POSITIONS = ("mrope", "imrope")  # types of RoPE of models whose positions have several dimensions
ROPE_SECTIONS = 4  # of these
REMAKE = "make the prefix again with this version of intactkv-export"


@dataclass(frozen=True)
class LayerShape:
    """Rows of a layer: K has n_head_kv * head_dim_k values a token, V n_head_kv * head_dim_v. head_dim_v 0: K's rows
    are latents (MLA), V is a part of them, and a state has no rows of V."""

    il: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int


@dataclass(frozen=True)
class CacheShape:
    """One KV cache of the model; a sliding-window model has a base cache and one with a window."""

    n_swa: int
    swa_type: int  # llama_swa_type: 0 none, 1 standard, 2 chunked, 3 symmetric
    layers: tuple[LayerShape, ...]

    def positions(self, n_tokens: int, n_extra: int = 0) -> list[int]:
        """Which of the positions 0..n_tokens-1 it still holds after them (llama_hparams::is_masked_swa).

        n_extra: cells that stand for no token. They are at the first token's position, and leave a window with it.
        """
        last = n_tokens - 1
        found = [pos for pos in range(n_tokens) if not self._masked(pos, last)]
        return found + [0] * (n_extra if found[0] == 0 else 0)

    def _masked(self, pos: int, last: int) -> bool:
        if self.swa_type == 1:
            return last - pos >= self.n_swa
        if self.swa_type == 2:
            return pos < last // self.n_swa * self.n_swa
        if self.swa_type == 3:
            return last - pos > self.n_swa // 2
        return False


def shapes(model: Mapping[str, Any]) -> list[CacheShape]:
    """The KV caches of a model description (bindings.describe), in the order of the state."""
    names = LayerShape.__dataclass_fields__
    return [
        CacheShape(c["n_swa"], c["swa_type"], tuple(LayerShape(**{n: x[n] for n in names}) for x in c["layers"]))
        for c in model["caches"]
    ]


def has_cell_ext(model: Mapping[str, Any]) -> bool:
    """Whether cells in a state of this model (bindings.describe) say more than a position and sequences."""
    return model["rope"]["type"] in SEVERAL_POSITIONS


@dataclass(frozen=True)
class StateShape:
    """Values of a recurrent layer's state: of its convolution (or token shift), and of the recurrence. 0: none."""

    il: int
    n_r: int
    n_s: int


@dataclass(frozen=True)
class Recurrent:
    """What a model's recurrent layers keep of a sequence. n_layer: of the model. layers: empty: it has none."""

    n_layer: int = 0
    layers: tuple[StateShape, ...] = ()


def recurrent(model: Mapping[str, Any]) -> Recurrent:
    """The recurrent layers of a model description."""
    found = model.get("recurrent")
    if found is None:
        return Recurrent()
    return Recurrent(found["n_layer"], tuple(StateShape(x["il"], x["n_r"], x["n_s"]) for x in found["layers"]))


@dataclass(frozen=True)
class Rows:
    """K or V of one layer in a state. `at`: where its header begins; data: of the rows alone."""

    at: int
    type: int  # ggml_type
    row_bytes: int  # of a cell; of a transposed V n_embd * value_bytes
    transposed: bool
    data: memoryview

    def values(self, n_cells: int) -> np.ndarray:
        """float32 or float16 [n_cells, n_values]. Raises IntactKVError for a quantized type."""
        if self.type not in (F32, F16):
            raise IntactKVError(f"rows of type {self.type} at byte {self.at} of a state are neither F32 nor F16")
        values = np.frombuffer(self.data, "<f4" if self.type == F32 else "<f2")
        return values.reshape(-1, n_cells).T if self.transposed else values.reshape(n_cells, -1)


@dataclass(frozen=True)
class Section:
    """One KV cache in a state. `at` and the like: offsets, for messages. ext: of each cell x, y, token, if it has them.
    intact, in_sight: the bytes that say which cells are such, or None. flags: of n_layer, where it is written."""

    at: int
    n_stream: int
    positions: np.ndarray  # int32 [n_cells]
    cells: list[tuple[int, list[int]]]  # of each cell: where its entry begins, its sequences
    ext: np.ndarray | None  # int32 [n_cells, 3]
    v_trans: int
    n_layer: int
    layers_at: int  # where v_trans stands, and n_layer behind it
    K: list[Rows]
    V: list[Rows]
    intact: memoryview | None
    in_sight: memoryview | None
    end: int

    @property
    def n_cells(self) -> int:
        return len(self.positions)

    @property
    def flags(self) -> int:
        return (0 if self.intact is None else INTACT) | (0 if self.in_sight is None else SIGHT)


class _Reader:
    def __init__(self, data: bytes | memoryview, at: int, end: int) -> None:
        self.data, self.at, self.end = memoryview(data), at, end

    def take(self, n: int, name: str) -> memoryview:
        if n > self.end - self.at:
            raise IntactKVError(
                f"its state ends inside {name}: {n} bytes are needed at byte {self.at} and {self.end - self.at} are "
                f"left: {REMAKE}"
            )
        self.at += n
        return self.data[self.at - n : self.at]

    def get(self, layout: str, name: str) -> int:
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout), name))[0]


def sections(
    data: bytes | memoryview, at: int = BUFFER_HEADER, end: int | None = None, model: Mapping[str, Any] | None = None
) -> Iterator[Section]:
    """The caches of a state, from byte `at` to `end`. Raises IntactKVError where the bytes end too early.

    model: its description (bindings.describe); None: one whose cells say no more than where they are, whose layers all
    have rows of V, and that has no recurrent layers, whose states come behind the caches.
    """
    read = _Reader(data, at, len(data) if end is None else end)
    cell_ext = model is not None and has_cell_ext(model)
    caches = iter(shapes(model) if model is not None else ())
    left = len(model["caches"]) if model is not None and "recurrent" in model else None
    while read.at < read.end and left != 0:
        cache = next(caches, None)
        n_layer_v = MAX_LAYERS if cache is None else sum(x.head_dim_v > 0 for x in cache.layers)
        yield _section(read, cell_ext, n_layer_v)
        left = None if left is None else left - 1


def _section(read: _Reader, cell_ext: bool, n_layer_v: int) -> Section:
    """n_layer_v: how many layers at most have rows of V."""
    start = read.at
    n_stream = read.get("I", "number of streams")
    if n_stream != 1:
        refuse("number of streams", n_stream, start, 1)
    n_cells = read.get("I", "number of cells")
    if n_cells == 0:  # llama.cpp writes nothing more of it
        return Section(start, n_stream, np.empty(0, np.int32), [], None, 0, 0, read.at, [], [], None, None, read.at)
    if 8 * n_cells > read.end - read.at:  # before anything of that size is made
        read.take(8 * n_cells, "the cells")
    positions, cells = np.empty(n_cells, np.int32), []
    ext = np.empty((n_cells, 3), np.int32) if cell_ext else None
    for i in range(n_cells):
        at = read.at
        positions[i] = read.get("i", "position of a cell")
        n_seq = read.get("I", "number of sequences of a cell")
        if ext is not None:
            ext[i] = np.frombuffer(read.take(12, "place and token of a cell"), "<i4")
        cells.append((at, np.frombuffer(read.take(4 * n_seq, "sequence of a cell"), "<i4").tolist()))
    layers_at = read.at
    v_trans = read.get("I", "flag for a transposed V")
    flagged = read.get("I", "number of layers")
    n_layer = flagged & ~(INTACT | SIGHT)
    if n_layer > MAX_LAYERS:
        raise IntactKVError(f"its number of layers is {n_layer} at byte {layers_at + 4}, over {MAX_LAYERS}: {REMAKE}")
    K = [_rows(read, n_cells, False) for _ in range(n_layer)]
    V = [_rows(read, n_cells, bool(v_trans)) for _ in range(min(n_layer, n_layer_v))]
    intact = _intact(read, n_layer) if flagged & INTACT else None
    in_sight = _in_sight(read) if flagged & SIGHT else None
    return Section(start, n_stream, positions, cells, ext, v_trans, n_layer, layers_at, K, V, intact, in_sight, read.at)


def _rows(read: _Reader, n_cells: int, transposed: bool) -> Rows:
    at = read.at
    kind = read.get("i", "type of a layer's rows")
    if transposed:
        row_bytes = read.get("I", "size of a layer's values") * read.get("I", "number of a layer's values")
    else:
        row_bytes = read.get("Q", "row size of a layer")
    return Rows(at, kind, row_bytes, transposed, read.take(n_cells * row_bytes, "the rows of a layer"))


def _intact(read: _Reader, n_layer: int) -> memoryview:
    start = read.at
    n = read.get("I", "number of intact cells")
    read.take(4 * n, "the intact cells")
    for _ in range(2 * n_layer):
        read.take(n * read.get("Q", "row size of an intact layer"), "the intact rows of a layer")
    return read.data[start : read.at]


def _in_sight(read: _Reader) -> memoryview:
    start = read.at
    read.take(4 * read.get("I", "number of cells in sight"), "the cells in sight")
    return read.data[start : read.at]


def read_states(data: bytes | memoryview, at: int, end: int, shape: Recurrent, last: int) -> tuple[States, int]:
    """The recurrent states at byte `at` of a state, views, and where they end. last: the last token's position.

    Raises IntactKVError where they are not what the model's are, or not finite.
    """
    read = _Reader(data, at, end)
    _expect(read, "I", "number of recurrent states", 1)
    _expect(read, "i", "position of the recurrent state", last)
    _expect(read, "I", "number of sequences of the recurrent state", 0)
    _expect(read, "I", "flag for a transposed state", 0)
    _expect(read, "I", "number of layers of the model", shape.n_layer)
    r = {x.il: _state(read, x.il, x.n_r, "convolution's") for x in shape.layers}
    s = {x.il: _state(read, x.il, x.n_s, "recurrent") for x in shape.layers}
    return {il: (r[il], s[il]) for il in r}, read.at


def _state(read: _Reader, il: int, n: int, name: str) -> np.ndarray:
    _expect(read, "i", "type of a layer's state", F32)
    _expect(read, "Q", "size of a layer's state", 4 * n)
    at = read.at
    values = np.frombuffer(read.take(4 * n, "the state of a layer"), "<f4")
    if not np.isfinite(values).all():
        raise IntactKVError(
            f"it has NaN or infinity in the {name} state of layer {il} (at byte {at}), where all values must be "
            "finite: compute it again with the engine in F32"
        )
    return values


def _expect(read: _Reader, layout: str, name: str, wanted: int) -> None:
    at = read.at
    found = read.get(layout, name)
    if found != wanted:
        refuse(name, found, at, wanted)


def refuse(name: str, found: int, at: int, wanted: int) -> NoReturn:
    """Raise the error for a number of a state that is not what it must be."""
    raise IntactKVError(f"its {name} is {found} at byte {at} and must be {wanted}: {REMAKE}")


def rows_by_layer(data: bytes, model: Mapping[str, Any], n_tokens: int) -> tuple[KV, KV]:
    """(K, V) of a buffer, F16 or F32 as the cache was, as float32; rows that a window has left behind are zero.

    model: the description of the model whose context gave the state.
    """
    K: KV = {}
    V: KV = {}
    for cache, section in zip(shapes(model), sections(data, model=model), strict=True):
        for side, found, head_dim in ((K, section.K, "head_dim_k"), (V, section.V, "head_dim_v")):
            for layer in cache.layers:
                side[layer.il] = np.zeros((n_tokens, layer.n_head_kv, getattr(layer, head_dim)), np.float32)
            for layer, rows in zip(_with_rows(cache, head_dim), found, strict=True):
                shape = side[layer.il].shape
                side[layer.il][section.positions] = rows.values(section.n_cells).reshape(-1, *shape[1:])
    return K, V


def _with_rows(cache: CacheShape, head_dim: str) -> list[LayerShape]:
    """The layers of a cache that have rows of this side."""
    return [layer for layer in cache.layers if getattr(layer, head_dim) > 0]


def states_by_layer(data: bytes, model: Mapping[str, Any], n_tokens: int) -> States:
    """The recurrent states of a buffer after n_tokens tokens; {}: the model has no recurrent layer."""
    shape, end = recurrent(model), BUFFER_HEADER
    for section in sections(data, model=model):
        end = section.end
    return read_states(data, end, len(data), shape, n_tokens - 1)[0] if shape.layers else {}


def which_cells(positions: Sequence[int] | np.ndarray, n_tokens: int) -> np.ndarray:
    """Of a prefix's cells in a state, by their positions: int64 [n]. Token i is cell i; those that stand for no token
    are n_tokens and on: in the order of the state, all at position 0 but the first."""
    cells = np.array(positions, np.int64)
    extra = np.flatnonzero(cells == 0)[1:]
    cells[extra] = n_tokens + np.arange(len(extra))
    return cells


def ext_of(tokens: Sequence[int], positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """What a prefix's cells at these positions say besides, where they do: int32 [n, 3] of x, y, token. Text is at the
    same position in all dimensions."""
    at = np.array(positions, np.int32)
    found = np.array([*tokens, NO_TOKEN], np.int32)[np.minimum(which_cells(at, len(tokens)), len(tokens))]
    return np.stack([at, at, found], axis=1)


def without_intact_cells(data: bytes, model: Mapping[str, Any] | None = None) -> bytes:
    """A buffer with its intact cells made ordinary: their copies in the cache's own type are all that is left. model:
    as in sections()."""
    out, end = bytearray(data[:BUFFER_HEADER]), BUFFER_HEADER
    for section in sections(data, model=model):
        end = section.end
        if section.n_cells == 0:
            out += data[section.at : section.end]
            continue
        n_layer_at = section.layers_at + 4
        in_sight = section.in_sight or b""
        rows_end = section.end - len(section.intact or b"") - len(in_sight)
        n_layer = struct.pack("<I", section.n_layer | (section.flags & SIGHT))
        out += data[section.at : n_layer_at] + n_layer + data[n_layer_at + 4 : rows_end] + in_sight
    return bytes(out + data[end:])


def file_header(tokens: Sequence[int]) -> bytes:
    """What a file begins with."""
    return struct.pack(f"<III{len(tokens)}i", MAGIC, VERSION, len(tokens), *tokens)


def f16_section(
    cache: CacheShape,
    tokens: Sequence[int],
    n_extra: int,
    K: Mapping[int, np.ndarray],
    V: Mapping[int, np.ndarray],
    *,
    cell_ext: bool = False,
) -> bytes:
    """A cache's section: the F16 rows of those cells that it still holds, in sequence 0: of the tokens, and behind
    them n_extra cells that stand for none.

    K, V: by layer, float16 [n_tokens + n_extra, n_head_kv, head_dim]. cell_ext: has_cell_ext() of the model. Raises
    IntactKVError for other shapes or types.
    """
    n_tokens = len(tokens)
    positions = cache.positions(n_tokens, n_extra)
    cells = which_cells(positions, n_tokens)
    parts = [struct.pack("<II", 1, len(positions))]
    for pos, (x, y, token) in zip(positions, ext_of(tokens, positions).tolist(), strict=True):
        parts.append(struct.pack("<iIiiii", pos, 1, x, y, token, 0) if cell_ext else struct.pack("<iIi", pos, 1, 0))
    parts.append(struct.pack("<II", 0, len(cache.layers)))
    for name, rows, head_dim in (("K", K, "head_dim_k"), ("V", V, "head_dim_v")):
        for layer in _with_rows(cache, head_dim):
            shape = n_tokens + n_extra, layer.n_head_kv, getattr(layer, head_dim)
            array = rows.get(layer.il)
            if array is None or array.shape != shape or array.dtype != np.float16:
                found = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise IntactKVError(f"{name} of layer {layer.il} is {found} and must be float16 {shape}")
            parts.append(struct.pack("<iQ", F16, 2 * shape[1] * shape[2]))
            parts.append(np.ascontiguousarray(array[cells], "<f2").tobytes())
    return b"".join(parts)


def states_section(shape: Recurrent, n_tokens: int, states: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """What stands behind the caches: the recurrent states after n_tokens tokens. b"": the model has none.

    Raises IntactKVError for other sizes or types than the model's.
    """
    if not shape.layers:
        return b""
    parts = [struct.pack("<IiIII", 1, n_tokens - 1, 0, 0, shape.n_layer)]
    for side, n in ((0, "n_r"), (1, "n_s")):
        for layer in shape.layers:
            wanted = (getattr(layer, n),)
            values = states[layer.il][side] if layer.il in states else None
            if values is None or values.shape != wanted or values.dtype != np.float32:
                found = "missing" if values is None else f"{values.dtype} {values.shape}"
                raise IntactKVError(f"the state {n} of layer {layer.il} is {found} and must be float32 {wanted}")
            parts.append(struct.pack("<iQ", F32, 4 * wanted[0]) + np.ascontiguousarray(values, "<f4").tobytes())
    return b"".join(parts)
