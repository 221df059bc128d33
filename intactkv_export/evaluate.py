"""How far a quantized model is from its reference: KL divergence and top-1 agreement, through the real runtime.

Protocol: the prefix, then independent chunks of a text, each evaluated right behind the prefix. The reference keeps
its cache at F16. For each chunk the KL divergence of the model's next-token distributions from the reference's is
averaged over the chunk's tokens; the figure is the mean over the chunks, its standard error that of the chunks.
All configurations see the same chunks, so two of them are compared by the mean of their differences per chunk.

    python -m intactkv_export.evaluate REFERENCE.gguf MODEL.gguf... --prefix MODEL.ikv --kv-type f16,q8_0,q4_0
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export import library, prefix_file
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.runtime import IntactLlama

L = library.load()

# How the model gets the prefix: it computes it itself; it is given the reference's, rounded to the KV type as the
# rest of the cache is; it is given the reference's first token, intact; it is given the reference's, intact.
MODES = ("plain", "rounded", "bos", "prompt")


@dataclass
class Figures:
    """One model, KV type and mode. kld and top1 are per chunk: mean KL divergence (nats), share of equal top tokens."""

    model: str
    kv_type: str
    mode: str
    kld: list[float]
    top1: list[float]


@dataclass
class Comparison:
    """Mean over the chunks and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def summary(per_chunk: Sequence[float]) -> Comparison:
    """Mean of independent chunks, and the standard error of that mean."""
    values = np.asarray(per_chunk, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Comparison(float(values.mean()), float(error))


def difference(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """a - b, chunk by chunk: its mean and standard error. Within noise: the mean is below two errors."""
    return summary(np.subtract(a, b).tolist())


def default_text() -> str:
    """Prose that every Python has: the language reference's topics (pydoc_data.topics), keys in order."""
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))[:60000]


def evaluate(
    reference: str | Path,
    models: Sequence[str | Path],
    prefix: str | Path,
    *,
    kv_types: Sequence[str] = ("q8_0",),
    modes: Sequence[str] = MODES,
    text: str | None = None,
    n_chunks: int = 12,
    n_tokens: int = 256,
    n_threads: int | None = None,
) -> Iterator[Figures]:
    """Compare models with the reference; yields the figures of each model, KV type and mode as they are measured.

    prefix: an `.ikv`, or a GGUF with one embedded, computed from the reference.
    text: cut into n_chunks chunks of n_tokens tokens, tokenized without special tokens; None: default_text().
    Mode "rounded" of an f16 cache is "prompt" itself and is left out.

    Raises IntactKVError if the prefix does not fit, or the text is too short; UsageError for an unknown mode.
    """
    unknown = set(modes) - set(MODES)
    if unknown:
        raise UsageError(f"no mode {sorted(unknown)[0]!r}: the modes are {', '.join(MODES)}")
    whole = prefix_file.read(prefix)
    settings = {"n_ctx": len(whole.tokens) + n_tokens, "n_threads": n_threads, "n_threads_batch": n_threads}
    settings |= {"n_batch": settings["n_ctx"], "n_ubatch": settings["n_ctx"]}

    with tempfile.TemporaryDirectory() as folder:
        bos = Path(folder, "bos.ikv")
        if "bos" in modes:
            bos.write_bytes(first_token(whole))
        source = _Evaluated(reference, None, "f16", whole.tokens, settings)
        chunks = _chunks(source.llama, default_text() if text is None else text, n_chunks, n_tokens)
        shape = (n_chunks, n_tokens, source.llama.n_vocab())
        targets = np.memmap(Path(folder, "targets"), np.float32, "w+", shape=shape)
        for target, chunk in zip(targets, chunks, strict=True):
            target[:] = source.log_probs(chunk)
        del source

        for model in models:
            for kv_type in kv_types:
                for mode in modes:
                    if mode == "rounded" and kv_type in ("f16", "f32"):
                        continue
                    path = {"plain": None, "bos": bos}.get(mode, prefix)
                    student = _Evaluated(model, path, kv_type, whole.tokens, settings)
                    if mode == "rounded":
                        student.round_prefix()
                    figures = Figures(Path(model).stem, kv_type, mode, [], [])
                    for target, chunk in zip(targets, chunks, strict=True):
                        got = student.log_probs(chunk)
                        figures.kld.append(float((np.exp(target) * (target - got)).sum(-1).mean()))
                        figures.top1.append(float((target.argmax(-1) == got.argmax(-1)).mean()))
                    yield figures
        del targets


