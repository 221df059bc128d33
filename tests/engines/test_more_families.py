"""The torch engine's K and V of further families are llama.cpp's, read from its state in float32.

Measured, relative error of the worst layer: 1e-6; those with GELU up to 3e-4, which ggml looks up in an F16 table.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra [convert] is not installed")

from intactkv_export.engines import choose
from intactkv_export.engines import torch_engine as engine
from intactkv_export.errors import UsageError
from intactkv_export.libllama import Context, bindings, state
from intactkv_export.models import locate
from intactkv_export.models.proven import supports
from intactkv_export.torch_model import from_huggingface
from intactkv_export.torch_model.rope_pairs import halves_to_neighbours
from tests.engines.test_recurrent import error
from tests.support import both_engines, random_architectures, random_families
from tests.support.cache_rows import Llama, random_tokens

TOLERANCE = 1e-5
TOLERANCE_GELU = 5e-4
GELU = {"starcoder2", "phi2", "falcon", "gpt-neox", "gpt2", "starcoder", "bloom"}
WINDOWS = {"olmo3", "cohere2", "gpt-oss", "cohere2-moe", "exaone-moe", "granite-swa", "granite-moe-swa", "afmoe"}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return random_families.build_all(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", random_families.MODELS)
def test_rows_of_every_family(families, name):
    """The description of the GGUF is the checkpoint's, too."""
    tokens = random_tokens(40)
    step = 8 if name in WINDOWS or "gemma" in name else None
    about, K, V = Llama(families[name].with_name(f"{name}.gguf")).rows(tokens, step=step)
    got_K, got_V, states = engine.compute_float32(families[name], tokens, about)
    assert got_K.keys() == K.keys() and states == {}
    worst = max(error(got[il], want[il]) for got, want in ((got_K, K), (got_V, V)) for il in want)
    assert worst < (TOLERANCE_GELU if name in GELU or "gemma" in name else TOLERANCE)


@pytest.mark.parametrize(
    "name", ["qwen2.5-vl-flat", "qwen3-vl", "mistral-small3", "ministral3-vision", "llama4-vision"]
)
def test_both_engines_make_the_same_file(families, tmp_path, name):
    """Of directories as the hub has them, with settings for images beside or around those for text."""
    got, want = both_engines.files(families[name], tmp_path)
    for a, b in zip(got.layers, want.layers, strict=True):
        assert max(error(a.K, b.K), error(a.V, b.V)) < 1e-3


def test_every_family_is_chosen(families):
    assert {choose("auto", locate(path)) for path in families.values()} == {"torch"}


def test_more_tokens_than_one_pass(families):
    """The second pass goes on at the positions after the first, in models whose positions are three numbers too."""
    tokens = random_tokens(engine._CHUNK + 40)
    _, K, _ = Llama(families["qwen3-vl"].with_name("qwen3-vl.gguf")).rows(tokens, n_ctx=1024)
    got, *_ = engine.compute_float32(families["qwen3-vl"], tokens, None)
    assert max(error(got[il], K[il]) for il in K) < 1e-4  # angles of RoPE in float32: exact to 2e-5 here


@pytest.fixture(scope="module")
def bamba(tmp_path_factory):
    directory = random_architectures.build("Bamba", tmp_path_factory.mktemp("bamba") / "bamba")
    assert random_architectures.to_gguf([directory]) == {}
    return directory


def test_bamba_is_refused_with_the_reason(bamba):
    assert choose("auto", locate(bamba)) == "llama"
    with pytest.raises(UsageError, match="turns other values of its heads.*bamba.*: use the llama engine"):
        choose("torch", locate(bamba))


def test_what_llama_cpp_turns_in_bamba(bamba):
    """The reason above. When this fails, upstream computes it as transformers does, and it can be proven."""
    import transformers

    tokens = random_tokens(24)
    with Context(bamba.with_name("bamba.gguf"), len(tokens) + 1, "f32", 1) as context:
        about = bindings.describe(context.ptr)
        context.decode(tokens, 0)
        K, V = state.rows_by_layer(context.state(), about, len(tokens))
    config = transformers.AutoConfig.from_pretrained(bamba)
    net = transformers.AutoModelForCausalLM.from_pretrained(bamba, dtype=torch.float32, attn_implementation="eager")
    cache, base = transformers.DynamicCache(config=config), net.eval().base_model
    with torch.no_grad():
        base(input_ids=torch.tensor([tokens]), use_cache=True, **{from_huggingface.cache_argument(base): cache})
    k, v = (x[0].transpose(0, 1).double().numpy() for x in (cache.layers[1].keys, cache.layers[1].values))
    n_rot, first = about["rope"]["n_rot"], np.arange(about["rope"]["n_rot"] // 2)
    angles = np.arange(len(tokens))[:, None, None] * config.rope_parameters["rope_theta"] ** (-2.0 * first / n_rot)

    def turned(x, second, angles):
        x, y = x.copy(), x
        x[..., first] = y[..., first] * np.cos(angles) - y[..., second] * np.sin(angles)
        x[..., second] = y[..., first] * np.sin(angles) + y[..., second] * np.cos(angles)
        return x

    as_llama_cpp = turned(turned(k, first + n_rot // 2, -angles), first + k.shape[-1] // 2, angles)
    assert error(v, V[1]) < TOLERANCE < 0.1 < error(halves_to_neighbours(k), K[1])
    assert error(halves_to_neighbours(as_llama_cpp), K[1]) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "exaone4"},  # a window of 4096, which llama.cpp has in models of 64 layers alone
        {"model_type": "cohere", "use_qk_norm": True},
        {"model_type": "glm4_moe", "n_group": 2},
        {"model_type": "stablelm", "use_parallel_residual": True},
        {"model_type": "nemotron", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"model_type": "llama4_text", "attention_chunk_size": 16},
        {"model_type": "llama4_text", "num_local_experts": 128},  # llama.cpp norms no Q and K of these
        {"model_type": "llama4_text", "no_rope_layers": [1] * 48},
        {"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 1.0}},
        {"model_type": "granite_swa", "layer_rope_theta": [1e4, 0]},
        {"model_type": "minimax_m2"},  # llama.cpp would choose experts by softmax
        {"model_type": "mistral3", "text_config": {"model_type": "qwen2"}},
        {"model_type": "falcon", "new_decoder_architecture": True},
    ],
)
def test_what_is_not_proven(config):
    assert not supports(config)
