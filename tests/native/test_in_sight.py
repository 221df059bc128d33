"""Cells in sight, which no sliding window hides: in llama.cpp's cache, whatever becomes of it."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, state
from intactkv_export.prefix import ikv
from tests.support import automatic, in_sight, lowlevel, tiny_ggufs
from tests.support.lowlevel import Context, L, kl
from tests.support.own_process import run
from tests.support.smol import Smol
from tests.support.tiny_ggufs import WINDOW

N = 600  # tokens: more than the cache of the window has cells
TOKENS = np.random.default_rng(1).integers(3, 250, N).tolist()
SMALL = {"n_ctx": 1024, "n_batch": 32, "n_ubatch": 32, "swa_full": False}  # of 256 cells, then


@pytest.fixture(scope="module", params=["gemma2", "gpt-oss"])
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sight") / f"{request.param}.gguf"
    tiny_ggufs.write(path, request.param)
    return path


@pytest.fixture(scope="module")
def windowed(gguf: Path) -> Any:
    return lowlevel.load_model(gguf)


@pytest.fixture(scope="module")
def prefixes(gguf: Path) -> dict[str, ikv.Prefix]:
    """The same rows: "seen" of every token; "leaves" the windows; and "many", with extra cells."""
    kinds: dict[str, dict[str, Any]] = {"seen": {}, "leaves": {"in_sight": False}, "many": {"n_extra": 5}}
    return {name: in_sight.write(gguf, gguf.with_name(f"{name}.ikv"), 1, **how) for name, how in kinds.items()}


def loaded(windowed: Any, prefix: ikv.Prefix, kv: str = "q8_0", seq: int = 0, **params: Any) -> Context:
    ctx = Context(windowed, kv, **(SMALL | params))
    assert bindings.load(ctx.ptr, prefix.data, seq) == 1
    return ctx


def on(ctx: Context, start: int, end: int, seq: int = 0) -> np.ndarray:
    """Logits of the tokens start..end-1 of the text, which is behind the prefix; in batches of 32 at most."""
    parts = [range(a, min(a + 32, end)) for a in range(start, end, 32)]
    return np.concatenate([ctx.decode([TOKENS[i] for i in part], 1 + part[0], seq) for part in parts])


def pos_min(ctx: Context, seq: int = 0) -> int:
    return int(L.llama_memory_seq_pos_min(ctx.memory, seq))


@pytest.mark.parametrize(("kv", "tail"), [("f16", 0), ("f32", 0), ("q8_0", 0), ("q4_0", 12)])
@pytest.mark.parametrize("name", ["seen", "many"])
def test_seen_where_the_window_has_long_left_them(
    windowed: Any, prefixes: dict[str, ikv.Prefix], name: str, kv: str, tail: int
) -> None:
    """The cache of the window, which gives all other cells away, says what one of full size says."""
    small, full = (loaded(windowed, prefixes[name], kv, tail=tail, swa_full=full) for full in (False, True))
    a, b = on(small, 0, N), on(full, 0, N)
    assert kl(b, a) < 1e-5
    gone = on(loaded(windowed, prefixes["leaves"], kv, tail=tail), 0, N)
    assert kl(gone[300:], a[300:]) > 1e-3
    if name == "seen":
        np.testing.assert_array_equal(gone[: WINDOW - 1], a[: WINDOW - 1])


def test_positions_that_can_be_gone_back_to(windowed: Any, prefixes: dict[str, ikv.Prefix]) -> None:
    """A cell that stands alone is not where a sequence begins: the server would go back to what is not there."""
    for name in ("seen", "many"):
        seen, leaves = loaded(windowed, prefixes[name]), loaded(windowed, prefixes["leaves"])
        assert pos_min(seen) == 0
        for end in (20, 100, 250, 260, 300, N):
            start = L.llama_memory_seq_pos_max(seen.memory, 0)
            on(seen, start, end)
            on(leaves, start, end)
            assert abs(pos_min(seen) - pos_min(leaves)) <= (6 if end > 250 else 0), end
        assert pos_min(seen) > 0
        L.llama_memory_seq_rm(seen.memory, 0, 1, -1)
        assert pos_min(seen) == 0 == L.llama_memory_seq_pos_max(seen.memory, 0)
        again = on(seen, 0, N)
        assert kl(on(loaded(windowed, prefixes[name]), 0, N), again) < 1e-5
        L.llama_memory_seq_rm(seen.memory, 0, 0, 1)  # and freed as any other cell
        L.llama_memory_seq_rm(seen.memory, 0, -1, -1)
        np.testing.assert_array_equal(on(seen, 0, N), on(Context(windowed, "q8_0", **SMALL), 0, N))


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@pytest.mark.parametrize(("kv", "tail"), [("f16", 0), ("q8_0", 0), ("q4_0", 12)])
def test_saved_and_loaded(windowed: Any, prefixes: dict[str, ikv.Prefix], kv: str, tail: int, whole: bool) -> None:
    which = None if whole else 0
    for name in ("seen", "many"):
        ctx = loaded(windowed, prefixes[name], kv, tail=tail)
        on(ctx, 0, 500)
        saved = ctx.save(which)
        again = Context(windowed, kv, tail=tail, **SMALL)
        assert again.restore(saved, which) and again.save(which) == saved
        assert pos_min(again) > 0 and pos_min(again) >= pos_min(ctx)
        if not whole:
            for section, n in zip(state.sections(saved), (0, prefixes[name].n_cells), strict=True):
                marked = np.frombuffer(section.in_sight or bytes(4), "<u4")
                assert marked[0] == n and set(section.positions[marked[1:]].tolist()) <= {0}
        assert kl(on(ctx, 500, N), on(again, 500, N)) < 1e-6  # the cells are in other places


def test_what_is_rounded_stays_in_sight(windowed: Any, prefixes: dict[str, ikv.Prefix]) -> None:
    """A state whose intact cells were made ordinary, as evaluations do."""
    ctx = loaded(windowed, prefixes["many"])
    on(ctx, 0, 500)
    rounded = Context(windowed, "q8_0", **SMALL)
    assert rounded.restore(state.without_intact_cells(ctx.save())) and rounded.n_intact() == 0
    gone = loaded(windowed, prefixes["leaves"])
    on(gone, 0, 500)
    expected = on(ctx, 500, N)
    assert kl(expected, on(rounded, 500, N)) < 0.2 * kl(expected, on(gone, 500, N))


PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY


def test_a_checkpoint_of_the_window(windowed: Any, prefixes: dict[str, ikv.Prefix]) -> None:
    """As the server makes one, to go back to: only the window's cells are in it."""
    ctx = loaded(windowed, prefixes["many"])
    on(ctx, 0, 300)
    size = L.llama_state_seq_get_size_ext(ctx.ptr, 0, PARTIAL)
    data = (ctypes.c_uint8 * size)()
    assert L.llama_state_seq_get_data_ext(ctx.ptr, data, size, 0, PARTIAL) == size
    expected = on(ctx, 300, N)
    assert L.llama_state_seq_set_data_ext(ctx.ptr, data, size, 0, PARTIAL) == size
    L.llama_memory_seq_rm(ctx.memory, 0, 301, -1)
    assert kl(expected, on(ctx, 300, N)) < 1e-6


