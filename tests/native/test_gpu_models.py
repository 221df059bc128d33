"""Models that keep more than plain K and V, in the memory of a GPU behind a prefix. Skipped where llama.cpp sees none.

    CMAKE_ARGS=-DGGML_CUDA=ON pip install .[dev]      # or another backend; from the sources, in a venv
    python -m pytest tests/native/test_gpu.py tests/native/test_gpu_models.py

Tiny random models. A GPU adds up in another order and multiplies with other roundings: `noise` is how far that moves
the logits of an F16 cache without any prefix, and every scenario may be that far from the CPU, a few times. So may a
quantized cache all of whose cells are intact: no row that was rounded, lost or misplaced fits in there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.libllama import bindings
from tests.support import gemma4_ggufs, gpu, hybrids, random_families, random_models, tiny_ggufs, upstream_archs
from tests.support.gpu import Place
from tests.support.lowlevel import Context, L

pytestmark = pytest.mark.skipif(not gpu.devices(), reason="llama.cpp sees no GPU")

N = 40  # tokens of the prefix: more than the windows
TOKENS = [int(t) for t in np.random.default_rng(0).integers(3, 120, N + 24)]
PREFIX, TEXT = TOKENS[:N], TOKENS[N:]
ALL = 256  # a tail as long as everything
SECTIONS = {"rope.dimension_sections": [12, 10, 10, 0]}

DIRECT: dict[str, Callable[[Path], Path]] = {
    "latents of DeepSeek": lambda path: tiny_ggufs.write(path, "deepseek2", 128, 64, 1, latent=512),
    "latents of Mistral 4": lambda path: tiny_ggufs.write(path, "deepseek2", 128, 64, 1, latent=256),
    "M-RoPE (Qwen2.5-VL)": lambda path: tiny_ggufs.write(path, "qwen2vl", **SECTIONS),
    "IM-RoPE (Qwen3-VL)": lambda path: tiny_ggufs.write(path, "qwen3vl", **SECTIONS),
    # all experts: where some are chosen, roundings choose others
    "sinks (gpt-oss)": lambda path: tiny_ggufs.write(path, "gpt-oss", n_expert_used=tiny_ggufs.N_EXPERT),
    "shared K and V (Gemma 4)": gemma4_ggufs.write,
    "Mamba 2 layers": lambda path: tiny_ggufs.write(path, "granitehybrid", n_head_kv=[2, 0, 2]),
}
UPSTREAM = {
    "LFM2": "lfm2-dense",
    "Qwen 3.5": "qwen35-dense",
    "Qwen3-Next": "qwen3next-moe",
    "Granite H": "granitehybrid-dense",
    "Falcon-H1": "falcon-h1-dense",
    "Kimi Linear": "kimi-linear-moe",
    "chunks (Llama 4)": "llama4-moe",
}
TRANSFORMERS = {"shared K and V (Gemma 3n)": "gemma3n"}
KINDS = [*DIRECT, *UPSTREAM, *TRANSFORMERS]


@pytest.fixture(scope="module")
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("gpu")
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in DIRECT:
            return DIRECT[kind](root / f"{len(made)}.gguf")
        if kind in TRANSFORMERS:
            pytest.importorskip("torch")
            pytest.importorskip("transformers")
            request.getfixturevalue("converter")
            name = TRANSFORMERS[kind]
            random_models.to_gguf([random_families.build(name, root / name)])
            return root / f"{name}.gguf"
        if not upstream_archs.can_build():
            pytest.skip("no compiler, or no libllama-common (make tools)")
        return upstream_archs.make(root, [UPSTREAM[kind].rpartition("-")[0]]).paths[UPSTREAM[kind]]

    def get(kind: str) -> Path:
        if kind not in made:
            path = make(kind)
            path.with_suffix(".ikv").write_bytes(hybrids.prefix_of(path, PREFIX))
            made[kind] = path
        return made[kind]

    return get


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    place = Place(None)
    yield place
    place.close()


@pytest.fixture(scope="module", params=["all", "two layers", "all but the cache"])
def there(request: pytest.FixtureRequest) -> Iterator[Place]:
    place = Place(request.param)
    yield place
    place.close()


class Case:
    """A model in a place, with a kind of cache; a quantized one has a tail as long as everything."""

    def __init__(self, place: Place, path: Path, kv: str, tail: int | None = None) -> None:
        self.place, self.path, self.kv = place, path, kv
        self.tail = (0 if kv == "f16" else ALL) if tail is None else tail
        self.data = path.with_suffix(".ikv").read_bytes()

    def context(self, *prefixes: Path, **params: Any) -> Context:
        sizes = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256}
        return self.place.context(self.path, self.kv, *prefixes, tail=self.tail, **{**sizes, **params})

    def loaded(self, **params: Any) -> Context:
        ctx = self.context(**params)
        assert bindings.load(ctx.ptr, self.data) == N
        return ctx


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def behind(ctx: Context, at: int = N) -> np.ndarray:
    """Logits of the text: one token, a batch, then one by one."""
    parts = [TEXT[:1], TEXT[1:21], *([token] for token in TEXT[21:])]
    rows = []
    for part in parts:
        rows.append(ctx.decode(part, at))
        at += len(part)
    return np.concatenate(rows)


def computed(c: Case) -> np.ndarray:
    ctx = c.context()
    ctx.decode(PREFIX, 0)
    return behind(ctx)


def by_hand(c: Case) -> np.ndarray:
    return behind(c.loaded())


def given(c: Case) -> np.ndarray:
    """To a sequence that begins with it, in two batches."""
    ctx = c.context(c.path.with_suffix(".ikv"))
    assert ctx.batch([(token, i, [0], False) for i, token in enumerate(PREFIX[:30])]) == 0
    assert ctx.batch([(token, 30 + i, [0], False) for i, token in enumerate(PREFIX[30:])]) == 0
    got = behind(ctx)
    assert ctx.n_not_computed() >= 10  # where a window moves over the cells, no more than these
    return got


def saved(c: Case) -> np.ndarray:
    """In the middle of the text, and gone on with in another context."""
    ctx, again = c.loaded(), c.context()
    ctx.decode(TEXT[:9], N)
    state = ctx.save()
    assert again.restore(state) and again.save() == state
    assert again.n_tail() == ctx.n_tail()
    return again.decode(TEXT[9:], N + 9)


def shifted(c: Case) -> np.ndarray:
    ctx = c.loaded()
    if not L.llama_memory_can_shift(ctx.memory):
        pytest.skip("upstream moves no sequence of this model")
    ctx.decode(TEXT[:9], N)
    L.llama_memory_seq_add(ctx.memory, 0, 0, -1, 5)
    return ctx.decode(TEXT[9:], N + 9 + 5)


def _copied(c: Case, unified: bool) -> np.ndarray:
    """Two sequences go on apart, in the same batches."""
    ctx = c.loaded(n_seq_max=2, kv_unified=unified, n_ctx=512)
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    rows = []
    for first in (0, 8):
        part = [(TEXT[i + 8 * seq], N + i, [seq], True) for i in range(first, first + 8) for seq in (0, 1)]
        assert ctx.batch(part) == 0
        rows += [ctx.logits(i) for i in range(len(part))]
    return np.stack([row for row in rows if row is not None])


def pool(c: Case) -> np.ndarray:
    return _copied(c, True)


def streams(c: Case) -> np.ndarray:
    return _copied(c, False)


Scenario = Callable[[Case], np.ndarray]
SCENARIOS: list[Scenario] = [by_hand, given, saved, shifted, pool, streams]


@pytest.fixture(scope="module")
def expected(gguf: Callable[[str], Path], here: Place) -> Callable[[Scenario, str], np.ndarray]:
    """What a scenario gives in an F16 cache on the CPU."""
    kept: dict[tuple[str, str], np.ndarray] = {}

    def get(scenario: Scenario, kind: str) -> np.ndarray:
        key = scenario.__name__, kind
        if key not in kept:
            kept[key] = scenario(Case(here, gguf(kind), "f16"))
        return kept[key]

    return get


@pytest.fixture(scope="module")
def noise(
    gguf: Callable[[str], Path], there: Place, expected: Callable[[Scenario, str], np.ndarray]
) -> Callable[[str], float]:
    kept: dict[str, float] = {}

    def get(kind: str) -> float:
        if kind not in kept:
            kept[kind] = distance(computed(Case(there, gguf(kind), "f16")), expected(computed, kind))
        return kept[kind]

    return get


def bound(noise: float, kv: str) -> float:
    """F16 rows are rounded once more where the cache is rotated. Attention in an F16 cache is upstream's alone."""
    return 4 * (noise if kv == "f16" else min(noise, 4e-3)) + 4e-3


