"""Latents (MLA): one row a token, K all of it and V its first values. Intact ones are read at F16 on both sides.

Tiny random models: the latents of DeepSeek and of Mistral 4, one whose size the kernel does not know, and the same
architecture as older files have it, with plain K and V.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary, bindings
from intactkv_export.prefix import ikv
from tests.support import automatic, lowlevel, random_models, tiny_ggufs
from tests.support.lowlevel import Context, L
from tests.support.own_process import run

N_ROT, HEAD_DIM = 64, 128
LATENTS = {"576": 512, "320": 256, "plain": None}
ATTENTION = ["portable", "fused"]
N, BY = 40, 37
TOKENS = [1, *(int(t) for t in np.random.default_rng(5).integers(3, tiny_ggufs.N_VOCAB, N + 29))]
PREFIX, TEXT = TOKENS[:N], TOKENS[N:]
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 512}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("mla")

    def get(name: str, **extra: Any) -> Path:
        out = root / f"{name}{len(extra)}.gguf"
        n_kv = 1 if LATENTS[name] else tiny_ggufs.N_HEAD
        return out if out.exists() else tiny_ggufs.write(
            out, "deepseek2", HEAD_DIM, N_ROT, n_kv, latent=LATENTS[name], **extra
        )  # fmt: skip

    return get


@pytest.fixture(scope="module")
def model(path: Callable[..., Path]) -> Callable[..., Any]:
    made: dict[Path, Any] = {}

    def get(name: str, **extra: Any) -> Any:
        file = path(name, **extra)
        if file not in made:
            made[file] = lowlevel.load_model(file)
        return made[file]

    return get


@pytest.fixture(params=ATTENTION)
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("INTACTKV_ATTN", request.param)
    return str(request.param)


def context(weights: Any, kv: str, tail: int = 0, **params: Any) -> Context:
    sizes = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1}
    return Context(weights, kv, tail=tail, **{**sizes, **params})


def logits(ctx: Context, tokens: Sequence[int], at: int, seq: int = 0) -> np.ndarray:
    """A batch, then token by token."""
    parts = [ctx.decode(tokens[:-4], at, seq)]
    return np.concatenate(parts + [ctx.decode([t], at + len(tokens) - 4 + i, seq) for i, t in enumerate(tokens[-4:])])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def state_at(weights: Any, at: int) -> bytes:
    """The prefix as an F16 cache holds it."""
    ctx = context(weights, "f16")
    ctx.decode(PREFIX, at)
    return ctx.save()


@pytest.mark.parametrize("kv", ["q8_0", "q4_0", "iq4_nl", "bf16"])
@pytest.mark.parametrize("name", LATENTS)
def test_intact_latents_are_read_at_f16(model: Callable[..., Any], attention: str, name: str, kv: str) -> None:
    """A prefix, and behind it a tail as long as everything: as an F16 cache. Were K or V read from the rounded rows,
    the distance would be that of a rounded cache."""
    weights = model(name)
    exact = context(weights, "f16")
    exact.decode(PREFIX, 0)
    expected = logits(exact, TEXT, N)
    ctx, rounded = context(weights, kv, tail=256), context(weights, kv)
    assert ctx.restore(state_at(weights, 0)) and ctx.n_intact() == N
    got = logits(ctx, TEXT, N)
    assert ctx.n_intact() == len(TOKENS) and ctx.n_tail() == len(TEXT)
    assert ctx.attention() == attention
    rounded.decode(PREFIX, 0)
    plain = distance(logits(rounded, TEXT, N), expected)
    assert distance(got, expected) < min(2e-3, plain / 3), plain
    row = 2 * (LATENTS[name] + N_ROT) if LATENTS[name] else 2 * 2 * HEAD_DIM * tiny_ggufs.N_HEAD
    assert ctx.arena_bytes() >= len(TOKENS) * row * tiny_ggufs.N_LAYER


@pytest.mark.parametrize("name", LATENTS)
def test_a_loaded_prefix_in_an_f16_cache_is_the_computed_one(
    model: Callable[..., Any], attention: str, name: str
) -> None:
    weights = model(name)
    computed, loaded = context(weights, "f16"), context(weights, "f16")
    computed.decode(PREFIX, 0)
    assert loaded.restore(computed.save()) and loaded.n_intact() == 0
    np.testing.assert_array_equal(logits(loaded, TEXT, N), logits(computed, TEXT, N))
    assert loaded.save() == computed.save()


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("name", LATENTS)
def test_states(model: Callable[..., Any], attention: str, name: str, unified: bool) -> None:
    """Intact cells of a prefix and of the tail; into another sequence, bit for bit."""
    weights = model(name)
    params = dict(tail=16, n_seq_max=2, kv_unified=unified)
    ctx = context(weights, "q4_0", **params)
    assert ctx.restore(state_at(weights, 0), 1)
    logits(ctx, TEXT[:20], N, 1)
    saved = ctx.save(1)
    again = context(weights, "q4_0", **params)
    again.decode(TEXT[:9], 0, 1)  # is replaced
    assert again.restore(saved, 1)
    assert (again.n_intact(1), again.n_tail(1)) == (ctx.n_intact(1), ctx.n_tail(1))
    assert again.n_tail(1) >= 16 and again.n_intact(1) == again.n_tail(1) + N
    assert again.save(1) == saved
    np.testing.assert_array_equal(again.decode([7], N + 20, 1), ctx.decode([7], N + 20, 1))


@pytest.mark.parametrize("extra", [{}, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", LATENTS)
def test_shift(model: Callable[..., Any], attention: str, name: str, kv: str, extra: dict[str, Any]) -> None:
    """Only the rotated part of a latent moves. Intact cells are as if they had been computed there in F16, rounded ones
    nearly as if they had been computed there in the same cache."""
    weights = model(name, **extra)

    def shifted(ctx: Context) -> np.ndarray:
        L.llama_memory_seq_add(ctx.memory, 0, 0, -1, BY)
        return ctx.decode(TEXT[:1], N + BY)

    assert L.llama_memory_can_shift(context(weights, kv).memory)
    there, apart = context(weights, "f32"), context(weights, "f32")
    there.decode(PREFIX, BY)
    true = there.decode(TEXT[:1], N + BY)
    apart.decode(PREFIX, 0)
    L.llama_memory_seq_add(apart.memory, 0, N - 1, -1, BY)
    unmoved = distance(apart.decode(TEXT[:1], N + BY), true)  # about what a shift that does nothing would give

    intact = context(weights, kv, tail=256)
    assert intact.restore(state_at(weights, 0))
    assert distance(shifted(intact), true) < min(3e-3, unmoved / 8)

    rounded, fresh = context(weights, kv), context(weights, kv)
    fresh.decode(PREFIX, BY)
    noise = distance(fresh.decode(TEXT[:1], N + BY), true)
    rounded.decode(PREFIX, 0)
    assert distance(shifted(rounded), true) < max(2 * noise, 2e-3)


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_without_a_prefix_the_bits_of_unpatched(path: Callable[..., Path], stock_lib: Path, kv: str) -> None:
    code = f"""
