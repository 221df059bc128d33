"""Models whose positions have several dimensions (M-RoPE, IM-RoPE): a prefix of text, and pictures behind it.

A picture comes as a batch of embeddings with a position in each dimension, as mtmd makes it: such a batch is computed
as usual. A token of text is at the same position in all of them.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, sequence_state, state
from intactkv_export.prefix import ikv, structure
from tests.support import extra_cells, lowlevel, own_process, tiny_ggufs
from tests.support.automatic import context as automatic_context
from tests.support.in_sight import ORIGIN
from tests.support.lowlevel import Context, L

# in pairs of values that RoPE turns: half of a head of 64 values, or of the 32 of it that are turned
KINDS: dict[str, dict[str, Any]] = {
    "qwen2vl": {"rope.dimension_sections": [12, 10, 10, 0]},
    "qwen3vl": {"rope.dimension_sections": [12, 10, 10, 0]},
    "glm4": {"rope.dimension_sections": [6, 5, 5, 0], "n_rot": 32},
}
N = 20
TOKENS = [1, *(int(t) for t in np.random.default_rng(3).integers(3, tiny_ggufs.N_VOCAB, 59))]
HEIGHT, WIDTH = 3, 4  # of a picture, in patches
PARAMS = dict(n_ctx=256, n_batch=256, n_ubatch=256)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("mrope")
    return lambda arch: tiny_ggufs.write(root / f"{arch}.gguf", arch, **KINDS[arch])


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, gguf: Callable[[str], Path]) -> Path:
    return gguf(request.param)


@pytest.fixture(scope="module")
def weights(path: Path) -> Any:
    return lowlevel.load_model(path)


@pytest.fixture(scope="module")
def prefix(path: Path) -> ikv.Prefix:
    model, K, V, *_ = llama_engine.compute(path, TOKENS[:N], cache_dtype="f16", n_threads=2)
    return ikv.read(ikv.build(model, TOKENS[:N], K, V, {**ORIGIN, "calibrated": None, "bos_only": False}))


def context(weights: Any, kv: str, **params: Any) -> Context:
    return Context(weights, kv, **{**PARAMS, **params})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def see(ctx: Context, pos: int, seq: int = 0) -> np.ndarray:
    """A picture at position pos: its patches are at one time, each at its own height and width. Logits of the last."""
    n, n_embd = HEIGHT * WIDTH, L.llama_model_n_embd(ctx.model)
    batch = L.llama_batch_init(n, n_embd, 1)
    places = (ctypes.c_int32 * (4 * n))()  # llama_batch_init makes room for one dimension
    kind, own = type(batch.pos), ctypes.cast(batch.pos, ctypes.c_void_p).value
    batch.pos = ctypes.cast(places, kind)
    values = np.random.default_rng(5).standard_normal((n, n_embd), np.float32)
    ctypes.memmove(batch.embd, values.ctypes.data, values.nbytes)
    batch.n_tokens = n
    for i in range(n):
        for dim, at in enumerate((pos, pos + i // WIDTH, pos + i % WIDTH, 0)):
            places[dim * n + i] = at
        batch.n_seq_id[i], batch.logits[i] = 1, i == n - 1
        batch.seq_id[i][0] = seq
    status = L.llama_decode(ctx.ptr, batch)
    batch.pos = ctypes.cast(own, kind)
    L.llama_batch_free(batch)
    assert status == 0
    found = ctx.logits(n - 1)
    assert found is not None
    return found


BEHIND_PICTURE = N + max(HEIGHT, WIDTH)


def test_the_file_has_what_llama_cpp_writes(weights: Any, prefix: ikv.Prefix, path: Path) -> None:
    rope = prefix.manifest["model"]["rope"]
    assert prefix.manifest["format"] == 2
    assert rope["type"] == ("imrope" if path.stem == "qwen3vl" else "mrope")
    assert rope["sections"] == KINDS[path.stem]["rope.dimension_sections"]
    exact = context(weights, "f16")
    exact.decode(TOKENS[:N], 0)
    (section,) = state.sections(exact.save(), model=prefix.manifest["model"])
    assert section.ext is not None and section.ext.tolist() == [[i, i, token] for i, token in enumerate(TOKENS[:N])]
    # of another library's making, and read by ours: the same K and V, the same bytes
    loaded = context(weights, "f16")
    assert bindings.load(loaded.ptr, prefix.data) == N
    assert loaded.save() == exact.save()
    n_header = len(state.file_header(TOKENS[:N]))
    section_bytes = exact.save()[state.BUFFER_HEADER :]
    assert prefix.data[n_header : n_header + len(section_bytes)] == section_bytes


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_text_and_a_picture_behind_a_prefix(weights: Any, prefix: ikv.Prefix, kv: str) -> None:
    exact, plain, mixed = (context(weights, kind, tail=8) for kind in ("f16", kv, kv))
    for ctx in (exact, plain):
        ctx.decode(TOKENS[:N], 0)
    assert bindings.load(mixed.ptr, prefix.data) == N
    saved = mixed.save()
    first = [ctx.decode(TOKENS[N : N + 1], N) for ctx in (exact, plain, mixed)]
    for ctx in (exact, plain, mixed):
        assert L.llama_memory_seq_rm(ctx.memory, 0, N, -1)
    seen = [see(ctx, N) for ctx in (exact, plain, mixed)]
    text = [ctx.decode(TOKENS[30:40], BEHIND_PICTURE) for ctx in (exact, plain, mixed)]
    for expected, rounded, got in (first, seen, text):
        assert np.isfinite(got).all()
        if kv == "f16":  # computed in another batch: the last bits, no more
            assert distance(got, expected) < 1e-3
        else:
            assert distance(got, expected) < distance(rounded, expected)
    # a picture and what was said about it are saved too, and go on with the same bits in another sequence
    again = context(weights, kv, tail=8, n_seq_max=2, kv_unified=True)
    assert again.restore(saved, 1)
    np.testing.assert_array_equal(see(again, N, 1), seen[2])
    np.testing.assert_array_equal(again.decode(TOKENS[30:40], BEHIND_PICTURE, 1), text[2])
    third = context(weights, kv, tail=8)
    assert third.restore(mixed.save())
    end = BEHIND_PICTURE + 10
    np.testing.assert_array_equal(third.decode(TOKENS[40:42], end), mixed.decode(TOKENS[40:42], end))


@pytest.mark.parametrize("kv", ["f16", "q4_0"])
def test_given_to_sequences_that_begin_with_it(weights: Any, prefix: ikv.Prefix, tmp_path: Path, kv: str) -> None:
    file = tmp_path / "x.ikv"
    file.write_bytes(prefix.data)
    ctx = automatic_context(weights, kv, file, n_seq_max=2, kv_unified=True, **PARAMS)
    by_hand = context(weights, kv, n_seq_max=2, kv_unified=True)
    assert bindings.load(by_hand.ptr, prefix.data) == N
    entries = [(token, pos, [0], pos == 29) for pos, token in enumerate(TOKENS[:30])]
    assert ctx.batch(entries) == 0 and by_hand.batch(entries[N:]) == 0
    assert ctx.n_not_computed() == N
    np.testing.assert_array_equal(ctx.logits(29), by_hand.logits(29 - N))
    # cells that the library placed by itself say the same as those of a state
    model = prefix.manifest["model"]
    (given,), (loaded,) = (state.sections(one.save(), model=model) for one in (ctx, by_hand))
    assert given.ext is not None and given.ext.tolist() == [[i, i, token] for i, token in enumerate(TOKENS[:30])]
    np.testing.assert_array_equal(given.ext, loaded.ext)
    for one in (ctx, by_hand):
        assert L.llama_memory_seq_rm(one.memory, 0, N, -1)
    np.testing.assert_array_equal(see(ctx, N), see(by_hand, N))
    np.testing.assert_array_equal(
        ctx.decode(TOKENS[30:40], BEHIND_PICTURE), by_hand.decode(TOKENS[30:40], BEHIND_PICTURE)
    )
    assert ctx.n_not_computed() == N


def test_a_picture_never_begins_with_a_prefix(weights: Any, prefix: ikv.Prefix, tmp_path: Path) -> None:
    file = tmp_path / "x.ikv"
    file.write_bytes(prefix.data)
    ctx = automatic_context(weights, "q8_0", file, **PARAMS)
    plain = context(weights, "q8_0")
    np.testing.assert_array_equal(see(ctx, 0), see(plain, 0))
    # nor does the text behind one, though it is the prefix's
    behind = max(HEIGHT, WIDTH)
    np.testing.assert_array_equal(ctx.decode(TOKENS[:N], behind), plain.decode(TOKENS[:N], behind))
    assert ctx.n_not_computed() == 0 and ctx.n_intact() == 0


N_EXTRA = 6


@pytest.fixture(scope="module")
def extra(prefix: ikv.Prefix) -> ikv.Prefix:
    """The prefix, and cells that stand for no token: they resemble the first one's, and are where it is."""
    rng = np.random.default_rng(7)

    def cells(rows: np.ndarray) -> np.ndarray:
        first = rows[:1].astype(np.float32)
        return first + rows.std() * rng.standard_normal((N_EXTRA, *rows.shape[1:]), np.float32)

    layers = prefix.layers
    return ikv.read(
        extra_cells.with_extra(prefix, {x.il: cells(x.K) for x in layers}, {x.il: cells(x.V) for x in layers})
    )


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_extra_cells(weights: Any, prefix: ikv.Prefix, extra: ikv.Prefix, tmp_path: Path, kv: str) -> None:
    """They are seen by text and by pictures behind them, move no token, and are saved and given as others are."""
    exact, without, ctx = context(weights, "f16"), context(weights, "f16"), context(weights, kv, tail=256)
    bindings.load(without.ptr, prefix.data)
    for one in (exact, ctx):
        bindings.load(one.ptr, extra.data)
        assert L.llama_memory_seq_pos_max(one.memory, 0) == N - 1
    assert ctx.n_intact() == (0 if kv == "f16" else N + N_EXTRA)
    (section,) = state.sections(exact.save(), model=extra.manifest["model"])
    assert section.ext is not None
    assert section.ext.tolist() == [[i, i, t] for i, t in enumerate(TOKENS[:N])] + [[0, 0, -1]] * N_EXTRA
    file = tmp_path / "x.ikv"
    file.write_bytes(extra.data)
    given, again = automatic_context(weights, kv, file, tail=256, **PARAMS), context(weights, kv, tail=256)
    assert given.batch([(token, pos, [0], False) for pos, token in enumerate(TOKENS[:N])]) == 0
    assert again.restore(ctx.save()) and again.save() == ctx.save()
    for read in (lambda c: c.decode(TOKENS[N:30], N), lambda c: see(c, 30), lambda c: c.decode(TOKENS[30:40], 34)):
        want, other, got = read(exact), read(without), read(ctx)
        assert distance(other, want) > 0.02
        assert distance(got, want) < 3e-3
        for one in (given, again):
            np.testing.assert_array_equal(read(one), got)
    assert given.n_not_computed() == N and not L.llama_memory_can_shift(ctx.memory)


