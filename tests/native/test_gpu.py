"""Layers in the memory of a GPU: logits, marks and saved states as on the CPU. Skipped where llama.cpp sees no GPU.

Both compute the same sums in another order and with other roundings. In an F16 cache that moves logits a little
(`noise`, measured without any prefix); in a quantized one a value that is rounded to the other side moves all that
follows, as it does between two sizes of batches on one CPU. So much is allowed, and no more: NOISE + 4 x noise. What a
missing or a misplaced row would change is many times as much (`test_a_prefix_is_seen`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support import automatic, extra_cells, gpu, in_sight, tiny_ggufs
from tests.support.gpu import Place
from tests.support.lowlevel import Context, L, kl
from tests.support.smol import Smol

# KL divergence, nats. On an H100 at most 2e-4, 8e-4, 0.15 and 0.05: the kernel fits the scales of 4 bits, CUDA does not
NOISE = {"f16": 2e-5, "q8_0": 2e-3, "q4_0": 0.2, "q8_0,q4_0": 0.08}
KINDS = list(NOISE)
Logits = list[np.ndarray]


pytestmark = pytest.mark.skipif(not gpu.devices(), reason="llama.cpp sees no GPU")


class Case:
    """What a scenario needs: a place, a kind of cache, files, tokens."""

    def __init__(self, place: Place, kv: str, files: dict[str, ikv.Prefix], gguf: Path, text: list[int]) -> None:
        self.place, self.kv, self.files, self.gguf, self.text = place, kv, files, gguf, text
        self.prefix = files["prompt"]
        self.n = len(self.prefix.tokens)

    def context(self, *names: str, **params: Any) -> Context:
        paths = [self.files[name].source for name in names]
        return self.place.context(self.gguf, self.kv, *(path for path in paths if path), **params)

    def loaded(self, name: str = "prompt", **params: Any) -> Context:
        ctx = self.context(**params)
        bindings.load(ctx.ptr, self.files[name].data)
        return ctx


def facts(ctx: Context) -> tuple[int, ...]:
    return ctx.n_intact(), ctx.n_tail(), ctx.arena_bytes(), ctx.n_not_computed()


def one_by_one(ctx: Context, tokens: list[int], pos: int) -> Logits:
    return [ctx.decode([token], pos + i) for i, token in enumerate(tokens)]


def plain(c: Case) -> tuple[Any, Logits]:
    ctx = c.context()
    return facts(ctx), [ctx.decode(c.text[:-4], 0), *one_by_one(ctx, c.text[-4:], len(c.text) - 4)]


def by_hand(c: Case) -> tuple[Any, Logits]:
    ctx = c.loaded()
    got = [ctx.decode(c.text[:-4], c.n), *one_by_one(ctx, c.text[-4:], c.n + len(c.text) - 4)]
    return facts(ctx), got


def tail(c: Case) -> tuple[Any, Logits]:
    """It is asked for after the first tokens: its rows are made while they may still be computed."""
    ctx = c.loaded()
    assert ctx.batch([(token, c.n + i, [0], False) for i, token in enumerate(c.text[:16])]) == 0
    asked = ctx.set_tail(12)
    got = [ctx.decode(c.text[16:-4], c.n + 16), *one_by_one(ctx, c.text[-4:], c.n + len(c.text) - 4)]
    return (asked, *facts(ctx)), got


def extra(c: Case) -> tuple[Any, Logits]:
    ctx = c.loaded("extra")
    return facts(ctx), [ctx.decode(c.text, c.n)]


def pieces(c: Case) -> tuple[Any, Logits]:
    """An automatic prefix in batches of 7: its tokens are computed, then taken over."""
    ctx, tokens = c.context("prompt"), c.prefix.tokens + c.text
    got = automatic.evaluate(ctx, tokens, 7, 0, c.n)
    return facts(ctx), [np.stack(got)]


def sequences(c: Case, unified: bool) -> tuple[Any, Logits]:
    """One behind the prefix, one that leaves it, one without, one with logits inside: in one batch."""
    tokens = c.prefix.tokens
    texts = [tokens + c.text[:10], tokens[:9] + c.text[:20], c.text[:12], tokens, tokens + c.text[5:9]]
    wanted = [c.n, 9, 0, c.n - 1, c.n + 3]
    ctx = c.context("prompt", n_seq_max=5, kv_unified=unified, n_ctx=1280)
    entries = [
        (text[pos], pos, [seq], pos >= wanted[seq])
        for pos in range(40)
        for seq, text in enumerate(texts)
        if pos < len(text)
    ]
    assert ctx.batch(entries) == 0
    rows = [ctx.logits(i) for i, entry in enumerate(entries) if entry[3]]
    return facts(ctx), [np.stack([row for row in rows if row is not None])]


def unified(c: Case) -> tuple[Any, Logits]:
    return sequences(c, True)


def streams(c: Case) -> tuple[Any, Logits]:
    return sequences(c, False)


def saved(c: Case) -> tuple[Any, Logits]:
    """Into the same context, and into one that holds the prefix itself."""
    ctx = c.loaded(tail=0 if c.kv == "f16" else 8)
    ctx.decode(c.text[:20], c.n)
    state = ctx.save()
    got = []
    for to in (ctx, c.context("prompt")):
        assert to.restore(state) and to.save() == state
        got.append(to.decode(c.text[20:], c.n + 20))
    return facts(ctx), got


def shifted(c: Case) -> tuple[Any, Logits]:
    """Right behind a batch that nobody waits for."""
    ctx = c.loaded(tail=0 if c.kv == "f16" else 8)
    assert ctx.batch([(token, c.n + i, [0], False) for i, token in enumerate(c.text[:30])]) == 0
    L.llama_memory_seq_rm(ctx.memory, 0, c.n, c.n + 8)
    L.llama_memory_seq_add(ctx.memory, 0, c.n + 8, -1, -8)
    got = ctx.decode(c.text[30:], c.n + 22)
    L.llama_memory_seq_add(ctx.memory, 0, 4, -1, 3)  # rows of the prefix too
    return facts(ctx), [got, ctx.decode(c.text[:6], c.n + len(c.text) - 8 + 3)]


def parted(c: Case) -> tuple[Any, Logits]:
    """Two sequences share the cells of an automatic prefix, one of them moves."""
    ctx = c.context("prompt", n_seq_max=2, kv_unified=True)
    tokens = c.prefix.tokens + c.text[:10]
    for seq in (0, 1):
        assert ctx.batch([(token, i, [seq], False) for i, token in enumerate(tokens)]) == 0
    L.llama_memory_seq_add(ctx.memory, 1, 2, -1, 5)
    return facts(ctx), [ctx.decode(c.text[10:], len(tokens) + 5 * seq, seq) for seq in (1, 0)]


Scenario = Callable[[Case], tuple[Any, Logits]]
SCENARIOS: list[Scenario] = [
    plain, by_hand, tail, extra, pieces, unified, streams, saved, shifted, parted,
]  # fmt: skip


@pytest.fixture(scope="module")
def here() -> Place:
    return Place(None)


@pytest.fixture(scope="module", params=["all", "ten layers", "all but the cache"])
def there(request: pytest.FixtureRequest) -> Iterator[Place]:
    place = Place(request.param)
    yield place
    place.close()


@pytest.fixture(scope="module")
def files(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ikv.Prefix]:
    """prompt: with other rows than the model's own, so that it shows who sees them; extra: with cells of no token."""
    root, whole = tmp_path_factory.mktemp("prefixes"), ikv.read(smol.ikv)
    rest = {k: v for k, v in whole.manifest.items() if k not in ("format", "tokens", "model")}
    rows = [{x.il: (getattr(x, side) * 0.8).astype(np.float16) for x in whole.layers} for side in "KV"]
    (root / "prompt.ikv").write_bytes(ikv.build(whole.manifest["model"], whole.tokens, *rows, rest))
    return {
        "prompt": ikv.read(root / "prompt.ikv"),
        "extra": extra_cells.write(smol.ikv, smol.reference, root / "extra.ikv", 4),
    }


