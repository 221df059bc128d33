"""Position shift (llama_memory_seq_add) of every kind of K: head sizes, partial and trailing RoPE, cache types, intact
cells, RoPE that is scaled. Upstream crashes on half of these.

The oracle is what the same tokens give when they are evaluated at the new positions in an F32 cache. A shift rounds
the quantized cells once more, so it may be about twice as far from it as evaluating them in the same cache is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import lowlevel, tiny_ggufs
from tests.support.lowlevel import Context, L

# architecture, head size, rotated elements: pairs side by side (llama, glm4), halves (qwen3, phi3), the last (minicpm3)
SHAPES = [
    ("llama", 64, 64),
    ("llama", 80, 80),
    ("llama", 96, 96),
    ("llama", 128, 128),
    ("glm4", 64, 32),
    ("glm4", 96, 48),
    ("glm4", 128, 64),
    ("glm4", 192, 64),
    ("qwen3", 128, 128),
    ("phi3", 96, 96),
    ("phi3", 96, 72),
    ("phi3", 80, 20),
    ("minicpm3", 96, 32),
    ("minicpm3", 128, 64),
]
KV = ["f16", "bf16", "q8_0", "q4_0"]
N, BY = 50, 37
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 512,
}

TOKENS = [1, *(int(t) for t in np.random.default_rng(1).integers(3, tiny_ggufs.N_VOCAB, N + 10))]
PREFIX = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Any] = {}

    def get(arch: str, head_dim: int, n_rot: int, **extra: Any) -> Any:
        path = Path(root, f"{arch}-{head_dim}-{n_rot}-{len(extra)}.gguf")
        if path.name not in made:
            n_head_kv = tiny_ggufs.N_HEAD if arch == "minicpm3" else 2
            made[path.name] = lowlevel.load_model(tiny_ggufs.write(path, arch, head_dim, n_rot, n_head_kv, **extra))
        return made[path.name]

    return get


def context(weights: Any, kv: str) -> Context:
    return Context(weights, kv, "f16", n_ctx=256, n_batch=256, n_ubatch=256)


def fresh(weights: Any, kv: str, by: int = BY) -> np.ndarray:
    """Evaluated where a shift would have moved it."""
    ctx = context(weights, kv)
    ctx.decode(TOKENS[:N], by)
    return ctx.decode(TOKENS[N:], N + by)


def apart(weights: Any) -> np.ndarray:
    """What a shift that does not rotate would give: the tokens are where they were, but for the last."""
    ctx = context(weights, "f32")
    ctx.decode(TOKENS[:N], 0)
    L.llama_memory_seq_add(ctx.memory, 0, N - 1, -1, BY)
    return ctx.decode(TOKENS[N:], N + BY)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def close(got: np.ndarray, weights: Any, kv: str) -> bool:
    true = fresh(weights, "f32")
    noise = distance(fresh(weights, kv), true)
    assert distance(apart(weights), true) > 4 * noise  # else nothing is shown
    return distance(got, true) < 1.8 * noise


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_cells_as_if_evaluated_there(model: Callable[..., Any], shape: tuple[str, int, int], kv: str) -> None:
    if kv.startswith("q") and shape[1] % 32:
        pytest.skip("llama.cpp has no such cache")
    weights = model(*shape)
    ctx = context(weights, kv)
    assert L.llama_memory_can_shift(ctx.memory)
    ctx.decode(TOKENS[:N], 0)
    L.llama_memory_seq_add(ctx.memory, 0, 0, -1, BY)
    assert close(ctx.decode(TOKENS[N:], N + BY), weights, kv)


@pytest.mark.parametrize("kv", ["bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize(
    "shape",
    [s for s in SHAPES if s[1] % 32 == 0 and s[:2] != ("llama", 64)],
    ids=lambda shape: "-".join(map(str, shape)),
)
def test_with_intact_cells(model: Callable[..., Any], shape: tuple[str, int, int], kv: str) -> None:
    """As if the prefix had been evaluated there in F16; with nothing but the prefix in the cache, only the token's own
    cell is not exact."""
    weights = model(*shape)
    there, here = context(weights, "f16"), context(weights, "f16")
    there.decode(TOKENS[:PREFIX], BY)
    here.decode(TOKENS[:PREFIX], 0)
    expected, mixed = context(weights, kv), context(weights, kv)
    assert expected.restore(there.save()) and mixed.restore(here.save())
    L.llama_memory_seq_add(mixed.memory, 0, 0, -1, BY)
    tokens = TOKENS[PREFIX : PREFIX + 1]
    got, right = mixed.decode(tokens, PREFIX + BY), expected.decode(tokens, PREFIX + BY)
    assert mixed.n_intact() == PREFIX
    assert distance(got, right) < 4e-3  # a last bit of K can move the fitted scale of a q4_0 block by a step
    exact = there.decode(tokens, PREFIX + BY)
    wrong = context(weights, kv)
    assert wrong.restore(here.save())
    L.llama_memory_seq_add(wrong.memory, 0, PREFIX - 1, -1, BY)
    assert distance(wrong.decode(tokens, PREFIX + BY), exact) > 4 * distance(got, exact)


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("shape", [("qwen3", 128, 128), ("phi3", 96, 72)], ids=str)
def test_scaled_rope_does_not_scale_k_again(model: Callable[..., Any], shape: tuple[str, int, int], kv: str) -> None:
    """YaRN multiplies K by 1.14 here as it rotates it. Ten shifts that come to BY would make it 3.7 times as long."""
    weights = model(*shape, **YARN)
    ctx = context(weights, kv)
    ctx.decode(TOKENS[:N], 0)
    end = N
    for by in [4] * 9 + [1]:
        L.llama_memory_seq_add(ctx.memory, 0, 0, -1, by)
        end += by
        ctx.decode(TOKENS[N : N + 1], end)  # a shift is done with the next batch
        L.llama_memory_seq_rm(ctx.memory, 0, end, -1)
    got = ctx.decode(TOKENS[N:], N + BY)
    true = fresh(weights, "f32")
    assert distance(got, true) < 4 * max(distance(fresh(weights, kv), true), 1e-3)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize("kv", ["f16", "bf16", "q8_0", "q5_1", "q4_0"])
def test_cells_that_stay_keep_their_bits(model: Callable[..., Any], kv: str, unified: bool) -> None:
    """Those of another sequence, and those before the ones that move: they are not rounded once more."""
    weights = model("llama", 64, 64)
    ctx = Context(weights, kv, "f16", n_ctx=512, n_batch=256, n_ubatch=256, n_seq_max=2, kv_unified=unified)
    for seq in (0, 1):
        ctx.decode(TOKENS[:N], 0, seq)
    L.llama_memory_seq_rm(ctx.memory, 0, 10, 20)
    other = ctx.save(1)
    L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    L.llama_memory_seq_rm(ctx.memory, 1, 10, -1)
    first = ctx.save(1)
    assert ctx.restore(other, 1)
    L.llama_memory_seq_add(ctx.memory, 0, 20, -1, -10)
    ctx.decode(TOKENS[N : N + 1], N - 10)
    assert ctx.save(1) == other
    L.llama_memory_seq_rm(ctx.memory, 0, 10, -1)
    L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    assert ctx.save(1) == first
