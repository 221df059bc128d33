"""For which Hugging Face models it is proven how their K and V lie in llama.cpp's cache.

tests/engines/test_torch_engine.py proves each entry against llama.cpp; an architecture that is not proven there has no
place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Hugging Face text model_type -> RoPE layout of the GGUF: which values RoPE pairs (torch_model/rope_pairs.py)
PROVEN: dict[str, str] = {
    "llama": "norm",
    "mistral": "norm",
    "mixtral": "norm",
    "granite": "norm",
    "smollm3": "norm",
    "qwen2": "neox",
    "qwen3": "neox",
    "gemma": "neox",
    "gemma2": "neox",
    "gemma3_text": "neox",
    "phi3": "neox",
    "qwen2_moe": "neox",
    "qwen3_moe": "neox",
    "olmoe": "neox",
    "olmo": "norm",
    "olmo2": "neox",
    "olmo3": "neox",
    "cohere": "norm",
    "cohere2": "norm",
    "glm": "norm",
    "glm4": "norm",
    "glm4_moe": "neox",
    "starcoder2": "neox",
    "granitemoe": "norm",
    "granitemoeshared": "norm",
    "ernie4_5": "norm",
    "ernie4_5_moe": "norm",
    "exaone4": "neox",
    "gpt_oss": "neox",
    "seed_oss": "neox",
    "nemotron": "neox",
    "stablelm": "neox",
    "apertus": "neox",
    "arcee": "norm",
    "gemma3n_text": "neox",
    "gemma4_text": "neox",
    "lfm2": "neox",
    "lfm2_moe": "neox",
    "granitemoehybrid": "norm",
    "falcon_h1": "neox",
    "nemotron_h": "norm",
    "qwen3_next": "neox",
    "qwen3_5_text": "neox",
    "qwen3_5_moe_text": "neox",
    "jamba": "neox",
    "mamba": "neox",
    "mamba2": "neox",
    "falcon_mamba": "neox",
    "deepseek_v2": "norm",
    "deepseek_v3": "norm",
    "glm4_moe_lite": "norm",
}
# Those of whose layers some share the K and V of others, or have other heads
UNEVEN = {"gemma3n_text", "gemma4_text"}
# Those that keep a latent instead of K and V (MLA)
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite"}
# Those of type "norm" for which transformers pairs neighbours too: the converter leaves the rows of W_q and W_k
NEIGHBOURS = {"cohere", "cohere2", "glm", "glm4", "ernie4_5", "ernie4_5_moe", "deepseek_v2"}
# Those with recurrent layers, whose states torch_model/caches/state_layout.py lays out
RECURRENT = {
    "lfm2",
    "lfm2_moe",
    "granitemoehybrid",
    "falcon_h1",
    "nemotron_h",
    "qwen3_next",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "jamba",
    "mamba",
    "mamba2",
    "falcon_mamba",
}
# Whether the weights of the experts that a token takes add up to 1, where config.json may say so (norm_topk_prob, false
# if it does not): llama.cpp has it in its code, one way for each architecture
NORMALIZED = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
_WRAPPED = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
}  # multimodal model_type -> its text model: the prefix is text
_ROPE_SCALING = {
    "llama": {"default", "linear", "llama3", "yarn"},
    "qwen2": {"default", "yarn"},
    "qwen3": {"default", "yarn"},
    "gemma3_text": {"default", "linear"},
    "phi3": {"default", "longrope"},
    "qwen3_moe": {"default", "yarn"},
    "gpt_oss": {"default", "yarn"},
    "gemma4_text": {"default", "proportional"},
    "apertus": {"default", "llama3"},
    "deepseek_v2": {"default", "yarn"},
    "deepseek_v3": {"default", "yarn"},
}
# Settings that llama.cpp has in its code, or upstream's converter ignores, one value for each architecture: what
# transformers takes if config.json does not say, and which values mean what llama.cpp computes
_NO_LIMIT = (None, [0.0, float("inf")], (0.0, float("inf")), [0.0, {"__float__": "Infinity"}])
_SETTINGS: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "olmo2": {"attention_bias": (False, (False,))},
    "olmo3": {"attention_bias": (False, (False,))},
    "cohere": {"use_qk_norm": (False, (False,)), "attention_bias": (False, (False,))},
    "cohere2": {"attention_bias": (False, (False,))},
    "glm4_moe": {"n_group": (1, (1,)), "topk_group": (1, (1,)), "norm_topk_prob": (True, (True,))},
    "granitemoe": {"attention_bias": (False, (False,))},
    "granitemoeshared": {"attention_bias": (False, (False,))},
    "ernie4_5": {"use_bias": (False, (False,))},
    "ernie4_5_moe": {"use_bias": (False, (False,)), "moe_layer_interval": (1, (1,))},
    "exaone4": {"sliding_window": (4096, (None, 0))},
    "gpt_oss": {"attention_bias": (True, (True,))},
    "nemotron": {"attention_bias": (False, (False,)), "mlp_bias": (False, (False,))},
    "stablelm": {
        "use_qkv_bias": (False, (False,)),
        "qk_layernorm": (False, (False,)),
        "use_parallel_residual": (False, (False,)),
    },
    "arcee": {"attention_bias": (False, (False,)), "mlp_bias": (False, (False,))},
    "lfm2": {"conv_bias": (False, (False,))},
    "lfm2_moe": {
        "conv_bias": (False, (False,)),
        "norm_topk_prob": (True, (True,)),
        "routed_scaling_factor": (1.0, (1.0,)),
    },
    "granitemoehybrid": {
        "position_embedding_type": (None, (None, "nope")),
        "mamba_proj_bias": (False, (False,)),
        "mamba_conv_bias": (True, (True,)),
        "time_step_limit": (None, _NO_LIMIT),
    },
    "falcon_h1": {
        "mamba_rms_norm": (False, (False,)),
        "mamba_proj_bias": (False, (False,)),
        "mamba_conv_bias": (True, (True,)),
        "projectors_bias": (False, (False,)),
        "attention_bias": (False, (False,)),
        "mlp_bias": (False, (False,)),
        "time_step_limit": (None, _NO_LIMIT),
    },
    "nemotron_h": {
        "n_group": (1, (1,)),
        "topk_group": (1, (1,)),
        "sliding_window": (None, (None,)),
        "mamba_proj_bias": (False, (False,)),
        "use_conv_bias": (True, (True,)),
        "use_bias": (False, (False,)),
        "attention_bias": (False, (False,)),
        "mlp_bias": (False, (False,)),
        "time_step_limit": (None, _NO_LIMIT),
    },
    "qwen3_next": {"norm_topk_prob": (True, (True,)), "attention_bias": (False, (False,))},
    "qwen3_5_text": {"attention_bias": (False, (False,))},
    "qwen3_5_moe_text": {"attention_bias": (False, (False,))},
    "jamba": {"mamba_proj_bias": (False, (False,)), "mamba_conv_bias": (True, (True,))},
    "mamba": {"use_bias": (False, (False,)), "use_conv_bias": (True, (True,))},
    "falcon_mamba": {"use_bias": (False, (False,)), "use_conv_bias": (True, (True,))},
    # how experts are chosen: llama.cpp takes "softmax" where the converter finds no scoring_func
    "deepseek_v2": {
        "scoring_func": ("softmax", ("softmax",)),
        "n_group": (1, (1, None)),
        "norm_topk_prob": (False, (False,)),
    },
    "deepseek_v3": {"scoring_func": (None, ("sigmoid",)), "rope_interleave": (True, (True,))},
    "glm4_moe_lite": {"rope_interleave": (True, (True,))},
    "mamba2": {
        "n_groups": (8, (1,)),  # transformers normalizes all of them together
        "use_bias": (False, (False,)),
        "use_conv_bias": (True, (True,)),
        "time_step_limit": (None, _NO_LIMIT),
    },
}
# Settings of a RoPE scaling that upstream's converter drops or llama.cpp combines in another way
_ROPE_UNPROVEN = (
    "attention_factor",
    "attn_factor",
    "mscale",
    "mscale_all_dim",
    "extrapolation_factor",
    "truncate",
)
# YaRN's, which the converter writes into the GGUF and llama.cpp reads for other architectures only: its defaults
_ROPE_FIXED = {"beta_fast": 32.0, "beta_slow": 1.0}


def is_reordered(model_type: str) -> bool:
    """Whether the values of a head of K are in another order in llama.cpp than in transformers (rope_pairs)."""
    return PROVEN[model_type] == "norm" and model_type not in NEIGHBOURS


def supports(config: Any) -> bool:
    """Whether the K/V layout of a model is proven. config: a transformers configuration, or config.json's dictionary.

    False for other architectures, for RoPE scalings not proven for the architecture, for experts that llama.cpp would
    choose or weigh in another way, and for checkpoints that transformers would run quantized.
    """
    full = config if isinstance(config, Mapping) else config.to_dict()
    text = full.get("text_config") or full
    outer = full.get("model_type", "")
    model_type = text.get("model_type") or _WRAPPED.get(outer)
    if model_type not in PROVEN or _WRAPPED.get(outer, outer) != model_type:
        return False
    each = _ropes(text)
    return (
        rope_types(config) <= _ROPE_SCALING.get(model_type, {"default"})
        and _same_experts(model_type, text)
        and all(text.get(key, least) in same for key, (least, same) in _SETTINGS.get(model_type, {}).items())
        and not full.get("quantization_config")
        and not any(r.get(key) is not None for r in each for key in _unproven(model_type, r))
        and all(r.get(key) in (None, value) for r in each for key, value in _ROPE_FIXED.items())
    )


def _unproven(model_type: str, rope: Mapping[str, Any]) -> tuple[str, ...]:
    """Of _ROPE_UNPROVEN; models with latents have two mscale, which cancel in what is cached if they are equal."""
    proven = {"truncate"} if model_type == "gpt_oss" else set()  # from_huggingface.read_config sets it
    if model_type in LATENT and rope.get("mscale") == rope.get("mscale_all_dim"):
        proven = {"mscale", "mscale_all_dim"}
    return tuple(key for key in _ROPE_UNPROVEN if key not in proven)


def rope_types(config: Any) -> set[str]:
    """The kinds of RoPE scaling that a model's layers have, "default" for none. config: as of supports()."""
    full = config if isinstance(config, Mapping) else config.to_dict()
    return {r.get("rope_type", r.get("type", "default")) for r in _ropes(full.get("text_config") or full)}


def _same_experts(model_type: str, text: Mapping[str, Any]) -> bool:
    """Whether llama.cpp computes layers as their configuration says: all of experts, weighed as it does, unclipped."""
    flash = (
        text.get("num_hidden_layers") in (47, 48) and text.get("vocab_size") == 154880
    )  # llama.cpp knows it by these
    return (
        (model_type != "glm4_moe_lite" or flash or text.get("scoring_func") == "sigmoid")
        and (model_type not in NORMALIZED or bool(text.get("norm_topk_prob")) == NORMALIZED[model_type])
        and not text.get("mlp_only_layers")
        and text.get("decoder_sparse_step") in (None, 1)
        and text.get("clip_qkv") is None
    )


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
