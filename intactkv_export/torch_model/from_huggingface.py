"""A Hugging Face directory as a transformers model, where its K/V layout is proven (models/proven.py)."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError, first_line
from intactkv_export.models import LATENT, PROVEN, RECURRENT, UNEVEN, why_not


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and notes: what matters to a user is raised as an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(hf_dir: str | Path) -> Any:
    """A checkpoint's configuration, as llama.cpp computes the model: without a window that it ignores, YaRN's bounds
    whole numbers, the base of RoPE that an alpha makes.

    Raises IntactKVError if it cannot be read, or the K/V layout is not proven.
    """
    from transformers import AutoConfig

    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=False, local_files_only=True)
        reason = why_not(config)
    except (OSError, ValueError, KeyError) as e:
        raise IntactKVError(
            f"cannot read the model configuration {path}: {first_line(e)}: give a directory that "
            "transformers can load, or use the llama engine"
        ) from e
    if raw.get("quantization_config"):
        reason = "a quantized checkpoint is not proven"
    if reason:
        raise IntactKVError(f"the torch engine cannot compute {hf_dir}: {reason}: use the llama engine")
    _as_llama_cpp(config.get_text_config(decoder=True))
    return config


# transformers lets no step of time be shorter than Nemotron-H's time_step_min, of which it also takes the logarithm;
# NVIDIA's code and llama.cpp know no bound
NO_LEAST_STEP = 1e-30
# Models whose sliding windows upstream's converter writes into the GGUF; it ignores those of Mistral, Qwen and Phi-3
_WINDOW_KEPT = {
    "gemma2",
    "gemma3_text",
    "olmo3",
    "cohere2",
    "gpt_oss",
    "cohere2_moe",
    "exaone_moe",
    "granite_swa",
    "granitemoe_swa",
    "afmoe",
} | UNEVEN
# Models whose norms llama.cpp computes without the epsilon that the GGUF has: it does not read it
_WITHOUT_EPSILON = {"qwen2_vl_text", "qwen2_5_vl_text"}


def _as_llama_cpp(text: Any) -> None:
    """Change a configuration to what the code of llama.cpp computes where checkpoints say otherwise."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("truncate") is False:  # gpt-oss; ggml_rope_yarn_corr_dims rounds
        rope["truncate"] = True
    if text.model_type == "nemotron_h":
        text.time_step_min = NO_LEAST_STEP
    if text.model_type in _WITHOUT_EPSILON:
        text.rms_norm_eps = 0.0
    if text.model_type == "falcon_mamba":  # the norms of B, C and dt, for which llama.cpp has no number of their own
        text.mixer_rms_eps = text.layer_norm_epsilon
    if text.model_type in _WINDOW_KEPT:
        return
    if getattr(text, "sliding_window", None):
        text.sliding_window = None
    if getattr(text, "use_sliding_window", False):
        text.use_sliding_window = False
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        text.layer_types = ["full_attention"] * text.num_hidden_layers


def load(
    hf_dir: str | Path,
    config: Any,
    device: str,
    dtype: str | None,
    offload_dir: str | Path | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    attention: str = "eager",
) -> Any:
    """The model in evaluation mode; every weight comes from the checkpoint."""
    import torch
    from safetensors import SafetensorError

    place: dict[str, Any] = {}
    if offload_dir is not None:
        place = {"device_map": "auto", "offload_folder": str(offload_dir), "max_memory": max_memory}
    elif device != "cpu":
        place = {"device_map": {"": device}}
    try:
        # The default, eager: the only attention of transformers that applies Gemma 2's soft cap, and softmax
        # stays in float32
        net, report = auto_class(config).from_pretrained(
            hf_dir,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype or "float32"),
            attn_implementation=attention,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            **place,
        )
    except (OSError, ValueError, RuntimeError, AssertionError, SafetensorError) as e:
        raise IntactKVError(
            f"cannot load the weights in {hf_dir} on {device}: {first_line(e)}: check that the "
            "download is complete and the device exists"
        ) from e
    # transformers fills what it does not find with random numbers
    absent = sorted(report["missing_keys"])
    if absent:
        raise IntactKVError(
            f"{hf_dir} lacks {len(absent)} of the model's tensors, the first is {absent[0]!r}: "
            "get the complete checkpoint"
        )
    text = config.get_text_config(decoder=True)
    if text.model_type == "mamba2" and text.n_groups > 1 and not any(hasattr(m, "group_size") for m in net.modules()):
        raise IntactKVError(
            f"this version of transformers norms the {text.n_groups} groups of {hf_dir} together, and llama.cpp each "
            "by itself: install a newer one, or use the llama engine"
        )
    _turn_as_llama_cpp(net, text)
    return net.eval()


