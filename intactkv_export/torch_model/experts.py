"""Mixtures of experts: transformers keeps the matrices of all experts of a layer in two parameters, gate and up in one.

A GGUF has three tensors of a layer, [columns, rows, experts]: gate, up and down. Experts without a gate (Nemotron) have
two in both.

What computes with them is transformers' loop over the experts that were chosen, on the CPU: its own choice, a grouped
product, falls back there in some versions to one whose backward pass works out the gradient of every frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

_FIRST, _LAST = ("gate_up_proj", "up_proj"), "down_proj"  # parameters of a module of experts: [n_expert, rows, columns]
_BIAS = "_bias"  # at the end of the name of a parameter [n_expert, rows]
_ROUNDED = "rounded_experts"  # the name of forward_rounded() among transformers' implementations


def are(module: Any) -> bool:
    """Whether a module of transformers is all experts of a layer."""
    return len(parameters(module)) == 2


def parameters(module: Any) -> list[str]:
    """What a module of transformers calls the matrices of experts: those that come first, and those behind them."""
    return [name for name in (*_FIRST, _LAST) if isinstance(getattr(module, name, None), torch.nn.Parameter)]


def is_stacked(name: str) -> bool:
    """Whether a tensor of transformers, by its name, holds matrices of all experts of a layer."""
    return name.removesuffix(_BIAS).endswith(tuple(f".experts.{part}" for part in (*_FIRST, _LAST)))


def parts(name: str) -> list[str]:
    """What a tensor that is_stacked() would be called if each kind of matrix were one of its own."""
    before, _, kind = name.rpartition(".")
    last, kind = "bias" if kind.endswith(_BIAS) else "weight", kind.removesuffix(_BIAS)
    return [f"{before}.{part}.{last}" for part in (("gate_proj", "up_proj") if kind == _FIRST[0] else (kind,))]


def joined(parts: Sequence[Tensor], interleaved: bool) -> Tensor:
    """The matrices [rows, columns], or biases [rows], of one expert as one: one above the other.

    interleaved: their rows in turn, and transposed (gpt-oss).
    """
    if not interleaved:
        return torch.cat(list(parts))
    rows = torch.stack(list(parts), 1).flatten(0, 1)
    return rows.T if rows.ndim == 2 else rows


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
    name = parameters(module)[0]
    first, last = module.round_inputs
    out = torch.zeros_like(x)
    x = first(x)
    for expert in chosen.unique().tolist():
        token, place = torch.where(chosen == expert)
        y = _times(x[token], module, name, expert)
        y = _times(last(module._apply_gate(y) if module.has_gate else module.act_fn(y)), module, _LAST, expert)
        out = out.index_add(0, token, (y * weights[token, place, None]).to(out.dtype))
    return out


def _times(x: Tensor, module: Any, name: str, expert: int) -> Tensor:
    """x [n, columns] times an expert's matrix in the parameter of this name, and its bias."""
    matrix = getattr(module, name)[expert]
    bias = getattr(module, name + _BIAS)[expert] if module.has_bias else None
    return linear(x, matrix.T if module.is_transposed else matrix, bias)
