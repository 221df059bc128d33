"""A GGUF's header as a configuration of transformers."""

from __future__ import annotations

from typing import Any

from intactkv_export.errors import IntactKVError
from intactkv_export.models import RECURRENT
from intactkv_export.torch_model.from_gguf import dense, hybrids, latent, mixtures
from intactkv_export.torch_model.from_gguf.family import Family
from intactkv_export.torch_model.from_gguf.header import INSTEAD, Header
from intactkv_export.torch_model.from_gguf.rope import check_longrope, rope

# By architecture
_FAMILIES = dense.FAMILIES | hybrids.FAMILIES
_WITH_EXPERTS = mixtures.FAMILIES | hybrids.WITH_EXPERTS | latent.WITH_EXPERTS
_NOT_PLAIN = ("rope_freqs.weight", "blk.0.ffn_gate_shexp.weight")


def family_of(header: Header) -> Family:
    """Raises IntactKVError if the architecture, or something of this model, is not proven."""
    with_experts = bool(header.get("expert_count", 0))
    family = (_WITH_EXPERTS if with_experts else _FAMILIES).get(header.arch)
    if family is None:
        raise IntactKVError(
            f"{header.path} is of architecture {header.arch!r}{' with experts' if with_experts else ''}, which torch "
            f"cannot read from a GGUF: {INSTEAD}"
        )
    if not isinstance(family, Family):
        family = family(header)
    check_longrope(header)
    keys = [
        key for key in ("attention.sliding_window", "rope.scaling.factor", "rope.scale_linear") if header.get(key, 0)
    ]
    if family.only_plain and (found := keys + [name for name in _NOT_PLAIN if name in header.tensors]):
        raise IntactKVError(
            f"{header.path} of architecture {header.arch!r} has {found[0]}, with which torch cannot read a GGUF of it: "
            f"{INSTEAD}"
        )
    if what := family.unproven(header) or _unproven(header, family):
        raise IntactKVError(
            f"{header.path} of architecture {header.arch!r} has {what}, with which torch cannot read a GGUF of it: "
            f"{INSTEAD}"
        )
    scale = header.get("expert_weights_scale", 1.0)
    if scale not in (0.0, 1.0) and not family.scaled:
        raise IntactKVError(
            f"{header.path} multiplies what its experts give by {scale}, which torch cannot read from a GGUF: {INSTEAD}"
        )
    return family


def _unproven(header: Header, family: Family) -> str:
    """What llama.cpp reads for every architecture, and own() of few."""
    n_rot = header.get("rope.dimension_count", header.head_dim)
    if n_rot != header.head_dim and not family.partly:
        return f"rope.dimension_count {n_rot} in heads of {header.head_dim}"
    groups = header.get("expert_group_count", 0)
    return f"expert_group_count {groups}" if groups > 1 and not family.grouped else ""


def configuration(header: Header, family: Family) -> dict[str, Any]:
    """Arguments of AutoConfig.for_model()."""
    return {
        "model_type": family.model_type,
        "vocab_size": header.tensors["token_embd.weight"][1].shape[1],
        "hidden_size": header.get("embedding_length"),
        "intermediate_size": _n_ff(header),
        "num_hidden_layers": header.n_layer,
        "num_attention_heads": header.get("attention.head_count"),
        "num_key_value_heads": _n_head_kv(header, family),
        "head_dim": header.head_dim,
        "max_position_embeddings": header.get("context_length"),
        **_epsilon(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "rope_parameters": rope(header),
        # a padding token of the class's own would be another vocabulary's
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        **family.own(header),
    }


def _n_ff(header: Header) -> int:
    """The header of a hybrid has a list, 0 where a layer has no feed-forward network, or nothing if all have experts:
    then as the matrices say."""
    if n_ff := header.get("feed_forward_length", 0):
        return int(n_ff)
    up = (".ffn_up.weight", ".ffn_up_exps.weight")
    first = next((x for name, (_, x) in header.tensors.items() if name.endswith(up)), None)
    return int(header.get("feed_forward_length") if first is None else first.shape[1])


def _epsilon(header: Header) -> dict[str, Any]:
    """Of RMS norms; that of others has as many names as families, and each knows its own."""
    if header.get("attention.layer_norm_epsilon", 0.0):
        return {}
    return {"rms_norm_eps": header.get("attention.layer_norm_rms_epsilon")}


def _n_head_kv(header: Header, family: Family) -> int:
    """The header of a hybrid has a list, 0 where a layer has none: then as the layers' own matrices say."""
    if family.model_type not in RECURRENT:
        return int(header.get("attention.head_count_kv", header.get("attention.head_count")))
    first = next((x for name, (_, x) in header.tensors.items() if name.endswith(".attn_k.weight")), None)
    if first is None:
        raise IntactKVError(f"{header.path} has no attention layer, and torch can train nothing else: {INSTEAD}")
    return first.shape[1] // header.head_dim
