"""Mixtures of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from intactkv_export.models import NORMALIZED
from intactkv_export.torch_model.from_gguf.dense import granite
from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header


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


def _row(header: Header, name: str, weight: np.ndarray) -> np.ndarray:
    """The gate of a shared expert is one row, of which the converter makes a vector."""
    return weight.reshape(1, -1) if name.endswith("shared_expert_gate.weight") else weight


FAMILIES = {
    "llama": Family(**_experts("mixtral", "num_local_experts")),
    "qwen2moe": Family(**_experts("qwen2_moe"), in_order=_row),
    "qwen3moe": Family(**_experts("qwen3_moe")),
    "olmoe": Family(**_experts("olmoe")),
    "granitemoe": Family(**_experts("granitemoe", "num_local_experts"), only_plain=True),
}
