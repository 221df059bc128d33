"""A whole model: tokens per second of decoding and prefill behind a filled cache, ours against stock, in turn.

    python -m benchmarks.decode MODEL.gguf [--types q8_0 q4_0] [--depths 0 512 2048 8192 32768] [--threads 2]
        [--ik-python VENV/bin/python] [--out build/benchmarks]

One process, one set of weights; per KV type one context with the fused kernel, one with stock attention
(INTACTKV_ATTN), and stock with an F16 cache. The cache is filled by the fused context and handed to the others of its
type as a state, so all read the same cells. With --ik-python, ik_llama.cpp (package ik-llama-cpp-python in a virtual
environment of its own) runs in a process of its own and takes its turn. Each round measures all once; ratios are
between neighbours in a round, and their median and quartiles are reported. Writes decode.json and decode.png.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from intactkv_export import library
from intactkv_export.libllama import bindings, kv_pair
from intactkv_export.runtime.intact_llama import KV_TYPES

ROOT = Path(__file__).resolve().parent.parent
N_BATCH = 512


@functools.cache
def _no_log(api: Any) -> Any:
    return api.llama_log_callback(lambda level, text, data: None)  # kept: the library has a pointer to it


def silence(api: Any) -> None:
    """No log of llama.cpp on the terminal."""
    api.llama_log_set(_no_log(api), None)


def open_model(path: Path) -> tuple[Any, Any]:
    """The bindings and the model, in CPU memory. Exits if it cannot be loaded."""
    api = library.load().llama_cpp
    api.llama_backend_init()
    silence(api)
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        sys.exit(f"{path} cannot be loaded")
    return api, model


class Session:
    """One context of our libraries, its attention chosen when it is made. kv_type: also a pair, "q8_0,q4_0"."""

    def __init__(
        self, api: Any, model: Any, kv_type: str, attention: str, n_ctx: int, n_threads: int, tail: int = 0
    ) -> None:
        os.environ["INTACTKV_ATTN"] = attention
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, N_BATCH, N_BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k, params.type_v = (KV_TYPES[name] for name in kv_pair(kv_type))
        params.flash_attn_type = 1
        self.api = api
        with bindings.no_automatic_prefixes():
            self.context = api.llama_init_from_model(model, params)
        del os.environ["INTACTKV_ATTN"]
        if not self.context:
            raise RuntimeError(f"no context with a {kv_type} cache and {attention} attention")
        bindings.set_tail(self.context, tail)
        self.memory = api.llama_get_memory(self.context)
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self.batch = api.llama_batch_init(N_BATCH, 0, 1)
        self.rng = random.Random(0)
        self.used = 0

    def close(self) -> None:
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)

    def _evaluate(self, n: int, size: int) -> float:
        start = time.perf_counter()
        batch = self.batch
        for first in range(0, n, size):
            batch.n_tokens = min(size, n - first)
            for i in range(batch.n_tokens):
                batch.token[i] = self.rng.randrange(self.n_vocab)
                batch.pos[i] = self.used + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == batch.n_tokens - 1
            if self.api.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            self.used += batch.n_tokens
        return time.perf_counter() - start

    def fill(self, n: int) -> None:
        """Evaluates tokens until n cells are used."""
        self._evaluate(n - self.used, N_BATCH)

    def copy(self, other: Session) -> None:
        """Takes over the cells of another context of the same KV type."""
        size = self.api.llama_state_seq_get_size(other.context, 0)
        data = (ctypes.c_uint8 * size)()
        if other.used > 0:
            self.api.llama_state_seq_get_data(other.context, data, size, 0)
            if self.api.llama_state_seq_set_data(self.context, data, size, 0) == 0:
                raise RuntimeError("the state cannot be copied")
        self.used = other.used

    def go_on(self, n: int) -> float:
        """Seconds for n tokens one by one; they stay. A tail stays whole so, going back would leave holes in it."""
        return self._evaluate(n, 1)

    def _measure(self, n: int, size: int) -> float:
        before = self.used
        seconds = self._evaluate(n, size)
        self.api.llama_memory_seq_rm(self.memory, 0, before, -1)
        self.used = before
        return seconds

    def decode(self, n: int) -> float:
        """Seconds for n tokens one by one; the cells are taken back."""
        return self._measure(n, 1)

    def prefill(self, n: int) -> float:
        """Seconds for n tokens in batches; the cells are taken back."""
        return self._measure(n, N_BATCH)


class IkSession:
    """ik_llama.cpp in a process of its own (ik_worker.py)."""

    def __init__(self, python: str, model: Path, kv_type: str, n_ctx: int, n_threads: int) -> None:
        script = Path(__file__).with_name("ik_worker.py")
        command = [python, str(script), str(model), str(n_ctx), kv_type, str(n_threads)]
        log = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=script.parent
        )

    def _ask(self, *command: object) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("ik_worker.py ended: run it by hand to see why")
        return json.loads(answer)

    def fill(self, n: int) -> None:
        self._ask("fill", n)

    def decode(self, n: int) -> float:
        return self._ask("decode", n)

    def prefill(self, n: int) -> float:
        return self._ask("prefill", n)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def rounds(sessions: dict[str, Any], what: str, n: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Seconds of every session, measured in turn, in a new order each round; the first round is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    start = time.perf_counter()
    for i in range(args.rounds + 1):
        names = list(sessions)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(getattr(sessions[name], what)(n))
        if i >= 2 and time.perf_counter() - start > args.patience:
            break
    return {name: np.array(values[1:]) for name, values in seconds.items()}


def measure_type(api: Any, model: Any, kv_type: str, args: argparse.Namespace) -> list[dict]:
    n_ctx = max(args.depths) + N_BATCH + 256
    sessions: dict[str, Any] = {
        f"fused {kv_type}": Session(api, model, kv_type, "fused", n_ctx, args.threads),
        f"stock {kv_type}": Session(api, model, kv_type, "stock", n_ctx, args.threads),
    }
    if kv_type != "f16":
        sessions["stock f16"] = Session(api, model, "f16", "stock", n_ctx, args.threads)
    if args.portable:
        sessions[f"portable {kv_type}"] = Session(api, model, kv_type, "portable", n_ctx, args.threads)
    if args.ik_python:
        sessions[f"ik {kv_type}"] = IkSession(args.ik_python, args.model, kv_type, n_ctx, args.threads)
    rows = []
    first = sessions[f"fused {kv_type}"]
    for depth in sorted(args.depths):
        for name, session in sessions.items():
            if session is not first and isinstance(session, Session) and name.endswith(kv_type):
                session.copy(first) if session.used < first.used else None
            session.fill(depth)
        for what, n in (("decode", args.decode), ("prefill", N_BATCH)):
            seconds = rounds(sessions, what, n, args)
            fused = seconds[f"fused {kv_type}"]
            for name, values in seconds.items():
                low, median, high = np.quantile(values / fused, [0.25, 0.5, 0.75])
                row = {
                    "what": what,
                    "depth": depth,
                    "kv_type": kv_type,
                    "name": name,
                    "rounds": len(values),
                    "tokens_per_s": n / float(np.median(values)),
                    "fused_is_faster_by": float(median),
                    "quartiles": [float(low), float(high)],
                }
                rows.append(row)
                print(
                    f"{what:>8} {depth:>6} {name:>14} {row['tokens_per_s']:>9.1f} tok/s   "
                    f"fused {kv_type} is {median:.2f}x ({low:.2f} to {high:.2f})",
                    flush=True,
                )
    for session in sessions.values():
        session.close()
    return rows


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for axis, what in zip(axes, ("decode", "prefill"), strict=True):
        rows = [row for row in result["rows"] if row["what"] == what]
        for name in dict.fromkeys(row["name"] for row in rows):
            own = {row["depth"]: row["tokens_per_s"] for row in rows if row["name"] == name}
            style = {"fused": "-", "stock": "--", "ik": ":", "portable": "-."}[name.split()[0]]
            axis.plot(list(own), list(own.values()), style, marker="o", label=name)
        axis.set_xscale("symlog", linthresh=512)
        axis.set_yscale("log")
        axis.set_xlabel("depth")
        axis.set_ylabel("tokens per second")
        axis.set_title(f"{what}, {result['model']}, {result['threads']} threads", fontsize=9)
        axis.legend(fontsize=7)
    figure.text(0.01, 0.002, machine.line(result["machine"]), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"], choices=list(KV_TYPES))
    parser.add_argument("--depths", nargs="+", type=int, default=[0, 512, 2048, 8192, 32768])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded per measurement")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which two rounds must do")
    parser.add_argument("--portable", action="store_true", help="the portable path too")
    parser.add_argument("--ik-python", help="python of a virtual environment with ik-llama-cpp-python")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    api, model = open_model(args.model)
    result: dict = {"machine": machine.describe(), "model": args.model.name, "threads": args.threads, "rows": []}
    for kv_type in args.types:
        result["rows"] += measure_type(api, model, kv_type, args)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "decode.json").write_text(json.dumps(result, indent=1))
    plot(result, args.out / "decode.png")
    print(f"written: {args.out / 'decode.json'}, {args.out / 'decode.png'}")


if __name__ == "__main__":
    main()
