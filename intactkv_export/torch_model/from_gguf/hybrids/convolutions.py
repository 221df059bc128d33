"""Families with short convolutions beside attention layers."""

from __future__ import annotations

from typing import Any

from intactkv_export.torch_model.from_gguf.family import Family, other_than
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.hybrids.kinds import kinds
from intactkv_export.torch_model.from_gguf.mixtures import SIGMOID


def _lfm2(header: Header) -> dict[str, Any]:
    return {
        "norm_eps": header.get("attention.layer_norm_rms_epsilon"),
        "layer_types": kinds(header, {"shortconv.conv.weight": "conv"}),
        "conv_L_cache": header.get("shortconv.l_cache"),
        "conv_bias": "blk.0.shortconv.conv.bias" in header.tensors,
        "block_auto_adjust_ff_dim": False,
    }


def _lfm2_moe(header: Header) -> dict[str, Any]:
    return _lfm2(header) | {
        "num_dense_layers": header.get("leading_dense_block_count"),
        "num_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }


def _parts_of_lfm2(header: Header, name: str) -> list[str]:
    if name.endswith(".expert_bias"):
        return [f"{name}.bias"]
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    before, found, part = name.removesuffix(".weight").partition(".feed_forward.experts.")
    return [f"{before.removeprefix('model.')}{found}{names[part]}.weight"] if found else [name]


FAMILIES = {"lfm2": Family("lfm2", _lfm2, unproven=other_than(attention__sliding_window=0))}
WITH_EXPERTS = {
    "lfm2moe": Family(
        "lfm2_moe",
        _lfm2_moe,
        parts=_parts_of_lfm2,
        unproven=other_than(attention__sliding_window=0, expert_gating_func=SIGMOID),
    )
}
