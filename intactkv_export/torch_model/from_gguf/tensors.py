"""The tensors of a GGUF under the names, and in the order of rows, that transformers has; and what ggml rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from math import prod
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from intactkv_export.errors import IntactKVError
from intactkv_export.models import LATENT, is_reordered
from intactkv_export.torch_model import experts
from intactkv_export.torch_model.from_gguf import latent
from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import INSTEAD, LONG, SHORT, Header
from intactkv_export.torch_model.rope_pairs import neighbours_to_halves
from intactkv_export.torch_model.rounding import rounded, straight

# Type of a matrix -> what activations are rounded to before it; q8_K for all others
_ACTIVATIONS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_ACTIVATIONS |= dict.fromkeys(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"), "q8_0")
# What transformers calls what gguf-py knows by another name
_RENAMED = {
    ".block_sparse_moe.": ".mlp.",
    ".mlp.router.": ".mlp.gate.",
    ".e_score_correction_bias": ".e_score_correction.bias",
    ".dt_bias": ".dt_proj.bias",
}
_OF_ROPE = ("rope_freqs.weight", LONG, SHORT)


class Tensors:
    """Those of one model."""

    def __init__(self, header: Header, family: Family) -> None:
        self._header, self._family = header, family

    def llama3_factors(self) -> Tensor | None:
        """What divides each RoPE frequency, [n_rot/2]: Llama 3's scaling, worked out by the converter."""
        name = "rope_freqs.weight"
        return torch.from_numpy(self._header.dequantized(name)) if name in self._header.tensors else None

    def weights(self, wanted: Mapping[str, Tensor], device: str) -> Iterator[tuple[str, Tensor]]:
        """Each of the transformers model's tensors, by name, that the GGUF has, in the dtype that it has there.

        Raises IntactKVError at the end if the GGUF has tensors of these layers that the model lacks.
        """
        known = set(_OF_ROPE)
        for name, like in wanted.items():
            own = self._own_names(name)
            if not all(x in self._header.tensors for x in own):
                continue
            known.update(own)
            size = sum(prod(self._header.tensors[x][1].shape) for x in own)
            if size != like.numel():
                raise IntactKVError(
                    f"{self._header.path} has {size} values of {own[0]}, and {like.numel()} by its header: convert the "
                    "model again"
                )
            if experts.is_stacked(name):
                yield name, self._stacked(own, like, device)
            else:
                weight = self._in_order(name, self._family.joined([self._header.dequantized(x) for x in own]))
                if weight.squeeze().shape == like.squeeze().shape:  # the converter adds or leaves out axes of 1
                    weight = weight.reshape(like.shape)
                yield name, torch.from_numpy(np.ascontiguousarray(weight)).to(device, like.dtype)
        self._check_known(known)

    def _check_known(self, known: set[str]) -> None:
        """A tensor that was left out is something of the model that is not computed here."""
        last = [f"blk.{il}." for il in range(self._header.n_layer, self._header.get("block_count"))]
        left = [x for x in self._header.tensors if x not in known and not x.startswith(tuple(last))]
        if left:
            raise IntactKVError(
                f"{self._header.path} of architecture {self._header.arch!r} has {left[0]}, with which torch cannot "
                f"read a GGUF of it: {INSTEAD}"
            )

    def _stacked(self, names: list[str], like: Tensor, device: str) -> Tensor:
        """Matrices, or biases, of all experts, those of each one joined.

        One at a time: a layer's experts may be most of what the memory holds.
        """
        out = torch.empty(like.shape, dtype=like.dtype, device=device)
        for i in range(len(out)):
            parts = [torch.from_numpy(self._header.dequantized(name, i)) for name in names]
            out[i].copy_(experts.joined(parts, self._family.interleaved))
        return out

    def round_activations(self, net: Any) -> None:
        """Before each matrix of the net, round what comes in as ggml does for that matrix's type."""
        for name, module in net.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(latent.BOTH):
                kind = self._before(f"{name}.weight")
                module.register_forward_pre_hook(lambda _, x, kind=kind: (_rounded(x[0], kind),))
            elif experts.are(module):
                first, last = (self._activations(self._own_names(f"{name}.{x}")[0]) for x in experts.parameters(module))
                module.round_inputs = partial(_rounded, kind=first), partial(_rounded, kind=last)

    def roundings(self, name: str) -> list[Callable[[Tensor], Tensor]]:
        """Of a module, what comes in is rounded so before each of the tensors that are its matrix."""
        return [partial(_rounded, kind=self._activations(x)) for x in self._own_names(f"{name}.weight")]

    def _before(self, name: str) -> str:
        """What activations are rounded to before a matrix of transformers."""
        own = [x if x in self._header.tensors else "token_embd.weight" for x in self._own_names(name)]  # tied
        kinds = {self._activations(x) for x in own}
        if len(kinds) > 1:
            raise IntactKVError(
                f"{self._header.path} holds {' and '.join(own)} in types before which activations are rounded to "
                f"{' and '.join(sorted(kinds))}, and torch has them in one matrix: quantize them to one type"
            )
        return kinds.pop()

    def _activations(self, name: str) -> str:
        """What activations are rounded to before they meet a matrix."""
        return _ACTIVATIONS.get(self._header.kind(self._header.tensors[name][1]).name, "q8_K")

    def _own_names(self, name: str) -> list[str]:
        """The GGUF's name of a tensor of transformers, several of one that holds several; "" if it has none."""
        for other, ours in _RENAMED.items():
            name = name.replace(other, ours)
        parts = experts.parts(name) if experts.is_stacked(name) else [name]
        known = [own for part in parts for own in self._family.parts(self._header, part)]
        return [self._names.get_name(own, try_suffixes=(".weight", ".bias")) or "" for own in known]

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        arch = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == self._header.arch)
        return gguf.get_tensor_name_map(arch, self._header.get("block_count"))

    def _in_order(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Undo what upstream's converter does to a tensor of transformers."""
        if self._family.one_more and name.endswith("norm.weight") and ".linear_attn." not in name:
            return weight - 1
        reordered = is_reordered(self._family.model_type) and self._family.model_type not in LATENT
        if name.split(".")[-2] in ("q_proj", "k_proj") and reordered:
            n_heads = len(weight) // self._header.head_dim  # of a hybrid, the header lists them by layer
            by_head = weight.reshape(n_heads, -1, weight.size // len(weight)).swapaxes(1, 2)
            return neighbours_to_halves(by_head).swapaxes(1, 2).reshape(weight.shape)
        return self._family.in_order(self._header, name, weight)


def _rounded(x: Tensor, kind: str) -> Tensor:
    return straight(x, lambda x: rounded(x.float(), kind).to(x.dtype))
