"""Tiny random models with recurrent layers, and prefix files of them whose rows are those of a cache at F16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from intactkv_export.engines import llama_engine
from intactkv_export.prefix import ikv
from tests.support import tiny_ggufs

N_VOCAB = 128  # as upstream's tiny models have
TOKENS = [int(t) for t in np.random.default_rng(2).integers(3, N_VOCAB, 60)]

# Of upstream's own test (support/upstream_archs.py): Mamba alone, beside attention layers, within them (Falcon-H1);
# short convolutions; gated delta nets, with IM-RoPE too; linear attention; delta attention beside latents
UPSTREAM = ("mamba", "mamba2", "jamba", "falcon-h1", "plamo2", "granitehybrid", "lfm2", "lfm2moe", "nemotron_h",
            "nemotron_h_moe", "qwen3next", "qwen35", "qwen35moe", "minimax-01", "kimi-linear")  # fmt: skip

ORIGIN = {
    "text": "",
    "messages": None,
    "bos_only": False,
    "chat_template_sha256": None,
    "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "random", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {}},
    "calibrated": None,
    "created_by": "the tests",
}


def prefix_of(path: Path, tokens: Sequence[int], dtype: str = "f16") -> bytes:
    """The prefix file of these tokens, computed by the model itself."""
    model, K, V, states = llama_engine.compute(path, tokens, cache_dtype=dtype, n_threads=2)
    return ikv.build(model, tokens, K, V, ORIGIN, states)


def write_rwkv7(path: Path, n_embd: int = 128, n_layer: int = 2, head: int = 64, lora: int = 32) -> Path:
    """RWKV7, which upstream's own test does not make: token shift and a matrix for each head."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "rwkv7")
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(4 * n_embd)
    writer.add_head_count(0)
    writer.add_layer_norm_eps(1e-5)
    writer.add_uint32("rwkv7.wkv.head_size", head)
    writer.add_uint32("rwkv7.token_shift_count", 2)
    for name in ("decay", "iclr", "value_residual_mix", "gate"):
        writer.add_uint32(f"rwkv7.attention.{name}_lora_rank", lora)
    tiny_ggufs.vocabulary(writer)

    def tensor(name: str, *shape: int, scale: float | None = None, mean: float = 0.0) -> None:
        scale = shape[-1] ** -0.5 if scale is None else scale
        writer.add_tensor(name, (mean + scale * rng.standard_normal(shape)).astype(np.float32))

    def norm(name: str) -> None:
        tensor(f"{name}.weight", n_embd, scale=0.1, mean=1.0)
        tensor(f"{name}.bias", n_embd, scale=0.1)

    tensor("token_embd.weight", tiny_ggufs.N_VOCAB, n_embd, scale=1.0)
    norm("token_embd_norm")
    norm("output_norm")
    tensor("output.weight", tiny_ggufs.N_VOCAB, n_embd)
    for i in range(n_layer):
        layer = f"blk.{i}"
        for name in ("attn_norm", "attn_norm_2", "time_mix_ln"):
            norm(f"{layer}.{name}")
        for name in ("w", "a", "v", "g"):
            if name != "g":
                tensor(f"{layer}.time_mix_{name}0.weight", n_embd, scale=0.3)
            tensor(f"{layer}.time_mix_{name}1.weight", lora, n_embd)
            tensor(f"{layer}.time_mix_{name}2.weight", n_embd, lora)
        tensor(f"{layer}.time_mix_lerp_fused.weight", 6, 1, 1, n_embd, scale=0.2, mean=0.5)
        for name in ("k_k", "k_a", "r_k"):
            tensor(f"{layer}.time_mix_{name}.weight", n_embd, scale=0.3, mean=0.5)
        for name in ("key", "value", "receptance", "output"):
            tensor(f"{layer}.time_mix_{name}.weight", n_embd, n_embd)
        tensor(f"{layer}.channel_mix_lerp_k.weight", 1, 1, n_embd, scale=0.2, mean=0.5)
        tensor(f"{layer}.channel_mix_key.weight", 4 * n_embd, n_embd)
        tensor(f"{layer}.channel_mix_value.weight", n_embd, 4 * n_embd)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
