"""For which Hugging Face models it is proven how their K and V lie in llama.cpp's cache.

tests/engines/test_torch_engine.py proves each entry against llama.cpp; an architecture that is not proven there has no
place here.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose, log
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
    "qwen2_vl_text": "neox",
    "qwen2_5_vl_text": "neox",
    "qwen3_vl_text": "neox",
    "qwen3_vl_moe_text": "neox",
    "ministral3": "norm",
    "mistral4": "norm",
    "minimax_m2": "neox",
    "llama4_text": "norm",
    "dots1": "neox",
    "hy_v3": "neox",
    "hunyuan_v1_dense": "neox",
    "hunyuan_v1_moe": "neox",
    "jais2": "neox",
    "cohere2_moe": "norm",
    "exaone_moe": "neox",
    "granite_swa": "norm",
    "granitemoe_swa": "norm",
    "afmoe": "neox",
    "hrm_text": "neox",
    "youtu": "norm",
    "glm4v_text": "neox",
    "paddleocr_vl_text": "neox",
    "phi": "neox",
    "falcon": "neox",
    "gpt_neox": "neox",
    "gpt2": "none",
    "gpt_bigcode": "none",
    "bloom": "none",
}
# Those of whose layers some share the K and V of others, or have other heads
UNEVEN = {"gemma3n_text", "gemma4_text"}
# Those that keep a latent instead of K and V (MLA)
LATENT = {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "mistral4"}
# Those of type "norm" for which transformers pairs neighbours too: the converter leaves the rows of W_q and W_k
NEIGHBOURS = {
    "cohere",
    "cohere2",
    "cohere2_moe",
    "glm",
    "glm4",
    "ernie4_5",
    "ernie4_5_moe",
    "deepseek_v2",
    "llama4_text",
}
# The other way round: transformers pairs neighbours, and the converter puts the halves together
HALVED = {"glm4v_text"}
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
# Those that llama.cpp computes in another way than transformers, which no setting changes
_OTHERWISE = {
    "bamba": "llama.cpp turns other values of its heads: RoPE is of their first half, and upstream's converter orders "
    "the values for one of whole heads",
}
# Whether the weights of the experts that a token takes add up to 1, where config.json may say so (norm_topk_prob, false
# if it does not): llama.cpp has it in its code, one way for each architecture
NORMALIZED = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False, "qwen3_vl_moe_text": True}
# multimodal model_type -> those that its text model may have, the first if config.json does not say: the prefix is text
_WRAPPED = {
    "gemma3": ("gemma3_text",),
    "gemma3n": ("gemma3n_text",),
    "gemma4": ("gemma4_text",),
    "qwen3_5": ("qwen3_5_text",),
    "qwen3_5_moe": ("qwen3_5_moe_text",),
    "qwen2_vl": ("qwen2_vl_text",),
    "qwen2_5_vl": ("qwen2_5_vl_text",),
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen3_vl_moe": ("qwen3_vl_moe_text",),
    "glm4v": ("glm4v_text",),
    "paddleocr_vl": ("paddleocr_vl_text",),
    "llama4": ("llama4_text",),
    "mistral3": ("mistral", "ministral3", "mistral4"),
}
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
    "qwen2_vl_text": {"default", "mrope"},
    "qwen2_5_vl_text": {"default", "mrope"},
    "olmo3": {"default", "yarn"},
    "ministral3": {"yarn"},
    "mistral4": {"yarn"},
    "llama4_text": {"default", "llama3"},
    "hunyuan_v1_dense": {"default", "dynamic"},
    "hunyuan_v1_moe": {"default", "dynamic"},
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
    "mistral4": {
        "scoring_func": (None, (None, "softmax")),
        "n_group": (1, (1,)),
        "norm_topk_prob": (True, (True,)),
        "rope_interleave": (True, (True,)),
        "attention_bias": (False, (False,)),
    },
    "minimax_m2": {"scoring_func": (None, ("sigmoid",))},
    "llama4_text": {
        "attention_chunk_size": (8192, (8192,)),
        "attn_temperature_tuning": (True, (True, 4)),  # some of the first say 4
        "floor_scale": (8192, (8192,)),
        "attn_scale": (0.1, (0.1,)),
        "no_rope_layer_interval": (4, (4,)),
        "attention_bias": (False, (False,)),
    },
    "dots1": {
        "scoring_func": (None, ("sigmoid",)),
        "n_group": (1, (1, None)),
        "topk_group": (1, (1, None)),
        "attention_bias": (False, (False,)),
    },
    "hy_v3": {"route_norm": (True, (True,)), "attention_bias": (False, (False,)), "mlp_bias": (False, (False,))},
    "hunyuan_v1_dense": {"attention_bias": (False, (False,))},
    "hunyuan_v1_moe": {"attention_bias": (False, (False,))},
    "jais2": {"attention_bias": (True, (True,)), "mlp_bias": (True, (True,)), "hidden_act": ("relu2", ("relu2",))},
    "cohere2_moe": {
        "attention_bias": (False, (False,)),
        "norm_topk_prob": (True, (True,)),
        "rms_norm_eps": (None, (None,)),
    },
    "exaone_moe": {"scoring_func": (None, ("sigmoid",)), "n_group": (1, (1,)), "topk_group": (1, (1,))},
    "granite_swa": {"attention_bias": (False, (False,)), "mlp_bias": (False, (False,))},
    "granitemoe_swa": {"attention_bias": (False, (False,))},
    "afmoe": {
        "mup_enabled": (False, (True,)),
        "global_attn_every_n_layers": (4, (4,)),
        "route_norm": (None, (True,)),
        "attention_bias": (False, (False,)),
    },
    "hrm_text": {"attention_bias": (False, (False,)), "mlp_bias": (False, (False,))},
    "youtu": {"rope_interleave": (True, (True,)), "attention_bias": (False, (False,))},
    "phi": {"qk_layernorm": (False, (False,)), "hidden_act": ("gelu_new", ("gelu_new",))},
    "falcon": {
        "alibi": (False, (False,)),
        "bias": (False, (False,)),
        "parallel_attn": (True, (True,)),
        "new_decoder_architecture": (False, (False,)),  # its cache holds K and V once for each head of Q
        "activation": ("gelu", ("gelu",)),
    },
    "gpt_neox": {"attention_bias": (True, (True,)), "hidden_act": ("gelu", ("gelu", "gelu_new", "gelu_fast"))},
    "gpt2": {
        "activation_function": ("gelu_new", ("gelu_new",)),
        "scale_attn_weights": (True, (True,)),
        "scale_attn_by_inverse_layer_idx": (False, (False,)),
    },
    "gpt_bigcode": {
        "multi_query": (True, (True,)),
        "activation_function": ("gelu_pytorch_tanh", ("gelu_pytorch_tanh", "gelu_new")),
        "scale_attn_weights": (True, (True,)),
    },
    "bloom": {"apply_residual_connection_post_layernorm": (False, (False,))},
    "mamba2": {
        "use_bias": (False, (False,)),
        "use_conv_bias": (True, (True,)),
        "time_step_limit": (None, _NO_LIMIT),
    },
}
# Those for which llama.cpp reads all of YaRN's settings
_OWN_YARN = {"ministral3"}
# Those whose RoPE scaling is another base, by their own alpha
_ALPHA = {"hunyuan_v1_dense", "hunyuan_v1_moe"}
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
    """Whether transformers pairs halves of a head of K and llama.cpp neighbours (rope_pairs)."""
    return PROVEN[model_type] == "norm" and model_type not in NEIGHBOURS


def text_types(model_type: str) -> tuple[str, ...]:
    """The types that a model's text model may have: its own, but of those that see images too."""
    return _WRAPPED.get(model_type, (model_type,))


