"""Families with Mamba 2, beside attention layers or within them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from intactkv_export.torch_model.from_gguf.dense import granite
from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.hybrids.kinds import kinds
from intactkv_export.torch_model.from_huggingface import NO_LEAST_STEP

# Tokens that are computed at once, each with all: the same sums in another order. Checkpoints say 128 or 256; a text of
# few tokens is filled up to it, and for the backward pass each head keeps as many values a token.
_CHUNK = 64
_BIASES = ("ssm_conv1d.bias", "ssm_dt.bias", "exp_probs_b.bias")  # that such models have


def _sizes(header: Header, names: Mapping[str, str]) -> dict[str, Any]:
    """Of Mamba 2. names: what the configuration calls the number of heads, values in one, and so on."""
    n_head = header.get("ssm.time_step_rank")
    values = {
        "heads": n_head,
        "head": header.get("ssm.inner_size") // n_head,
        "groups": header.get("ssm.group_count"),
        "state": header.get("ssm.state_size"),
        "conv": header.get("ssm.conv_kernel"),
        "chunk": _CHUNK,
    }
    return {name: values[kind] for kind, name in names.items()}


_PREFIXED = {"heads": "mamba_n_heads", "head": "mamba_d_head", "groups": "mamba_n_groups", "state": "mamba_d_state",
             "conv": "mamba_d_conv", "chunk": "mamba_chunk_size"}  # fmt: skip
_NEMOTRON = {"heads": "mamba_num_heads", "head": "mamba_head_dim", "groups": "n_groups", "state": "ssm_state_size",
             "conv": "conv_kernel", "chunk": "chunk_size"}  # fmt: skip


def _granite_h(header: Header) -> dict[str, Any]:
    n_experts = header.get("expert_count", 0)
    up = header.tensors["blk.0.ffn_up_shexp.weight" if n_experts else "blk.0.ffn_up.weight"][1]
    return (
        _sizes(header, _PREFIXED)
        | granite(header)
        | {
            "layer_types": kinds(header, {"ssm_in.weight": "linear_attention"}),
            "mamba_expand": header.get("ssm.inner_size") // header.get("embedding_length"),
            "shared_intermediate_size": up.shape[1],
            "num_local_experts": n_experts,
            "num_experts_per_tok": header.get("expert_used_count", 0),
            "position_embedding_type": "nope",
        }
    )


def _parts_of_granite(header: Header, name: str) -> list[str]:
    """The network that every token passes: of a model with experts, the shared one."""
    _, found, part = name.partition(".shared_mlp.")
    end = "_shexp.weight" if header.get("expert_count", 0) else ".weight"
    kinds = {"input_linear.weight": ("ffn_gate", "ffn_up"), "output_linear.weight": ("ffn_down",)}.get(part, ())
    return [f"blk.{name.split('.')[2]}.{kind}{end}" for kind in kinds] if found else [name]


def _falcon_h1(header: Header) -> dict[str, Any]:
    """All multipliers are in the matrices."""
    ones = ("embedding", "lm_head", "key", "attention_in", "attention_out", "ssm_in", "ssm_out")
    return (
        _sizes(header, _PREFIXED)
        | {f"{name}_multiplier": 1.0 for name in ones}
        | {
            "mamba_d_ssm": header.get("ssm.inner_size"),
            "ssm_multipliers": [1.0] * 5,
            "mlp_multipliers": [1.0] * 2,
            "mamba_rms_norm": False,
        }
    )


def _nemotron_h(header: Header) -> dict[str, Any]:
    signs = {"ssm_in.weight": "linear_attention", "attn_q.weight": "full_attention", "ffn_up_exps.weight": "moe"}
    epsilon = header.get("attention.layer_norm_rms_epsilon", 0.0) or header.get("attention.layer_norm_epsilon")
    return _sizes(header, _NEMOTRON) | {
        "layers_block_type": kinds(header, signs, "mlp"),
        "layer_norm_epsilon": epsilon,
        "time_step_min": NO_LEAST_STEP,
        "num_experts_per_tok": 0,  # the class's default is 2, with experts or without
    }


def _nemotron_h_moe(header: Header) -> dict[str, Any]:
    return _nemotron_h(header) | {
        "n_routed_experts": header.get("expert_count"),
        "num_experts_per_tok": header.get("expert_used_count"),
        "moe_intermediate_size": header.get("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": header.get("expert_shared_feed_forward_length"),
        "moe_latent_size": header.get("moe_latent_size", 0) or None,
        "norm_topk_prob": bool(header.get("expert_weights_norm", False)),
        "routed_scaling_factor": header.get("expert_weights_scale", 1.0),
    }


def _parts_of_nemotron(header: Header, name: str) -> list[str]:
    if ".mixer.experts." in name:
        return [name.replace(".mixer.", ".mlp.")]
    return [name.replace("model.", "backbone.", 1).replace(".e_score_correction_bias", ".e_score_correction.bias")]


def _order(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    """A tensor of Mamba 2, which the converter computes with, or cuts into groups."""
    if name.endswith(".A_log"):
        return np.log(-weight)
    return weight.reshape(-1) if name.endswith((".mamba.norm.weight", ".mixer.norm.weight")) else weight


def _unproven(header: Header) -> str:
    if any(name.endswith(".bias") and not name.endswith(_BIASES) for name in header.tensors):
        return "biases"
    if header.get("rope.scaling.finetuned", header.arch == "granitehybrid"):
        return "RoPE"  # Bamba: such layers in the same GGUF architecture as Granite's, which have none
    return "a norm inside Mamba" if header.arch == "falcon-h1" and "blk.0.ssm_norm.weight" in header.tensors else ""


FAMILIES = {
    "granitehybrid": Family("granitemoehybrid", _granite_h, _order, _parts_of_granite, _unproven, partly=True),
    "falcon-h1": Family("falcon_h1", _falcon_h1, _order, unproven=_unproven),
    "nemotron_h": Family("nemotron_h", _nemotron_h, _order, _parts_of_nemotron, _unproven, partly=True),
}
WITH_EXPERTS = {
    "granitehybrid": FAMILIES["granitehybrid"],
    "nemotron_h_moe": Family(
        "nemotron_h", _nemotron_h_moe, _order, _parts_of_nemotron, _unproven, scaled=True, partly=True
    ),
}