def test_extra_cells_in_upstreams_library(path: Path, extra: ikv.Prefix, stock_lib: Path, tmp_path: Path) -> None:
    """It loads the file into an F16 cache: the same bits."""
    file = tmp_path / "x.ikv"
    file.write_bytes(extra.data)
    code = f"""
import ctypes, hashlib
from tests.native.test_mrope import TOKENS, context, see
from tests.support import lowlevel
from tests.support.lowlevel import L
ctx = context(lowlevel.load_model({str(path)!r}), "f16")
tokens, n = (L.llama_token * 64)(), ctypes.c_size_t()
assert L.llama_state_seq_load_file(ctx.ptr, {str(file).encode()!r}, 0, tokens, 64, ctypes.byref(n))
logits = ctx.decode(TOKENS[{N}:30], {N}), see(ctx, 30), ctx.decode(TOKENS[30:40], 34)
print(*(hashlib.sha256(x.tobytes()).hexdigest() for x in logits))
"""
    ours, stock = own_process.run(code, INTACTKV_ATTN="stock"), own_process.run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert len(ours.stdout) > 100 and ours.stdout == stock.stdout


def test_no_shift(weights: Any) -> None:
    ctx = context(weights, "q8_0")
    assert not L.llama_memory_can_shift(ctx.memory)


