"""The attention kernel alone: ours against upstream's op, in turn, on the same tensors.

    python -m benchmarks.attention [--quick] [--threads 2] [--out build/benchmarks]
    python -m benchmarks.attention --against CHECKOUT    another checkout's kernel instead of upstream's op

Per KV type, model shape, depth and batch: median time of both, ratio with quartiles, GB/s of K and V read (batch 1)
as a fraction of the read bandwidth measured on this machine, and multiply-adds per second. Copies of K and V that
together exceed the caches are used in turn, as the layers of a model are. Writes attention.json and attention.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from benchmarks import kernel as K
from benchmarks import machine

# head sizes of K and of V, query heads, KV heads
SHAPES = {
    "SmolLM2-135M": (64, 64, 9, 3),
    "MHA": (64, 64, 16, 16),
    "7B class": (128, 128, 32, 8),
    "Gemma": (256, 256, 8, 4),
    "DeepSeek V2 Lite": (576, 512, 16, 1),
    "GLM-4.7-Flash": (576, 512, 20, 1),
    "DeepSeek V3": (576, 512, 128, 1),
    "Mistral 4": (320, 256, 32, 1),
}
LATENTS = ("DeepSeek V2 Lite", "GLM-4.7-Flash", "DeepSeek V3", "Mistral 4")  # V is the first values of K's rows
BEYOND_CACHES = 128 << 20  # bytes
ROUNDS = 9  # of two kernels in turn


def make_case(name: str, n_tokens: int, depth: int, kv_type: str) -> K.Case:
    """n_tokens queries behind `depth` cells, causal, the cache padded to a multiple of 256 as llama.cpp pads it."""
    dim_k, dim_v, n_head, n_head_kv = SHAPES[name]
    used = depth + n_tokens
    n_kv = -(-used // 256) * 256
    rng = np.random.default_rng(0)
    q = rng.standard_normal((1, n_tokens, n_head, dim_k), np.float32)
    k = rng.standard_normal((1, n_kv, n_head_kv, dim_k), np.float32)
    latents = name in LATENTS
    v = k[..., :dim_v] if latents else rng.standard_normal((1, n_kv, n_head_kv, dim_v), np.float32)
    seen = np.arange(n_kv)[None] <= depth + np.arange(n_tokens)[:, None]
    mask = np.where(seen, np.float16(0), np.float16(-np.inf))[None, None]
    return K.Case(q, k, v, kv_type, kv_type, mask=mask, scale=dim_k**-0.5, latents=latents)


def in_turn(
    kernel: K.Kernel, other: K.Kernel, case: K.Case, *, n_threads: int, repeat: int, n_layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Seconds [ROUNDS] of both kernels, each the median of `repeat` calls; who comes first changes every round."""
    seconds: dict[K.Kernel, list[float]] = {kernel: [], other: []}
    for i in range(ROUNDS):
        for k in (kernel, other) if i % 2 == 0 else (other, kernel):
            _, calls = k.run(case, fused=True, n_threads=n_threads, repeat=repeat, n_layer=n_layer)
            seconds[k].append(float(np.median(calls)))
    return np.array(seconds[kernel]), np.array(seconds[other])


