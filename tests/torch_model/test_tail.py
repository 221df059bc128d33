"""The tail in torch: all tokens at once, each seeing what it would one by one, and the gradients of that."""

from __future__ import annotations

import pytest

from tests.support import random_models

pytest.importorskip("torch", reason="the extra [convert] is not installed")

from pydoc_data import topics

import torch
from transformers.cache_utils import Cache, DynamicLayer

from intactkv_export import torch_model
from intactkv_export.errors import UsageError
from intactkv_export.libllama import default_tail, kv_pair
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.prefix import ikv
from tests.support.cache_rows import random_tokens
from tests.support.log_probs import divergence, llama_log_probs

N_PREFIX = 5
TOKENS = random_tokens(24)
# One of each architecture: RoPE scaling, biases and vision have no part in this
NAMES = ["llama-gqa", *(name for name in random_models.MODELS if "-" not in name)]


class _OneVersion(DynamicLayer):
    """What one token sees, as single rows: the prefix, older cells rounded, the newest `tail` of the others intact."""

    def __init__(self, k, v, layout, kv_type, tail):
        super().__init__()
        self.keys, self.values = k, v
        self.dtype, self.device, self.is_initialized = k.dtype, k.device, True
        self.layout, self.kv_type, self.tail, self.n_prefix = layout, kv_type, tail, k.shape[-2]

    def update(self, key_states, value_states, *args, **kwargs):
        assert key_states.shape[-2] == 1
        self.keys, self.values = torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)
        old = max(self.n_prefix, self.keys.shape[-2] - self.tail)
        return tuple(
            torch.cat(
                [
                    rows[..., : self.n_prefix, :],
                    self.layout.as_cached(rows[..., self.n_prefix : old, :], kind, kv_type),
                    self.layout.as_intact(rows[..., old:, :], kind, kv_type),
                ],
                -2,
            )
            for rows, kind, kv_type in zip((self.keys, self.values), "KV", self.kv_type, strict=True)
        )


def load(path, **settings):
    """In float64: a value between two steps of q4_0 would fall to either side, and the logits differ by a hundredth."""
    model = torch_model.load(path, **settings)
    model.net.double()
    model.net.config._experts_implementation = "eager"  # the other ones of Mixtral have no float64
    return model


def prefix_of(model, n=N_PREFIX):
    generator = torch.Generator().manual_seed(0)
    shape = n, model.n_head_kv, model.head_dim
    return ([torch.randn(shape, generator=generator) for _ in range(model.n_layer)] for _ in "KV")


def one_by_one(model, K, V, kv_type, tail):
    """Logits [1, n, n_vocab] of TOKENS, one pass a token, no mask but the model's own."""
    rows = ([model.to_cache(x, kind) for x in xs] for xs, kind in ((K, "K"), (V, "V")))
    layers = [_OneVersion(k, v, model.layout, kv_pair(kv_type), tail) for k, v in zip(*rows, strict=True)]
    cache = {model._cache_argument: Cache(layers=layers)}
    logits = [model.net(input_ids=torch.tensor([[t]]), use_cache=True, **cache).logits for t in TOKENS]
    return torch.cat(logits, 1).float()


@pytest.mark.parametrize("name", NAMES)
def test_all_at_once_as_one_by_one(models, name):
    """Every architecture; the windows of the Gemmas are 8 tokens. In one pass, and in passes of several lengths."""
    model = load(models[name])
    K, V = prefix_of(model)
    with torch.no_grad():
        rounded = model.forward([TOKENS], model.cache(K, V, "q4_0"))
        for tail in (1, 6, 100):
            want = one_by_one(model, K, V, "q4_0", tail)
            tolerance = 1e-5 * want.abs().max()
            assert (rounded - want).abs().max() > 10 * tolerance  # the tail matters here
            whole = model.forward([TOKENS, TOKENS], model.cache(K, V, "q4_0", batch=2, grows=False, tail=tail))
            assert (whole - want).abs().max() < tolerance, tail
            cache = model.cache(K, V, "q4_0", tail=tail)
            parts = [TOKENS[:13], TOKENS[13:14], TOKENS[14:15], TOKENS[15:19], TOKENS[19:]]
            grown = torch.cat([model.forward([part], cache) for part in parts], 1)
            assert (grown - want).abs().max() < tolerance, tail


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_both_attentions_and_types_of_k_and_v(models, attention):
    model = load(models["llama-gqa"], attention=attention)
    K, V = prefix_of(model)
    with torch.no_grad():
        for kv_type in ("q8_0,q4_0", "f16,iq4_nl"):
            want = one_by_one(model, K, V, kv_type, 6)
            got = model.forward([TOKENS], model.cache(K, V, kv_pair(kv_type), tail=6))
            # a fitted scale may fall to the other side of an F16 step (2^-11 of it): 1e-4 was seen
            assert (got - want).abs().max() < 5e-4 * want.abs().max(), kv_type


