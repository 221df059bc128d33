"""A model of 7B class for timing: Llama shapes (head size 128, 32 heads, 8 KV heads), random weights, few layers.

    python -m benchmarks.random_model OUT.gguf [--layers 4]
    python -m benchmarks.random_model OUT.gguf --hybrid [--layers 32]

Written as Q4_0, tensor by tensor: memory stays small. The Llama has no vocabulary. --hybrid: the shapes of Granite 4.0
H 350M, Mamba 2 in all layers but every eighth, with a vocabulary of 32000 made up tokens.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

N_EMBD, N_HEAD, N_HEAD_KV, N_FF, N_VOCAB, N_CTX = 4096, 32, 8, 14336, 32000, 65536


def write(path: Path, n_layer: int) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter

    q4_0, f32 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.F32
    n_embd_kv = N_EMBD // N_HEAD * N_HEAD_KV
    shapes = {
        "attn_q": (N_EMBD, N_EMBD),
        "attn_k": (n_embd_kv, N_EMBD),
        "attn_v": (n_embd_kv, N_EMBD),
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_gate": (N_FF, N_EMBD),
        "ffn_up": (N_FF, N_EMBD),
        "ffn_down": (N_EMBD, N_FF),
    }
    writer = GGUFWriter(path, "llama", use_temp_file=True)
    writer.add_block_count(n_layer)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(N_EMBD)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(N_EMBD // N_HEAD)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)

    def add(name: str, shape: tuple[int, int]) -> None:
        # blocks of 32 values: an F16 scale and 16 bytes of nibbles, of which every one is a valid number
        rows, columns = shape
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(columns**-0.5 / 4.6).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=q4_0)

    def add_ones(name: str) -> None:
        writer.add_tensor(name, np.ones(N_EMBD, np.float32), raw_dtype=f32)

    add("token_embd.weight", (N_VOCAB, N_EMBD))
    for layer in range(n_layer):
        add_ones(f"blk.{layer}.attn_norm.weight")
        add_ones(f"blk.{layer}.ffn_norm.weight")
        for name, shape in shapes.items():
            add(f"blk.{layer}.{name}.weight", shape)
    add_ones("output_norm.weight")
    add("output.weight", (N_VOCAB, N_EMBD))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


H = dict(n_embd=768, n_ff=2048, heads=12, heads_kv=4, conv=4, state=128, ssm_heads=48, inner=1536)


def write_hybrid(path: Path, n_layer: int) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType

    rng = np.random.default_rng(0)
    head, xbc = H["n_embd"] // H["heads"], H["inner"] + 2 * H["state"]
    attention = [i % 8 == 5 for i in range(n_layer)]
    writer = GGUFWriter(path, "granitehybrid", use_temp_file=True)
    writer.add_block_count(n_layer)
    writer.add_context_length(N_CTX)
    writer.add_embedding_length(H["n_embd"])
    writer.add_feed_forward_length(H["n_ff"])
    writer.add_head_count(H["heads"])
    writer.add_head_count_kv([H["heads_kv"] if has else 0 for has in attention])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    for name, size in (("conv_kernel", "conv"), ("state_size", "state"), ("time_step_rank", "ssm_heads")):
        writer.add_uint32(f"granitehybrid.ssm.{name}", H[size])
    writer.add_uint32("granitehybrid.ssm.group_count", 1)
    writer.add_uint32("granitehybrid.ssm.inner_size", H["inner"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, N_VOCAB))])
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.NORMAL] * (N_VOCAB - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = rng.integers(0, 256, (rows, columns // 32, 18), np.uint8)
        blocks[..., :2] = np.frombuffer(np.float16(columns**-0.5 / 4.6).tobytes(), np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_0)

    def small(name: str, *shape: int, mean: float = 0.0, scale: float = 0.0) -> None:
        writer.add_tensor(name, (mean + scale * rng.standard_normal(shape)).astype(np.float32))

    add("token_embd.weight", N_VOCAB, H["n_embd"])
    small("output_norm.weight", H["n_embd"], mean=1.0)
    for layer, has in enumerate(attention):
        name = f"blk.{layer}"
        small(f"{name}.attn_norm.weight", H["n_embd"], mean=1.0)
        small(f"{name}.ffn_norm.weight", H["n_embd"], mean=1.0)
        add(f"{name}.ffn_gate.weight", H["n_ff"], H["n_embd"])
        add(f"{name}.ffn_up.weight", H["n_ff"], H["n_embd"])
        add(f"{name}.ffn_down.weight", H["n_embd"], H["n_ff"])
        if has:
            add(f"{name}.attn_q.weight", H["n_embd"], H["n_embd"])
            add(f"{name}.attn_k.weight", H["heads_kv"] * head, H["n_embd"])
            add(f"{name}.attn_v.weight", H["heads_kv"] * head, H["n_embd"])
            add(f"{name}.attn_output.weight", H["n_embd"], H["n_embd"])
            continue
        small(f"{name}.ssm_conv1d.weight", xbc, H["conv"], scale=0.5)
        small(f"{name}.ssm_conv1d.bias", xbc)
        small(f"{name}.ssm_dt.bias", H["ssm_heads"])
        small(f"{name}.ssm_a", H["ssm_heads"], 1, mean=-1.0)
        small(f"{name}.ssm_d", H["ssm_heads"], 1, mean=1.0)
        small(f"{name}.ssm_norm.weight", 1, H["inner"], mean=1.0)
        add(f"{name}.ssm_in.weight", H["inner"] + xbc + H["ssm_heads"], H["n_embd"])
        add(f"{name}.ssm_out.weight", H["n_embd"], H["inner"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="4, of a hybrid 32")
    parser.add_argument("--hybrid", action="store_true")
    args = parser.parse_args()
    make, default = (write_hybrid, 32) if args.hybrid else (write, 4)
    make(args.out, args.layers or default)
    print(f"written: {args.out}, {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
