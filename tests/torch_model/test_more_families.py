"""GGUFs of further families in torch: the logits of llama.cpp, from float32 weights and from quantized ones.

Random weights, and of every family that can be trained for.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.errors import IntactKVError
from intactkv_export.torch_model.from_gguf import check_header
from tests.support import random_families, random_models
from tests.support.cache_rows import Llama, random_tokens
from tests.support.log_probs import divergence, llama_log_probs
from tests.torch_model.test_experts import errors_of_k, quantized

NAMES = ("olmo2", "arcee", "seed-oss", "exaone4", "starcoder2", "stablelm", "nemotron", "granitemoe")
OTHERS = ("olmo3", "granitemoeshared", "cohere")


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    made = random_models.build_all(random_families.build, NAMES + OTHERS, root)
    return {name: path.with_name(f"{name}.gguf") for name, path in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpps(families, name):
    """F32 weights behind an F16 cache."""
    path, tokens = families[name], random_tokens(64)
    want = llama_log_probs(path, None, "f16", tokens[:1], [tokens[1:]])
    with torch.inference_mode():
        got = torch.log_softmax(torch_model.load(path).forward([tokens])[:, 1:], -1)
    assert (got - want).abs().max() < 2e-2 and divergence(want, got) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_are_llama_cpps(families, tmp_path, name):
    """K of the second layer, behind the first one's matrices; as of experts, the median over the tokens.

    OLMo 2 and EXAONE 4 multiply token embeddings without a norm: those of Q4_0 lie between two steps of Q8_0, which
    AVX rounds to even. StarCoder2's GELU is looked up in an F16 table.
    """
    ftype = "Q8_0" if name in ("olmo2", "exaone4") else "Q4_0"
    path, tokens = quantized(families[name], tmp_path / "q.gguf", ftype), random_tokens(64)
    _, K, _ = Llama(path).rows(tokens)
    rounded, exact = (
        errors_of_k(torch_model.load(path, attention="eager", round_activations=rounds), tokens, K)
        for rounds in (True, False)
    )
    assert np.median(rounded[1]) < (4e-3 if name == "starcoder2" else 1e-5)
    assert np.median(exact[1]) > 5e-3


@pytest.mark.parametrize(
    ("name", "why"), [("olmo3", "attention.sliding_window"), ("granitemoeshared", "shexp"), ("cohere", "'command-r'")]
)
def test_what_torch_cannot_read(families, name, why):
    with pytest.raises(IntactKVError, match=why):
        check_header(families[name])
