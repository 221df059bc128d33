"""The torch engine: IntactKV of a Hugging Face model, computed by transformers, in llama.cpp's layout.

The rows llama.cpp keeps in its cache are K after RoPE and V, per KV head. Two things differ from
transformers:

- Upstream's converter reorders the rows of W_q and W_k of Llama-type models (`LlamaModel.permute` in
  conversion/llama.py), because their RoPE is ggml's 'norm' type: pairs are consecutive values (2j, 2j+1),
  where transformers pairs (j, j + head_dim/2). The same reordering of K after RoPE gives llama.cpp's rows.
  Models of RoPE type 'neox' pair as transformers does: nothing to reorder.
- A context of llama.cpp uses one set of LongRoPE factors for all positions (`llama_model::get_rope_factors`);
  transformers changes from the short to the long set with the length of the text. Which set the context uses
  is in the model description, and transformers is made to use it.

Everything is computed in float32 (or the dtype asked for) and rounded to float16 once, at the end.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError, UsageError

# Hugging Face text model_type -> RoPE layout of the GGUF. tests/test_engine_torch.py proves each entry
# against llama.cpp; an architecture that is not proven there has no place here.
PROVEN: dict[str, str] = {
    "llama": "norm",
    "mistral": "norm",
    "mixtral": "norm",
    "granite": "norm",
    "smollm3": "norm",
    "qwen2": "neox",
    "qwen3": "neox",
    "gemma": "neox",
    "gemma2": "neox",
    "gemma3_text": "neox",
    "phi3": "neox",
}
_WRAPPED = {"gemma3": "gemma3_text"}  # multimodal model_type -> its text model: the prefix is text
_ROPE_SCALING = {
    "llama": {"default", "linear", "llama3", "yarn"},
    "qwen2": {"default", "yarn"},
    "qwen3": {"default", "yarn"},
    "gemma3_text": {"default", "linear"},
    "phi3": {"default", "longrope"},
}
# Settings of a RoPE scaling that upstream's converter drops or llama.cpp combines in another way
_ROPE_UNPROVEN = (
    "attention_factor",
    "attn_factor",
    "mscale",
    "mscale_all_dim",
    "extrapolation_factor",
    "truncate",
)
DTYPES = ("float32", "float16", "bfloat16", "auto")
_CHUNK = 512  # tokens a forward pass: bounds the attention matrix, [heads, _CHUNK, n_tokens]

KV = dict[int, np.ndarray]


def supports(config: Any) -> bool:
    """Whether the K/V layout of a model is proven: `config` is a transformers config or config.json's
    dictionary.

    False for other architectures, for RoPE scalings not proven for the architecture, and for checkpoints that
    transformers would run quantized.
    """
    full = config if isinstance(config, Mapping) else config.to_dict()
    text = full.get("text_config") or full
    outer = full.get("model_type", "")
    model_type = text.get("model_type") or _WRAPPED.get(outer)
    if model_type not in PROVEN or _WRAPPED.get(outer, outer) != model_type:
        return False
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    each = [r for r in rope.values() if isinstance(r, Mapping)] or [rope]
    types = {r.get("rope_type", r.get("type", "default")) for r in each}
    return (
        types <= _ROPE_SCALING.get(model_type, {"default"})
        and not full.get("quantization_config")
        and not any(r.get(key) is not None for r in each for key in _ROPE_UNPROVEN)
    )


def versions() -> dict[str, str]:
    """Versions of what computes, for the manifest."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def compute(
    hf_dir: str | Path,
    tokens: Sequence[int],
    model: Mapping[str, Any] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offload_dir: str | Path | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[KV, KV]:
    """K and V of `tokens` at positions 0.., each {layer: float16 array [n_tokens, n_head_kv, head_dim]}.

    `model` is the description of the model that will read them (its GGUF in llama.cpp): heads, RoPE and
    LongRoPE factors must agree with the checkpoint; None skips the comparison. All positions are returned for
    all layers, also those that a sliding window has left behind.

    dtype: of the weights and the arithmetic: None (float32), "float16", "bfloat16", or "auto" (the
    checkpoint's). device: "cpu", "cuda", "cuda:1", "mps". offload_dir: let accelerate spread a model larger
    than memory over GPUs, memory and this folder, within `max_memory` ({"cpu": "8GiB", 0: "20GiB"}; None:
    what is free). progress(done, total) counts tokens.

    Raises IntactKVError: checkpoint not proven, incomplete, unreadable or different from `model`; token out
    of the vocabulary; K or V beyond float16. UsageError: an unknown dtype.
    """
    K, V = compute_float32(
        hf_dir,
        tokens,
        model,
        device=device,
        dtype=dtype,
        offload_dir=offload_dir,
        max_memory=max_memory,
        progress=progress,
    )
    return (
        {il: _to_float16(k, "K", il) for il, k in K.items()},
        {il: _to_float16(v, "V", il) for il, v in V.items()},
    )