Run = Callable[[Scenario, Place, str], tuple[Any, Logits]]


@pytest.fixture(scope="module")
def run(files: dict[str, ikv.Prefix], smol: Smol, here: Place) -> Run:
    """What a scenario gives in a place; on the CPU it is computed once."""
    text = automatic.some_text(here.model(smol.reference))
    kept: dict[tuple[str, str], tuple[Any, Logits]] = {}

    def get(scenario: Scenario, place: Place, kv: str) -> tuple[Any, Logits]:
        case = Case(place, kv, files, smol.reference, text)
        if place.name is not None:
            return scenario(case)
        key = scenario.__name__, kv
        if key not in kept:
            kept[key] = scenario(case)
        return kept[key]

    return get


@pytest.fixture(scope="module")
def noise(run: Run, here: Place, there: Place) -> float:
    return kl(*(np.concatenate(run(plain, place, "f16")[1]) for place in (here, there)))


def test_noise_is_small(noise: float) -> None:
    assert noise < 1e-2  # 4e-3 where a GPU adds up in F16


@pytest.mark.parametrize("kv", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
def test_as_on_the_cpu(
    run: Run, here: Place, there: Place, noise: float, scenario: Scenario, kv: str, record_property: Any
) -> None:
    (counts, want), (counts_there, got) = (run(scenario, place, kv) for place in (here, there))
    assert counts_there == counts
    apart = [kl(a, b) for a, b in zip(want, got, strict=True)]
    record_property("kl", max(apart))
    assert max(apart) < NOISE[kv] + 4 * noise, (apart, noise)


@pytest.mark.parametrize("kv", KINDS)
def test_a_prefix_is_seen(run: Run, there: Place, noise: float, kv: str) -> None:
    """These tests would see it if it were not: the rows are others than those that are computed."""
    (_, with_it), (_, without) = run(by_hand, there, kv), run(plain, there, kv)
    assert kl(with_it[0], without[0]) > 2 * (NOISE[kv] + 4 * noise)


@pytest.mark.parametrize("kv", ["q8_0", "q4_0", "q8_0,q4_0"])
def test_where_every_cell_is_intact_it_is_an_f16_cache(
    files: dict[str, ikv.Prefix], run: Run, smol: Smol, there: Place, here: Place, noise: float, kv: str
) -> None:
    """No roundings of a quantized cache are left to hide behind: every row is the right one."""
    text = automatic.some_text(here.model(smol.reference))
    exact, rest = (Case(there, kind, files, smol.reference, text) for kind in ("f16", kv))
    (_, want), ctx = by_hand(exact), rest.loaded(tail=512)
    got = [ctx.decode(text[:-4], rest.n), *one_by_one(ctx, text[-4:], rest.n + len(text) - 4)]
    assert ctx.n_intact() == rest.n + len(text)
    assert max(kl(a, b) for a, b in zip(want, got, strict=True)) < 4 * noise + 1e-5  # of F16 alone


@pytest.mark.parametrize("kv", KINDS)
def test_rows_are_the_same_bytes_and_states_move(
    files: dict[str, ikv.Prefix], run: Run, smol: Smol, here: Place, there: Place, noise: float, kv: str
) -> None:
    """What is loaded is rounded and rotated on the CPU; a state saved here goes on there, and the other way round."""
    text = automatic.some_text(here.model(smol.reference))
    cases = [Case(place, kv, files, smol.reference, text) for place in (here, there)]
    contexts = [case.loaded(tail=0 if kv == "f16" else 8) for case in cases]
    assert contexts[0].save() == contexts[1].save()
    for ctx in contexts:
        ctx.decode(text[:20], cases[0].n)
    states = [ctx.save() for ctx in contexts]
    want = [ctx.decode(text[20:], cases[0].n + 20) for ctx in contexts]
    for case, state, logits in zip(reversed(cases), states, want, strict=True):
        ctx = case.context()
        assert ctx.restore(state) and ctx.save() == state
        assert kl(logits, ctx.decode(text[20:], case.n + 20)) < NOISE[kv] + 4 * noise


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_cells_in_sight(
    here: Place, there: Place, noise: float, kv: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A model with sliding windows: two caches, and a first token that stays in sight in both."""
    gguf = tmp_path_factory.getbasetemp() / "gemma2.gguf"
    if not gguf.is_file():
        tiny_ggufs.write(gguf, "gemma2", head_dim=128)
        in_sight.write(gguf, gguf.with_suffix(".ikv"), 1, n_extra=3)
    prefix = ikv.read(gguf.with_suffix(".ikv"))
    tokens = np.random.default_rng(1).integers(3, 250, 320).tolist()
    small = {"n_ctx": 1024, "n_batch": 32, "n_ubatch": 32, "swa_full": False}
    got = []
    for place in (here, there):
        ctx = place.context(gguf, kv, **small)
        bindings.load(ctx.ptr, prefix.data)
        got.append(np.concatenate([ctx.decode(tokens[i : i + 32], 1 + i) for i in range(0, len(tokens), 32)]))
    assert kl(*got) < NOISE[kv] + 4 * noise


def test_what_is_said_of_attention(here: Place, there: Place, smol: Smol) -> None:
    """The kernel's only where all of the cache is in the memory of the CPU."""
    del here
    said = there.context(smol.reference, "q8_0").attention()
    assert said == ("fused" if there.name == "all but the cache" else "stock")
