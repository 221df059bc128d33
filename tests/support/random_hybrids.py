"""Tiny random-weight Hugging Face models with recurrent layers, as random_models has them for others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import random_models
from tests.support.random_models import VOCAB

_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_BASE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
_MAMBA2 = dict(
    mamba_n_heads=8, mamba_d_head=64, mamba_n_groups=2, mamba_d_state=32, mamba_d_conv=4, mamba_chunk_size=32
)
_DELTA = dict(
    num_hidden_layers=4,
    head_dim=64,
    layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    linear_conv_kernel_dim=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, shared_expert_intermediate_size=192)
_MROPE = {**_ROPE, "mrope_section": [3, 3, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.25}

_NEMOTRON_H: dict[str, Any] = dict(
    head_dim=64, ssm_state_size=32, mamba_num_heads=8, mamba_head_dim=64, n_groups=2, chunk_size=32
)
_NEMOTRON_H_MOE: dict[str, Any] = dict(
    _NEMOTRON_H,
    layers_block_type=["linear_attention", "moe", "full_attention", "linear_attention", "moe"],
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=192,
)
_SAID_OF_MOE = {"hybrid_override_pattern": "ME*ME", "num_hidden_layers": 5, "layers_block_type": None}

# name: (HF model_type, what differs from _BASE, what config.json says otherwise: real checkpoints keep older names)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lfm2": (
        "lfm2",
        dict(
            num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], rope_parameters=_ROPE
        ),
        {},
    ),
    "lfm2-moe": (
        "lfm2_moe",
        dict(
            num_hidden_layers=4,
            layer_types=["conv", "conv", "full_attention", "conv"],
            num_dense_layers=1,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            tie_word_embeddings=True,
            rope_parameters=_ROPE,
        ),
        {},
    ),
    "granite-h": (
        "granitemoehybrid",
        dict(
            _MAMBA2,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            shared_intermediate_size=256,
            num_local_experts=4,
            num_experts_per_tok=2,
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=0.5,
            rope_parameters=_ROPE,
        ),
        {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    ),
    "granite-h-dense": (
        "granitemoehybrid",
        dict(
            _MAMBA2,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
            shared_intermediate_size=256,
            num_local_experts=0,
            num_experts_per_tok=0,
            rope_parameters=_ROPE,
        ),
        {"layer_types": ["mamba", "attention", "mamba", "mamba"]},
    ),
    "falcon-h1": (
        "falcon_h1",
        dict(
            _MAMBA2,
            num_hidden_layers=3,
            head_dim=64,
            mamba_d_ssm=512,
            rope_parameters=_ROPE,
            key_multiplier=0.5,
            attention_in_multiplier=0.8,
            attention_out_multiplier=0.9,
            ssm_in_multiplier=1.25,
            ssm_out_multiplier=0.7,
            ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
            mlp_multipliers=[0.9, 0.6],
            embedding_multiplier=2.0,
            lm_head_multiplier=0.5,
        ),
        {},
    ),
    "nemotron-h": (
        "nemotron_h",
        dict(
            layers_block_type=["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"],
            **_NEMOTRON_H,
        ),
        {
            "hybrid_override_pattern": "M-*M-",
            "num_hidden_layers": 5,
            "layers_block_type": None,
            **dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group")),
        },
    ),
    "nemotron-h-moe": (
        "nemotron_h",
        dict(_NEMOTRON_H_MOE, routed_scaling_factor=2.5),
        _SAID_OF_MOE,
    ),
    "nemotron-h-latent": (
        "nemotron_h",
        dict(_NEMOTRON_H_MOE, moe_latent_size=128),
        _SAID_OF_MOE,
    ),
    "qwen3-next": (
        "qwen3_next",
        dict(_DELTA, **_EXPERTS, rope_parameters={**_ROPE, "partial_rotary_factor": 0.25}),
        {},
    ),
    "qwen3.5": ("qwen3_5_text", dict(_DELTA, rope_parameters=_MROPE), {}),
    "qwen3.5-moe": ("qwen3_5_moe_text", dict(_DELTA, **_EXPERTS, rope_parameters=_MROPE), {}),
    "jamba": (
        "jamba",
        dict(
            num_hidden_layers=4,
            attn_layer_period=4,
            attn_layer_offset=2,
            num_experts=4,
            num_experts_per_tok=2,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=16,
            mamba_d_conv=4,
        ),
        {},
    ),
    "mamba": ("mamba", dict(num_hidden_layers=3, intermediate_size=None, state_size=16, conv_kernel=4), {}),
    "mamba2": (
        "mamba2",
        dict(
            num_hidden_layers=3,
            intermediate_size=None,
            num_heads=8,
            head_dim=64,
            state_size=32,
            n_groups=2,
            chunk_size=32,
        ),
        {},
    ),
    "falcon-mamba": (
        "falcon_mamba",
        dict(num_hidden_layers=3, intermediate_size=None, state_size=16, conv_kernel=4),
        {},
    ),
}


def build_all(root: Path) -> dict[str, Path]:
    """{name: Hugging Face directory} of all in `root`, each with its F32 GGUF beside it as NAME.gguf."""
    return random_models.build_all(build, MODELS, root)


def build(name: str, directory: Path, shift: dict[str, float] | None = None) -> Path:
    """Write random model `name`, a key of MODELS, into `directory` and return it. shift: added to such tensors."""
    model_type, differs, written = MODELS[name]
    settings = {key: value for key, value in {**_BASE, **differs}.items() if value is not None}
    random_models.write(directory, model_type, settings)
    random_models.say(directory, written)
    if differs.get("tie_word_embeddings"):  # as large as an output matrix, or softmax would be all zeros and a one
        _change(directory, "embed_tokens.weight", lambda x: x / x.shape[1] ** 0.5)
    for end, by in (shift or {}).items():
        _change(directory, end, lambda x, by=by: x + by)
    return directory


def _change(directory: Path, end: str, function: Callable[[Any], Any]) -> None:
    """The tensors of which the name ends so."""
    from safetensors.torch import load_file, save_file

    path = directory / "model.safetensors"
    tensors = {name: function(x) if name.endswith(end) else x for name, x in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
