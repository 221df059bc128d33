"""Tiny random-weight GGUFs, written directly: structures of K that no Hugging Face class is needed for.

Layers (two) of four heads, F32, a vocabulary of bytes. The weights keep the size of what they are given, so every
layer's K and V matter to the logits and these stay small enough to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

N_FF, N_HEAD, N_LAYER, N_VOCAB = 256, 4, 2, 3 + 256
LORA = 64  # MiniCPM3, DeepSeek 2: the width through which Q goes; K and V too, where there is no latent
WINDOW = 16
N_EXPERT = 4
SSM = dict(conv_kernel=4, state_size=16, time_step_rank=8, group_count=1)


def write(
    path: Path,
    arch: str,
    head_dim: int = 64,
    n_rot: int | None = None,
    n_head_kv: int | Sequence[int] = 2,
    n_layer: int = N_LAYER,
    chat_template: str | None = None,
    latent: int | None = None,
    n_expert_used: int = 2,
    **extra: float | bool | str | list[int],
) -> Path:
    """Writes a model of architecture arch: llama (norm RoPE), qwen3 (neox), glm4 (norm, any n_rot), phi3 (neox, any
    n_rot), minicpm3 (the last n_rot elements), deepseek2 (the same; with a latent or,
    as older files are, without), granitehybrid (n_head_kv by layer, 0: a Mamba layer), gemma2 (every
    other layer has a sliding window of WINDOW tokens; soft caps), gpt-oss (such layers, sinks, experts), qwen2vl and
    qwen3vl (with rope.dimension_sections M-RoPE and IM-RoPE, as glm4 has it too).

    n_rot: elements of a head that are rotated, all by default. n_layer: unless n_head_kv is a list. latent: values of a
    token's latent, of which V is all and K has n_rot more. n_expert_used: of N_EXPERT. extra: more of the metadata,
    behind "ARCH.".
    """
    rng = np.random.default_rng(0)
    n_rot = head_dim if n_rot is None else n_rot
    n_embd = N_HEAD * head_dim
    heads = [n_head_kv] * n_layer if isinstance(n_head_kv, int) else list(n_head_kv)
    writer = gguf.GGUFWriter(path, arch)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5))

    def norm(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))

    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(len(heads))
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(n_head_kv)
    writer.add_key_length(latent + n_rot if latent else head_dim)
    writer.add_value_length(latent or head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(n_rot)
    writer.add_rope_freq_base(10000.0)
    for key, value in extra.items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(f"{arch}.{key}", value, kind)
    if arch in ("gemma2", "gpt-oss"):
        writer.add_sliding_window(WINDOW)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)
    if arch == "gpt-oss":
        writer.add_expert_count(N_EXPERT)
        writer.add_expert_used_count(n_expert_used)
        writer.add_expert_feed_forward_length(N_FF)
    if arch in ("minicpm3", "deepseek2"):
        writer.add_q_lora_rank(LORA)
        writer.add_kv_lora_rank(latent or LORA)
    if arch == "deepseek2":
        writer.add_leading_dense_block_count(len(heads))
        writer.add_expert_feed_forward_length(N_FF)
        writer.add_expert_shared_count(0)
    if latent:
        writer.add_key_length_mla(head_dim)
        writer.add_value_length_mla(head_dim)
    if arch == "granitehybrid":
        for key, size in dict(SSM, inner_size=2 * n_embd).items():
            writer.add_uint32(f"{arch}.ssm.{key}", size)
    vocabulary(writer)

    writer.add_tensor("token_embd.weight", rng.standard_normal((N_VOCAB, n_embd), np.float32))
    norm("output_norm", n_embd)
    if arch != "gemma2":
        matrix("output", N_VOCAB, n_embd)
    for i, n_kv in enumerate(heads):
        layer = f"blk.{i}"
        norm(f"{layer}.attn_norm", n_embd)
        if arch != "gpt-oss":
            norm(f"{layer}.ffn_norm", n_embd)
        if arch in ("minicpm3", "deepseek2"):
            matrix(f"{layer}.attn_q_a", LORA, n_embd)
            norm(f"{layer}.attn_q_a_norm", LORA)
            matrix(f"{layer}.attn_q_b", N_HEAD * head_dim, LORA)
            matrix(f"{layer}.attn_kv_a_mqa", (latent or LORA) + n_rot, n_embd)
            norm(f"{layer}.attn_kv_a_norm", latent or LORA)
            if latent:
                matrix(f"{layer}.attn_k_b", N_HEAD, latent, head_dim - n_rot)
                matrix(f"{layer}.attn_v_b", N_HEAD, head_dim, latent)
            else:
                matrix(f"{layer}.attn_kv_b", N_HEAD * (2 * head_dim - n_rot), LORA)
        elif arch == "phi3":
            matrix(f"{layer}.attn_qkv", (N_HEAD + 2 * n_kv) * head_dim, n_embd)
        elif n_kv:
            matrix(f"{layer}.attn_q", N_HEAD * head_dim, n_embd)
            matrix(f"{layer}.attn_k", n_kv * head_dim, n_embd)
            matrix(f"{layer}.attn_v", n_kv * head_dim, n_embd)
        else:
            _mamba(writer, layer, n_embd, rng)
        if n_kv:
            matrix(f"{layer}.attn_output", n_embd, N_HEAD * head_dim)
        if arch in ("glm4", "gemma2", "gpt-oss"):
            norm(f"{layer}.post_attention_norm", n_embd)
        if arch in ("glm4", "gemma2"):
            norm(f"{layer}.post_ffw_norm", n_embd)
        if arch == "gpt-oss":
            _experts(writer, layer, n_embd, n_kv * head_dim, rng)
            continue
        if arch in ("qwen3", "qwen3vl"):
            norm(f"{layer}.attn_q_norm", head_dim)
            norm(f"{layer}.attn_k_norm", head_dim)
        if arch in ("glm4", "phi3"):
            matrix(f"{layer}.ffn_up", 2 * N_FF, n_embd)
        else:
            matrix(f"{layer}.ffn_gate", N_FF, n_embd)
            matrix(f"{layer}.ffn_up", N_FF, n_embd)
        matrix(f"{layer}.ffn_down", n_embd, N_FF)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def vocabulary(writer: gguf.GGUFWriter) -> None:
    """N_VOCAB tokens: bytes."""
    kind = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * 256])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_space_prefix(False)


def _experts(writer: gguf.GGUFWriter, layer: str, n_embd: int, n_kv: int, rng: np.random.Generator) -> None:
    """And the biases and the sinks, which only such layers have."""
    shapes = {
        "ffn_gate_inp": (N_EXPERT, n_embd),
        "ffn_gate_exps": (N_EXPERT, N_FF, n_embd),
        "ffn_up_exps": (N_EXPERT, N_FF, n_embd),
        "ffn_down_exps": (N_EXPERT, n_embd, N_FF),
    }
    biases = {"attn_q": (n_embd,), "attn_k": (n_kv,), "attn_v": (n_kv,), "attn_output": (n_embd,)}
    biases |= {name: shape[:-1] for name, shape in shapes.items()}
    for name, shape in shapes.items():
        writer.add_tensor(
            f"{layer}.{name}.weight", rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5)
        )
    for name, shape in biases.items():
        writer.add_tensor(f"{layer}.{name}.bias", 0.1 * rng.standard_normal(shape, np.float32))
    writer.add_tensor(f"{layer}.attn_sinks.weight", rng.standard_normal(N_HEAD, np.float32))


def _mamba(writer: gguf.GGUFWriter, layer: str, n_embd: int, rng: np.random.Generator) -> None:
    inner, state, ranks = 2 * n_embd, SSM["state_size"], SSM["time_step_rank"]
    shapes = {
        "ssm_in.weight": (2 * inner + 2 * state + ranks, n_embd),
        "ssm_conv1d.weight": (inner + 2 * state, SSM["conv_kernel"]),
        "ssm_conv1d.bias": (inner + 2 * state,),
        "ssm_dt.bias": (ranks,),
        "ssm_d": (ranks, 1),
        "ssm_norm.weight": (1, inner),
        "ssm_out.weight": (n_embd, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{layer}.{name}", rng.standard_normal(shape, np.float32) / np.float32(shape[-1] ** 0.5))
    writer.add_tensor(f"{layer}.ssm_a", -np.ones((ranks, 1), np.float32))
