"""What llama.cpp makes of rows it rounds, in torch: those written to a KV cache, and those that meet quantized weights.

Each function of ggml that quantizes a row (`quantize_row_q8_0_ref`, ... of ggml-quants.c) maps 32 values, a block, to
integers and an F16 scale. The values here are those that reading the blocks back gives, bit for bit. Two freedoms that
ggml's other kernels take are not modelled: q8_0 with AVX rounds ties to even, and a compiler may fuse multiply and add.

A quantized cache also holds its rows in a rotated basis (llama_kv_cache's attn_rot_k, attn_rot_v): the products with
Q, or the sums of V, are rotated back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # kvalues_iq4nl


def rounded(x: Tensor, kv_type: str) -> Tensor:
    """Rows as the type holds them: float32 [..., n], n a multiple of its block: 32, 256 for q8_K, 1 for f16 and bf16.

    kv_type: one of runtime.KV_TYPES, or q8_K, what the CPU rounds activations to before it multiplies them with
    K-quants. Raises KeyError for any other.
    """
    if kv_type == "f32":
        return x
    if kv_type in _FLOATS:
        return x.to(_FLOATS[kv_type]).float()
    block = 256 if kv_type == "q8_K" else 32
    return _BLOCKS[kv_type](x.unflatten(-1, (-1, block))).flatten(-2)


def straight(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """function(x), a rounding, which gradients pass as if it were not there."""
    return _Straight.apply(x, function)


def rotation(kv_type: str, head_dim: int, is_v: bool) -> int:
    """Size of the Hadamard matrices that rotate a head's values in a cache of this type; 0: not rotated.

    As llama_kv_cache::build_input_k_rot and build_input_v_rot: 64 for V, the largest power of two that divides
    head_dim for K, nothing unless the type is quantized and head_dim a multiple of 64.
    """
    if kv_type not in _BLOCKS or head_dim % 64:
        return 0
    return 64 if is_v else head_dim & -head_dim


def rotate(x: Tensor, size: int) -> Tensor:
    """Each run of `size` values of the last dimension times the orthonormal Hadamard matrix, its own inverse."""
    if not size:
        return x
    matrix = _hadamard(size).to(x.device, x.dtype)
    return (x.unflatten(-1, (-1, size)) @ matrix).flatten(-2)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


@cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def _inverse(d: Tensor) -> Tensor:
    """1/d in float32; 0 where d is 0. Below 2.9e-39 it would be infinite: such a scale is 0 in F16 anyway."""
    inverse = 1 / d
    return torch.where(torch.isfinite(inverse), inverse, torch.zeros_like(d))


def _half(x: Tensor) -> Tensor:
    return x.half().float()


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(-1, keepdim=True) / 127
    y = x * _inverse(d)
    q = torch.copysign((y.abs() + 0.5).floor(), y)  # roundf: ties away from zero
    return q * _half(d)


def _q8_k(x: Tensor) -> Tensor:
    """The scale stays in float32."""
    inverse = _inverse(x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -127)
    q = (x * inverse).round().clamp(max=127)
    return q * _inverse(inverse)


def _symmetric(x: Tensor, zero: int) -> Tensor:
    """q4_0 (zero 8) and q5_0 (zero 16): the value with the largest magnitude, the first of equals, is -zero."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    d = largest / -zero
    q = (x * _inverse(d) + (zero + 0.5)).trunc().clamp(max=2 * zero - 1)
    return (q - zero) * _half(d)


def _with_minimum(x: Tensor, steps: int) -> Tensor:
    """q4_1 (15 steps) and q5_1 (31): from the smallest value up to the largest."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    d = (high - low) / steps
    q = ((x - low) * _inverse(d) + 0.5).trunc().clamp(max=steps)
    return q * _half(d) + _half(low)


def _iq4_nl(x: Tensor) -> Tensor:
    """Sixteen uneven steps; the scale is then fitted by least squares, weighted by the squared values.

    The sums are float64 here: in one block of many the fitted scale may differ from ggml's by a unit of F16.
    """
    values = torch.tensor(_IQ4_NL, dtype=torch.float32, device=x.device)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    q = values[_nearest(x * _inverse(largest / values[0]), values)]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    qx, w = q.to(wide) * x.to(wide), x.to(wide) ** 2
    d = ((w * qx).sum(-1, keepdim=True) / (w * q.to(wide) ** 2).sum(-1, keepdim=True)).float()
    d = torch.where(largest.abs() < 1e-15, torch.zeros_like(d), d)  # GROUP_MAX_EPS
    return q * _half(d)


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """best_index_int8: the upper one of two equally near values."""
    upper = torch.searchsorted(values, x.contiguous(), right=True).clamp(1, len(values) - 1)
    lower = upper - 1
    return torch.where(x - values[lower] < values[upper] - x, lower, upper)


_FLOATS = {"f16": torch.float16, "bf16": torch.bfloat16}
_BLOCKS: dict[str, Callable[[Tensor], Tensor]] = {
    "q8_0": _q8_0,
    "q5_1": lambda x: _with_minimum(x, 31),
    "q5_0": lambda x: _symmetric(x, 16),
    "q4_1": lambda x: _with_minimum(x, 15),
    "q4_0": lambda x: _symmetric(x, 8),
    "iq4_nl": _iq4_nl,
    "q8_K": _q8_k,
}