# The soft cap of Gemma 2's attention, and the sinks of gpt-oss's
_EAGER_ONLY = {"gemma2", "gpt_oss"}


def attention_of(model_type: str, asked: str) -> str:
    """The implementation of attention that computes a model as it is: the one asked for, "sdpa" or "eager", or this."""
    return "eager" if model_type in _EAGER_ONLY else asked


def _turn_as_llama_cpp(net: Any, text: Any) -> None:
    """Qwen3-VL's last pairs of a head belong to no section of IM-RoPE: llama.cpp leaves them as they are."""
    if text.model_type not in ("qwen3_vl_text", "qwen3_vl_moe_text"):
        return
    sections = text.rope_parameters.get("mrope_section") or [24, 20, 20]
    rope = net.get_decoder().rotary_emb
    for pair in range(len(rope.inv_freq)):
        if pair >= 3 * sections[pair % 3]:
            rope.inv_freq[pair] = 0.0


def auto_class(config: Any) -> Any:
    """What loads a model: some that see images are no causal language models to transformers, their text alone is."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text_alone = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if text_alone else AutoModelForImageTextToText


def check_analyzable(model_type: str, what: str) -> None:
    """Raises IntactKVError for a model whose cache only training carries. what: the model, as the error calls it."""
    if model_type in RECURRENT | LATENT:
        kept = "states of recurrent layers" if model_type in RECURRENT else "latents (MLA)"
        raise IntactKVError(
            f"{what} has {kept}, which cannot be analyzed yet: give the number of a prefix's tokens yourself"
        )


def cache_argument(module: Any) -> str:
    """What the cache is called among a model's arguments: transformers 5.24 has another name than versions before."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def check(text: Any, model: Mapping[str, Any], hf_dir: str) -> None:
    """The checkpoint and the description of the model that will use the prefix must mean the same rows."""

    def same(what: str, checkpoint: Any, described: Any) -> None:
        equal = (
            math.isclose(checkpoint, described, rel_tol=1e-5)
            if isinstance(checkpoint, float)
            else checkpoint == described
        )
        if not equal:
            raise IntactKVError(
                f"{what} is {checkpoint} in {hf_dir} but {described} in the GGUF: use the GGUF made "
                "from this checkpoint"
            )

    # In the description a sliding-window model has one cache for its full layers and one for the others.
    layers = {layer["il"]: (layer, cache["n_swa"]) for cache in model["caches"] for layer in cache["layers"]}
    attention = attention_layers(text)
    same("number of layers", len(attention), len(layers))
    turns = model["rope"]["type"] != "none" and bool(getattr(text, "rope_parameters", None))
    if turns:
        same("RoPE type", PROVEN[text.model_type], _PAIRS.get(model["rope"]["type"], model["rope"]["type"]))
    for il in attention:
        if il not in layers:
            same(f"layer {il}", "an attention layer", "none")
        layer, n_swa = layers[il]
        kind, (n_head, head_dim_k, head_dim_v) = layer_type(text, il), _shape(text, il)
        same(f"n_head_kv of layer {il}", n_head, layer["n_head_kv"])
        same(f"head_dim of K of layer {il}", head_dim_k, layer["head_dim_k"])
        same(f"head_dim of V of layer {il}", head_dim_v, layer["head_dim_v"])
        if turns:
            _check_rope(same, text, il, layer, model["rope"])
        window = {
            "sliding_attention": getattr(text, "sliding_window", None),
            "chunked_attention": getattr(text, "attention_chunk_size", None),
        }.get(kind)
        same(f"sliding window of layer {il}", window or 0, n_swa)


