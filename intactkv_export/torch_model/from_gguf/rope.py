"""RoPE as a GGUF's header says it, and as transformers' configurations do."""

from __future__ import annotations

from typing import Any

from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file
from intactkv_export.torch_model.from_gguf.header import INSTEAD, LONG, SHORT, Header


def rope(header: Header) -> dict[str, Any]:
    """rope_parameters of transformers.

    Raises IntactKVError for a scaling that is not proven.
    """
    base = {"rope_theta": header.get("rope.freq_base", 1e4)}
    if long := gguf_file.longrope(header.file):
        return base | {
            "rope_type": "longrope",
            "short_factor": header.dequantized(SHORT).tolist(),
            "long_factor": header.dequantized(LONG).tolist(),
            "original_max_position_embeddings": long.n_ctx_orig,
            "attention_factor": header.get("rope.scaling.attn_factor", 1.0),
        }
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear", 0.0))  # the latter in the first files
    kind = header.get("rope.scaling.type", "linear")  # what llama.cpp takes
    if kind == "none" or (kind == "linear" and not factor):
        return base | {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise IntactKVError(
            f"{header.path} has RoPE scaling {kind!r}, and torch reads only linear and yarn from a GGUF: {INSTEAD}"
        )
    base |= {"rope_type": kind, "factor": factor or header.get("rope.scaling.factor")}
    if kind == "yarn":
        base["original_max_position_embeddings"] = header.get("rope.scaling.original_context_length")
    return base


def check_longrope(header: Header) -> None:
    """Raises IntactKVError for LongRoPE of another architecture than Phi-3's, or with one list of factors alone."""
    factors = {LONG, SHORT} & header.tensors.keys()
    scaled = header.get("rope.scaling.attn_factor", 1.0) != 1.0
    if header.arch != "phi3" and (factors or scaled):
        raise IntactKVError(
            f"{header.path} of architecture {header.arch!r} scales its RoPE as LongRoPE does, which torch reads from a "
            f"GGUF of architecture 'phi3' only: {INSTEAD}"
        )
    if header.tensors and (len(factors) == 1 or (scaled and not factors)):  # a header alone has no tensors
        raise IntactKVError(
            f"{header.path} has LongRoPE and not both of {LONG} and {SHORT}, which torch needs from a GGUF: "
            "convert the model again"
        )