def why_not(config: Any) -> str:
    """Why the K/V layout of a model is not proven, "" if it is. config: as of supports()."""
    if supports(config):
        return ""
    full = config if isinstance(config, Mapping) else config.to_dict()
    model_type = full.get("model_type")
    return (
        _OTHERWISE.get(str(model_type))
        or f"the K/V layout of model type {model_type!r}, with its settings, is not proven"
    )


def supports(config: Any) -> bool:
    """Whether the K/V layout of a model is proven. config: a transformers configuration, or config.json's dictionary.

    False for other architectures, for RoPE scalings not proven for the architecture, for experts that llama.cpp would
    choose or weigh in another way, and for checkpoints that transformers would run quantized.
    """
    full = config if isinstance(config, Mapping) else config.to_dict()
    text = full.get("text_config") or full
    outer = full.get("model_type", "")
    inner = text_types(outer)
    # The first Qwen2-VL and Qwen2.5-VL have no text_config, their settings are those of the text
    model_type = (text.get("model_type") if text is not full else None) or inner[0]
    if model_type not in PROVEN or model_type not in inner:
        return False
    each = _ropes(text)
    return (
        rope_types(config) <= _ROPE_SCALING.get(model_type, {"default"})
        and _same_layers(model_type, text)
        and all(text.get(key, least) in same for key, (least, same) in _SETTINGS.get(model_type, {}).items())
        and not full.get("quantization_config")
        and all(
            r.get("alpha") for r in each if model_type in _ALPHA and "dynamic" in (r.get("rope_type"), r.get("type"))
        )
        and not any(r.get(key) is not None for r in each for key in _unproven(model_type, r))
        and (model_type in _OWN_YARN or all(r.get(k) in (None, v) for r in each for k, v in _ROPE_FIXED.items()))
    )