def test_no_tail_and_no_prefix(models):
    """A tail of 0 is the cache without one; an F16 cache has no tail; without a prefix there is one too."""
    model = load(models["llama-gqa"])
    K, V = prefix_of(model)
    with torch.no_grad():
        want = model.forward([TOKENS], model.cache(K, V, "q4_0"))
        assert torch.equal(model.forward([TOKENS], model.cache(K, V, "q4_0", tail=0)), want)
        cache = model.cache(K, V, "f16", tail=128)
        assert cache.tail == 0
        assert torch.equal(model.forward([TOKENS], cache), model.forward([TOKENS], model.cache(K, V, "f16")))
        K, V = prefix_of(model, 0)
        got, want = model.forward([TOKENS], model.cache(K, V, "q4_0", tail=6)), one_by_one(model, K, V, "q4_0", 6)
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_memory_of_a_growing_cache_stays(models):
    """What is kept beside the rounded rows: the newest tail - 1."""
    model = load(models["llama-gqa"])
    cache = model.cache(*prefix_of(model), "q4_0", tail=6)
    with torch.no_grad():
        for part in (TOKENS[:3], TOKENS[3:], TOKENS[:1]):
            model.forward([part], cache)
    assert cache.layers[0].keys.shape[-2] == N_PREFIX + len(TOKENS) + 1
    assert [x.shape[-2] for x in cache.layers[0]._intact] == [5, 5]


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
def test_gradients_are_those_of_one_by_one(models, name):
    """Through both versions of each row, and straight through both roundings."""
    model = load(models[name])

    def gradients(logits_of):
        leaves = [[x.requires_grad_() for x in rows] for rows in prefix_of(model)]
        logits = logits_of(*leaves)
        torch.log_softmax(logits[0, :-1], -1).gather(-1, torch.tensor(TOKENS[1:])[:, None]).sum().backward()
        return [x.grad for rows in leaves for x in rows]

    got = gradients(lambda K, V: model.forward([TOKENS], model.cache(K, V, "q4_0", grows=False, tail=6)))
    want = gradients(lambda K, V: one_by_one(model, K, V, "q4_0", 6))
    without = gradients(lambda K, V: model.forward([TOKENS], model.cache(K, V, "q4_0", grows=False)))
    for a, b, c in zip(got, want, without, strict=True):
        assert torch.allclose(a, b, rtol=1e-2, atol=1e-3 * b.abs().max())
        assert not torch.allclose(a, c, rtol=1e-2, atol=1e-3 * b.abs().max())


def test_it_is_llama_cpps(smol):
    """F16 weights, one token at a time behind a prefix: as far from the F16 cache, and near to each other.

    Measured, 48 tokens: 0.00251 there, 0.00253 here, 0.00039 between them; without a tail 0.047.
    """
    tail, kv_type = 16, "q4_0"
    with Vocabulary(smol.reference) as vocabulary:
        text = "\n".join(topics.topics[key] for key in sorted(topics.topics))[:2000]
        chunk = vocabulary.tokenize(text, special=False)[:48]
    exact = llama_log_probs(smol.reference, smol.ikv, "f16", smol.tokens, [chunk])
    want = llama_log_probs(smol.reference, smol.ikv, kv_type, smol.tokens, [chunk], tail, 1)
    model = torch_model.load(smol.reference)
    with torch.no_grad():
        cache = model.cache(*torch_model.prefix_rows(ikv.read(smol.ikv)), kv_type, grows=False, tail=tail)
        got = torch.log_softmax(model.forward([chunk], cache), -1)
    assert divergence(exact, got) == pytest.approx(divergence(exact, want), rel=0.15)
    assert divergence(want, got) < 0.4 * divergence(exact, want)


def test_default_tail():
    for kv_type, tail in {"q8_0": 0, "f16": 0, "bf16": 0, "f32": 0, "q4_0": 128, "iq4_nl": 128, "q5_1": 128}.items():
        assert default_tail(kv_pair(kv_type)) == tail
    assert default_tail(kv_pair("q8_0,q4_0")) == default_tail(kv_pair("q5_0,f16")) == 128


def test_a_negative_tail_is_refused(models):
    model = load(models["llama-gqa"])
    with pytest.raises(UsageError, match="-1"):
        model.cache(*prefix_of(model), "q4_0", tail=-1)
