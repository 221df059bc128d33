"""What a drafting head reads of a model behind a prefix: hidden states of all tokens (MTP), a layer's inputs (EAGLE).

The prefix's tokens are computed for it, then its rows take the place of what was computed, before the tokens behind.
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
from tests.support import automatic, drafting_heads, hybrids, upstream_archs
from tests.support.hybrids import TOKENS
from tests.support.lowlevel import Context, L

# plain K and V, latents, recurrent layers beside attention
KINDS = {"glm4moe": "glm4moe-moe", "deepseek2": "deepseek2-moe", "qwen35": "qwen35-dense"}
N = 20
TEXT = TOKENS[N:]
OTHER = TOKENS[::-1]
SET, GET = "_Z26llama_set_embeddings_nextnP13llama_contextbb", "_Z26llama_get_embeddings_nextnP13llama_context"
SET_LAYER = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"
GET_LAYER = "_Z30llama_get_embeddings_layer_inpP13llama_contextj"
_lib = L.llama_cpp._lib

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not upstream_archs.can_build(), reason="no compiler, or no libllama-common (make tools)"),
    pytest.mark.skipif(not hasattr(_lib, SET), reason="these functions have other names here"),
]


def function(name: str, returns: Any, *arguments: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = ctypes.CFUNCTYPE(returns, *arguments)((name, _lib))
    return found


class Read:
    """What is read of every token: asked for, and got as F32 [n_tokens, n_embd]."""

    def __init__(self, layer: int | None) -> None:
        self.layer = layer

    def ask(self, ctx: Context) -> Context:
        if self.layer is None:
            function(SET, None, ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool)(ctx.ptr, True, False)
        else:
            function(SET_LAYER, None, ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool)(ctx.ptr, self.layer, True)
        return ctx

    def rows(self, ctx: Context, n: int) -> np.ndarray:
        got = ctypes.POINTER(ctypes.c_float)
        if self.layer is None:
            data = function(GET, got, ctypes.c_void_p)(ctx.ptr)
        else:
            data = function(GET_LAYER, got, ctypes.c_void_p, ctypes.c_uint32)(ctx.ptr, self.layer)
        return np.ctypeslib.as_array(data, shape=(n, L.llama_model_n_embd(ctx.model))).copy()


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("heads")
    made = upstream_archs.make(root, KINDS).paths
    return {kind: drafting_heads.append(made[name], root / f"{kind}.gguf") for kind, name in KINDS.items()}


@pytest.fixture(scope="module")
def weights(paths: dict[str, Path]) -> dict[str, Any]:
    params = L.llama_model_default_params()
    params.load_mtp = True
    return {kind: L.llama_model_load_from_file(str(path).encode(), params) for kind, path in paths.items()}


@pytest.fixture(scope="module")
def files(paths: dict[str, Path]) -> dict[str, Path]:
    """Prefixes with other rows than the models compute, so that it shows who sees them."""
    made = {}
    for kind, path in paths.items():
        model, K, V, states = llama_engine.compute(path, TOKENS[:N], cache_dtype="f16", n_threads=2)
        for of in (K, V):
            of.update({il: (rows * 0.7).astype(np.float16) for il, rows in of.items()})
        made[kind] = path.with_suffix(".ikv")
        made[kind].write_bytes(ikv.build(model, TOKENS[:N], K, V, hybrids.ORIGIN, states))
    return made


def context(weights: Any, kv: str, *prefixes: Path) -> Context:
    sizes = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 256, "n_seq_max": 2, "kv_unified": True}
    return automatic.context(weights, kv, *prefixes, **sizes)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize(("kind", "read"), [(kind, Read(None)) for kind in KINDS] + [("qwen35", Read(1))])
def test_behind_a_prefix(weights: Any, files: dict[str, Path], kind: str, kv: str, read: Read) -> None:
    by_hand, plain, ctx = (read.ask(context(weights[kind], kv, *more)) for more in ((), (), (files[kind],)))
    plain.decode(TOKENS[:N], 0)
    before = read.rows(plain, N)
    without = plain.decode(TEXT, N)
    bindings.load(by_hand.ptr, files[kind].read_bytes())
    want = by_hand.decode(TEXT, N)
    behind = read.rows(by_hand, len(TEXT))
    assert distance(without, want) > 0.01

    assert ctx.batch([(token, i, [0], i >= N) for i, token in enumerate(TOKENS)]) == 0
    got = np.stack([ctx.logits(i) for i in range(N, len(TOKENS))])
    assert distance(got, want) < 1e-4
    rows = read.rows(ctx, len(TOKENS))
    assert distance(rows[:N], before) < 1e-3 and distance(rows[N:], behind) < 1e-3
    assert ctx.n_intact(0) == (N if kv == "q8_0" else 0) and ctx.n_not_computed() == 0
    np.testing.assert_array_equal(ctx.decode([7], len(TOKENS)), by_hand.decode([7], len(TOKENS)))


@pytest.mark.parametrize("kind", KINDS)
def test_in_pieces_and_beside_another_sequence(weights: Any, files: dict[str, Path], kind: str) -> None:
    """Rows are where the batch has their tokens."""
    read = Read(None)
    by_hand, other, ctx = (read.ask(context(weights[kind], "f16", *more)) for more in ((), (), (files[kind],)))
    bindings.load(by_hand.ptr, files[kind].read_bytes())
    by_hand.decode(TEXT, N)
    behind = read.rows(by_hand, len(TEXT))
    other.decode(OTHER, 0)
    beside = read.rows(other, len(OTHER))
    found: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for part in automatic.parts(len(TOKENS), 16):
        entries = [(text[pos], pos, [seq], False) for pos in part for seq, text in enumerate((TOKENS, OTHER))]
        assert ctx.batch(entries) == 0
        rows = read.rows(ctx, len(entries))
        for seq in found:
            found[seq].append(rows[seq::2])
    assert distance(np.concatenate(found[0])[N:], behind) < 5e-3
    assert distance(np.concatenate(found[1]), beside) < 5e-3


@pytest.mark.parametrize("kind", ["glm4moe", "deepseek2"])
def test_another_text_behind_the_beginning_of_a_trained_prefix(
    weights: Any, files: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Trained rows are all or none: what the sequence has of them is computed anew, and then what is asked for."""
    whole, trained, half = ikv.read(files[kind]), tmp_path / "trained.ikv", N // 2
    rest = {name: value for name, value in whole.manifest.items() if name not in ("format", "tokens", "model")}
    rows = [{x.il: getattr(x, side) for x in whole.layers} for side in "KV"]
    manifest = {**rest, "calibrated": {"by": "tests"}}
    trained.write_bytes(ikv.build(whole.manifest["model"], TOKENS[:N], *rows, manifest))
    read = Read(None)
    plain, ctx = (read.ask(context(weights[kind], "q8_0", *more)) for more in ((), (trained,)))
    for c in (plain, ctx):
        assert c.batch([(token, i, [0], False) for i, token in enumerate(TOKENS[:half])]) == 0
    assert ctx.n_intact(0) == half
    got, want = (c.decode(OTHER, half) for c in (ctx, plain))
    assert ctx.n_intact(0) == 0 and distance(got, want) < 1e-3
    assert distance(read.rows(ctx, len(OTHER)), read.rows(plain, len(OTHER))) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_heads_own_context_holds_none(weights: Any, files: dict[str, Path], kind: str) -> None:
    """The environment's prefix belongs to the model's layers, not to the head's."""
    with automatic.environment(str(files[kind])):
        model = Context(weights[kind], "q8_0", tail=None, n_ctx=256)
        head = Context(weights[kind], "q8_0", tail=None, n_ctx=256, ctx_type=1)
    assert (model.n_prefixes(), head.n_prefixes(), head.n_intact()) == (1, 0, 0)
