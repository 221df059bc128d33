"""A model of 7B class for timing: Llama shapes (head size 128, 32 heads, 8 KV heads), random weights, few layers.

    python -m benchmarks.random_model OUT.gguf [--layers 4]

Written as Q4_0 without a vocabulary, tensor by tensor: memory stays small.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    write(args.out, args.layers)
    print(f"written: {args.out}, {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