@pytest.mark.parametrize("unified", [True, False])
def test_several_sequences(windowed: Any, prefixes: dict[str, ikv.Prefix], unified: bool) -> None:
    """Each its own; a copy has them too; what is freed is free."""
    alone = on(loaded(windowed, prefixes["many"]), 0, 400)
    n_ctx = 2048 if unified else 4096
    ctx = loaded(windowed, prefixes["many"], n_seq_max=3, kv_unified=unified, n_ctx=n_ctx)
    bindings.load(ctx.ptr, prefixes["many"].data, 1)
    for start in range(0, 400, 20):
        for seq in (0, 1):
            got = on(ctx, start, start + 20, seq)
            assert kl(alone[start : start + 20], got) < 1e-4
    L.llama_memory_seq_rm(ctx.memory, 2, -1, -1)
    L.llama_memory_seq_cp(ctx.memory, 0, 2, -1, -1)
    L.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
    more = on(loaded(windowed, prefixes["many"]), 0, 440)[400:]
    assert kl(more, on(ctx, 400, 440, 2)) < 1e-4
    np.testing.assert_array_less(0, pos_min(ctx, 2))


def test_moved_as_other_cells(windowed: Any, prefixes: dict[str, ikv.Prefix]) -> None:
    """In a cache of full size, the only one of a window that can be shifted: RoPE is relative, the logits stay."""
    for kv in ("f16", "q8_0"):
        ctx = loaded(windowed, prefixes["many"], kv, swa_full=True)
        on(ctx, 0, 300)
        L.llama_memory_seq_add(ctx.memory, 0, 0, -1, 50)
        got = ctx.decode(TOKENS[300:320], 351)
        *_, windows = state.sections(ctx.save())
        assert windows.positions.tolist().count(50) == prefixes["many"].n_cells
        expected = on(loaded(windowed, prefixes["many"], kv, swa_full=True), 0, 320)[300:]
        assert kl(expected, got) < (1e-5 if kv == "f16" else 1e-3)


def test_a_file_is_loaded_so_too(windowed: Any, prefixes: dict[str, ikv.Prefix]) -> None:
    """By what every program has, llama_state_seq_load_file()."""
    ctx = Context(windowed, "q8_0", **SMALL)
    out, n = (L.llama_token * 10)(), ctypes.c_size_t()
    path = str(prefixes["many"].source).encode()
    assert L.llama_state_seq_load_file(ctx.ptr, path, 0, out, 10, ctypes.byref(n)) > 0
    np.testing.assert_array_equal(on(ctx, 0, N), on(loaded(windowed, prefixes["many"]), 0, N))


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_automatic_prefixes(windowed: Any, prefixes: dict[str, ikv.Prefix], kv: str) -> None:
    """A program that decodes the text's tokens, the first among them, gets the cells, and they stay."""
    prefix = prefixes["many"]
    with automatic.environment(str(prefix.source)):
        ctx = Context(windowed, kv, **SMALL)
    ctx.decode(prefix.tokens, 0)
    assert pos_min(ctx) == 0
    assert kl(on(loaded(windowed, prefix, kv), 0, N), on(ctx, 0, N)) < 1e-6
    assert pos_min(ctx) > 0


