"""Mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from intactkv_export.models import NORMALIZED
from intactkv_export.torch_model.from_gguf.dense import granite, partly_rotary, windows
from intactkv_export.torch_model.from_gguf.family import Family, another_base, other_than, renamed
from intactkv_export.torch_model.from_gguf.header import Header

SIGMOID = 2  # expert_gating_func


def _experts(model_type: str, n_experts: str = "num_experts") -> dict[str, Any]:
    """Arguments of a Family. Whether the weights of the experts chosen add up to 1 is not in the header.

    n_experts: what the configuration calls their number.
    """

    def own(header: Header) -> dict[str, Any]:
        n_ff, n_used = header.get("feed_forward_length"), header.get("expert_used_count")
        return {
            n_experts: header.get("expert_count"),
            "num_experts_per_tok": n_used,
            "norm_topk_prob": NORMALIZED.get(model_type, True),
            "moe_intermediate_size": header.get("expert_feed_forward_length", n_ff // n_used),
            "shared_expert_intermediate_size": header.get("expert_shared_feed_forward_length", n_ff),
            "sliding_window": None,
            "use_sliding_window": False,
            "qkv_bias": "blk.0.attn_q.bias" in header.tensors,
        } | (granite(header) if model_type == "granitemoe" else {})

    return {"model_type": model_type, "own": own}


def routed(header: Header) -> dict[str, Any]:
    """Experts chosen by sigmoids, in groups, behind layers that have none; others that every token takes."""
    return {
        "n_routed_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "n_shared_experts": header.get("expert_shared_count", 0),
        "first_k_dense_replace": header.get("leading_dense_block_count", 0),
        "norm_topk_prob": bool(header.get("expert_weights_norm", False)),
        "routed_scaling_factor": header.get("expert_weights_scale", 0.0) or 1.0,
        "n_group": header.get("expert_group_count", 0) or 1,
        "topk_group": header.get("expert_group_used_count", 0) or 1,
    }


def _glm4_moe(header: Header) -> dict[str, Any]:
    qk_norm = "blk.0.attn_q_norm.weight" in header.tensors
    return routed(header) | partly_rotary(header) | {"use_qk_norm": qk_norm}


def _ernie_moe(header: Header) -> dict[str, Any]:
    return {
        "moe_num_experts": header.get("expert_count"),
        "moe_k": header.get("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "moe_num_shared_experts": header.get("expert_shared_count", 0),
        "moe_layer_start_index": header.get("leading_dense_block_count", 0),
        "moe_layer_interval": header.get("interleave_moe_layer_step", 1),
        "moe_layer_end_index": header.n_layer - 1,
        "moe_norm_min": 6.103515625e-5,  # the least sum of weights in llama.cpp's graph
    }


def _minimax_m2(header: Header) -> dict[str, Any]:
    return partly_rotary(header) | {
        "num_local_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "intermediate_size": header.get("expert_feed_forward_length"),
    }


def _hunyuan_moe(header: Header) -> dict[str, Any]:
    return {"num_experts": header.get("expert_count"), "moe_topk": header.get("expert_used_count")}


def _gpt_oss(header: Header) -> dict[str, Any]:
    return windows(header, 2) | {
        "num_local_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "intermediate_size": header.get("expert_feed_forward_length"),
    }


FAMILIES: dict[str, Family | Callable[[Header], Family]] = {
    "llama": Family(**_experts("mixtral", "num_local_experts")),
    "qwen2moe": Family(**_experts("qwen2_moe")),
    "qwen3moe": Family(**_experts("qwen3_moe")),
    "olmoe": Family(**_experts("olmoe")),
    "glm4moe": Family(
        "glm4_moe",
        _glm4_moe,
        unproven=other_than(expert_gating_func=SIGMOID, rope__dimension_sections=0),
        scaled=True,
        partly=True,
    ),
    "ernie4_5-moe": Family("ernie4_5_moe", _ernie_moe, parts=renamed("mlp.gate.moe_statics", "mlp.moe_statics")),
    "minimax-m2": Family("minimax_m2", _minimax_m2, unproven=other_than(expert_gating_func=SIGMOID), partly=True),
    "hunyuan-moe": Family("hunyuan_v1_moe", _hunyuan_moe),
    "gpt-oss": Family(
        "gpt_oss",
        _gpt_oss,
        parts=renamed("attn.sinks", "attn.sinks.weight"),
        unproven=another_base,
        interleaved=True,
    ),
    "granitemoe": Family(
        **_experts("granitemoe", "num_local_experts"),
        unproven=other_than(rope__scaling__finetuned=True),
        only_plain=True,
    ),
}
