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
}
# Whether the weights of the experts that a token takes add up to 1, where config.json may say so (norm_topk_prob, false
# if it does not): llama.cpp has it in its code, one way for each architecture
NORMALIZED = {"qwen2_moe": False, "qwen3_moe": True, "olmoe": False}
_WRAPPED = {"gemma3": "gemma3_text"}  # multimodal model_type -> its text model: the prefix is text
_ROPE_SCALING = {
    "llama": {"default", "linear", "llama3", "yarn"},
    "qwen2": {"default", "yarn"},
    "qwen3": {"default", "yarn"},
    "gemma3_text": {"default", "linear"},
    "phi3": {"default", "longrope"},
    "qwen3_moe": {"default", "yarn"},
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
        and not full.get("quantization_config")
        and not any(r.get(key) is not None for r in each for key in _ROPE_UNPROVEN)
        and all(r.get(key) in (None, value) for r in each for key, value in _ROPE_FIXED.items())
    )


def rope_types(config: Any) -> set[str]:
    """The kinds of RoPE scaling that a model's layers have, "default" for none. config: as of supports()."""
    full = config if isinstance(config, Mapping) else config.to_dict()
    return {r.get("rope_type", r.get("type", "default")) for r in _ropes(full.get("text_config") or full)}


def _same_experts(model_type: str, text: Mapping[str, Any]) -> bool:
    """Whether llama.cpp computes layers as their configuration says: all of experts, weighed as it does, unclipped."""
    return (
        (model_type not in NORMALIZED or bool(text.get("norm_topk_prob")) == NORMALIZED[model_type])
        and not text.get("mlp_only_layers")
        and text.get("decoder_sparse_step") in (None, 1)
        and text.get("clip_qkv") is None
    )


def _ropes(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    return [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
