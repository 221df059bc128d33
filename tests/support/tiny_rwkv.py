"""A tiny random RWKV 7, written directly: neither upstream's architecture test nor transformers has one."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

N_EMBD, N_FF, N_LAYER, N_VOCAB, LORA, HEAD = 128, 256, 2, 128, 32, 64


def write(path: Path, *, seed: int = 0) -> Path:
    """Writes the model, F32, with a vocabulary without text (llama.cpp's tokenizer model "test")."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(2048)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_FF)
    writer.add_layer_norm_eps(1e-5)
    writer.add_head_count(0)  # as upstream's converter writes it
    writer.add_wkv_head_size(HEAD)
    writer.add_decay_lora_rank(LORA)
    writer.add_iclr_lora_rank(LORA)
    writer.add_value_residual_mix_lora_rank(LORA)
    writer.add_gate_lora_rank(LORA)
    writer.add_tokenizer_model("test")
    writer.add_token_list([f"tok_{i}" for i in range(N_VOCAB)])
    writer.add_token_scores([0.0] * N_VOCAB)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5))

    def vector(name: str, *shape: int, mean: float = 0.0, scale: float = 0.3) -> None:
        writer.add_tensor(f"{name}.weight", np.float32(mean + scale * rng.standard_normal(shape)))

    def norm(name: str) -> None:
        vector(name, N_EMBD, mean=1.0, scale=0.2)
        writer.add_tensor(f"{name}.bias", np.zeros(N_EMBD, np.float32))

    tensor("token_embd", N_VOCAB, N_EMBD)
    norm("token_embd_norm")
    norm("output_norm")
    tensor("output", N_VOCAB, N_EMBD)
    for il in range(N_LAYER):
        at = f"blk.{il}."
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            norm(at + name)
        for kind in "wavg":
            if kind != "g":
                vector(f"{at}time_mix_{kind}0", N_EMBD)
            tensor(f"{at}time_mix_{kind}1", LORA, N_EMBD)
            tensor(f"{at}time_mix_{kind}2", N_EMBD, LORA)
        vector(at + "time_mix_lerp_fused", 6, 1, 1, N_EMBD, mean=0.5)
        for name in ("k_k", "k_a", "r_k"):
            vector(f"{at}time_mix_{name}", N_EMBD, mean=0.5)
        for name in ("key", "value", "receptance", "output"):
            tensor(f"{at}time_mix_{name}", N_EMBD, N_EMBD)
        vector(at + "channel_mix_lerp_k", 1, 1, N_EMBD, mean=0.5)
        tensor(at + "channel_mix_key", N_FF, N_EMBD)
        tensor(at + "channel_mix_value", N_EMBD, N_FF)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
