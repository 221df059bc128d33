"""The torch engine: IntactKV of a Hugging Face model, computed by transformers, in llama.cpp's layout.

The rows llama.cpp keeps in its cache are K after RoPE and V, per KV head; of recurrent layers it keeps what
torch_model/caches/state_layout.py lays out. What differs from transformers:

- The order of K's values in models of RoPE type "norm": torch_model/rope_pairs.py.
- A context of llama.cpp uses one set of LongRoPE factors for all positions (`llama_model::get_rope_factors`);
  transformers changes from the short to the long set with the length of the text. Which set the context uses is in the
  model description, and transformers is made to use it.
- YaRN's bounds are whole numbers in llama.cpp, and gpt-oss's checkpoints say that they are not: from_huggingface too.
- llama.cpp runs Mistral, Qwen and Phi-3 without the sliding window that some of their checkpoints have: so does
  transformers here (from_huggingface.read_config).
- llama.cpp norms Qwen2-VL and Qwen2.5-VL without an epsilon, Falcon-Mamba with one epsilon for all norms, and leaves
  the last pairs of Qwen3-VL's heads unturned: so does transformers here (from_huggingface).

Everything is computed in float32 (or the dtype asked for) and rounded to float16 once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.engines import recurrent
from intactkv_export.engines.rows import to_float16
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import KV, States
from intactkv_export.models import HALVED, LATENT, RECURRENT, check_dtype, is_reordered
from intactkv_export.work import Steps

_CHUNK = 512  # tokens a forward pass: bounds the attention matrix, [heads, _CHUNK, n_tokens]


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
    progress: Steps | None = None,
) -> tuple[KV, KV, States]:
    """K and V of `tokens` at positions 0.., each {layer: float16 array [n_tokens, n_head_kv, head_dim]}, and the states
    of recurrent layers after the last token, {layer: (r, s)} in float32 (caches/state_layout.py).

    `model` is the description of the model that will read them (its GGUF in llama.cpp): heads, RoPE and LongRoPE
    factors must agree with the checkpoint; None skips the comparison. All positions are returned for all layers, also
    those that a sliding window has left behind.

    dtype: of the weights and the arithmetic: None (float32), "float16", "bfloat16", or "auto" (the checkpoint's).
    device: "cpu", "cuda", "cuda:1", "mps". offload_dir: let accelerate spread a model larger than memory over GPUs,
    memory and this folder, within `max_memory` ({"cpu": "8GiB", 0: "20GiB"}; None: what is free). progress counts
    tokens.

    Raises IntactKVError: checkpoint not proven, incomplete, unreadable or different from `model`; token out of the
    vocabulary; K or V beyond float16. UsageError: an unknown dtype.
    """
    K, V, states = compute_float32(
        hf_dir,
        tokens,
        model,
        device=device,
        dtype=dtype,
        offload_dir=offload_dir,
        max_memory=max_memory,
        progress=progress,
    )
    return to_float16(K, "K"), to_float16(V, "V"), states


def compute_float32(
    hf_dir: str | Path,
    tokens: Sequence[int],
    model: Mapping[str, Any] | None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offload_dir: str | Path | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    progress: Steps | None = None,
) -> tuple[KV, KV, States]:
    """As compute(), before the rounding: float32 arrays. What engines are compared with."""
    import torch
    from transformers import DynamicCache

    from intactkv_export.torch_model import from_huggingface, rope_pairs

    if not tokens:
        raise IntactKVError(f"no tokens to compute a prefix of with {hf_dir}: give a prefix of at least one token")
    check_dtype(dtype)
    with from_huggingface.quiet():
        config = from_huggingface.read_config(hf_dir)
    text = config.get_text_config(decoder=True)
    bad = next((t for t in tokens if not 0 <= t < text.vocab_size), None)
    if bad is not None:
        raise IntactKVError(
            f"token {bad} is not in the vocabulary of {hf_dir}, which has {text.vocab_size} tokens: "
            "tokenize the prefix with this model's tokenizer"
        )
    if model is not None:
        from_huggingface.check(text, model, str(hf_dir))
    from_huggingface.fix_longrope(text, _longrope(text, model, len(tokens)), hf_dir)

    with from_huggingface.quiet():
        net = from_huggingface.load(hf_dir, config, device, dtype, offload_dir, max_memory)
    # Without a config this cache keeps every position of every layer; with one, which recurrent layers need, sliding
    # layers would crop theirs. No model has both.
    cache = DynamicCache(config=text) if text.model_type in RECURRENT else DynamicCache()
    step = len(tokens) if recurrent.in_one_pass(text) else _CHUNK
    with torch.inference_mode():
        for start in range(0, len(tokens), step):
            part = torch.tensor([list(tokens[start : start + step])]).to(net.device)
            # base_model: no output matrix is needed, K and V are all that is kept
            base = net.base_model
            base(input_ids=part, use_cache=True, **{from_huggingface.cache_argument(base): cache})
            if progress is not None:
                progress(start + part.shape[1], len(tokens))

    K: KV = {}
    V: KV = {}
    for il in from_huggingface.attention_layers(text):
        k, v = (x[0].transpose(0, 1).float().cpu().numpy() for x in (cache.layers[il].keys, cache.layers[il].values))
        if text.model_type in LATENT:  # transformers caches both parts of llama.cpp's row: the latent, and K's RoPE
            turned = rope_pairs.halves_to_neighbours(v) if is_reordered(text.model_type) else v
            k, v = np.concatenate([k, turned], -1), v[..., :0]
        elif is_reordered(text.model_type):
            k = np.ascontiguousarray(rope_pairs.halves_to_neighbours(k))
        elif text.model_type in HALVED:
            n_rot = from_huggingface.n_rot(text, text.rope_parameters)
            k[..., :n_rot] = rope_pairs.neighbours_to_halves(k[..., :n_rot])
        K[il], V[il] = k, v
    states = recurrent.states(cache, text)
    if model is not None:
        recurrent.check(states, model, str(hf_dir))
    return K, V, states


def _longrope(text: Any, model: Mapping[str, Any] | None, n_tokens: int) -> str | None:
    """The LongRoPE factors that llama.cpp uses (no `model`: in a context of n_tokens); None: it has none."""
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    if model is not None:
        return str(model["rope"]["factors"])
    from intactkv_export.torch_model import from_huggingface

    name = "long_factor" if n_tokens > rope["original_max_position_embeddings"] else "short_factor"
    return from_huggingface.longrope_hash(rope[name])