@pytest.mark.parametrize("full", [False, True])
def test_restored_where_the_context_holds_them(windowed: Any, prefixes: dict[str, ikv.Prefix], full: bool) -> None:
    """A sequence that is restored has them in sight, though other sequences have the same."""
    prefix = prefixes["many"]
    with automatic.environment(str(prefix.source)):
        ctx = Context(
            windowed, "q8_0", **(SMALL | {"n_seq_max": 2, "swa_full": full, "n_ctx": 2048, "kv_unified": True})
        )
    ctx.decode(prefix.tokens, 0)
    on(ctx, 0, 300)
    assert ctx.restore(ctx.save(), 1)
    assert ctx.n_intact(1) == prefix.n_cells
    L.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
    expected = on(loaded(windowed, prefix), 0, N)[300:]
    assert kl(expected, on(ctx, 300, N, 1)) < 1e-4


def test_no_room_in_the_window(windowed: Any, gguf: Path) -> None:
    """256 cells: of the window 15 tokens, of a ubatch 232."""
    prefix = in_sight.write(gguf, gguf.with_name("wide.ikv"), 1, n_extra=9)
    ctx = Context(windowed, "q8_0", **(SMALL | {"n_batch": 232, "n_ubatch": 232}))
    with pytest.raises(
        IntactKVError, match="its 10 cells stay in sight, and .* no room .* beside n_ubatch = 232: use a"
    ):
        bindings.load(ctx.ptr, prefix.data)
    whole = loaded(windowed, prefix, n_batch=231, n_ubatch=231)
    for start in range(0, 600, 231):
        whole.decode((TOKENS * 2)[start : start + 231], 1 + start)


def test_without_windows_nothing_changes(f16: Any, smol: Smol, tmp_path: Path) -> None:
    """A model whose layers all see everything: the same cells, the same state, the same bits."""
    start = ikv.read(smol.bos)
    rest = {k: v for k, v in start.manifest.items() if k not in ("format", "tokens", "model")}
    K, V = ({x.il: getattr(x, side) for x in start.layers} for side in "KV")
    files = [
        ikv.build(start.manifest["model"], start.tokens, K, V, {**rest, "calibrated": {"in_sight": said}})
        for said in (True, False)
    ]
    for kv in ("f16", "q8_0"):
        a, b = Context(f16, kv), Context(f16, kv)
        assert bindings.load(a.ptr, files[0]) == bindings.load(b.ptr, files[1]) == 1
        np.testing.assert_array_equal(a.decode(list(range(40, 80)), 1), b.decode(list(range(40, 80)), 1))
        assert a.save() == b.save()


STOCK = """
import ctypes, json, sys
import numpy as np
from tests.support import lowlevel
from tests.support.lowlevel import L
gguf, path, state, out, tokens = *sys.argv[1:5], json.loads(sys.argv[5])
model = lowlevel.load_model(gguf)
ctx = lowlevel.Context(model, "f16", n_ctx=1024, n_batch=32, n_ubatch=32, swa_full=False)
found, n = (L.llama_token * 10)(), ctypes.c_size_t()
assert L.llama_state_seq_load_file(ctx.ptr, path.encode(), 0, found, 10, ctypes.byref(n)) > 0
logits = [ctx.decode(tokens[i : i + 32], 1 + i) for i in range(0, len(tokens), 32)]
np.save(out, np.concatenate(logits))
data = open(state, "rb").read()
print("state", int(ctx.restore(data)))
"""


def test_stock_llama_cpp(
    gguf: Path, windowed: Any, prefixes: dict[str, ikv.Prefix], stock_lib: Path, tmp_path: Path
) -> None:
    """It loads the file, and the cells leave its windows: as ours does without what the manifest says. It does not load
    a state of which it cannot keep the cells in sight."""
    ctx = loaded(windowed, prefixes["seen"], "f16")
    on(ctx, 0, 100)
    (tmp_path / "state").write_bytes(ctx.save())
    arguments = [gguf, prefixes["seen"].source, tmp_path / "state", tmp_path / "logits.npy"]
    code = STOCK.replace("sys.argv", repr(["", *map(str, arguments), json.dumps(TOKENS[:320])]))
    done = run(code, lib=stock_lib)
    assert done.returncode == 0 and done.stdout.split() == ["state", "0"], done.stdout + done.stderr
    leaves = on(loaded(windowed, prefixes["leaves"], "f16"), 0, 320)
    assert kl(leaves, np.load(tmp_path / "logits.npy")) < 1e-5
