"""What a trained first token brings behind prompts and texts that it was never trained on, through llama.cpp.

    python -m benchmarks.first_token REFERENCE.gguf MODEL.gguf[=PREFIX.ikv] ... [--kv-types f16 q8_0 q4_0]
        [--depths 256 1024 4096] [--tokens 256] [--texts 4] [--text FILE] [--prompts none terse rules story]
        [--threads 2] [--out build/benchmarks]

The reference is one off the grid (benchmarks.off_grid), the models are quantized from it. PREFIX is the trained prefix
of the first token; without it the one embedded or beside the model. One that is not trained is measured too, without
the rows of the trained one. Each prompt has texts of its own, so that all prompts' texts together are independent;
all models, types and depths see the same ones. All depths are measured in one pass over a text, `--tokens` behind each.

Three ways: the first token computed by the quantized model as all others are (plain), by the reference (intact), and
trained. Ratios are of means over texts; their standard errors are those of the paired differences. A cache with a tail
evaluates text 16 tokens at a time, as a reply is, else most of it would be in the tail; one without 128 at a time,
which is several times faster and the same.

Rows are appended to first_token.jsonl as they come: of four models of SmolLM2's size it takes two hours on two cores.
Started again with the same files and settings, those that are there are not measured again. Writes first_token.md, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.kernel import ROOT
from intactkv_export.evaluation import DECODE_BATCH, Estimate, Figures, Texts, difference, evaluate
from intactkv_export.libllama import EXACT, kv_pair
from intactkv_export.models import read_text
from intactkv_export.prefix import Prefix, of_model
from intactkv_export.texts import cut_text, default_text, token_hash

# Written for this benchmark alone: nothing is calibrated behind them.
PROMPTS: dict[str, str | None] = {
    "none": None,
    "terse": "You run a lighthouse on a remote island. Answer in the fewest words you can.",
    "rules": (
        "You answer questions about beekeeping for a club of beginners.\n\nRules:\n- Name the season that an advice is "
        "for.\n- Give quantities in grams and litres, never in cups.\n- If a question is not about bees, say so and "
        "stop.\n- End with one thing to look out for on the next inspection."
    ),
    "story": (
        "The user is the night clerk of a small hotel at a mountain pass, and you are the hotel's old reservation "
        "system, which has learned to speak. You know the guests: Mrs. Ilves in room 4, who sleeps badly and asks for "
        "tea; the two surveyors in rooms 7 and 8, who leave at five and must be woken; a cellist, room 11, who may "
        "practise until nine in the evening and no longer. The road to the valley closes when more than twenty "
        "centimetres of snow have fallen. Breakfast is from half past six to ten; the cook does not make eggs on "
        "Sundays. You are courteous, a little proud of your punctuality, and you never reveal one guest's affairs to "
        "another. When the clerk asks for a note in the guest book, you write it in the style of the guest book, which "
        "is brief and dated."
    ),
}
# Of a cache without a tail. Longer ones are hardly faster, and llama.cpp keeps room for the logits of all its tokens.
FAST_UBATCH = 128
MODES = {"plain": "plain", "bos": "intact", "prompt": "intact", "calibrated": "trained"}


@dataclass(frozen=True)
class Model:
    """A quantized model and its prefix of the first token, in that file; None: embedded or beside it."""

    path: Path
    file: Path | None

    @property
    def prefix(self) -> Prefix:
        return of_model(self.path, self.file)

    @property
    def trained(self) -> bool:
        return self.prefix.manifest["calibrated"] is not None

    def modes(self, prompt: str | None) -> list[str]:
        """Of evaluate()."""
        return ["plain", "prompt" if prompt is None else "bos", *(["calibrated"] if self.trained else [])]


def models_of(arguments: Sequence[str]) -> list[Model]:
    """MODEL.gguf[=PREFIX.ikv] of each. Exits if a prefix is not of the first token, or two models have one name."""
    found = []
    for argument in arguments:
        path, _, file = argument.partition("=")
        found.append(Model(Path(path), Path(file) if file else None))
    for model in found:
        if (n := len(model.prefix.tokens)) != 1:
            raise SystemExit(f"the prefix of {model.path} has {n} tokens: give one of the first token (--bos-only)")
    names = [model.path.stem for model in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise SystemExit(f"two models are named {twice[0]}, and rows go by the name: link one of them to another name")
    return found


def texts_of(args: argparse.Namespace) -> dict[str, list[list[int]]]:
    """For each prompt its own texts, as tokens: the same ones whichever other prompts are measured."""
    text = default_text(whole=True) if args.text is None else read_text(args.text)
    places = [list(PROMPTS).index(name) for name in args.prompts]
    n = (max(places) + 1) * args.texts
    chunks = cut_text(args.reference, text, n, args.tokens, max(args.depths))
    return {name: chunks[i * args.texts : (i + 1) * args.texts] for name, i in zip(args.prompts, places, strict=True)}


def ways(kv_types: Sequence[str]) -> Iterator[tuple[list[str], int]]:
    """KV types that are evaluated alike, and how many tokens at a time."""
    by_default = os.environ.get("INTACTKV_TAIL")
    tails = [name for name in kv_types if not set(kv_pair(name)) <= EXACT | ({"q8_0"} if by_default is None else set())]
    for names, ubatch in (([name for name in kv_types if name not in tails], FAST_UBATCH), (tails, DECODE_BATCH)):
        if names:
            yield names, ubatch


def identity(path: Path) -> list[Any]:
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def same_settings(args: argparse.Namespace, model: Model, chunks: list[list[int]], prompt: str | None) -> str:
    """A hash: rows that have it are of the same measurement."""
    of = [identity(args.reference), identity(model.path), model.prefix.sha256, token_hash(chunks), prompt, args.tokens]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


def row_of(figures: Figures, prompt: str, settings: str, n_bytes: int) -> dict[str, Any]:
    return {
        "settings": settings, "model": figures.model, "bytes": n_bytes, "prompt": prompt, "kv_type": figures.kv_type,
        "tail": figures.way.tail, "ubatch": figures.way.ubatch, "depth": figures.depth, "mode": MODES[figures.mode],
        "kld": figures.kld, "nll": figures.nll, "top1": figures.top1,
    }  # fmt: skip


def measure(args: argparse.Namespace, models: list[Model]) -> list[dict[str, Any]]:
    """All rows, those of an earlier run among them."""
    log = args.out / "first_token.jsonl"
    old = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    texts = texts_of(args)
    for name in args.prompts:
        prompt, chunks = PROMPTS[name], texts[name]
        settings = {model.path.stem: same_settings(args, model, chunks, prompt) for model in models}
        kept = {_key(row): row for row in old if row["settings"] == settings.get(row["model"])}
        found |= kept
        for kv_types, ubatch in ways(args.kv_types):
            for trained in (True, False):
                missing = [
                    model
                    for model in models
                    if model.trained == trained and _wanted(args, model, prompt, name, kv_types) - kept.keys()
                ]
                if not missing:
                    continue
                for figures in evaluate(
                    args.reference, [model.path for model in missing], [model.file for model in missing],
                    kv_types=kv_types, modes=missing[0].modes(prompt), texts=Texts(tokens=chunks), system_prompt=prompt,
                    n_threads=args.threads, depths=args.depths, decode_batch=ubatch, impossible=print,
                ):  # fmt: skip
                    path = next(model.path for model in missing if model.path.stem == figures.model)
                    row = row_of(figures, name, settings[figures.model], path.stat().st_size)
                    found[_key(row)] = row
                    with log.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    kld = Estimate(float(np.mean(row["kld"])), math.nan)
                    print(f"{row['model']} {row['kv_type']} {name} {row['depth']} {row['mode']} {kld:.4f}", flush=True)
    return [row for row in found.values() if row["kv_type"] in args.kv_types and row["depth"] in args.depths]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("model", "prompt", "kv_type", "depth", "mode"))


def _wanted(
    args: argparse.Namespace, model: Model, prompt: str | None, name: str, kv_types: list[str]
) -> set[tuple[Any, ...]]:
    modes = [MODES[mode] for mode in model.modes(prompt)]
    return {
        (model.path.stem, name, kv_type, depth, mode) for kv_type in kv_types for depth in args.depths for mode in modes
    }


def ratio(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """Of the means, with the standard error that the paired differences leave it (to first order)."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    found = float(x.mean() / y.mean())
    error = float((x - found * y).std(ddof=1) / math.sqrt(len(x)) / y.mean()) if len(x) > 1 else math.nan
    return Estimate(found, error)