def test_copied_and_cut_back(weights: Any, prefix: ikv.Prefix) -> None:
    for unified in (True, False):
        ctx = context(weights, "q8_0", n_seq_max=2, kv_unified=unified)
        bindings.load(ctx.ptr, prefix.data)
        expected = ctx.decode(TOKENS[N:30], N)
        assert L.llama_memory_seq_rm(ctx.memory, 0, N, -1)
        L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
        np.testing.assert_array_equal(ctx.decode(TOKENS[N:30], N, 1), expected)
        assert ctx.n_intact(1) == N


def test_a_rounded_copy(weights: Any, prefix: ikv.Prefix) -> None:
    ctx, plain = context(weights, "q4_0"), context(weights, "q4_0")
    bindings.load(ctx.ptr, prefix.data)
    rounded = state.without_intact_cells(sequence_state(ctx.ptr), prefix.manifest["model"])
    assert plain.restore(rounded) and plain.n_intact() == 0 and plain.save() == rounded


def damaged(prefix: ikv.Prefix, at: int, value: int) -> bytes:
    """The prefix with another number at byte `at`, and the checksum of that."""
    length = struct.unpack_from("<Q", prefix.data, len(prefix.data) - 48)[0]
    body = bytearray(prefix.data[:-48])
    struct.pack_into("<i", body, at, value)
    return bytes(body) + structure.trailer(bytes(body), length)