def compute_float32(
    hf_dir: str | Path,
    tokens: Sequence[int],
    model: Mapping[str, Any] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offload_dir: str | Path | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[KV, KV]:
    """As compute(), before the rounding: float32 arrays. What engines are compared with."""
    import torch
    from transformers import DynamicCache

    if not tokens:
        raise IntactKVError(
            f"no tokens to compute a prefix of with {hf_dir}; give a prefix of at least one token"
        )
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    with quiet():
        config = read_config(hf_dir)
    text = config.get_text_config(decoder=True)
    bad = next((t for t in tokens if not 0 <= t < text.vocab_size), None)
    if bad is not None:
        raise IntactKVError(
            f"token {bad} is not in the vocabulary of {hf_dir}, which has {text.vocab_size} tokens; "
            "tokenize the prefix with this model's tokenizer"
        )
    if model is not None:
        check(text, model, len(tokens), str(hf_dir))
    _fix_longrope(text, model, len(tokens), str(hf_dir))

    with quiet():
        net = load(hf_dir, config, device, dtype, offload_dir, max_memory)
    # Without a config this cache keeps every position of every layer; with one, sliding layers would crop
    # theirs.
    cache = DynamicCache()
    with torch.inference_mode():
        for start in range(0, len(tokens), _CHUNK):
            part = list(tokens[start : start + _CHUNK])
            # base_model: no output matrix is needed, K and V are all that is kept
            net.base_model(
                input_ids=torch.tensor([part]).to(net.device), past_key_values=cache, use_cache=True
            )
            if progress is not None:
                progress(start + len(part), len(tokens))

    K: KV = {}
    V: KV = {}
    for il in range(text.num_hidden_layers):
        k, v = (
            x[0].transpose(0, 1).float().cpu().numpy()
            for x in (cache.layers[il].keys, cache.layers[il].values)
        )
        if PROVEN[text.model_type] == "norm":
            k = interleave(k)
        K[il], V[il] = k, v
    return K, V


def interleave(k: np.ndarray) -> np.ndarray:
    """Half-split rows [..., head_dim] in the order of ggml's 'norm' RoPE: value (s, j) of [2, head_dim/2]
    goes to 2j + s. Same reordering as `LlamaModel.permute` of upstream's conversion/llama.py.
    """
    halves = k.reshape(*k.shape[:-1], 2, k.shape[-1] // 2)
    return np.ascontiguousarray(halves.swapaxes(-1, -2)).reshape(k.shape)


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
    from transformers import AutoConfig

    path = Path(hf_dir) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(hf_dir, trust_remote_code=False, local_files_only=True)
        proven = supports(config)
    except (OSError, ValueError, KeyError) as e:
        raise IntactKVError(
            f"cannot read the model configuration {path}: {_first_line(e)}; give a directory that "
            "transformers can load, or use the llama engine"
        ) from e
    if not proven or raw.get("quantization_config"):
        raise IntactKVError(
            f"the K/V layout of {hf_dir} (model type {config.model_type!r}) is not proven for the torch "
            f"engine, which knows unquantized {', '.join(PROVEN)}; use the llama engine"
        )
    return config


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
    from transformers import AutoModelForCausalLM

    place: dict[str, Any] = {}
    if offload_dir is not None:
        place = {"device_map": "auto", "offload_folder": str(offload_dir), "max_memory": max_memory}
    elif device != "cpu":
        place = {"device_map": {"": device}}
    try:
        # The default, eager: the only attention of transformers that applies Gemma 2's soft cap, and softmax
        # stays in float32
        net, report = AutoModelForCausalLM.from_pretrained(
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
            f"cannot load the weights in {hf_dir} on {device}: {_first_line(e)}; check that the "
            "download is complete and the device exists"
        ) from e
    # transformers fills what it does not find with random numbers
    absent = sorted(report["missing_keys"])
    if absent:
        raise IntactKVError(
            f"{hf_dir} lacks {len(absent)} of the model's tensors, the first is {absent[0]!r}; "
            "get the complete checkpoint"
        )
    return net.eval()


def check(text: Any, model: Mapping[str, Any], n_tokens: int, hf_dir: str) -> None:
    """The checkpoint and the description of the model that will use the prefix must mean the same rows."""

    def same(what: str, checkpoint: Any, described: Any) -> None:
        equal = (
            math.isclose(checkpoint, described, rel_tol=1e-5)
            if isinstance(checkpoint, float)
            else checkpoint == described
        )
        if not equal:
            raise IntactKVError(
                f"{what} is {checkpoint} in {hf_dir} but {described} in the GGUF; use the GGUF made "
                "from this checkpoint"
            )

    # In the description a sliding-window model has one cache for its full layers and one for the others.
    layers = {layer["il"]: (layer, cache["n_swa"]) for cache in model["caches"] for layer in cache["layers"]}
    same("number of layers", text.num_hidden_layers, len(layers))
    same("RoPE type", PROVEN[text.model_type], model["rope"]["type"])
    for il in range(text.num_hidden_layers):
        layer, n_swa = layers[il]
        kind, head_dim = _layer_type(text, il), _head_dim(text)
        rope = text.rope_parameters.get(kind, text.rope_parameters)
        same(f"n_head_kv of layer {il}", text.num_key_value_heads, layer["n_head_kv"])
        same(f"head_dim of K of layer {il}", head_dim, layer["head_dim_k"])
        same(f"head_dim of V of layer {il}", head_dim, layer["head_dim_v"])
        same(f"RoPE base of layer {il}", float(rope["rope_theta"]), layer["rope_base"])
        same("n_rot", int(head_dim * rope.get("partial_rotary_factor", 1.0)), model["rope"]["n_rot"])
        if kind != "sliding_attention":
            scaled = rope["rope_type"] in ("linear", "yarn")
            same("RoPE scale", 1.0 / rope["factor"] if scaled else 1.0, model["rope"]["scale"])
        # Upstream ignores the window of some models (Mistral, Phi-3): the same numbers while no token is
        # outside.
        window = (text.sliding_window or 0) if kind == "sliding_attention" else 0
        if window != n_swa and n_tokens > min(w for w in (window, n_swa) if w):
            raise IntactKVError(
                f"layer {il} has a sliding window of {window} tokens in {hf_dir} but {n_swa} in the GGUF "
                f"(0: none), and the prefix has {n_tokens} tokens; shorten it or use the llama engine"
            )


def _layer_type(text: Any, il: int) -> str:
    """'full_attention' or 'sliding_attention': models without a list of them have the window everywhere."""
    types = getattr(text, "layer_types", None)
    if types:
        return types[il]
    return "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"


def _head_dim(text: Any) -> int:
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _fix_longrope(text: Any, model: Mapping[str, Any] | None, n_tokens: int, hf_dir: str) -> None:
    """Both sets of LongRoPE factors become the one that llama.cpp uses (no `model`: the one for n_tokens)."""
    rope = text.rope_parameters
    if rope.get("rope_type") != "longrope":
        return
    if model is None:
        name = "long_factor" if n_tokens > rope["original_max_position_embeddings"] else "short_factor"
    else:
        sha256 = {
            n: hashlib.sha256(np.asarray(rope[n], "<f4").tobytes()).hexdigest()
            for n in ("short_factor", "long_factor")
        }
        wanted = model["rope"]["factors"]
        name = next((n for n, digest in sha256.items() if digest == wanted), "")
        if not name:
            raise IntactKVError(
                f"the LongRoPE factors of the GGUF (SHA-256 {wanted}) are neither the short nor the long "
                f"ones of {hf_dir} ({', '.join(sha256.values())}); use the GGUF made from this checkpoint"
            )
    rope["short_factor"] = rope["long_factor"] = list(rope[name])


def _to_float16(x: np.ndarray, what: str, il: int) -> np.ndarray:
    """Rounded once, to nearest even."""
    with np.errstate(over="ignore"):
        out = x.astype(np.float16)
    finite = np.isfinite(out)
    if not finite.all():
        token, head, i = (int(n) for n in np.argwhere(~finite)[0])
        raise IntactKVError(
            f"{what} of layer {il}, token {token}, head {head} is {x[token, head, i]:g}, beyond float16 "
            f"(largest {np.finfo(np.float16).max:g}); this model's prefix cannot be stored as F16"
        )
    return out


def _first_line(e: BaseException) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")