class _Evaluated:
    """A model that has the prefix's tokens in its cache, and gives the log probabilities of what follows them."""

    def __init__(
        self, model: str | Path, prefix: str | Path | None, kv_type: str, tokens: list[int], settings: dict[str, Any]
    ) -> None:
        self.llama = IntactLlama(model, prefix, kv_type, **settings)
        self.tokens = tokens
        self.state: bytes | None = None
        self.llama.eval(tokens)

    def round_prefix(self) -> None:
        """Make the intact cells ordinary: from now on attention reads their rounded copies."""
        ctx = self.llama.ctx
        data = (L.llama_cpp.ctypes.c_uint8 * L.llama_state_seq_get_size(ctx, 0))()
        n = L.llama_state_seq_get_data(ctx, data, len(data), 0)
        state = without_intact_cells(bytes(data[:n]))
        data = (L.llama_cpp.ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if L.llama_state_seq_set_data(ctx, data, len(data), 0) == 0 or self.llama.intact_cells:
            raise IntactKVError("llama.cpp refused the rounded copy of the prefix")

    def log_probs(self, chunk: Sequence[int]) -> np.ndarray:
        """[len(chunk), n_vocab], F32: after each token of the chunk, the log probabilities of the next."""
        llama = self.llama
        llama._ctx.kv_cache_seq_rm(0, len(self.tokens), -1)
        llama._batch.set_batch(batch=chunk, n_past=len(self.tokens), logits_all=True)
        llama._ctx.decode(llama._batch)
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(chunk), llama.n_vocab()))
        shifted = logits - logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def first_token(prefix: prefix_file.Prefix) -> bytes:
    """A prefix file of the first token alone: it saw no other, so its K and V are those in the whole prefix.

    Raises IntactKVError if a sliding window has left it behind.
    """
    if any(0 not in layer.positions for layer in prefix.layers):
        raise IntactKVError(f"the prefix of {len(prefix.tokens)} tokens is longer than the model's window: no mode bos")
    other = {key: prefix.manifest[key] for key in prefix.manifest.keys() - {"format", "tokens", "model"}}
    return prefix_file.build(
        prefix.manifest["model"],
        prefix.tokens[:1],
        {layer.il: layer.K[layer.positions == 0] for layer in prefix.layers},
        {layer.il: layer.V[layer.positions == 0] for layer in prefix.layers},
        {**other, "bos_only": True, "messages": None},
    )


def _chunks(llama: IntactLlama, text: str, n_chunks: int, n_tokens: int) -> list[list[int]]:
    tokens = llama.tokenize(text.encode(), add_bos=False, special=False)
    if len(tokens) < n_chunks * n_tokens:
        raise IntactKVError(
            f"the text has {len(tokens)} tokens, {n_chunks} chunks of {n_tokens} need {n_chunks * n_tokens}: "
            "give a longer text, or fewer or shorter chunks"
        )
    return [tokens[i * n_tokens : (i + 1) * n_tokens] for i in range(n_chunks)]


def without_intact_cells(state: bytes) -> bytes:
    """The state of a sequence (llama_state_seq_get_data) with its intact cells made ordinary.

    A cell that is intact also has a copy in the cache's own type; the F16 rows follow each cache's section of the
    state, marked by the highest bit of its layer count (arena::write_state in native/src/cells.cpp).
    """
    out = bytearray(state[:8])  # magic, sequence
    at = 8

    def take(n: int) -> bytes:
        nonlocal at
        at += n
        return state[at - n : at]

    def keep(n: int) -> bytes:
        out.extend(data := take(n))
        return data

    while at < len(state):  # one section a cache
        _, n_cells = struct.unpack("<II", keep(8))
        for _ in range(n_cells):
            _, n_seq = struct.unpack("<iI", keep(8))
            keep(4 * n_seq)
        keep(4)
        (flagged,) = struct.unpack("<I", take(4))
        n_layer, intact = flagged & 0x7FFFFFFF, flagged >> 31
        out.extend(struct.pack("<I", n_layer))
        for _ in range(2 * n_layer):  # K of each layer, V of each layer
            _, row_bytes = struct.unpack("<iQ", keep(12))
            keep(n_cells * row_bytes)
        if intact:
            (n_intact,) = struct.unpack("<I", take(4))
            take(4 * n_intact)
            for _ in range(2 * n_layer):
                (row_bytes,) = struct.unpack("<Q", take(8))
                take(n_intact * row_bytes)
    return bytes(out)


def table(results: Sequence[Figures]) -> str:
    """The figures as text, each mode with its difference from "plain" of the same model and KV type."""
    lines = [f"{'model':24} {'KV':7} {'prefix':8} {'KLD':>16}  {'top-1':>15}  {'KLD against plain':>18}"]
    plain = {(r.model, r.kv_type): r for r in results if r.mode == "plain"}
    for r in results:
        base = plain.get((r.model, r.kv_type))
        against = "" if base is None or base is r else str(difference(r.kld, base.kld))
        kld, top1 = summary(r.kld), summary(r.top1)
        lines.append(f"{r.model[:24]:24} {r.kv_type:7} {r.mode:8} {kld!s:>16}  {top1!s:>15}  {against:>18}".rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m intactkv_export.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("reference", type=Path, help="the reference model, an F16 GGUF")
    parser.add_argument("models", type=Path, nargs="+", help="quantized GGUFs")
    parser.add_argument("--prefix", type=Path, required=True, help="the reference's prefix: .ikv or GGUF")
    parser.add_argument("--kv-type", default="q8_0", help="KV types, comma-separated")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: Python's language reference)")
    parser.add_argument("--chunks", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a chunk")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true", help="the figures of every chunk, as JSON")
    args = parser.parse_args(arguments)
    results = []
    for figures in evaluate(
        args.reference,
        args.models,
        args.prefix,
        kv_types=args.kv_type.split(","),
        modes=args.modes.split(","),
        text=args.text.read_text() if args.text else None,
        n_chunks=args.chunks,
        n_tokens=args.tokens,
        n_threads=args.threads,
    ):
        results.append(figures)
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(json.dumps([asdict(r) for r in results]) if args.json else table(results))


if __name__ == "__main__":
    try:
        main()
    except IntactKVError as error:
        print(f"intactkv-export: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
