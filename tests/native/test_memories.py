"""What upstream's memory has besides plain rows of K and V, each behind a prefix, in a quantized cache and with a tail.

The models are random and tiny: Gemma 4 written here, the others by upstream's own test of architectures.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support import gemma4_ggufs, lowlevel, tiny_ggufs, upstream_archs
from tests.support.in_sight import ORIGIN
from tests.support.lowlevel import Context, L
from tests.support.own_process import run

# kind: the model
UPSTREAM = {
    "chunked attention, layers without RoPE": "llama4-moe",
    "learned sinks, a window": "gpt-oss-moe",
    "ALiBi": "bloom-dense",
    "ALiBi, biases": "mpt-dense",
    "ALiBi, one tensor of Q, K and V": "jais-dense",
    "learned positions": "gpt2-dense",
    "one tensor of Q, K and V, clamped": "dbrx-moe",
}
GEMMA4 = "layers that share K and V, V from K, other heads by layer"
VARYING = "other numbers of KV heads by layer"
NO_ROPE = "a layer without RoPE"
KINDS = [GEMMA4, VARYING, NO_ROPE, *UPSTREAM]
N = 40  # more than the windows: 16, and 32 in upstream's models
PARAMS = dict(n_ctx=256, n_batch=256, n_ubatch=256)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("memories")
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind == GEMMA4 and kind not in made:
            made[kind] = gemma4_ggufs.write(root / "gemma4.gguf")
        elif kind == VARYING and kind not in made:
            made[kind] = tiny_ggufs.write(root / "varying.gguf", "deci", n_head_kv=[1, 4])
        elif kind == NO_ROPE and kind not in made:
            made[kind] = tiny_ggufs.write(root / "no-rope.gguf", "smollm3", n_layer=4)  # the fourth
        elif kind not in made:
            if not upstream_archs.can_build():
                pytest.skip("no compiler, or no libllama-common (make tools)")
            paths = upstream_archs.make(root, [name.rpartition("-")[0] for name in UPSTREAM.values()]).paths
            made.update({of: paths[name] for of, name in UPSTREAM.items()})
        return made[kind]

    return get


def tokens(n_vocab: int, n: int = N + 24) -> list[int]:
    return [int(t) for t in np.random.default_rng(0).integers(3, min(n_vocab, 120), n)]


def prefix_of(path: Path, text: list[int]) -> bytes:
    model, K, V, *_ = llama_engine.compute(path, text, cache_dtype="f16", n_threads=2)
    return ikv.build(model, text, K, V, {**ORIGIN, "calibrated": None, "bos_only": False})


def context(weights: Any, kv: str, **params: Any) -> Context:
    return Context(weights, kv, **{**PARAMS, **params})


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def behind(ctx: Context, text: list[int]) -> np.ndarray:
    """Logits of the tokens behind the prefix: one, and then twenty at once."""
    return np.concatenate([ctx.decode(text[N : N + 1], N), ctx.decode(text[N + 1 : N + 21], N + 1)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_a_quantized_cache_and_the_tail(gguf: Callable[[str], Path], kind: str) -> None:
    path = gguf(kind)
    weights = lowlevel.load_model(path)
    text = tokens(L.llama_vocab_n_tokens(L.llama_model_get_vocab(weights)))
    data = prefix_of(path, text[:N])

    exact, loaded = context(weights, "f16"), context(weights, "f16")
    exact.decode(text[:N], 0)
    assert bindings.load(loaded.ptr, data) == N
    assert loaded.save() == exact.save()
    expected = behind(exact, text)
    np.testing.assert_array_equal(behind(loaded, text), expected)

    for kv, tail in (("q8_0", 0), ("q4_0", 0), ("q4_0", 16)):
        plain, mixed, again = (context(weights, kv, tail=tail) for _ in range(3))
        plain.decode(text[:N], 0)
        assert bindings.load(mixed.ptr, data) == N and mixed.attention() == "fused"
        assert again.restore(mixed.save())
        got, rounded = behind(mixed, text), behind(plain, text)
        assert np.isfinite(got).all()
        assert distance(got[:1], expected[:1]) < distance(rounded[:1], expected[:1]), (kv, tail)
        if tail:  # all that the last tokens see of the newest is intact
            assert distance(got, expected) < 0.5 * distance(rounded, expected)
        # saved with the prefix and its tail, and loaded: the same bits
        np.testing.assert_array_equal(behind(again, text), got)
        third = context(weights, kv, tail=tail)
        assert third.restore(mixed.save())
        np.testing.assert_array_equal(third.decode(text[N + 21 :], N + 21), mixed.decode(text[N + 21 :], N + 21))


def test_without_a_prefix_as_before(gguf: Callable[[str], Path], stock_lib: Path) -> None:
    code = f"""
