"""Extra cells, which stand for no token, in torch: where they are, who sees them, and that llama.cpp agrees."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.engines import llama_engine
from intactkv_export.errors import UsageError
from intactkv_export.prefix import ikv
from intactkv_export.torch_model import layers
from tests.support import extra_cells
from tests.support.cache_rows import random_tokens
from tests.support.log_probs import divergence, llama_log_probs

N = 5  # extra cells of a random model
WINDOWS = ["gemma2", "gemma3"]  # of 8 tokens
ORIGIN = {
    "text": "", "messages": None, "bos_only": False, "chat_template_sha256": None, "calibrated": None,
    "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
}  # fmt: skip


def at_positions(model, tokens, first):
    """K by layer, llama.cpp's rows, of tokens evaluated at the positions first, first + 1, ..."""
    cache = layers.empty_cache(model)
    ids = torch.tensor([tokens])
    with torch.no_grad():
        model.net(
            input_ids=ids, position_ids=torch.arange(first, first + len(tokens))[None], use_cache=True,
            **{model._cache_argument: cache},
        )  # fmt: skip
    return [model.to_rows(layer.keys, "K") for layer in cache.layers]


@pytest.mark.parametrize("name", ["llama-gqa", "llama-llama3", "qwen3-yarn", "smollm3", "phi3-partial", *WINDOWS])
def test_rows_turned_back(models, name):
    """RoPE is relative: evaluated elsewhere the tokens see each other as before, and K, turned back, is the same.

    Of the first token, evaluated at 0, K is what it was. Within the window, where every token sees all before it.
    """
    model = torch_model.load(models[name])
    tokens = random_tokens(8)
    here, there = at_positions(model, tokens, 0), at_positions(model, tokens, 90)
    back = model.at_first_position(there, range(90, 98))
    for il, (a, b, c) in enumerate(zip(model.at_first_position(here, range(8)), back, there, strict=True)):
        assert torch.allclose(a[0], here[il][0], rtol=1e-6), il
        assert (a - b).abs().max() < 2e-4 * a.abs().max(), il
        if getattr(model.decoder_layers[il].self_attn, "use_rope", True):
            assert (b - c).abs().max() > 0.3 * b.abs().max(), il


def test_rows_turned_back_are_llama_cpps(smol, student):
    """By its own position shift, in a cache of F32."""
    _, there, _ = extra_cells.text_rows(smol.reference, moved=False)
    _, want, _ = extra_cells.text_rows(smol.reference)
    got = student.at_first_position([there[il] for il in sorted(there)], range(20, 36))
    for il, rows in enumerate(got):
        assert np.abs(rows.numpy() - want[il]).max() < 1e-4 * np.abs(want[il]).max(), il


@pytest.fixture(scope="module")
def smol_file(smol, tmp_path_factory):
    """By the prefix's kind: a file with 16 extra cells."""
    root = tmp_path_factory.mktemp("extra")
    made = {}
    for kind, path in (("prompt", smol.ikv), ("bos", smol.bos)):
        made[kind] = extra_cells.write(path, smol.reference, root / f"{kind}.ikv")
    return made


@pytest.fixture(scope="module")
def student(smol):
    return torch_model.load(smol.reference)


@pytest.fixture(scope="module")
def chunk(smol):
    return extra_cells.text_rows(smol.reference, first=40, n=1)[0][1:25]


@pytest.mark.parametrize(
    ("kind", "kv_type", "attention"),
    [("bos", "f16", "fused"), ("bos", "q8_0", "portable"), ("prompt", "f16", "portable"), ("prompt", "q8_0", "fused")],
)
def test_logits_are_llama_cpps(smol, smol_file, student, chunk, kind, kv_type, attention, monkeypatch):
    """Exact weights. Measured: 2.5e-6 nats for F16, 2.3e-4 for q8_0; without the extra cells it is 0.24, and with
    every position as many higher as there are extra cells 0.14."""
    monkeypatch.setenv("INTACTKV_ATTN", attention)
    prefix = smol_file[kind]
    want = llama_log_probs(smol.reference, prefix.source, kv_type, prefix.tokens, [chunk])
    K, V = torch_model.prefix_rows(prefix)

    def off(extra, n):
        with torch.no_grad():
            cache = student.cache([k[:n] for k in K], [v[:n] for v in V], kv_type, extra=extra)
            return divergence(want, torch.log_softmax(student.forward([chunk], cache), -1))

    right = off(16, prefix.n_cells)
    assert right < {"f16": 2e-5, "q8_0": 2e-3}[kv_type]
    assert min(off(0, len(prefix.tokens)), off(0, prefix.n_cells)) > 5 * right