def _check_rope(same: Callable[[str, Any, Any], None], text: Any, il: int, layer: Any, described: Any) -> None:
    """RoPE of a layer, as check() does."""
    kind = layer_type(text, il)
    rope = text.rope_parameters.get(kind, text.rope_parameters)
    turned = getattr(text, "position_embedding_type", "rope") == "rope"  # Granite's hybrids are not
    base = rope["rope_theta"] * _of_base(rope, _head_dim(_own(text, il)))
    same(f"RoPE base of layer {il}", float(base) if turned else 0.0, layer["rope_base"])
    if rope["rope_type"] != "proportional":  # Gemma 4's, which turns all of larger heads
        same("n_rot", n_rot(_own(text, il), rope), described["n_rot"])
    if kind != "sliding_attention":
        scaled = rope["rope_type"] in ("linear", "yarn")
        same("RoPE scale", 1.0 / rope["factor"] if scaled else 1.0, described["scale"])


def n_rot(text: Any, rope: Mapping[str, Any]) -> int:
    """How many values of a head RoPE turns."""
    return int(_head_dim(text) * rope.get("partial_rotary_factor", 1.0))


def _of_base(rope: Mapping[str, Any], head_dim: int) -> float:
    """What the base of RoPE is multiplied by: Hunyuan's alpha makes it larger."""
    return rope["alpha"] ** (head_dim / (head_dim - 2)) if rope["rope_type"] == "dynamic" else 1.0


def fix_longrope(text: Any, factors: str | None, path: str | Path) -> None:
    """Both sets of LongRoPE factors become one, as a context of llama.cpp has one set for all positions.

    transformers, left alone, changes from the short to the long ones with the length of a text. text: a configuration,
    before its model is made. factors: SHA-256 of those to use, as a model description has it; None: both stay, as they
    do for a model without LongRoPE. Raises IntactKVError if the model has no such factors.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if factors is None or rope.get("rope_type") != "longrope":
        return
    hashes = {name: longrope_hash(rope[name]) for name in ("short_factor", "long_factor")}
    name = next((name for name, digest in hashes.items() if digest == factors), None)
    if name is None:
        raise IntactKVError(
            f"the LongRoPE factors of the GGUF (SHA-256 {factors}) are neither the short nor the long "
            f"ones of {path} ({', '.join(hashes.values())}): use the GGUF made from this checkpoint"
        )
    rope["short_factor"] = rope["long_factor"] = list(rope[name])


def longrope_hash(factors: Sequence[float]) -> str:
    """As a model description has it: of the bytes that a GGUF holds."""
    return hashlib.sha256(struct.pack(f"<{len(factors)}f", *factors)).hexdigest()


def attention_layers(text: Any) -> list[int]:
    """The layers that keep K and V of their own."""
    types = getattr(text, "layer_types", None)
    n_own = text.num_hidden_layers - (getattr(text, "num_kv_shared_layers", 0) or 0)
    return [il for il in range(n_own) if not types or types[il] not in _NO_ROWS]


def recurrent_layers(text: Any) -> list[int]:
    """The layers that keep states; one may have K and V too."""
    types = getattr(text, "layer_types", None) or ()
    return [il for il, kind in enumerate(types) if kind in _WITH_STATES]


def layer_type(text: Any, il: int) -> str:
    """'full_attention' or 'sliding_attention': models without a list of them have the window everywhere."""
    types = getattr(text, "layer_types", None)
    if types:
        return types[il]
    return "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"


def is_turned(attention: Any) -> bool:
    """Whether a layer's attention has RoPE: SmolLM3 says which have none, of Cohere 2 it is those without a window."""
    if attention.config.model_type == "cohere2":
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


_NO_ROWS = {"conv", "linear_attention", "mamba", "mlp", "moe"}  # layer types without K and V
_WITH_STATES = {"conv", "linear_attention", "mamba", "hybrid"}
_PAIRS = {"imrope": "neox", "mrope": "neox"}  # of text, whose positions are equal in all dimensions


def _shape(text: Any, il: int) -> tuple[int, int, int]:
    """Heads of K and V of a layer, and their sizes in a cache; a latent has no V."""
    if text.model_type in LATENT:
        return 1, text.kv_lora_rank + text.qk_rope_head_dim, 0
    own = _own(text, il)
    return _n_head_kv(own), _head_dim(own), _head_dim(own)


def _n_head_kv(text: Any) -> int:
    """Of a layer's configuration; the oldest models have no word for it but multi_query, one head for all."""
    if getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False):
        return 1
    n = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    return n or text.num_attention_heads


def _own(text: Any, il: int) -> Any:
    """The configuration of a layer."""
    return text.per_layer_config[il] if text.model_type in UNEVEN else text


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
