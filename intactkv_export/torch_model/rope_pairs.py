"""The order of a head's values: which two of them RoPE turns together.

"neox": value j with j + head_dim/2, the halves of a head; so does transformers. "norm": 2j with 2j + 1, neighbours; so
does llama.cpp for Llama-type models, for which upstream's converter reorders W_q and W_k (LlamaModel.permute of
conversion/llama.py). Those that reorder the last axis take numpy arrays and torch tensors.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Values = TypeVar("Values")  # numpy.ndarray or torch.Tensor [..., head_dim]


def halves_to_neighbours(x: Values) -> Values:
    """From transformers' order to that of RoPE type "norm": value (s, j) of [2, head_dim/2] goes to 2j + s."""
    return _transposed(x, 2, x.shape[-1] // 2)  # type: ignore[attr-defined]


def neighbours_to_halves(x: Values) -> Values:
    """The inverse."""
    return _transposed(x, x.shape[-1] // 2, 2)  # type: ignore[attr-defined]


def turned_back(x: Tensor, angles: Tensor, neighbours: bool) -> Tensor:
    """Values [..., n, head_dim] as they were before RoPE turned them by angles [n, n_rot/2]; those behind the first
    n_rot stay.

    neighbours: which two were turned together; False: the halves of the first n_rot. What RoPE multiplies at every
    position alike (YaRN, LongRoPE) stays too.
    """
    n_rot = 2 * angles.shape[-1]
    part, rest = x[..., :n_rot], x[..., n_rot:]
    first, second = (neighbours_to_halves(part) if neighbours else part).chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    back = torch.cat([first * cos + second * sin, second * cos - first * sin], -1)
    return torch.cat([halves_to_neighbours(back) if neighbours else back, rest], -1)


def _transposed(x: Values, n: int, m: int) -> Values:
    grid = x.reshape(*x.shape[:-1], n, m)  # type: ignore[attr-defined]
    return grid.swapaxes(-1, -2).reshape(x.shape)  # type: ignore[attr-defined]
