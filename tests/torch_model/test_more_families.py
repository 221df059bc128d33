"""GGUFs of further families in torch: the logits of llama.cpp, from float32 weights and from quantized ones.

Random weights, and of every family that can be trained for.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import gguf
import torch

from intactkv_export import torch_model
from intactkv_export.conversion import prefix
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.torch_model.from_gguf import check_header
from intactkv_export.torch_model.from_gguf.configuration import family_of
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.tensors import Tensors
from tests.support import random_families, random_models
from tests.support.cache_rows import Llama, random_tokens
from tests.support.log_probs import divergence, llama_log_probs
from tests.torch_model.test_experts import errors_of_k, quantized
from tests.torch_model.test_extra_cells import at_positions

NAMES = (
    "olmo", "olmo2", "olmo3", "olmo3-yarn", "arcee", "seed-oss", "exaone4", "starcoder2", "stablelm", "nemotron",
    "granitemoe", "glm", "glm4", "glm4-moe", "glm4-moe-scaled", "cohere", "cohere2", "ernie4.5", "ernie4.5-moe",
    "ministral3", "mistral3", "hunyuan", "hunyuan-moe", "minimax-m2", "gpt-oss",
)  # fmt: skip
OTHERS = ("granitemoeshared", "apertus")
WINDOWS = ("olmo3", "olmo3-yarn", "cohere2", "gpt-oss")
UNNORMED = ("olmo2", "olmo3", "olmo3-yarn", "exaone4")  # they multiply token embeddings without a norm


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    made = random_models.build_all(random_families.build, NAMES + OTHERS, root)
    return {name: path.with_name(f"{name}.gguf") for name, path in made.items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpps(families, name):
    """F32 weights behind an F16 cache. Ministral 3 turns queries up from position 128 on."""
    path, tokens = families[name], random_tokens(160 if name == "ministral3" else 64)
    want = llama_log_probs(path, None, "f16", tokens[:1], [tokens[1:]])
    with torch.inference_mode():
        got = torch.log_softmax(torch_model.load(path).forward([tokens])[:, 1:], -1)
    assert (got - want).abs().max() < 2e-2 and divergence(want, got) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_are_llama_cpps(families, tmp_path, name):
    """K of the second layer, behind the first one's matrices; as of experts, the median over the tokens.

    Token embeddings of Q4_0 lie between two steps of Q8_0, which AVX rounds to even: those without a norm are of Q8_0.
    StarCoder2's GELU is looked up in an F16 table.
    """
    ftype = "Q8_0" if name in (*UNNORMED, "hunyuan-moe") else "Q4_0"  # of Q4_0 HunYuan's are between steps, too
    path, tokens = quantized(families[name], tmp_path / "q.gguf", ftype), random_tokens(64)
    _, K, _ = Llama(path).rows(tokens, step=8 if name in WINDOWS else None)
    rounded, exact = (
        errors_of_k(torch_model.load(path, attention="eager", round_activations=rounds), tokens, K)
        for rounds in (True, False)
    )
    assert np.median(rounded[1]) < (4e-3 if name == "starcoder2" else 1e-5)
    assert np.median(exact[1]) > 5e-3


@pytest.mark.parametrize(
    "name", ["glm4", "cohere", "cohere2", "ernie4.5", "ministral3", "hunyuan", "gpt-oss", "olmo3-yarn"]
)
def test_rows_turned_back(families, name):
    """What extra cells begin with, K at position 0: of the same text here and there.

    HunYuan's norm behind RoPE makes a text depend on where it is; its first layer has seen none.
    """
    model, tokens = torch_model.load(families[name], attention="eager"), random_tokens(8)
    here, there = at_positions(model, tokens, 0), at_positions(model, tokens, 5)
    back = model.at_first_position(there, range(5, 13))
    for il, (a, b, c) in enumerate(zip(model.at_first_position(here, range(8)), back, there, strict=True)):
        assert torch.allclose(a[0], here[il][0], rtol=1e-6, atol=1e-6), il
        assert (a - b).abs().max() < 2e-4 * a.abs().max() or (name == "hunyuan" and il > 0), il
        assert (b - c).abs().max() > 0.3 * b.abs().max() or (name == "cohere2" and il == 3), il


def test_mxfp4_experts_are_llama_cpps(families, tmp_path):
    """As gpt-oss has them: experts of MXFP4, all other matrices of Q8_0."""
    path, tokens = quantized(families["gpt-oss"], tmp_path / "q.gguf", "MXFP4_MOE"), random_tokens(64)
    kinds = {x.name.split(".")[-2]: x.type for x in gguf_file.read(path).tensors if x.name.startswith("blk.1.")}
    assert kinds["ffn_gate_exps"] == kinds["ffn_down_exps"] == gguf.GGMLQuantizationType.MXFP4
    _, K, _ = Llama(path).rows(tokens, step=8)
    error = errors_of_k(torch_model.load(path, round_activations=True), tokens, K)
    assert np.median(error[1]) < 1e-5


@pytest.mark.parametrize("name", WINDOWS)
def test_a_quantized_cache_with_a_tail_is_llama_cpps(families, tmp_path, name):
    """A token at a time behind a q4_0 cache, against what such a cache does to the model."""
    prefix(families[name], families[name], system_prompt="Be brief.", engine="llama", out=tmp_path / "p.ikv")
    file, tokens = ikv.read(tmp_path / "p.ikv"), random_tokens(48)
    exact = llama_log_probs(families[name], tmp_path / "p.ikv", "f16", file.tokens, [tokens])
    want = llama_log_probs(families[name], tmp_path / "p.ikv", "q4_0", file.tokens, [tokens], tail=8, step=1)
    model = torch_model.load(families[name])
    cache = model.cache(*torch_model.prefix_rows(file), "q4_0", tail=8)
    with torch.no_grad():
        got = torch.log_softmax(model.forward([tokens], cache), -1)
    assert divergence(want, got) < 0.2 * divergence(want, exact)


@pytest.mark.parametrize(("name", "why"), [("granitemoeshared", "shexp"), ("apertus", "'apertus'")])
def test_what_torch_cannot_read(families, name, why):
    with pytest.raises(IntactKVError, match=why):
        check_header(families[name])


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("glm4-moe", {"glm4moe.expert_gating_func": 1}, "expert_gating_func 1"),
        ("glm4", {"glm4.rope.dimension_sections": [8, 12, 12, 0]}, "rope.dimension_sections"),
        ("cohere2", {"cohere2.rope.freq_base_swa": 20000}, "rope.freq_base_swa 20000"),
        ("olmo", {"olmo.attention.clamp_kqv": 8}, "attention.clamp_kqv 8"),
    ],
)
def test_settings_that_torch_cannot_read(families, tmp_path, name, changes, why):
    changes = {key: [gguf_file.Uint64(x) for x in v] if isinstance(v, list) else v for key, v in changes.items()}
    with open(tmp_path / "other.gguf", "wb") as file:
        gguf_file.copy(families[name], file, changes)
    with pytest.raises(IntactKVError, match=why):
        check_header(tmp_path / "other.gguf")


def test_a_tensor_that_is_not_computed(families):
    """What torch would leave out is refused: GLM-4 has norms that the GLM before it has not."""
    header = Header(families["glm4"])
    net = torch_model.load(families["glm4"]).net
    known = {name: x for name, x in net.state_dict().items() if "post_mlp_layernorm" not in name}
    with pytest.raises(IntactKVError, match="has blk.0.post_ffw_norm.weight, with which torch cannot"):
        list(Tensors(header, family_of(header)).weights(known, "cpu"))


def test_tensors_of_other_sizes(families):
    header = Header(families["glm4"])
    wanted = {"model.norm.weight": torch.empty(128)}
    with pytest.raises(IntactKVError, match="256 values of output_norm.weight, and 128 by its header: convert"):
        list(Tensors(header, family_of(header)).weights(wanted, "cpu"))
