"""Models that cache latents (MLA: DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash), computed as llama.cpp does.

transformers works out each head's K and V of a latent. llama.cpp takes the matrix that would make K to the query's side
(it is absorbed), attends to the latents themselves, and makes V of their sum: the same but for what is rounded before
those two matrices, which are tensors of their own in a GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.mixtures import SIGMOID, routed
from intactkv_export.torch_model.from_gguf.rope import rope

_ABSORBED = "absorbed_latents"  # the name of attend() among transformers' implementations
BOTH = ".kv_b_proj"  # the module whose matrix makes K and V
_SOFTMAX = 1  # expert_gating_func
_GLM_FLASH = ((47, 48), 154880)  # layers and vocabulary by which llama.cpp knows it in files without that key


def _own(header: Header) -> dict[str, Any]:
    turned = header.get("rope.dimension_count")
    parameters = rope(header)
    if parameters["rope_type"] == "yarn":  # the converter writes a tenth of it
        scale = header.get("rope.scaling.yarn_log_multiplier", 0.0) / 0.1
        parameters |= {"mscale": scale, "mscale_all_dim": scale}
    return routed(header) | {
        "q_lora_rank": header.get("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": header.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": header.get("attention.key_length_mla") - turned,
        "v_head_dim": header.get("attention.value_length_mla"),
        "head_dim": turned,
        "num_key_value_heads": header.get("attention.head_count"),
        "rope_parameters": parameters,
    }


def _gating(header: Header) -> int:
    if known := header.get("expert_gating_func", 0):
        return int(known)
    layers, vocabulary = _GLM_FLASH
    flash = header.n_layer in layers and header.tensors["token_embd.weight"][1].shape[1] == vocabulary
    return SIGMOID if flash else _SOFTMAX


def _unproven(header: Header) -> str:
    if header.get("attention.temperature_scale", 0.0):
        return "attention.temperature_scale"
    if (gating := _gating(header)) not in (_SOFTMAX, SIGMOID):
        return f"expert_gating_func {gating}"
    if rope(header)["rope_type"] == "linear":
        return "linear RoPE scaling"
    if header.get("rope.scaling.type", "none") == "yarn" and not header.get("rope.scaling.yarn_log_multiplier", 0.0):
        return "YaRN without rope.scaling.yarn_log_multiplier"
    if "blk.0.attn_kv_b.weight" in header.tensors:
        return "blk.0.attn_kv_b.weight"
    return ""


def _unproven_softmax(header: Header) -> str:
    """transformers takes the best expert of a group for its score, llama.cpp the two best."""
    for key, most in (("expert_group_count", 1), ("expert_weights_norm", 0)):
        if header.get(key, 0) > most:
            return f"softmax experts with {key} {header.get(key)}"
    return _unproven(header)


def _parts(header: Header, name: str) -> list[str]:
    before, found, after = name.partition(BOTH + ".")
    return [f"{before}.k_b_proj.{after}", f"{before}.v_b_proj.{after}"] if found else [name]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Of the two matrices that make K and V, [n_head, latent, n] and [n_head, n, latent], the one that makes both."""
    if len(parts) == 1:
        return parts[0]
    k, v = parts
    return np.concatenate([k.swapaxes(1, 2), v], 1).reshape(-1, k.shape[1])


def _deepseek2(header: Header) -> Family:
    """How experts are chosen tells V2 from those after it."""
    model_type, unproven = ("deepseek_v3", _unproven)
    if _gating(header) != SIGMOID:
        model_type, unproven = ("deepseek_v2", _unproven_softmax)
    return Family(
        model_type, _own, parts=_parts, joined=_joined, unproven=unproven, scaled=True, partly=True, grouped=True
    )


def set_up(net: Any, header: Header, roundings: Callable[[str], list[Callable[[Tensor], Tensor]]]) -> None:
    """Have a net of transformers attend as llama.cpp does, with the epsilon that its norms of latents have there.

    roundings: of a module's name, how what comes in is rounded before the matrix of K, and before that of V.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_ABSORBED, attend)
    AttentionMaskInterface.register(_ABSORBED, sdpa_mask)
    net.config._attn_implementation = _ABSORBED
    for name, module in net.named_modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = header.get("attention.layer_norm_rms_epsilon")
        if hasattr(module, "expand_kv"):
            module.expand_kv = _Rows()
            module.num_key_value_groups = module.num_heads
            module.absorbed = _Absorbed(module, *roundings(name + BOTH))


class _Rows:
    """In place of expand_kv(): K is the whole row, V the latent."""

    def __call__(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([latent, turned], -1), latent


@dataclass(frozen=True)
class _Absorbed:
    """The two matrices of an attention module, by head, and what is rounded before each."""

    module: Any
    round_query: Callable[[Tensor], Tensor]
    round_sum: Callable[[Tensor], Tensor]

    def query(self, query: Tensor) -> Tensor:
        """Queries [batch, n_head, n, n_still + n_turned] as those of latents and of what RoPE turns behind them."""
        still, turned = query.tensor_split([self.module.qk_nope_head_dim], -1)
        return torch.cat([self.round_query(still) @ self._by_head[:, : self.module.qk_nope_head_dim], turned], -1)

    def values(self, latents: Tensor) -> Tensor:
        """Sums of latents [batch, n_head, n, n_latent] as sums of V."""
        return self.round_sum(latents) @ self._by_head[:, self.module.qk_nope_head_dim :].mT

    @property
    def _by_head(self) -> Tensor:
        return self.module.kv_b_proj.weight.unflatten(0, (self.module.num_heads, -1))


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' own attention, of absorbed queries to latents."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    absorbed = module.absorbed
    out, weights = sdpa_attention_forward(module, absorbed.query(query), key, value, mask, **kwargs)
    return absorbed.values(out.transpose(1, 2)).transpose(1, 2), weights


WITH_EXPERTS: dict[str, Family | Callable[[Header], Family]] = {"deepseek2": _deepseek2}
