"""Extra cells of a prefix, which stand for no token and are all at the first token's position, in llama.cpp's cache:
loaded, saved, copied, shifted and freed as the others, on our libraries and on stock ones."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support import extra_cells, lowlevel
from tests.support.lowlevel import Context, L, kl
from tests.support.own_process import run
from tests.support.smol import Smol

N = 16


@pytest.fixture(scope="module")
def prefixes(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ikv.Prefix]:
    """With N extra cells behind the tokens; "bos": of the first token."""
    root = tmp_path_factory.mktemp("extra")
    pairs = (("prompt", smol.ikv), ("bos", smol.bos))
    return {kind: extra_cells.write(path, smol.reference, root / f"{kind}.ikv", N) for kind, path in pairs}


@pytest.fixture(scope="module", params=["prompt", "bos"])
def prefix(request: pytest.FixtureRequest, prefixes: dict[str, ikv.Prefix]) -> ikv.Prefix:
    return prefixes[request.param]


@pytest.fixture(scope="module")
def text(f16: Any) -> list[int]:
    from pydoc_data.topics import topics

    return lowlevel.tokenize(f16, topics["yield"], special=False)[:60]


def loaded(f16: Any, prefix: ikv.Prefix, kv: str = "q8_0", seq: int = 0, **params: Any) -> Context:
    ctx = Context(f16, kv, **params)
    assert bindings.load(ctx.ptr, prefix.data, seq) == len(prefix.tokens)
    return ctx


def test_they_are_seen_and_take_no_position(f16: Any, smol: Smol, prefix: ikv.Prefix, text: list[int]) -> None:
    n = len(prefix.tokens)
    exact = loaded(f16, prefix, "f16")
    assert L.llama_memory_seq_pos_max(exact.memory, 0) == n - 1 and L.llama_memory_seq_pos_min(exact.memory, 0) == 0
    logits = exact.decode(text, n)
    for kv, limit in (("q8_0", 3e-3), ("f32", 1e-4)):
        ctx = loaded(f16, prefix, kv)
        assert ctx.n_intact() == (prefix.n_cells if kv == "q8_0" else 0)
        assert kl(logits, ctx.decode(text, n)) < limit
    without = Context(f16, "f16")
    bindings.load(without.ptr, (smol.bos if n == 1 else smol.ikv).read_bytes())
    assert kl(logits, without.decode(text, n)) > 0.02


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
def test_saved_and_loaded_bit_for_bit(f16: Any, prefix: ikv.Prefix, text: list[int], whole: bool) -> None:
    n = len(prefix.tokens)
    for kv, tail in (("q8_0", 0), ("q4_0", 8), ("f16", 0)):
        ctx = loaded(f16, prefix, kv, tail=tail)
        ctx.decode(text[:20], n)
        saved = ctx.save(None if whole else 0)
        again = Context(f16, kv, tail=tail)
        assert again.restore(saved, None if whole else 0)
        counts = ctx.n_intact(), ctx.n_tail()
        assert counts == ((0, 0) if kv == "f16" else (prefix.n_cells + ctx.n_tail(), 20 if tail else 0))
        assert (again.n_intact(), again.n_tail()) == counts
        assert again.save(None if whole else 0) == saved
        np.testing.assert_array_equal(again.decode(text[20:30], n + 20), ctx.decode(text[20:30], n + 20))


def test_the_arena_holds_a_row_each(f16: Any, prefix: ikv.Prefix) -> None:
    ctx = loaded(f16, prefix)
    before = ctx.arena_bytes()
    assert before == prefix.n_cells * 30 * 2 * 192 * 2
    assert bindings.load(ctx.ptr, prefix.data) == len(prefix.tokens)  # over itself: the same rows serve again
    assert (ctx.n_intact(), ctx.arena_bytes()) == (prefix.n_cells, before)


def test_removed_with_the_first_token(f16: Any, prefix: ikv.Prefix, text: list[int]) -> None:
    n = len(prefix.tokens)
    ctx = loaded(f16, prefix)
    ctx.decode(text[:10], n)
    L.llama_memory_seq_rm(ctx.memory, 0, n, -1)
    assert ctx.n_intact() == prefix.n_cells
    L.llama_memory_seq_rm(ctx.memory, 0, 1, -1)
    assert ctx.n_intact() == 1 + N
    L.llama_memory_seq_rm(ctx.memory, 0, 0, 1)
    assert ctx.n_intact() == 0 and L.llama_memory_seq_pos_max(ctx.memory, 0) == -1
    np.testing.assert_array_equal(ctx.decode(text, 0), Context(f16, "q8_0").decode(text, 0))


def test_a_context_shift_leaves_them(f16: Any, prefix: ikv.Prefix, text: list[int]) -> None:
    """As programs do it: of the tokens behind n_keep the older half goes, the newer ones move up."""
    n, gone = len(prefix.tokens), 20
    shifted = {}
    for kv in ("f16", "q8_0"):
        ctx = loaded(f16, prefix, kv)
        ctx.decode(text[:40], n)
        L.llama_memory_seq_rm(ctx.memory, 0, n, n + gone)
        L.llama_memory_seq_add(ctx.memory, 0, n + gone, n + 40, -gone)
        shifted[kv] = ctx.decode(text[40:50], n + 40 - gone)
        assert ctx.n_intact() == (0 if kv == "f16" else prefix.n_cells)
    assert kl(shifted["f16"], shifted["q8_0"]) < 1e-2
    ctx = loaded(f16, prefix, "f16")  # near to what the same text gives; other texts are far
    fresh = ctx.decode(text[gone:50], n)[-10:]
    assert kl(fresh, shifted["f16"]) < 0.3 * kl(loaded(f16, prefix, "f16").decode(text[:10], n), shifted["f16"])


def test_a_shift_of_everything_moves_them_together(f16: Any, prefix: ikv.Prefix, text: list[int]) -> None:
    """RoPE is relative: the logits stay. Below position 0 they are freed, all of them."""
    n, by = len(prefix.tokens), 50
    for kv, limit in (("f16", 1e-4), ("q8_0", 3e-3)):
        ctx = loaded(f16, prefix, kv)
        L.llama_memory_seq_add(ctx.memory, 0, 0, -1, by)
        got = ctx.decode(text[:8], n + by)
        assert kl(loaded(f16, prefix, kv).decode(text[:8], n), got) < limit
        assert L.llama_memory_seq_pos_min(ctx.memory, 0) == by
        saved = ctx.save()
        assert saved.count(by.to_bytes(4, "little") + b"\1\0\0\0\0\0\0\0") == 1 + N
        L.llama_memory_seq_add(ctx.memory, 0, 0, by + 1, -by - 1)
        assert ctx.n_intact() == (0 if kv == "f16" else n - 1)


@pytest.mark.parametrize("unified", [True, False])
def test_sequences(f16: Any, prefix: ikv.Prefix, text: list[int], unified: bool) -> None:
    n, cells = len(prefix.tokens), prefix.n_cells
    alone = loaded(f16, prefix).decode(text[:10], n)
    ctx = loaded(f16, prefix, seq=1, n_seq_max=3, kv_unified=unified, n_ctx=1024 if unified else 3072)
    for seq in (0, 2):
        L.llama_memory_seq_cp(ctx.memory, 1, seq, -1, -1)
    assert [ctx.n_intact(seq) for seq in (-1, 0, 1, 2)] == [cells if unified else 3 * cells, *[cells] * 3]
    for seq in (2, 0):
        assert kl(alone, ctx.decode(text[:10], n, seq=seq)) < 1e-5
    L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
    assert [ctx.n_intact(seq) for seq in (0, 1, 2)] == [cells, 0, cells]


def test_a_context_that_is_full_of_them(f16: Any, prefixes: dict[str, ikv.Prefix], text: list[int]) -> None:
    prefix = prefixes["bos"]
    rows = (
        {x.il: np.repeat(x.K[1:], 16, 0) for x in prefix.layers},
        {x.il: np.repeat(x.V[1:], 16, 0) for x in prefix.layers},
    )
    bos = ikv.read(ikv.build(
        prefix.manifest["model"], prefix.tokens, {x.il: x.K[:1] for x in prefix.layers},
        {x.il: x.V[:1] for x in prefix.layers},
        {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model", "extra_cells")},
    ))  # fmt: skip
    many = ikv.read(extra_cells.with_extra(bos, *rows))
    ctx = Context(f16, "q8_0", n_ctx=256, n_batch=256, n_ubatch=256)
    with pytest.raises(
        IntactKVError, match="1 tokens, 256 extra cells and the context only n_ctx = 256 for a sequence"
    ):
        bindings.load(ctx.ptr, many.data)
    assert bindings.load(ctx.ptr, prefix.data) == 1
    ctx.decode((text * 5)[: 256 - 17], 1)  # as many as there is room for
    with pytest.raises(AssertionError, match="1"):
        ctx.decode(text[:1], 240)


STOCK = """
import ctypes, hashlib, json, sys
import numpy as np
from tests.support import lowlevel
from tests.support.lowlevel import L
model, path, tokens = sys.argv[1], sys.argv[2].encode(), json.loads(sys.argv[3])
ctx = lowlevel.Context(lowlevel.load_model(model), "f16")
out, n = (L.llama_token * 100)(), ctypes.c_size_t()
assert L.llama_state_seq_load_file(ctx.ptr, path, 0, out, 100, ctypes.byref(n)) > 0
logits = [ctx.decode(tokens[:20], n.value), *(ctx.decode([t], n.value + 20 + i) for i, t in enumerate(tokens[20:30]))]
n_keep = n.value
L.llama_memory_seq_rm(ctx.memory, 0, n_keep, n_keep + 10)
L.llama_memory_seq_add(ctx.memory, 0, n_keep + 10, n_keep + 30, -10)
logits.append(ctx.decode(tokens[30:35], n_keep + 20))
print(n.value, hashlib.sha256(np.concatenate(logits).tobytes()).hexdigest(), hashlib.sha256(ctx.save()).hexdigest())
"""


def test_stock_llama_cpp_loads_them_into_an_f16_cache(
    smol: Smol, prefix: ikv.Prefix, text: list[int], stock_lib: Path, f16: Any
) -> None:
    """The same bits as ours with its attention: behind the prefix, token by token, after a context shift, saved."""
    code = STOCK.replace("sys.argv", repr(["", str(smol.reference), str(prefix.source), json.dumps(text)]))
    ours, stock = run(code, INTACTKV_ATTN="stock"), run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert stock.stdout.split()[0] == str(len(prefix.tokens)) and ours.stdout == stock.stdout


def test_a_state_file_of_them_is_a_prefix_file_no_more(f16: Any, prefix: ikv.Prefix, tmp_path: Path) -> None:
    """llama_state_seq_load_file() checks what a file says of its cells, and takes states that say nothing."""
    ctx = Context(f16, "q8_0")
    out, n = (L.llama_token * 100)(), ctypes.c_size_t()

    def load(data: bytes) -> int:
        (tmp_path / "x").write_bytes(data)
        return int(L.llama_state_seq_load_file(ctx.ptr, str(tmp_path / "x").encode(), 0, out, 100, ctypes.byref(n)))

    assert load(prefix.data) > 0 and ctx.n_intact() == prefix.n_cells
    (length,) = np.frombuffer(prefix.data[-48:-40], "<u8")
    bare = prefix.data[: -48 - int(length)]
    assert load(bare) > 0 and ctx.n_intact() == prefix.n_cells and n.value == len(prefix.tokens)
    assert load(prefix.data.replace(b'"extra_cells":16', b'"extra_cells":17')) == 0
