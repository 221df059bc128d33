"""Families with recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.rope import rope


def _kinds(header: Header, recurrent: str, sign: str) -> list[str]:
    """layer_types of a hybrid, whose recurrent layers have a tensor of this name."""
    return [recurrent if f"blk.{il}.{sign}" in header.tensors else "full_attention" for il in range(header.n_layer)]


def _lfm2(header: Header) -> dict[str, Any]:
    return {
        "norm_eps": header.get("attention.layer_norm_rms_epsilon"),
        "layer_types": _kinds(header, "conv", "shortconv.conv.weight"),
        "conv_L_cache": header.get("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in header.tensors,
        "block_auto_adjust_ff_dim": False,
    }


def _order_of_lfm2(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    return weight[:, None] if name.endswith(".conv.conv.weight") else weight


def _qwen35(header: Header) -> dict[str, Any]:
    n_head_v = header.get("ssm.time_step_rank")
    rotary = header.get("rope.dimension_count") / header.head_dim
    return {
        "layer_types": _kinds(header, "linear_attention", "ssm_conv1d.weight"),
        "linear_conv_kernel_dim": header.get("ssm.conv_kernel"),
        "linear_num_key_heads": header.get("ssm.group_count"),
        "linear_key_head_dim": header.get("ssm.state_size"),
        "linear_num_value_heads": n_head_v,
        "linear_value_head_dim": header.get("ssm.inner_size") // n_head_v,
        "partial_rotary_factor": rotary,
        "rope_parameters": rope(header) | {"partial_rotary_factor": rotary},
    }


def _order_of_qwen35(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    """llama.cpp has the first head of V of every head of K together, transformers those of one."""
    if ".linear_attn." not in name:
        return weight
    part = name.rpartition(".linear_attn.")[2].removesuffix(".weight")
    n_k, n_v = header.get("ssm.group_count"), header.get("ssm.time_step_rank")
    size = header.get("ssm.inner_size") // n_v

    def by_k(rows: np.ndarray, size: int) -> np.ndarray:
        return rows.reshape(n_v // n_k, n_k, size, -1).swapaxes(0, 1).reshape(rows.shape)

    if part == "out_proj":
        return by_k(weight.T, size).T
    if part == "in_proj_z":
        return by_k(weight, size)
    if part in ("in_proj_qkv", "conv1d"):
        v = -n_v * size
        whole = np.concatenate([weight[:v], by_k(weight[v:], size)])
        return whole[:, None] if part == "conv1d" else whole
    if part == "A_log":
        weight = np.log(-weight)
    return weight if part == "norm" else by_k(weight, 1)


FAMILIES = {
    "lfm2": Family("lfm2", _lfm2, _order_of_lfm2),
    "qwen35": Family("qwen3_5_text", _qwen35, _order_of_qwen35, one_more=True),
}