@pytest.mark.parametrize("n_tokens", [1, 3, 12])
@pytest.mark.parametrize("name", ["llama-gqa", *WINDOWS])
def test_windows_are_llama_cpps(models, name, n_tokens, tmp_path):
    """In layers with a window the extra cells leave it with the first token: with 12 tokens they have already.

    Measured: 1e-4 apart at most.
    """
    gguf, tokens = models[name].with_suffix(".gguf"), random_tokens(60)
    model, description, K, V = with_rows(models, name, tokens, n_tokens)
    path = tmp_path / "x.ikv"
    path.write_bytes(ikv.build(description, tokens[:n_tokens], K, V, {**ORIGIN, "extra_cells": N}))
    prefix = ikv.read(path)
    assert {int((x.cells >= n_tokens).sum()) for x in prefix.layers} == (
        {0, N} if name in WINDOWS and n_tokens == 12 else {N}
    )
    chunk = tokens[n_tokens : n_tokens + 30]
    want = llama_log_probs(gguf, path, "f16", prefix.tokens, [chunk])
    rows = torch_model.prefix_rows(prefix)
    with torch.no_grad():
        cache = model.cache(*rows, "f16", extra=N)
        parts = [chunk[:4], chunk[4:5], chunk[5:]]
        got = torch.log_softmax(torch.cat([model.forward([part], cache) for part in parts], 1), -1)
        plain = model.cache([k[:n_tokens] for k in rows[0]], [v[:n_tokens] for v in rows[1]], "f16")
        without = torch.log_softmax(model.forward([chunk], plain), -1)
    assert distance(got, want) < min(1e-3, 0.1 * distance(without, want))
    if name in WINDOWS:  # transformers' own mask, for which a row's number is its position
        with torch.no_grad():
            cache = model.cache(*rows, "f16", extra=N)
            ids = torch.tensor([chunk])
            arguments = {model._cache_argument: cache, "position_ids": cache.positions(30)[None, -30:]}
            wrong = torch.log_softmax(model.net(input_ids=ids, use_cache=True, **arguments).logits, -1)
        assert distance(wrong, want) > 5 * distance(got, want)


def distance(a, b):
    """Logits, not probabilities: those of some random models are all 0 or 1."""
    return float((a - b).norm() / b.norm())


def with_rows(models, name, tokens, n_tokens):
    """(model, description, K, V) for a prefix of n_tokens tokens with N extra cells: rows of other tokens, moved."""
    model = torch_model.load(models[name])
    description, K, V, _ = llama_engine.compute(models[name].with_suffix(".gguf"), tokens[:n_tokens], n_threads=1)
    cache = layers.empty_cache(model)
    with torch.no_grad():
        model.forward([tokens[-20:]], cache)
    k, v = layers.cached_rows(model, cache, 20)
    k = model.at_first_position([x[10 : 10 + N] for x in k], range(10, 10 + N))
    for il in K:
        K[il] = np.concatenate([K[il], k[il].numpy()]).astype(np.float16)
        V[il] = np.concatenate([V[il], v[il][10 : 10 + N].numpy()]).astype(np.float16)
    return model, description, K, V


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3"])
def test_one_by_one_with_a_tail_and_in_a_batch(models, name, attention):
    """All at once as token by token; gradients reach the extra rows; what is repeated is repeated."""
    model = torch_model.load(models[name], attention=attention)
    tokens = random_tokens(60)
    _, _, K, V = with_rows(models, name, tokens, 3)
    rows = [[torch.from_numpy(x[il].astype(np.float32)) for il in sorted(x)] for x in (K, V)]
    chunk = tokens[3:33]
    for tail in (0, 6):
        with torch.no_grad():
            cache = model.cache(*rows, "q8_0", tail=tail, extra=N)
            one = torch.cat([model.forward([[token]], cache) for token in chunk], 1)
            again = model.cache(*rows, "q8_0", batch=2, grows=False, tail=tail, extra=N)
            for _ in range(2):
                got = model.forward([chunk, chunk], again)
                assert (got - one).abs().max() < 1e-3 * one.abs().max(), tail
    leaves = [[x.clone().requires_grad_() for x in side] for side in rows]
    model.forward([chunk], model.cache(*leaves, "q4_0", grows=False, extra=N)).logsumexp(-1).sum().backward()
    assert all(bool((x.grad[-N:] != 0).any(-1).all()) for side in leaves for x in side)


def test_curves_and_analyses_leave_them_out(models):
    """layers.with_intact(): some of the tokens intact, and always the extra cells, which are no tokens of a curve."""
    model = torch_model.load(models["llama-gqa"])
    tokens = random_tokens(60)
    _, _, K, V = with_rows(models, "llama-gqa", tokens, 4)
    rows = [[torch.from_numpy(x[il].astype(np.float32)) for il in sorted(x)] for x in (K, V)]
    chunks = [tokens[10:20], tokens[20:30]]
    whole, cache = layers.with_intact(model, tokens[:4], chunks, *rows, 4, "f32")
    assert (cache.n_prefix, cache.n_extra) == (4 + N, N)
    some, cache = layers.with_intact(model, tokens[:4], chunks, *rows, 2, "f32")
    assert (cache.n_prefix, cache.n_extra) == (2 + N, N)
    assert all(a.shape == b.shape for a, b in zip(whole, some, strict=True))
    assert cache.positions(0).tolist() == [0, 1, *[0] * N, *range(2, 14)]


def test_more_than_there_are(models):
    model = torch_model.load(models["llama-gqa"])
    rows = [torch.zeros(3, model.n_head_kv, model.head_dim)] * model.n_layer
    for extra in (-1, 4):
        with pytest.raises(UsageError, match=f"{extra} extra cells among the 3"):
            model.cache(rows, rows, extra=extra)
