"""What a KV cache costs, with a tail of intact cells and without: tokens per second, bytes.

    python -m benchmarks.tail MODEL.gguf [--caches q4_0 q4_0+128 q8_0,q4_0 q8_0,q4_0+128 q8_0 f16]
        [--depths 0 2048 8192] [--against q4_0] [--threads 2] [--rounds 9] [--out build/benchmarks]

A cache is named by its KV type, or K,V, and the tail behind a +. One process, one set of weights, one context a cache.
Each is filled by itself up to a depth, the last cells of it in a batch as long as the tail. Then all decode in turn, in
an order that changes each round, and their tokens stay, so that the tails stay whole; then all evaluate a batch of 512.
Ratios are between neighbours in a round; their medians and quartiles are printed. Writes tail.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.decode import N_BATCH, ROOT, Session, open_model, rounds
from intactkv_export.libllama import bindings


def session(api: Any, model: Any, name: str, n_ctx: int, n_threads: int) -> Session:
    kv_type, _, tail = name.partition("+")
    return Session(api, model, kv_type, "fused", n_ctx, n_threads, int(tail or 0))


def cell_bytes(api: Any, one: Session) -> int:
    """Bytes of a cell in the cache, all layers: from what a saved sequence grows by."""
    sizes = []
    for _ in range(2):
        sizes.append(api.llama_state_seq_get_size(one.context, 0))
        one.go_on(1)
    return sizes[1] - sizes[0] - 12  # its position, its number of sequences, its sequence


def measure(api: Any, model: Any, args: argparse.Namespace) -> list[dict[str, Any]]:
    n_ctx = max(args.depths) + (args.rounds + 2) * args.decode + 2 * N_BATCH
    sessions = {name: session(api, model, name, n_ctx, args.threads) for name in args.caches}
    rows = []
    for depth in sorted(args.depths):
        for one in sessions.values():
            one.fill(max(depth - 128, 0))
            one.fill(depth)
        for what, method, n in (("decode", "go_on", args.decode), ("prefill", "prefill", N_BATCH)):
            seconds = rounds(sessions, method, n, args)
            for name, values in seconds.items():
                low, median, high = np.quantile(seconds[args.against] / values, [0.25, 0.5, 0.75])
                row = {
                    "what": what,
                    "depth": depth,
                    "cache": name,
                    "rounds": len(values),
                    "tokens_per_s": n / float(np.median(values)),
                    "speed": float(median),
                    "quartiles": [float(low), float(high)],
                    "f16_row_bytes": bindings.arena_bytes(sessions[name].context),
                }
                rows.append(row)
                print(
                    f"{what:>8} {depth:>6} {name:>16} {row['tokens_per_s']:>8.1f} tok/s   "
                    f"{median:.3f} of {args.against} ({low:.3f} to {high:.3f})",
                    flush=True,
                )
    for one in sessions.values():
        one.close()
    for name in args.caches:
        plain = session(api, model, name.partition("+")[0], 512, args.threads)
        plain.fill(1)
        rows.append({"what": "bytes", "cache": name, "cell_bytes": cell_bytes(api, plain)})
        print(f"   bytes        {name:>16} {rows[-1]['cell_bytes']:>8} a token")
        plain.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--caches", nargs="+", default="q4_0 q4_0+128 q8_0,q4_0 q8_0,q4_0+128 q8_0 f16".split())
    parser.add_argument("--against", default="q4_0", help="the cache that ratios are to; one of --caches")
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 2048, 8192])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode", type=int, default=24, help="tokens decoded per measurement")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which two rounds must do")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()
    if args.against not in args.caches:
        parser.error(f"--against {args.against}: it is none of --caches {' '.join(args.caches)}")

    api, model = open_model(args.model)
    result = {"machine": machine.describe(), "model": args.model.name, "threads": args.threads}
    result["rows"] = measure(api, model, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tail.json").write_text(json.dumps(result, indent=1))
    print(f"written: {args.out / 'tail.json'}")


if __name__ == "__main__":
    main()