@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_small(noise: Callable[[str], float], kind: str, record_property: Any) -> None:
    record_property("noise", noise(kind))
    # On an H100 0.05 of Gemma 4's in an F16 cache, prefix or not, which is upstream's; at most 4e-3 of the others'
    assert noise(kind) < (0.1 if "Gemma" in kind else 0.01)


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_cpu(
    gguf: Callable[[str], Path],
    there: Place,
    expected: Callable[[Scenario, str], np.ndarray],
    noise: Callable[[str], float],
    kind: str,
    scenario: Scenario,
    kv: str,
    record_property: Any,
) -> None:
    apart = distance(scenario(Case(there, gguf(kind), kv)), expected(scenario, kind))
    record_property("distance", apart)
    assert apart < bound(noise(kind), kv), noise(kind)


@pytest.mark.parametrize("tail", [0, 16])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_and_its_tail_are_not_rounded(
    gguf: Callable[[str], Path], here: Place, there: Place, kind: str, kv: str, tail: int
) -> None:
    """As many cells as on the CPU, of the same bytes, and closer to exact than a cache that rounded them."""
    on_cpu, case = Case(here, gguf(kind), kv, tail), Case(there, gguf(kind), kv, tail)
    exact = by_hand(Case(there, gguf(kind), "f16"))
    ctx, other = case.loaded(), on_cpu.loaded()
    assert ctx.save() == other.save()
    assert (ctx.n_intact(), ctx.arena_bytes()) == (other.n_intact(), other.arena_bytes())
    assert ctx.n_intact() == (32 if kind == "LFM2" else N)  # upstream's tiny one has a window
    got, rounded = behind(ctx), computed(Case(there, gguf(kind), kv, 0))
    behind(other)
    assert (ctx.n_intact(), ctx.n_tail()) == (other.n_intact(), other.n_tail())
    assert np.isfinite(got).all()
    assert distance(got[:1], exact[:1]) < distance(rounded[:1], exact[:1])
    if tail:
        assert distance(got, exact) < distance(rounded, exact)


@pytest.mark.parametrize("kind", KINDS)
def test_these_bounds_would_see_a_fault(
    gguf: Callable[[str], Path],
    there: Place,
    expected: Callable[[Scenario, str], np.ndarray],
    noise: Callable[[str], float],
    kind: str,
) -> None:
    """A prefix that is lost, and one that is rounded."""
    want, case = expected(by_hand, kind), Case(there, gguf(kind), "q4_0", 0)
    assert distance(behind(case.context(), 0), want) > 2 * bound(noise(kind), "q4_0")
    if kind not in ("Qwen3-Next", "shared K and V (Gemma 3n)"):  # whose tiny models hardly heed their attention
        assert distance(computed(case), want) > bound(noise(kind), "q4_0")
