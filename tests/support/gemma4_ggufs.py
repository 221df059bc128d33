"""Tiny random-weight GGUFs of Gemma 4 and of its drafting head, written directly.

The model has what no other has together: layers that read K and V of an earlier layer, a full layer without matrices
of V (K before its norm and RoPE is V), heads of 128 values there and of 64 in those with a sliding window, one KV head
and two. The head reads K and V of the model's last layers, it has none.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from tests.support.tiny_ggufs import N_FF, N_VOCAB, WINDOW, vocabulary

N_EMBD, N_HEAD, HEAD, HEAD_SWA = 128, 2, 128, 64
WINDOWED = [True, True, False, True, False]  # by layer; the last two read K and V of the two before
N_SHARED = 2
N_EMBD_HEAD = 64  # of the drafting head


class _Writer:
    def __init__(self, path: Path, arch: str, n_embd: int, windowed: list[bool]) -> None:
        self.rng = np.random.default_rng(7)
        self.n_embd = n_embd
        self.gguf = writer = gguf.GGUFWriter(path, arch)
        writer.add_context_length(2048)
        writer.add_embedding_length(n_embd)
        writer.add_block_count(len(windowed))
        writer.add_feed_forward_length(N_FF)
        writer.add_head_count(N_HEAD)
        writer.add_head_count_kv([2 if is_swa else 1 for is_swa in windowed])
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_key_length_swa(HEAD_SWA)
        writer.add_value_length_swa(HEAD_SWA)
        writer.add_rope_dimension_count(HEAD)
        writer.add_rope_dimension_count_swa(HEAD_SWA)
        writer.add_rope_freq_base(1e6)
        writer.add_rope_freq_base_swa(1e4)
        writer.add_sliding_window(WINDOW)
        writer.add_sliding_window_pattern(windowed)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_embedding_length_per_layer_input(0)
        vocabulary(writer)
        self.matrix("token_embd", N_VOCAB, n_embd, size=1.0)
        self.norm("output_norm", n_embd)
        factors = [1.0] * (HEAD // 8) + [1e30] * (HEAD // 2 - HEAD // 8)  # a quarter of a head is turned
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))

    def matrix(self, name: str, *shape: int, size: float | None = None) -> None:
        size = shape[-1] ** -0.5 if size is None else size
        self.gguf.add_tensor(f"{name}.weight", self.rng.standard_normal(shape, np.float32) * np.float32(size))

    def norm(self, name: str, n: int) -> None:
        self.gguf.add_tensor(f"{name}.weight", np.ones(n, np.float32))

    def layer(self, i: int, is_swa: bool) -> None:
        """What a layer has besides its K and V."""
        name, width = f"blk.{i}", N_HEAD * (HEAD_SWA if is_swa else HEAD)
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            self.norm(f"{name}.{norm}", self.n_embd)
        self.norm(f"{name}.attn_q_norm", width // N_HEAD)
        self.norm(f"{name}.layer_output_scale", 1)
        self.matrix(f"{name}.attn_q", width, self.n_embd)
        self.matrix(f"{name}.attn_output", self.n_embd, width)
        self.matrix(f"{name}.ffn_gate", N_FF, self.n_embd)
        self.matrix(f"{name}.ffn_up", N_FF, self.n_embd)
        self.matrix(f"{name}.ffn_down", self.n_embd, N_FF)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def write(path: Path) -> Path:
    """Writes the model."""
    writer = _Writer(path, "gemma4", N_EMBD, WINDOWED)
    writer.gguf.add_shared_kv_layers(N_SHARED)
    for i, is_swa in enumerate(WINDOWED):
        writer.layer(i, is_swa)
        if i < len(WINDOWED) - N_SHARED:
            head, n_kv = (HEAD_SWA, 2) if is_swa else (HEAD, 1)
            writer.norm(f"blk.{i}.attn_k_norm", head)
            writer.matrix(f"blk.{i}.attn_k", n_kv * head, N_EMBD)
            if is_swa:
                writer.matrix(f"blk.{i}.attn_v", n_kv * head, N_EMBD)
    writer.close()
    return path


def write_head(path: Path) -> Path:
    """Writes the drafting head of that model."""
    writer = _Writer(path, "gemma4-assistant", N_EMBD_HEAD, [True, False])
    writer.gguf.add_embedding_length_out(N_EMBD)
    writer.gguf.add_nextn_predict_layers(2)
    writer.matrix("nextn.pre_projection", N_EMBD_HEAD, 2 * N_EMBD)
    writer.matrix("nextn.post_projection", N_EMBD, N_EMBD_HEAD)
    for i, is_swa in enumerate([True, False]):
        writer.layer(i, is_swa)
    writer.close()
    return path