def pooled(rows: list[dict[str, Any]], **where: Any) -> dict[str, list[float]]:
    """The divergence of each text, by mode, of the rows that are as said; texts in the same order for all modes."""
    found: dict[str, list[float]] = {}
    for row in sorted(rows, key=lambda row: list(PROMPTS).index(row["prompt"])):
        if all(row[name] == value for name, value in where.items()):
            found.setdefault(row["mode"], []).extend(row["kld"])
    return found


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a table over all prompts, one of each prompt, and where the trained one is worse."""
    depths = sorted({row["depth"] for row in rows})
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    yield "| model | KV | depth | plain | intact | trained | intact / plain | trained / plain |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for model, kv_type in dict.fromkeys((row["model"], row["kv_type"]) for row in rows):
        for depth in depths:
            found = pooled(rows, model=model, kv_type=kv_type, depth=depth)
            yield "| " + " | ".join([model, kv_type, str(depth), *_cells(found)]) + " |"
    yield ""
    yield "| model | KV | prompt | " + " | ".join(f"at {depth}" for depth in depths) + " |"
    yield "| --- | --- | --- |" + " ---: |" * len(depths)
    best = "trained" if any(row["mode"] == "trained" for row in rows) else "intact"
    for model, kv_type in dict.fromkeys((row["model"], row["kv_type"]) for row in rows):
        for prompt in prompts:
            each = [pooled(rows, model=model, kv_type=kv_type, prompt=prompt, depth=depth) for depth in depths]
            ratios = [f"{ratio(x[best], x['plain']):.2f}" if {best, "plain"} <= x.keys() else "" for x in each]
            yield f"| {model} | {kv_type} | {prompt} | " + " | ".join(ratios) + " |"
    yield f"\nThe second table: {best} / plain."
    yield from _worse(rows, prompts, depths)


def _cells(found: dict[str, list[float]]) -> Iterator[str]:
    for mode in ("plain", "intact", "trained"):
        yield f"{np.mean(found[mode]):.4f}" if mode in found else ""
    for mode in ("intact", "trained"):
        yield f"{ratio(found[mode], found['plain']):.2f}" if {mode, "plain"} <= found.keys() else ""


def _worse(rows: list[dict[str, Any]], prompts: list[str], depths: list[int]) -> Iterator[str]:
    """Every cell of the grid in which training made it worse by more than two standard errors."""
    n, worse = 0, []
    for model, kv_type in dict.fromkeys((row["model"], row["kv_type"]) for row in rows):
        for prompt in prompts:
            for depth in depths:
                found = pooled(rows, model=model, kv_type=kv_type, prompt=prompt, depth=depth)
                for other in ("plain", "intact"):
                    if {"trained", other} <= found.keys():
                        more = difference(found["trained"], found[other])
                        n += 1
                        if more.mean > 0 and not more.within_noise:
                            worse.append(f"- {model} {kv_type} {prompt} at {depth}: trained - {other} {more:+.4f}")
    if n:
        yield f"\nWorse than plain or intact by more than two standard errors: {len(worse)} of {n} comparisons."
        yield from worse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf[=PREFIX.ikv]")
    parser.add_argument("--kv-types", nargs="+", default=["f16", "q8_0", "q4_0"])
    parser.add_argument("--depths", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=4, help="of each prompt")
    parser.add_argument("--text", type=Path, help="what they are cut from; default: Python's language reference")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS), choices=PROMPTS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure(args, models_of(args.models))
    machine.publish(table(rows), args.out / "first_token.md")
    print(f"written: {args.out / 'first_token.jsonl'}, {args.out / 'first_token.md'}")


if __name__ == "__main__":
    main()