def measure(
    kernel: K.Kernel,
    other: K.Kernel | None,
    name: str,
    n_tokens: int,
    depth: int,
    kv_type: str,
    args: argparse.Namespace,
) -> dict:
    dim_k, dim_v, n_head, n_head_kv = SHAPES[name]
    case = make_case(name, n_tokens, depth, kv_type)
    of_a_cell = dim_k if name in LATENTS else dim_k + dim_v
    bytes_read = (depth + n_tokens) * n_head_kv * of_a_cell // 32 * K.BLOCK_BYTES[kv_type]
    n_layer = int(np.clip(BEYOND_CACHES // bytes_read, 1, 64)) if n_tokens == 1 else 1
    once, _ = kernel.compare(case, n_threads=args.threads, repeat=1, n_layer=1)
    repeat = int(np.clip(args.seconds / 4 / once[0], 3, 400))
    if other is None:
        fused, theirs = kernel.compare(case, n_threads=args.threads, repeat=repeat, n_layer=n_layer)
    else:
        repeat = max(repeat // ROUNDS, 3)
        fused, theirs = in_turn(kernel, other, case, n_threads=args.threads, repeat=repeat, n_layer=n_layer)
    ratio = np.quantile(theirs / fused, [0.25, 0.5, 0.75])
    mac = n_tokens * (depth + (n_tokens + 1) / 2) * n_head * (dim_k + dim_v)
    return {
        "shape": name,
        "kv_type": kv_type,
        "depth": depth,
        "tokens": n_tokens,
        "repeat": repeat,
        "fused_ms": float(np.median(fused)) * 1e3,
        "stock_ms" if other is None else "other_ms": float(np.median(theirs)) * 1e3,
        "ratio": float(ratio[1]),
        "ratio_quartiles": [float(ratio[0]), float(ratio[2])],
        "gb_per_s": bytes_read / float(np.median(fused)) / 1e9,
        "gmac_per_s": mac / float(np.median(fused)) / 1e9,
    }


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    batches = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["shape"] for row in rows))
    figure, axes = pyplot.subplots(
        len(batches), len(names), figsize=(4.5 * len(names), 3 * len(batches)), squeeze=False, sharex=True
    )
    for i, tokens in enumerate(batches):
        for j, name in enumerate(names):
            axis = axes[i][j]
            for kv_type in result["types"]:
                own = [r for r in rows if (r["tokens"], r["shape"], r["kv_type"]) == (tokens, name, kv_type)]
                axis.plot([r["depth"] for r in own], [r["ratio"] for r in own], marker="o", label=kv_type)
            axis.axhline(1, color="gray", linewidth=0.8)
            axis.set_xscale("symlog", linthresh=256)
            axis.set_yscale("log")
            axis.set_title(f"{name}, batch {tokens}", fontsize=9)
            axis.set_ylabel(f"times as fast as {result['against']}")
    axes[-1][0].set_xlabel("depth")
    axes[0][0].legend(fontsize=7)
    figure.text(0.01, 0.002, machine.line(result["machine"]), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["f16", "q8_0", "q5_1", "q4_0"], choices=list(K.BLOCK_BYTES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 512, 2048, 8192, 32768])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="instruction set instead of the best: avx512vnni, avx512, avx2, portable, ...")
    parser.add_argument("--against", type=Path, help="another checkout, whose kernel is measured instead of stock's")
    parser.add_argument("--seconds", type=float, default=2.0, help="aimed at per measurement")
    parser.add_argument("--quick", action="store_true", help="two types, one shape, three depths, two batches")
    parser.add_argument("--out", type=Path, default=K.ROOT / "build" / "benchmarks")
    args = parser.parse_args()
    if args.quick:
        args.types, args.shapes, args.depths, args.tokens = (
            ["q8_0", "q4_0"],
            ["SmolLM2-135M"],
            [0, 2048, 8192],
            [1, 512],
        )

    kernel = K.Kernel(K.build())
    if not kernel.choose(args.isa):
        parser.error(f"this machine has no {args.isa}")
    other = K.Kernel(K.build_of(args.against)) if args.against else None
    if other:
        other.choose(args.isa)
    theirs = "other_ms" if other else "stock_ms"
    bandwidth = kernel.read_bandwidth(args.threads)
    print(f"{kernel.isa()}, {args.threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    result = {
        "machine": machine.describe(),
        "isa": kernel.isa(),
        "threads": args.threads,
        "read_bandwidth_gb_per_s": bandwidth / 1e9,
        "types": args.types,
        "against": str(args.against or "stock"),
        "rows": [],
    }
    print(
        f"{'shape':>16} {'type':>6} {'depth':>6} {'batch':>5} {'ours ms':>9} {theirs.replace('_', ' '):>9} "
        f"{'ratio':>7}  GB/s, GMAC/s"
    )
    for name in args.shapes:
        for kv_type in args.types:
            for depth in args.depths:
                for tokens in args.tokens:
                    row = measure(kernel, other, name, tokens, depth, kv_type, args)
                    result["rows"].append(row)
                    text = f"{row['gb_per_s']:.1f} ({row['gb_per_s'] * 1e9 / bandwidth:.0%})" if tokens == 1 else ""
                    print(
                        f"{name:>16} {kv_type:>6} {depth:>6} {tokens:>5} {row['fused_ms']:>9.3f} "
                        f"{row[theirs]:>9.3f} {row['ratio']:>6.2f}x  {text or format(row['gmac_per_s'], '.1f')}",
                        flush=True,
                    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "attention.json").write_text(json.dumps(result, indent=1))
    plot(result, args.out / "attention.png")
    print(f"written: {args.out / 'attention.json'}, {args.out / 'attention.png'}")


if __name__ == "__main__":
    main()
