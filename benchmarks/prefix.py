"""What a prefix costs and saves, in a whole model: decoding behind it, and the time to the first token.

    python -m benchmarks.prefix MODEL.gguf [--kv-type q8_0] [--prefixes 24 512 2048] [--depth 2048] [--threads 2]
    python -m benchmarks.prefix HYBRID.gguf --prefixes 2000 --first-token     of a model with recurrent layers

Decoding: contexts whose caches hold the same number of cells, none, 24, 512, ... of them intact; seconds for the same
tokens, in turn; the ratio to the context without intact cells. First token: a message of 16 tokens behind a prefix
that is loaded (verified first, as every program does), against stock attention computing prefix and message, and
against stock attention with an F16 cache that takes the prefix as a state. Medians and quartiles of rounds in which
all take turns. Writes prefix.json. Decoding takes tokens back, which a recurrent state cannot: there only the time to
the first token is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.decode import ROOT, Session, open_model, silence
from intactkv_export.engines import llama_engine as engine
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import KV_TYPES

MESSAGE = 16  # tokens


def make_prefix(model: Path, n: int, n_threads: int) -> bytes:
    """A prefix file of n random tokens, computed by the model itself."""
    tokens = np.random.default_rng(n).integers(1000, 20000, n).tolist()
    description, K, V, states = engine.compute(model, tokens, cache_dtype="f16", n_threads=n_threads)
    manifest = {
        "text": "",
        "messages": None,
        "bos_only": False,
        "chat_template_sha256": None,
        "reference": {"sha256": "0" * 64, "dtype": "F16", "name": model.name, "quantized": True},
        "engine": {"name": "llama", "dtype": "f16", "versions": engine.versions()},
        "calibrated": None,
        "created_by": "benchmarks.prefix",
    }
    return ikv.build(description, tokens, K, V, manifest, states)


def in_turn(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of every run, in a new order each round; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(runs[name]())
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def rows_of(what: str, seconds: dict[str, np.ndarray], against: str) -> list[dict[str, Any]]:
    rows = []
    for name, values in seconds.items():
        low, median, high = np.quantile(values / seconds[against], [0.25, 0.5, 0.75])
        row = {"what": what, "name": name, "ms": float(np.median(values)) * 1e3}
        row |= {"times": float(median), "quartiles": [float(low), float(high)]}
        rows.append(row)
        times = f"{median:.3f}x ({low:.3f} to {high:.3f}) of {against}"
        print(f"{what:>12} {name:>32} {row['ms']:9.2f} ms  {times}", flush=True)
    return rows


def decoding(api: Any, model: Any, files: dict[int, bytes], args: argparse.Namespace) -> list[dict[str, Any]]:
    runs = {}
    for n in (0, *(n for n in files if n < args.depth)):
        session = Session(api, model, args.kv_type, "fused", args.depth + 256, args.threads)
        if n:
            session.used = bindings.load(session.context, files[n])
        session.fill(args.depth)
        assert bindings.n_cells(session.context) == n
        runs[f"{n} intact of {args.depth}"] = lambda session=session: session.decode(args.decode) / args.decode
    return rows_of("token", in_turn(runs, args.rounds), next(iter(runs)))


def first_token(api: Any, model: Any, n: int, file: bytes, args: argparse.Namespace) -> list[dict[str, Any]]:
    ours, stock, f16 = (
        Session(api, model, kv_type, attention, n + 256, args.threads)
        for kv_type, attention in ((args.kv_type, "fused"), (args.kv_type, "stock"), ("f16", "stock"))
    )
    f16.used = bindings.load(f16.context, file)
    state = (ctypes.c_uint8 * api.llama_state_seq_get_size(f16.context, 0))()
    api.llama_state_seq_get_data(f16.context, state, len(state), 0)

    def timed(session: Session, load: Callable[[], object], n_tokens: int) -> float:
        api.llama_memory_clear(session.memory, False)
        start = time.perf_counter()
        load()
        session.used = n + MESSAGE - n_tokens
        session.fill(n + MESSAGE)
        return time.perf_counter() - start

    runs = {
        f"{n} loaded": lambda: timed(ours, lambda: bindings.load(ours.context, file), MESSAGE),
        f"{n} computed, stock": lambda: timed(stock, lambda: None, n + MESSAGE),
        f"{n} as a state, stock f16": lambda: timed(
            f16, lambda: api.llama_state_seq_set_data(f16.context, state, len(state), 0), MESSAGE
        ),
    }
    rows = rows_of("first token", in_turn(runs, args.rounds), f"{n} loaded")
    for session in (ours, stock, f16):
        session.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kv-type", default="q8_0", choices=list(KV_TYPES))
    parser.add_argument("--prefixes", nargs="+", type=int, default=[24, 512, 2048], help="tokens")
    parser.add_argument("--depth", type=int, default=4096, help="cells behind which tokens are decoded")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded per measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--first-token", action="store_true", help="the time to the first token alone")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    api, model = open_model(args.model)
    files = {n: make_prefix(args.model, n, args.threads) for n in args.prefixes}
    silence(api)  # the engine has put back llama.cpp's own log
    result: dict = {"machine": machine.describe(), "model": args.model.name, "threads": args.threads, "rows": []}
    if not args.first_token:
        result["rows"] += decoding(api, model, files, args)
    for n, file in files.items():
        result["rows"] += first_token(api, model, n, file, args)
    args.out.mkdir(parents=True, exist_ok=True)
    for n, file in files.items():
        print(f"{n} tokens: a file of {len(file) / 1e6:.1f} MB")
    (args.out / "prefix.json").write_text(json.dumps(result, indent=1))
    print(f"written: {args.out / 'prefix.json'}")


if __name__ == "__main__":
    main()
