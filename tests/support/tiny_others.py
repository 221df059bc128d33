"""Tiny random models that neither upstream's architecture test nor transformers makes, written directly.

F32, two layers, a vocabulary without text (llama.cpp's tokenizer model "test"). tiny_rwkv.py has RWKV 7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

N_EMBD, N_FF, N_LAYER, N_HEAD, N_VOCAB, HEAD, LORA = 128, 256, 2, 2, 128, 64, 32

Tensors = Iterator[tuple[str, tuple[int, ...]]]  # names, and shapes as numpy has them


def write(name: str, path: Path, *, seed: int = 0) -> Path:
    """Writes the model `name`, a key of MODELS, which is its architecture's name."""
    settings, tensors = MODELS[name]
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, name)
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    for key, value in settings.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{name}.{key}", value)
    writer.add_tokenizer_model("test")
    made = list(tensors())
    n_vocab = made[0][1][0]  # of the embeddings
    writer.add_token_list([f"tok_{i}" for i in range(n_vocab)])
    writer.add_token_scores([0.0] * n_vocab)
    for tensor, shape in made:
        writer.add_tensor(tensor, _values(rng, tensor, shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _values(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    noise = rng.standard_normal(shape, np.float32)
    if "norm" in name or "time_mix_ln" in name:
        return np.float32(0 if name.endswith("bias") else 1) + np.float32(0.2) * noise
    if "lerp" in name or len(shape) == 1:
        return np.float32(0.5) + np.float32(0.3) * noise
    return noise / np.float32(shape[-1] ** 0.5)


def _around(layer: Callable[[str], Tensors], output: bool = True, n_vocab: int = N_VOCAB) -> Tensors:
    """The embeddings, the layers' tensors, the output."""
    yield "token_embd.weight", (n_vocab, N_EMBD)
    yield "output_norm.weight", (N_EMBD,)
    if output:
        yield "output.weight", (n_vocab, N_EMBD)
    for il in range(N_LAYER):
        yield from layer(f"blk.{il}.")


def _attention(at: str) -> Tensors:
    yield f"{at}attn_norm.weight", (N_EMBD,)
    for side in ("q", "k", "v", "output"):
        yield f"{at}attn_{side}.weight", (N_EMBD, N_EMBD)


def _ffn(at: str, gate: bool = True) -> Tensors:
    yield f"{at}ffn_norm.weight", (N_EMBD,)
    for name in ("gate", "up") if gate else ("up",):
        yield f"{at}ffn_{name}.weight", (N_FF, N_EMBD)
    yield f"{at}ffn_down.weight", (N_EMBD, N_FF)


def _llama() -> Tensors:
    def layer(at: str) -> Tensors:
        yield from _attention(at)
        yield from _ffn(at)

    return _around(layer)


def _bitnet() -> Tensors:
    def layer(at: str) -> Tensors:
        yield from _attention(at)
        yield from _ffn(at)
        yield f"{at}attn_sub_norm.weight", (N_EMBD,)
        yield f"{at}ffn_sub_norm.weight", (N_FF,)

    return _around(layer, output=False)


def _chameleon() -> Tensors:
    def layer(at: str) -> Tensors:
        yield from _attention(at)
        yield from _ffn(at)
        for side in "qk":
            yield f"{at}attn_{side}_norm.weight", (N_HEAD, HEAD)

    return _around(layer, n_vocab=8320)  # llama.cpp takes tokens 4 to 8195 for parts of images


def _plm() -> Tensors:
    def layer(at: str) -> Tensors:
        yield f"{at}attn_norm.weight", (N_EMBD,)
        yield f"{at}attn_q.weight", (N_HEAD * HEAD, N_EMBD)
        yield f"{at}attn_kv_a_mqa.weight", (LORA + HEAD // 2, N_EMBD)
        yield f"{at}attn_kv_a_norm.weight", (LORA,)
        yield f"{at}attn_kv_b.weight", (N_HEAD * (HEAD // 2 + HEAD), LORA)
        yield f"{at}attn_output.weight", (N_EMBD, N_HEAD * HEAD)
        yield from _ffn(at, gate=False)

    return _around(layer, output=False)


def _deepseek_ocr() -> Tensors:
    def layer(at: str) -> Tensors:
        yield from _attention(at)
        if at == "blk.0.":
            yield from _ffn(at)
            return
        yield f"{at}ffn_norm.weight", (N_EMBD,)
        yield f"{at}ffn_gate_inp.weight", (4, N_EMBD)
        yield f"{at}ffn_down_exps.weight", (4, N_EMBD, HEAD)
        yield f"{at}ffn_down_shexp.weight", (N_EMBD, HEAD)
        for name in ("gate", "up"):
            yield f"{at}ffn_{name}_exps.weight", (4, HEAD, N_EMBD)
            yield f"{at}ffn_{name}_shexp.weight", (HEAD, N_EMBD)

    return _around(layer)


def _rwkv6() -> Tensors:
    def layer(at: str) -> Tensors:
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            yield f"{at}{name}.weight", (N_EMBD,)
            yield f"{at}{name}.bias", (N_EMBD,)
        yield from _time_mix6(at)
        yield f"{at}time_mix_first.weight", (N_EMBD // HEAD, HEAD)
        for name in ("k", "r"):
            yield f"{at}channel_mix_lerp_{name}.weight", (1, 1, N_EMBD)
        yield f"{at}channel_mix_key.weight", (N_FF, N_EMBD)
        yield f"{at}channel_mix_value.weight", (N_EMBD, N_FF)
        yield f"{at}channel_mix_receptance.weight", (N_EMBD, N_EMBD)

    yield from _around(layer)
    yield "output_norm.bias", (N_EMBD,)
    yield "token_embd_norm.weight", (N_EMBD,)
    yield "token_embd_norm.bias", (N_EMBD,)


def _time_mix6(at: str) -> Tensors:
    yield f"{at}time_mix_w1.weight", (LORA * 5, N_EMBD)
    yield f"{at}time_mix_w2.weight", (5, N_EMBD, LORA)
    yield f"{at}time_mix_lerp_x.weight", (1, 1, N_EMBD)
    yield f"{at}time_mix_lerp_fused.weight", (5, 1, 1, N_EMBD)
    yield f"{at}time_mix_decay.weight", (N_EMBD,)
    yield f"{at}time_mix_decay_w1.weight", (LORA, N_EMBD)
    yield f"{at}time_mix_decay_w2.weight", (N_EMBD, LORA)
    for name in ("key", "value", "receptance", "gate", "output"):
        yield f"{at}time_mix_{name}.weight", (N_EMBD, N_EMBD)


def _rwkv6_qwen2() -> Tensors:
    def layer(at: str) -> Tensors:
        yield f"{at}attn_norm.weight", (N_EMBD,)
        yield from _time_mix6(at)
        yield from _ffn(at)

    return _around(layer)


def _arwkv7() -> Tensors:
    def layer(at: str) -> Tensors:
        yield f"{at}attn_norm.weight", (N_EMBD,)
        for kind in "wavg":
            if kind != "g":
                yield f"{at}time_mix_{kind}0.weight", (N_EMBD,)
            yield f"{at}time_mix_{kind}1.weight", (LORA, N_EMBD)
            yield f"{at}time_mix_{kind}2.weight", (N_EMBD, LORA)
        yield f"{at}time_mix_lerp_fused.weight", (6, 1, 1, N_EMBD)
        for name in ("k_k", "k_a", "r_k"):
            yield f"{at}time_mix_{name}.weight", (N_EMBD,)
        for name in ("key", "value", "receptance", "output"):
            yield f"{at}time_mix_{name}.weight", (N_EMBD, N_EMBD)
        yield from _ffn(at)

    return _around(layer)


_RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
_HEADS = {"attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD, **_RMS}
_RWKV = {"attention.head_count": 0, "wkv.head_size": HEAD}
_RWKV6 = {**_RWKV, "time_mix_extra_dim": LORA, "time_decay_extra_dim": LORA}

# architecture: (settings, its tensors)
MODELS: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {
    "arwkv7": (
        {
            **_RWKV,
            **_RMS,
            "token_shift_count": 1,
            "attention.decay_lora_rank": LORA,
            "attention.iclr_lora_rank": LORA,
            "attention.value_residual_mix_lora_rank": LORA,
            "attention.gate_lora_rank": LORA,
        },
        _arwkv7,
    ),
    "bitnet": (_HEADS, _bitnet),
    "chameleon": (_HEADS, _chameleon),
    "deepseek2-ocr": (
        {
            **_HEADS,
            "leading_dense_block_count": 1,
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_shared_count": 1,
            "expert_feed_forward_length": HEAD,
        },
        _deepseek_ocr,
    ),
    "llama-embed": (_HEADS, _llama),
    "plm": (
        {
            **_HEADS,
            "attention.kv_lora_rank": LORA,
            "attention.key_length": HEAD,
            "attention.value_length": HEAD,
            "rope.dimension_count": HEAD // 2,
        },
        _plm,
    ),
    "rwkv6": ({**_RWKV6, "attention.layer_norm_epsilon": 1e-5}, _rwkv6),
    "rwkv6qwen2": ({**_RWKV6, **_RMS, "token_shift_count": 1}, _rwkv6_qwen2),
}
