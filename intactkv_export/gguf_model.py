"""A GGUF as a transformers model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(path: str | Path, device: str, dtype: str, attention: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    path = Path(path)
    net = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    net.hf_quantizer = None
    if hasattr(net.config, "quantization_config"):
        del net.config.quantization_config
    return net.to(device)
