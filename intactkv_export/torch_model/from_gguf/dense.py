"""Families whose layers are all alike, attention and one feed-forward network."""

from __future__ import annotations

from typing import Any

from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.rope import rope


def granite(header: Header) -> dict[str, Any]:
    keys = {"embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
            "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}  # fmt: skip
    return {name: header.get(key) for name, key in keys.items()}


def _layer_norm(name: str, header: Header) -> dict[str, Any]:
    """The epsilon of norms that are no RMS norms, which has as many names as architectures."""
    return {name: header.get("attention.layer_norm_epsilon")}


def _partly_rotary(header: Header) -> dict[str, Any]:
    rotary = header.get("rope.dimension_count", header.head_dim) / header.head_dim
    return {
        "partial_rotary_factor": rotary,
        "rope_parameters": rope(header) | {"partial_rotary_factor": rotary},
        "use_qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        "qk_layernorm": "blk.0.attn_q_norm.weight" in header.tensors,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in header.tensors,
    }


def _without_window(header: Header) -> dict[str, Any]:
    return {"sliding_window": None, "layer_types": ["full_attention"] * header.n_layer}


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
        "sliding_window": header.get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _query_scalar(header, 46),  # Gemma 2 27B
    }


def _gemma3(header: Header) -> dict[str, Any]:
    kinds = ["full_attention" if il % 6 == 5 else "sliding_attention" for il in range(header.n_layer)]
    return {
        "final_logit_softcapping": header.get("final_logit_softcapping", 0.0) or None,
        "sliding_window": header.get("attention.sliding_window", 0) or None,
        "query_pre_attn_scalar": _query_scalar(header, 62),  # Gemma 3 27B
        "layer_types": kinds,
        "rope_parameters": {
            "full_attention": rope(header),
            "sliding_attention": {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 1e4)},
        },
    }


FAMILIES = {
    "llama": Family("llama"),
    "granite": Family("granite", granite),
    "smollm3": Family("smollm3"),
    "qwen2": Family("qwen2", _qwen2),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", one_more=True),
    "gemma2": Family("gemma2", _gemma2, one_more=True),
    "gemma3": Family("gemma3_text", _gemma3, one_more=True),
    "phi3": Family("phi3", _phi3),
    "olmo2": Family("olmo2", only_plain=True),
    "arcee": Family("arcee", only_plain=True),
    "seed_oss": Family("seed_oss", only_plain=True),
    "exaone4": Family("exaone4", _without_window, only_plain=True),
    "starcoder2": Family(
        "starcoder2", lambda header: _without_window(header) | _layer_norm("norm_epsilon", header), only_plain=True
    ),
    "stablelm": Family(
        "stablelm", lambda header: _partly_rotary(header) | _layer_norm("layer_norm_eps", header), only_plain=True
    ),
    "nemotron": Family(
        "nemotron",
        lambda header: _partly_rotary(header) | _layer_norm("norm_eps", header),
        only_plain=True,
        one_more=True,
    ),
}
