"""What llama.cpp makes of rows it rounds, in torch: those written to a KV cache, and those that meet quantized weights.

stored(): as the store of fused attention does (native/src/attention/simd/fit-inl.h): blocks of 4 and 5 bits get the
scale of the smallest error. rounded(): as ggml does, and so caches that fused attention does not serve.

Each function of ggml that quantizes a row (`quantize_row_q8_0_ref`, ... of ggml-quants.c) maps 32 values, a block, to
integers and an F16 scale. The values here are those that reading the blocks back gives, bit for bit. Two freedoms that
ggml's other kernels take are not modelled: q8_0 with AVX rounds ties to even, and a compiler may fuse multiply and add.

A quantized cache also holds its rows in a rotated basis (llama_kv_cache's attn_rot_k, attn_rot_v): the products with
Q, or the sums of V, are rotated back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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


def stored(x: Tensor, kv_type: str) -> Tensor:
    """Rows as a cache of the type holds them that fused attention serves: bit for bit. Shapes and errors: rounded()."""
    if kv_type not in _FITTED:
        return rounded(x, kv_type)
    return _FITTED[kv_type](x.unflatten(-1, (x.shape[-1] // 32, 32))).reshape(x.shape)


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
    if not size or not x.shape[-1]:  # V of latents is part of K
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


@dataclass(frozen=True)
class _Scales:
    """A type with a scale: its levels, and the scales tried, in units of the one that ggml takes."""

    lowest: int
    highest: int
    tried: tuple[float, ...]
    one: int = 16384  # what the largest value becomes, so that sums are whole numbers below 2^24: exact in any order
    levels: tuple[int, ...] = ()  # where they are not all the integers between

    def __call__(self, x: Tensor) -> Tensor:
        low, high = x.aminmax(dim=-1, keepdim=True)
        size = torch.maximum(high, -low)
        side = torch.where(high > -low, -1.0, 1.0)
        empty = ~(size >= _LEAST)
        n = _whole(x * (self.one / size * side), -self.one, self.one)
        best = _Best()
        for scale in self.tried:
            q = self._nearest(n * (_f32(-self.lowest) / (_f32(self.one) * _f32(scale))).item())
            qx, qq = (q * n).sum(-1, keepdim=True), (q * q).sum(-1, keepdim=True)
            best.keep(qx * qx / qq, qx / qq)
        d = _half(torch.where(empty, 0.0, best.values[0] * (size / self.one * side)))
        return self._nearest(x * _inverse(d)) * d

    def _nearest(self, x: Tensor) -> Tensor:
        if not self.levels:
            return _whole(x, self.lowest, self.highest)
        levels = torch.tensor(self.levels, dtype=torch.float32, device=x.device)
        return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2, right=True)]


@dataclass(frozen=True)
class _Minimum:
    """A type with a scale and a minimum. tried: what is cut off below and above, in units of the range."""

    highest: int
    tried: tuple[tuple[float, float], ...]
    one: int = 16384

    def __call__(self, x: Tensor) -> Tensor:
        low, high = x.aminmax(dim=-1, keepdim=True)
        size = high - low
        empty = ~(size >= _LEAST)
        n = _whole((x - low) * (self.one / size), -self.one, self.one)
        sx = n.sum(-1, keepdim=True).long()
        best = _Best()
        for below, above in self.tried:
            start = (_f32(below) * self.one).item()
            step = (_f32(self.highest) / (self.one * (1 - _f32(below) - _f32(above)))).item()
            q = _whole((n - start) * step, 0, self.highest)
            s, qq, qx = (y.sum(-1, keepdim=True).long() for y in (q, q * q, q * n))
            a, b = (32 * qx - sx * s).float(), (32 * qq - s * s).float()
            best.keep(a * a / b, a / b, (sx * qq - s * qx).float() / b)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        unit = size / self.one
        fitted = (low.to(wide) + best.values[1].to(wide) * unit.to(wide)).float()
        d, m = _half(torch.where(empty, 0.0, best.values[0] * unit)), _half(torch.where(empty, low, fitted))
        return _whole((x - m) * _inverse(d), 0, self.highest) * d + m


class _Best:
    """The best try so far, the first of equals: how much of the squares it explains, and what was kept with it."""

    def __init__(self) -> None:
        self.gain: Tensor | None = None
        self.values: tuple[Tensor, ...] = ()

    def keep(self, gain: Tensor, *values: Tensor) -> None:
        if self.gain is None:
            self.gain, self.values = gain, values
        else:
            better = gain > self.gain
            self.gain = torch.where(better, gain, self.gain)
            self.values = tuple(torch.where(better, x, y) for x, y in zip(values, self.values, strict=True))


def _whole(x: Tensor, low: float, high: float) -> Tensor:
    return x.clamp(low, high).round()


def _f32(x: float) -> Tensor:
    """Constants are computed in float32 there, step by step."""
    return torch.tensor(x, dtype=torch.float32)


_LEAST = 1e-20  # of the largest value or the range of a block; below, the scale is 0
_FITTED: dict[str, Callable[[Tensor], Tensor]] = {
    "q4_0": _Scales(-8, 7, (0.8, 0.85, 0.9, 0.95, 1.0, 1.03, 1.06, 1.1)),
    "q5_0": _Scales(-16, 15, (0.88, 0.91, 0.94, 0.97, 1.0, 1.02, 1.04, 1.06)),
    "iq4_nl": _Scales(-127, 113, (0.84, 0.89, 0.945, 1.0, -0.9, -0.97, -1.03, -1.1), 4096, _IQ4_NL),
    "q4_1": _Minimum(
        15,
        ((0, 0), (0, 0.025), (0, 0.05), (0.025, 0), (0.025, 0.025), (0.025, 0.05), (0.05, 0), (0.05, 0.025)),
    ),
    "q5_1": _Minimum(
        31,
        ((0, 0), (-0.01, -0.01), (-0.01, 0), (-0.01, 0.01), (0, -0.01), (0, 0.01), (0.01, -0.01), (0.01, 0)),
    ),
}
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
