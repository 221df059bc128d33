"""Families whose layers are all alike, attention and one feed-forward network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from intactkv_export.torch_model.from_gguf.family import Family, another_base, other_than
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.rope import rope


def granite(header: Header) -> dict[str, Any]:
    keys = {"embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}  # fmt: skip
    return {name: header.get(key) for name, key in keys.items()}


def _layer_norm(name: str, header: Header) -> dict[str, Any]:
    """The epsilon of norms that are no RMS norms, which has as many names as architectures."""
    return {name: header.get("attention.layer_norm_epsilon")}


def partly_rotary(header: Header) -> dict[str, Any]:
    """RoPE that turns the first values of a head only."""
    rotary = header.get("rope.dimension_count", header.head_dim) / header.head_dim
    return {
        "partial_rotary_factor": rotary,
        "rope_parameters": rope(header) | {"partial_rotary_factor": rotary},
    }


def _stablelm(header: Header) -> dict[str, Any]:
    return partly_rotary(header) | {
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in header.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors,
    }


def _without_window(header: Header) -> dict[str, Any]:
    return {"sliding_window": None, "layer_types": ["full_attention"] * header.n_layer}


def windows(header: Header, every: int, size: int | None = None) -> dict[str, Any]:
    """The layers with a sliding window: those that the header lists, else all but each `every`th, or the number that it
    has in place of a list, as load_swa_pattern() has it; 0: all."""
    n, key = header.n_layer, "attention.sliding_window_pattern"
    listed = header.array(key)[:n]
    if not listed:
        every = header.get(key, every)
        listed = [not every or il % every < every - 1 for il in range(n)]
    return {
        "sliding_window": header.get("attention.sliding_window", size),
        "layer_types": ["sliding_attention" if windowed else "full_attention" for windowed in listed],
    }


def _cohere(header: Header) -> dict[str, Any]:
    return {"logit_scale": header.get("logit_scale")} | _layer_norm("layer_norm_eps", header)


def _olmo3(header: Header) -> dict[str, Any]:
    """RoPE is scaled in layers without a window only."""
    theta = header.get("rope.freq_base_swa", header.get("rope.freq_base", 1e4))
    plain = {"rope_type": "default", "rope_theta": theta}
    return windows(header, 4) | {"rope_parameters": {"full_attention": rope(header), "sliding_attention": plain}}


def _olmo2(header: Header) -> Family:
    """Of both, a window tells OLMo 3."""
    return Family("olmo3", _olmo3) if header.get("attention.sliding_window", 0) else Family("olmo2", only_plain=True)


def _ministral3(header: Header) -> dict[str, Any]:
    """YaRN with bounds of its own; from its original context on queries grow with the position."""
    scale = header.get("rope.scaling.yarn_log_multiplier", 0.0)
    yarn = {"beta_fast": header.get("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": header.get("rope.scaling.yarn_beta_slow", 1.0),
            "llama_4_scaling_beta": header.get("attention.temperature_scale", 0.0)}  # fmt: skip
    if scale:
        yarn |= {"mscale": 1.0, "mscale_all_dim": scale}
    return {"sliding_window": None, "rope_parameters": rope(header) | yarn}


def _without_yarn(header: Header) -> str:
    return "" if rope(header)["rope_type"] == "yarn" else "attention.temperature_scale without YaRN"


def _mistral3(header: Header) -> Family:
    """Mistral Small 3 has no such temperature, and is a Mistral."""
    if header.get("attention.temperature_scale", 0.0):
        return Family("ministral3", _ministral3, unproven=_without_yarn)
    return Family("mistral", lambda header: {"sliding_window": None}, only_plain=True)


def _phi3(header: Header) -> dict[str, Any]:
    n_ctx_orig = rope(header).get("original_max_position_embeddings", header.get("context_length"))
    return {
        "sliding_window": None,
        "partial_rotary_factor": header.get("rope.dimension_count", header.head_dim) / header.head_dim,
        "original_max_position_embeddings": n_ctx_orig,  # the class has a default, and prefers it to the RoPE's
    }


def _qwen2(header: Header) -> dict[str, Any]:
    return {"sliding_window": None, "use_sliding_window": False}


def _query_scalar(header: Header, of_embd: int) -> int:
    """The largest Gemma, of so many layers, scales queries by what an embedding has for each head."""
    n_embd, heads = header.get("embedding_length"), header.get("attention.head_count")
    return int(n_embd // heads) if header.n_layer == of_embd else header.head_dim


def _gemma2(header: Header) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": header.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": header.get("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": _query_scalar(header, 46),  # Gemma 2 27B
    } | windows(header, 2, 4096)


def _gemma3(header: Header) -> dict[str, Any]:
    windowed = header.get("attention.sliding_window", 0)
    # the class asks for a size even if no layer has a window
    plain = _without_window(header) | {"sliding_window": header.get("context_length")}
    return (windows(header, 6) if windowed else plain) | {
        "final_logit_softcapping": header.get("final_logit_softcapping", 0.0) or None,
        "query_pre_attn_scalar": _query_scalar(header, 62),  # Gemma 3 27B
        "rope_parameters": {
            "full_attention": rope(header),
            "sliding_attention": {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 1e4)},
        },
    }


FAMILIES: dict[str, Family | Callable[[Header], Family]] = {
    "llama": Family("llama"),
    "granite": Family("granite", granite, unproven=other_than(rope__scaling__finetuned=True)),  # False: no RoPE
    "smollm3": Family("smollm3"),
    "qwen2": Family("qwen2", _qwen2),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", one_more=True),
    "gemma2": Family("gemma2", _gemma2, unproven=another_base, one_more=True),
    "gemma3": Family("gemma3_text", _gemma3, one_more=True),
    "phi3": Family("phi3", _phi3, partly=True),
    "olmo": Family("olmo", unproven=other_than(attention__clamp_kqv=0.0), only_plain=True),
    "olmo2": _olmo2,
    "command-r": Family("cohere", _cohere, only_plain=True),
    "cohere2": Family("cohere2", lambda header: _cohere(header) | windows(header, 4), unproven=another_base),
    "chatglm": Family("glm", partly_rotary, partly=True, only_plain=True),
    "glm4": Family(
        "glm4", partly_rotary, unproven=other_than(rope__dimension_sections=0), partly=True, only_plain=True
    ),
    "ernie4_5": Family("ernie4_5", only_plain=True),
    "hunyuan-dense": Family("hunyuan_v1_dense", unproven=other_than(rope__scaling__alpha=0.0)),
    "mistral3": _mistral3,
    "arcee": Family("arcee", only_plain=True),
    "seed_oss": Family("seed_oss", only_plain=True),
    "exaone4": Family("exaone4", _without_window, only_plain=True),
    "starcoder2": Family(
        "starcoder2", lambda header: _without_window(header) | _layer_norm("norm_epsilon", header), only_plain=True
    ),
    "stablelm": Family(
        "stablelm",
        lambda header: _stablelm(header) | _layer_norm("layer_norm_eps", header),
        partly=True,
        only_plain=True,
    ),
    "nemotron": Family(
        "nemotron",
        lambda header: _stablelm(header) | _layer_norm("norm_eps", header),
        partly=True,
        only_plain=True,
        one_more=True,
    ),
}
