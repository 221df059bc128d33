"""Mixtures of experts: transformers keeps the matrices of all experts of a layer in two parameters, gate and up in one.

A GGUF has three tensors of a layer, [columns, rows, experts]: gate, up and down.

What computes with them is transformers' loop over the experts that were chosen, on the CPU: its own choice, a grouped
product, falls back there in some versions to one whose backward pass works out the gradient of every frozen weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

PARTS = ("gate_up_proj", "down_proj")  # parameters of a module of experts: [n_expert, rows, columns]
_ROUNDED = "rounded_experts"  # the name of forward_rounded() among transformers' implementations


def are(module: Any) -> bool:
    """Whether a module of transformers is all experts of a layer."""
    return all(isinstance(getattr(module, part, None), torch.nn.Parameter) for part in PARTS)


def is_stacked(name: str) -> bool:
    """Whether a tensor of transformers, by its name, holds matrices of all experts of a layer."""
    return name.endswith(tuple(f".experts.{part}" for part in PARTS))


def parts(name: str) -> list[str]:
    """What a tensor that is_stacked() would be called if each kind of matrix were one of its own."""
    before, _, kind = name.rpartition(".")
    return [f"{before}.{part}.weight" for part in (("gate_proj", "up_proj") if kind == PARTS[0] else (kind,))]


def set_up(net: Any, device: str, rounds: bool) -> None:
    """Choose how a model computes its experts, if it has any. rounds: each module has round_inputs, see below."""
    if not any(are(module) for module in net.modules()):
        return
    if rounds:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(_ROUNDED, forward_rounded)
        net.set_experts_implementation(_ROUNDED)
    elif device == "cpu":
        net.set_experts_implementation("eager")


def forward_rounded(module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What the experts make of x [n_tokens, n_embd], rounded before each matrix by module.round_inputs.

    chosen, weights: [n_tokens, n_used], the experts of each token and what their outputs are multiplied by.
    round_inputs: two functions of a tensor, before gate and up, and before down.
    """
    first, last = module.round_inputs
    out = torch.zeros_like(x)
    x = first(x)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        gate, up = linear(x[token], module.gate_up_proj[expert]).chunk(2, -1)
        y = linear(last(module.act_fn(gate) * up), module.down_proj[expert])
        out = out.index_add(0, token, (y * weights[token, place, None]).to(out.dtype))
    return out
