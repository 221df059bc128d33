"""Which layers of a hybrid are of which kind."""

from __future__ import annotations

from collections.abc import Mapping

from intactkv_export.torch_model.from_gguf.header import Header


def kinds(header: Header, signs: Mapping[str, str], otherwise: str = "full_attention") -> list[str]:
    """layer_types of a hybrid. signs: a tensor of a layer -> what such a layer is; the first that it has."""
    return [
        next((kind for sign, kind in signs.items() if f"blk.{il}.{sign}" in header.tensors), otherwise)
        for il in range(header.n_layer)
    ]