import hashlib
from tests.support import lowlevel
model = lowlevel.load_model({str(path("576"))!r})
ctx = lowlevel.Context(model, {kv!r})
h = hashlib.sha256(ctx.decode({PREFIX}, 0).tobytes())
for i, token in enumerate({TEXT}):
    h.update(ctx.decode([token], {N} + i).tobytes())
print(h.hexdigest(), hashlib.sha256(ctx.save()).hexdigest())
"""
    stock = run(code, lib=stock_lib)
    for attention in ("stock", "portable"):
        ours = run(code, INTACTKV_ATTN=attention)
        assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
        assert len(ours.stdout) > 100 and ours.stdout == stock.stdout, attention


# --- prefix files ---


def written(gguf: Path, tokens: list[int]) -> bytes:
    about, K, V, *_ = llama_engine.compute(gguf, tokens)
    origin = {
        **{"text": "x", "messages": None, "bos_only": False, "chat_template_sha256": None, "calibrated": None},
        "reference": {"sha256": "0" * 64, "dtype": "F32", "name": gguf.name, "quantized": False},
        "engine": {"name": "llama", "dtype": "f32", "versions": {}},
        "created_by": "the tests",
    }
    return ikv.build(about, tokens, K, V, origin)


@pytest.mark.parametrize("name", LATENTS)
def test_a_prefix_file(path: Callable[..., Path], model: Callable[..., Any], name: str) -> None:
    """Computed by the llama engine, read by both readers, loaded; and given to a sequence by itself."""
    data = written(path(name), PREFIX)
    prefix = ikv.read(data)
    has_v = LATENTS[name] is None
    assert prefix.manifest["format"] == (1 if has_v else 2)
    for layer in prefix.layers:
        assert layer.K.shape[1:] == ((4, HEAD_DIM) if has_v else (1, LATENTS[name] + N_ROT))
        assert layer.V.shape == (N, 4, HEAD_DIM) if has_v else layer.V.size == 0
    assert bindings.verify(data) == N
    weights = model(name)
    exact = context(weights, "f16")
    exact.decode(PREFIX, 0)
    expected = logits(exact, TEXT, N)
    file = path(name).with_suffix(".ikv")
    file.write_bytes(data)
    for kv in ("f16", "q8_0"):
        loaded = context(weights, kv, tail=256 if kv == "q8_0" else 0)
        assert bindings.load(loaded.ptr, data) == N
        assert loaded.n_intact() == (0 if kv == "f16" else N)
        got = logits(loaded, TEXT, N)
        assert distance(got, expected) < 3e-3
        given = automatic.context(weights, kv, file, tail=256 if kv == "q8_0" else 0, n_ctx=256, n_batch=256)
        whole = np.array(automatic.evaluate(given, TOKENS[: N + 5], 256, wanted=N))
        assert given.n_not_computed() == N
        assert distance(whole, expected[:5]) < 3e-3


def test_a_prefix_of_latents_is_not_one_of_k_and_v(path: Callable[..., Path], model: Callable[..., Any]) -> None:
    for mine, other in (("576", "plain"), ("plain", "576"), ("576", "320")):
        ctx, data = context(model(other), "q8_0"), written(path(mine), PREFIX[:3])
        with pytest.raises(
            IntactKVError, match=r"another model: layer 0 \w+ is \d+ in the prefix and \d+ in the model"
        ):
            bindings.load(ctx.ptr, data)


@pytest.mark.parametrize("name", random_models.MLA)
def test_models_of_transformers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By upstream's converter; the prefix at F16 helps, and the tail too."""
    pytest.importorskip("torch")
    directory = random_models.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    gguf = directory.with_name(f"{name}.gguf")
    data, weights = written(gguf, PREFIX), lowlevel.load_model(gguf)
    exact = context(weights, "f16")
    exact.decode(PREFIX, 0)
    expected = logits(exact, TEXT, N)
    for attention in ATTENTION:
        monkeypatch.setenv("INTACTKV_ATTN", attention)
        rounded, mixed, all_intact = (context(weights, "q8_0", tail=tail) for tail in (0, 0, 256))
        rounded.decode(PREFIX, 0)
        bindings.load(mixed.ptr, data)
        bindings.load(all_intact.ptr, data)
        assert mixed.n_intact() == N
        plain, got, best = (distance(logits(ctx, TEXT, N), expected) for ctx in (rounded, mixed, all_intact))
        assert best < plain / 3 and got < plain, (plain, got, best)


def test_sparse_attention_is_refused_with_the_reason(tmp_path: Path) -> None:
    """By the header and by the library: an indexer's cache beside the latents is no part of a prefix."""
    pytest.importorskip("torch")
    directory = random_models.build("deepseek32", tmp_path / "deepseek32")
    random_models.to_gguf([directory])
    gguf = directory.with_name("deepseek32.gguf")
    why = "an indexer with a cache of its own chooses the tokens that are attended (sparse attention)"
    with Vocabulary(gguf) as vocabulary:
        assert vocabulary.refusal() == why
    with pytest.raises(IntactKVError, match=re.escape(f"'deepseek32' cannot carry a prefix: {why}")):
        llama_engine.describe(gguf)