@pytest.mark.parametrize("field, name", [*enumerate(["x of a cell", "y of a cell", "token of a cell"])])
def test_a_cell_that_is_elsewhere_is_refused_by_both_readers(
    weights: Any, prefix: ikv.Prefix, field: int, name: str
) -> None:
    first = len(state.file_header(TOKENS[:N])) + 8
    data = damaged(prefix, first + 24 * 7 + 8 + 4 * field, 99)
    wanted = TOKENS[7] if field == 2 else 7
    ctx = context(weights, "q8_0")
    for read in (ikv.read, lambda data: bindings.verify(data, ctx.ptr)):
        with pytest.raises(IntactKVError, match=f"{name} is 99 at byte .* and must be {wanted}"):
            read(data)


def test_a_prefix_of_other_sections_is_refused(prefix: ikv.Prefix, path: Path, tmp_path: Path) -> None:
    kind = dict(KINDS[path.stem], **{"rope.dimension_sections": [4, 4, 8, 0]})
    other = lowlevel.load_model(tiny_ggufs.write(tmp_path / "other.gguf", path.stem, **kind))
    ctx = context(other, "q8_0")
    with pytest.raises(IntactKVError, match=r"rope sections\[0\] is \d+ in the prefix and 4 in the model"):
        bindings.load(ctx.ptr, prefix.data)


def test_without_a_prefix_as_before(weights: Any, path: Path, stock_lib: Path) -> None:
    code = f"""
import hashlib
from tests.native.test_mrope import TOKENS, context, see
from tests.support import lowlevel
weights = lowlevel.load_model({str(path)!r})
for kv in ("f16", "q8_0"):
    ctx = context(weights, kv)
    ctx.decode(TOKENS[:20], 0)
    see(ctx, 20)
    logits = ctx.decode(TOKENS[30:40], 24)
    print(hashlib.sha256(logits.tobytes()).hexdigest(), hashlib.sha256(ctx.save()).hexdigest())
"""
    ours, stock = own_process.run(code, INTACTKV_ATTN="stock"), own_process.run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert ours.stdout.count("\n") == 2 and ours.stdout == stock.stdout
