"""Families with gated delta nets beside attention layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.hybrids.kinds import kinds
from intactkv_export.torch_model.from_gguf.rope import rope


def _delta(header: Header) -> dict[str, Any]:
    n_head_v = header.get("ssm.time_step_rank")
    rotary = header.get("rope.dimension_count") / header.head_dim
    return {
        "layer_types": kinds(header, {"ssm_conv1d.weight": "linear_attention"}),
        "linear_conv_kernel_dim": header.get("ssm.conv_kernel"),
        "linear_num_key_heads": header.get("ssm.group_count"),
        "linear_key_head_dim": header.get("ssm.state_size"),
        "linear_num_value_heads": n_head_v,
        "linear_value_head_dim": header.get("ssm.inner_size") // n_head_v,
        "partial_rotary_factor": rotary,
        "rope_parameters": rope(header) | {"partial_rotary_factor": rotary},
    }


def _delta_moe(header: Header) -> dict[str, Any]:
    return _delta(header) | {
        "num_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "shared_expert_intermediate_size": header.get("expert_shared_feed_forward_length"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _sizes(header: Header) -> tuple[int, int, int]:
    """Of a delta net: heads of K, heads of V, values in a head of V."""
    n_k, n_v = header.get("ssm.group_count"), header.get("ssm.time_step_rank")
    return n_k, n_v, header.get("ssm.inner_size") // n_v


def _parts_of_qwen3next(header: Header, name: str) -> list[str]:
    """The first converters left Q, K, V and the gate in one matrix, as transformers has them."""
    layer, _, part = name.removeprefix("model.layers.").partition(".")
    if part != "linear_attn.in_proj_qkvz.weight" or f"blk.{layer}.ssm_in.weight" in header.tensors:
        return [name]
    return [f"blk.{layer}.attn_qkv.weight", f"blk.{layer}.attn_gate.weight"]


def _order_of_qwen3next(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp has Q of all heads, then K, V and the gate of all; transformers all of one head of K together."""
    if ".linear_attn." not in name:
        return weight
    part = name.rpartition(".linear_attn.")[2].removesuffix(".weight")
    if part == "in_proj_qkvz" and f"blk.{name.split('.')[2]}.ssm_in.weight" not in header.tensors:
        n_k, n_v, size = _sizes(header)
        n = n_k * header.get("ssm.state_size")
        split = np.split(weight, np.cumsum([n, n, n_v * size]))
        return np.concatenate([x.reshape(n_k, -1, weight.shape[1]) for x in split], 1).reshape(weight.shape)
    return np.log(-weight) if part == "A_log" else weight


def _order_of_qwen35(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp has the first head of V of every head of K together, transformers those of one."""
    if ".linear_attn." not in name:
        return weight
    part = name.rpartition(".linear_attn.")[2].removesuffix(".weight")
    n_k, n_v, size = _sizes(header)

    def by_k(rows: np.ndarray, size: int) -> np.ndarray:
        return rows.reshape(n_v // n_k, n_k, size, -1).swapaxes(0, 1).reshape(rows.shape)

    if part == "out_proj":
        return by_k(weight.T, size).T
    if part == "in_proj_z":
        return by_k(weight, size)
    if part in ("in_proj_qkv", "conv1d"):
        v = -n_v * size
        return np.concatenate([weight[:v], by_k(weight[v:], size)])
    if part == "A_log":
        weight = np.log(-weight)
    return weight if part == "norm" else by_k(weight, 1)


FAMILIES = {"qwen35": Family("qwen3_5_text", _delta, _order_of_qwen35, partly=True, one_more=True)}
WITH_EXPERTS = {
    "qwen3next": Family("qwen3_next", _delta_moe, _order_of_qwen3next, _parts_of_qwen3next, partly=True, one_more=True),
    "qwen35moe": Family("qwen3_5_moe_text", _delta_moe, _order_of_qwen35, partly=True, one_more=True),
}