import hashlib
from tests.native.test_memories import context, tokens
from tests.support import lowlevel
from tests.support.lowlevel import L
for path in {[str(gguf(kind)) for kind in KINDS]!r}:
    weights = lowlevel.load_model(path)
    text = tokens(L.llama_vocab_n_tokens(L.llama_model_get_vocab(weights)))
    for kv in ("f16", "q8_0"):
        ctx = context(weights, kv)
        logits = [ctx.decode(text[:40], 0), ctx.decode(text[40:], 40)]
        print(*(hashlib.sha256(x).hexdigest() for x in (*(y.tobytes() for y in logits), ctx.save())))
"""
    ours, stock = run(code, INTACTKV_ATTN="stock"), run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert ours.stdout.count("\n") == 2 * len(KINDS) and ours.stdout == stock.stdout


# --- a drafting head that reads the cache of another model ---


def draft(head: Context, token: int, pos: int) -> np.ndarray:
    """Logits of the token that follows `token`, which is at position pos."""
    hidden = np.random.default_rng(9).standard_normal(gemma4_ggufs.N_EMBD).astype(np.float32)
    batch, one = L.llama_batch_init(1, gemma4_ggufs.N_EMBD, 1), (ctypes.c_int32 * 1)(token)
    ctypes.memmove(batch.embd, hidden.ctypes.data, hidden.nbytes)
    batch.token = ctypes.cast(one, type(batch.token))
    batch.n_tokens, batch.pos[0], batch.n_seq_id[0], batch.seq_id[0][0], batch.logits[0] = 1, pos, 1, 0, 1
    status = L.llama_decode(head.ptr, batch)
    batch.token = ctypes.cast(None, type(batch.token))
    L.llama_batch_free(batch)
    assert status == 0
    logits = head.logits(0)
    assert logits is not None
    return logits


@pytest.mark.parametrize("attention", ["fused", "portable"])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_a_drafting_head_reads_the_intact_cells(
    gguf: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv: str, attention: str
) -> None:
    weights = lowlevel.load_model(gguf(GEMMA4))
    head_weights = lowlevel.load_model(gemma4_ggufs.write_head(tmp_path / "head.gguf"))
    text = tokens(tiny_ggufs.N_VOCAB)
    data = prefix_of(gguf(GEMMA4), text[:N])
    drafts = {}
    for name, kind, tail in (("exact", "f16", 0), ("rounded", kv, 0), ("prefix", kv, 0), ("prefix and tail", kv, 32)):
        monkeypatch.setenv("INTACTKV_ATTN", "fused" if kind == "f16" else attention)
        model = context(weights, kind, tail=tail)
        head = context(head_weights, kind, tail=None, ctx_type=1, ctx_other=model.ptr)
        if name.startswith("prefix"):
            assert bindings.load(model.ptr, data) == N
        else:
            model.decode(text[:N], 0)
        first = draft(head, text[N], N)
        n_cells = model.n_intact(), model.n_tail()
        draft(head, text[N], N)  # once more, on a graph that is used again
        model.decode(text[N : N + 10], N)
        drafts[name] = first, draft(head, text[N + 10], N + 10)
        if name.startswith("prefix"):  # the head has given no cell of its own a row, and taken none away
            assert n_cells == (N, 0) and model.n_intact() == N + min(tail, 10)
        del head, model
    (first, later), of = drafts["exact"], drafts
    assert distance(of["prefix"][0], first) < 0.1 * distance(of["rounded"][0], first)
    assert distance(of["prefix"][1], later) < distance(of["rounded"][1], later)
    assert distance(of["prefix and tail"][1], later) < 0.1 * distance(of["rounded"][1], later)