def _unproven(model_type: str, rope: Mapping[str, Any]) -> tuple[str, ...]:
    """Of _ROPE_UNPROVEN; two mscale cancel in what is cached if they are equal, where llama.cpp reads them."""
    proven = {"truncate"} if model_type == "gpt_oss" else set()  # from_huggingface.read_config sets it
    if model_type in LATENT | _OWN_YARN | _ALPHA and rope.get("mscale") == rope.get("mscale_all_dim"):
        proven = {"mscale", "mscale_all_dim"}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("attention_factor") or 0
    if kind == "yarn" and isclose(factor, 0.1 * log(rope.get("factor") or 1) + 1):
        proven |= {"attention_factor"}  # what llama.cpp computes
    return tuple(key for key in _ROPE_UNPROVEN if key not in proven)


def rope_types(config: Any) -> set[str]:
    """The kinds of RoPE scaling that a model's layers have, "default" for none. config: as of supports()."""
    full = config if isinstance(config, Mapping) else config.to_dict()
    return {r.get("rope_type", r.get("type", "default")) for r in _ropes(full.get("text_config") or full)}


def _same_layers(model_type: str, text: Mapping[str, Any]) -> bool:
    """Whether llama.cpp computes layers as their configuration says: all of experts, weighed as it does, unclipped, and
    turned by one RoPE."""
    flash = (
        text.get("num_hidden_layers") in (47, 48) and text.get("vocab_size") == 154880
    )  # llama.cpp knows it by these
    return (
        (model_type != "glm4_moe_lite" or flash or text.get("scoring_func") == "sigmoid")
        and (model_type not in NORMALIZED or bool(text.get("norm_topk_prob")) == NORMALIZED[model_type])
        and not text.get("mlp_only_layers")
        and text.get("decoder_sparse_step") in (None, 1)
        and text.get("clip_qkv") is None
        and (model_type != "llama4_text" or _same_llama4(text))
        and len(set(text.get("layer_rope_theta") or [0])) == 1  # Granite's with windows
        and not (model_type.endswith("_swa") and text.get("no_rope_layers"))
    )


def _same_llama4(text: Mapping[str, Any]) -> bool:
    """Of Llama 4's layers llama.cpp has in its code which are turned and which have experts, and what has norms."""
    n, every = text.get("num_hidden_layers", 48), text.get("interleave_moe_layer_step", 1)
    turned = [int((il + 1) % 4 != 0) for il in range(n)]
    with_experts = list(range(every - 1, n, every))
    kinds = ["chunked_attention" if x else "full_attention" for x in turned]
    return (
        (text.get("no_rope_layers") or turned) == turned
        and (text.get("moe_layers") or with_experts) == with_experts
        and (text.get("layer_types") or kinds) == kinds
        and text.get("use_qk_norm", True) == (text.get("num_local_experts", 16) != 128)
    )


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
