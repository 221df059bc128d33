"""What Python does for each token of a reply, ours against llama_cpp's own, by the length of the reply.

    python -m benchmarks.python_overhead MODEL.gguf [--lengths 100 1000 3500] [--rounds 3] [--out build/benchmarks]

The tokens are given, nothing is evaluated: what is left is the work on text and chunks, in CPU time of this process.
Beside it, what the model needs for a token here (one by one, an F16 cache, no depth). Writes python_overhead.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from intactkv_export.runtime import IntactLlama, L

ROOT = Path(__file__).resolve().parent.parent
TEXT = "The sea is wide and blue 🌊, 海は広い。 "  # characters of several tokens too


class Given(IntactLlama):
    """Generates what it is given."""

    script: Sequence[int] = ()

    def generate(self, tokens: Sequence[int], **settings: Any) -> Iterator[int]:
        yield from self.script


class GivenToLlama(Given):
    """The same, its text made as llama_cpp makes it."""

    _create_completion = L.Llama._create_completion

    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes:
        return self._model.detokenize(tokens, special=special)


def seconds(llama: Given, script: list[int], stream: bool) -> float:
    """CPU seconds of a reply, for each of its tokens."""
    llama.script = script
    start = time.process_time()
    reply = llama.create_completion([1], max_tokens=len(script), stop=["nowhere"], stream=stream)
    for _ in reply if stream else ():
        pass
    return (time.process_time() - start) / len(script)


def decoding(llama: IntactLlama, n: int = 32) -> float:
    """Seconds of evaluating and sampling a token."""
    tokens = llama.generate(llama.tokenize(TEXT.encode()), temp=0.0)
    next(tokens)
    start = time.perf_counter()
    for _ in range(n):
        next(tokens)
    return (time.perf_counter() - start) / n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", nargs="+", type=int, default=[100, 1000, 3500])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    settings: dict[str, Any] = {"n_ctx": max(args.lengths) + 256, "n_threads": args.threads}
    llamas = {"ours": Given, "llama_cpp": GivenToLlama}
    opened = {name: kind(args.model, None, "f16", **settings) for name, kind in llamas.items()}
    script = opened["ours"].tokenize((TEXT * max(args.lengths)).encode(), add_bos=False)
    plain = IntactLlama(args.model, None, "f16", **settings)
    rows = []
    for stream in (False, True):
        for n in args.lengths:
            best = {
                name: min(seconds(llama, script[:n], stream) for _ in range(args.rounds))
                for name, llama in opened.items()
            }
            rows.append({"stream": stream, "tokens": n, **{f"{name}_ms": 1e3 * s for name, s in best.items()}})
            words = ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in best.items())
            print(f"{'streamed' if stream else 'whole':>8} {n:>6} tokens, for each: {words}", flush=True)
    decode_ms = 1e3 * min(decoding(plain) for _ in range(args.rounds))
    print(f"decoding {decode_ms:.1f} ms a token")
    result = {"machine": machine.describe(), "model": args.model.name, "decode_ms": decode_ms, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "python_overhead.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
