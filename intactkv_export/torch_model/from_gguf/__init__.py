"""A GGUF as a transformers model: its header becomes a configuration, its tensors are dequantized by gguf-py.

transformers reads GGUFs too, but leaves out what some models cannot do without: RoPE scaling, the size of a head that
is not n_embd / n_head, Granite's multipliers. What is here is proven against the directories that the GGUFs were
converted from (tests/torch_model/test_model.py); the rest is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from intactkv_export.errors import IntactKVError
from intactkv_export.models import LATENT
from intactkv_export.torch_model import experts, from_huggingface
from intactkv_export.torch_model.from_gguf import latent
from intactkv_export.torch_model.from_gguf.configuration import configuration, family_of
from intactkv_export.torch_model.from_gguf.header import Header
from intactkv_export.torch_model.from_gguf.rope import rope
from intactkv_export.torch_model.from_gguf.tensors import Tensors


def check_header(path: str | Path, name: str | Path | None = None, states: bool = True) -> None:
    """Raises what load() would, as far as the header tells; a GGUF with a vocabulary and no tensors is enough.

    name: what the error calls it; None: its path. states: whether the caller carries those of recurrent layers.
    """
    header = Header(path, name)
    model_type = family_of(header).model_type
    if not states:
        from_huggingface.check_analyzable(model_type, f"{header.path} of architecture {header.arch!r}")
    rope(header)


def load(
    path: str | Path,
    device: str,
    dtype: str,
    attention: str,
    round_activations: bool = False,
    rope_factors: str | None = None,
) -> Any:
    """A causal language model of transformers with the GGUF's weights, in evaluation mode, on the device.

    round_activations: to 8 bits before they meet quantized weights, as llama.cpp's CPU backend does
    (vec_dot_type of type_traits_cpu in ggml-cpu.c); gradients pass that straight through. rope_factors: see
    from_huggingface.fix_longrope().

    Raises IntactKVError if the GGUF is damaged or incomplete, or the architecture, RoPE scaling or a tensor type is
    not among those that are proven.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    header = Header(path)
    family = family_of(header)
    tensors = Tensors(header, family)
    config = AutoConfig.for_model(**configuration(header, family))
    from_huggingface.fix_longrope(config, rope_factors, path)
    attention = from_huggingface.attention_of(config.model_type, attention)
    with init_empty_weights(include_buffers=False):
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    experts.set_up(net, device, round_activations)
    weights = dict(tensors.weights(net.state_dict(), device))
    net.load_state_dict(weights, strict=False, assign=True)
    net.tie_weights()
    missing = sorted(name for name, weight in net.state_dict().items() if weight.is_meta)
    if missing:
        raise IntactKVError(
            f"{path} lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}: convert the model again"
        )
    if (factors := tensors.llama3_factors()) is not None:
        rotary = net.get_decoder().rotary_emb
        rotary.inv_freq = rotary.inv_freq / factors
    if config.model_type in LATENT:
        latent.set_up(net, header, tensors.roundings if round_activations else lambda name: [_as_it_is] * 2)
    if round_activations:
        tensors.round_activations(net)
    return net.eval().to(device)


def _as_it_is(x: Any) -> Any:
    return x
