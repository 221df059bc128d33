"""Mixtures of experts in torch, from GGUFs: the same experts as llama.cpp's for every token, weighed as it does.

That a wrong choice is seen: with other experts, a token's K in the next layers is off by a tenth and more.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import library, torch_model
from intactkv_export.torch_model import experts
from tests.support.cache_rows import Llama, random_tokens
from tests.support.log_probs import divergence, llama_log_probs

L = library.load()
NAMES = ("mixtral", "qwen2-moe", "qwen3-moe", "qwen3-moe-yarn", "olmoe")


def quantized(path, target, ftype):
    params = L.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(L, f"LLAMA_FTYPE_MOSTLY_{ftype}"), 1
    assert L.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return target


def errors_of_k(model, tokens, K):
    """||a - b|| / ||b|| of each layer's and token's K, [n_layer, n_tokens]; K: llama.cpp's."""
    cache = torch_model.layers.empty_cache(model)
    with torch.inference_mode():
        model.forward([tokens], cache)
    got = [model.to_rows(layer.keys, "K").numpy() for layer in cache.layers]
    return np.stack(
        [np.linalg.norm(a - K[il], axis=(1, 2)) / np.linalg.norm(K[il], axis=(1, 2)) for il, a in enumerate(got)]
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpps(models, name):
    """F32 weights behind an F16 cache, which flash attention reads: measured, 1.3e-3 at most."""
    path, tokens = models[name].with_suffix(".gguf"), random_tokens(64)
    want = llama_log_probs(path, None, "f16", tokens[:1], [tokens[1:]])
    with torch.inference_mode():
        got = torch.log_softmax(torch_model.load(path).forward([tokens])[:, 1:], -1)
    assert (got - want).abs().max() < 5e-3 and divergence(want, got) < 1e-6


@pytest.mark.parametrize(("name", "ftype"), [("mixtral", "Q4_0"), ("qwen3-moe", "Q4_K_M"), ("qwen2-moe", "Q4_0")])
def test_activations_are_rounded_before_experts_too(models, tmp_path, name, ftype):
    """K of the second layer, behind the first one's experts: bit for bit ggml's products, but for sums of float32.

    Where a value lies between two steps, a sum's last bit decides, and from there on tokens differ: hence the median.
    """
    path, tokens = quantized(models[name].with_suffix(".gguf"), tmp_path / "q.gguf", ftype), random_tokens(64)
    _, K, _ = Llama(path).rows(tokens)
    rounded, exact = (
        errors_of_k(torch_model.load(path, attention="eager", round_activations=rounds), tokens, K)
        for rounds in (True, False)
    )
    assert np.median(rounded[1]) < 2e-6 and np.median(exact[1]) > 2e-3


def test_rounding_nothing_is_transformers_own(models):
    """Both ways to compute experts, and gradients that reach what comes in."""
    model = torch_model.load(models["qwen2-moe"])
    found = [module for module in model.net.modules() if experts.are(module)]
    assert len(found) == model.n_layer and model.net.config._experts_implementation == "eager"
    module = found[0]
    module.round_inputs = (lambda x: x, lambda x: x)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 256, generator=generator).requires_grad_()
    weights, chosen = torch.softmax(torch.randn(12, 4, generator=generator), -1).topk(2)
    outputs = [
        f(x)
        for f in (lambda x: module(x, chosen, weights), lambda x: experts.forward_rounded(module, x, chosen, weights))
    ]
    assert torch.allclose(*outputs, atol=1e-6)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in outputs]
    assert gradients[0].abs().max() > 0.1 and torch.allclose(*gradients, rtol=1e-4, atol=1e-5)
