"""What IntactKV is worth in bits per weight: KL divergence from the reference over file size, all types.

    python -m benchmarks.sizes REFERENCE.gguf PREFIX.ikv [--types Q2_K Q4_0 ...] [--calibrated Q4_0=FILE.ikv ...]
        [--prompts none terse rules story] [--texts 12] [--tokens 256] [--kv-type f16] [--out build/benchmarks]

REFERENCE is best one off the grid (benchmarks.off_grid): of weights that come from a quantized file some types look
better than they are. It is quantized to each type and evaluated as `intactkv-export eval` does: the prefix computed by
the quantized model (plain), by the reference (intact), and calibrated where a prefix is given for the type (trained),
one of the same tokens. PREFIX of the first token is measured behind the prompts of benchmarks.first_token too, each
with texts of its own; one of a whole prompt right in front of the texts ("none").

Sizes count what there is to ship: the model, and the prefix file where it is used. Worth: how many bits per weight a
plain model has more, of the best plain types, where it is as near to the reference as this one with its prefix; less
what a plain model as near as this type's has. Writes sizes.json, sizes.md and sizes.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.first_token import MODES, PROMPTS, ratio, texts_of
from benchmarks.kernel import ROOT
from intactkv_export.analysis.plots import CONFIGURATIONS
from intactkv_export.evaluation import Texts, evaluate, summary
from intactkv_export.models import weights
from intactkv_export.prefix import ikv

TYPES = ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"]
Rows = list[dict[str, Any]]


def measure(args: argparse.Namespace, models: dict[Path, float], given: dict[str, Path]) -> Rows:
    """A row for each type and way, over all prompts. models: file -> bits per weight. given: type -> calibrated."""
    n_tokens, of_file = len(ikv.read(args.prefix).tokens), args.prefix.stat().st_size
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, chunks in texts_of(args).items():
        prompt = PROMPTS[name]
        intact = "bos" if prompt is not None and n_tokens == 1 else "prompt"
        # With a calibrated one and without: the reference is asked once for all models of either kind.
        for trained in (True, False):
            own = [path for path in models if (path.stem in given) == trained]
            if not own:
                continue
            for figures in evaluate(
                args.reference, own, [given.get(path.stem, args.prefix) for path in own], kv_types=[args.kv_type],
                modes=["plain", intact, *(["calibrated"] if trained else [])], texts=Texts(tokens=chunks),
                system_prompt=prompt, n_threads=args.threads,
            ):  # fmt: skip
                path = next(path for path in own if path.stem == figures.model)
                mode = MODES[figures.mode]
                prefix = (
                    {"plain": 0, "intact": of_file}.get(mode) if mode != "trained" else given[path.stem].stat().st_size
                )
                row = rows.setdefault(
                    (path.stem, mode),
                    {"type": path.stem, "mode": mode, "bits_per_weight": models[path], "kld_by_text": {},
                     "bytes": path.stat().st_size, "prefix_bytes": prefix},
                )  # fmt: skip
                row["kld_by_text"][name] = figures.kld
                print(f"{path.stem:8} {name:6} {mode:8} {summary(figures.kld):.4f}", flush=True)
    for row in rows.values():
        kld = summary(of_all(row))
        row |= {"kld": kld.mean, "error": kld.error}
    return list(rows.values())


def of_all(row: dict[str, Any]) -> list[float]:
    """The divergence of each text behind each prompt."""
    return [kld for each in row["kld_by_text"].values() for kld in each]


def bits_of_plain(rows: Rows, kld: float) -> float:
    """Bits per weight of the best plain types at a divergence: between two types by its logarithm; NaN beyond them."""
    best: list[tuple[float, float]] = []  # those that no smaller type is as near as
    for row in sorted((row for row in rows if row["mode"] == "plain"), key=lambda row: row["bits_per_weight"]):
        if not best or row["kld"] < best[-1][1]:
            best.append((row["bits_per_weight"], row["kld"]))
    bits, distance = np.array(best[::-1]).T
    return float(np.interp(np.log(kld), np.log(distance), bits, left=np.nan, right=np.nan))


def table(rows: Rows) -> Iterator[str]:
    """Markdown, a line for each type."""
    found = {(row["type"], row["mode"]): row for row in rows}
    yield "| type | bits per weight | MB | plain | intact | trained | intact / plain | trained / plain | worth, bits |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name in dict.fromkeys(row["type"] for row in rows):
        plain = found[name, "plain"]
        cells = [f"{plain['bits_per_weight']:.2f}", f"{plain['bytes'] / 1e6:.1f}"]
        own = {mode: found[name, mode] for mode in ("plain", "intact", "trained") if (name, mode) in found}
        cells += [f"{own[mode]['kld']:.4f}" if mode in own else "" for mode in ("plain", "intact", "trained")]
        cells += [f"{ratio(of_all(own[m]), of_all(plain)):.2f}" if m in own else "" for m in ("intact", "trained")]
        best = own.get("trained", own["intact"])
        worth = bits_of_plain(rows, best["kld"]) - bits_of_plain(rows, plain["kld"])
        cells.append("" if np.isnan(worth) else f"{worth:+.2f}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4.5))
    what = "first token" if result["prefix_tokens"] == 1 else f"{result['prefix_tokens']} tokens of the prompt"
    for mode, color_of, label in (
        ("plain", "plain", "plain"),
        ("intact", "bos" if result["prefix_tokens"] == 1 else "prompt", f"{what} intact"),
        ("trained", "calibrated", f"{what} trained"),
    ):
        color, line, _ = CONFIGURATIONS[color_of]
        own = sorted((row for row in result["rows"] if row["mode"] == mode), key=lambda row: row["bytes"])
        if own:
            size = [(row["bytes"] + row["prefix_bytes"]) / 1e6 for row in own]
            kld, error = [row["kld"] for row in own], [row["error"] for row in own]
            axis.errorbar(size, kld, error, linestyle=line, marker="o", color=color, label=label, capsize=2)
    for row in result["rows"]:
        if row["mode"] == "plain":
            at = row["bytes"] / 1e6, row["kld"]
            axis.annotate(row["type"], at, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axis.set_yscale("log")
    axis.set_xlabel("file size, MB")
    axis.set_ylabel("KL divergence, nats a token")
    axis.legend(fontsize=8, frameon=False)
    figure.text(0.01, 0.002, machine.line(result["machine"]), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def prefixes(pairs: list[str], types: list[str], prefix: Path) -> dict[str, Path]:
    """TYPE=FILE.ikv of each. Exits for a type that is not measured, or a prefix that is not a calibrated one of these
    tokens."""
    tokens, given = ikv.read(prefix).tokens, {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if name not in types:
            raise SystemExit(f"--calibrated {pair}: the types that are measured are {', '.join(types)}")
        read = ikv.read(file)
        if read.manifest["calibrated"] is None or read.tokens != tokens:
            how = "not calibrated" if read.manifest["calibrated"] is None else f"of {len(read.tokens)} other tokens"
            raise SystemExit(f"--calibrated {pair}: that prefix is {how}: give one trained from {prefix}")
        given[name] = Path(file)
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=sorted(weights.TYPES))
    parser.add_argument("--calibrated", nargs="+", default=[], metavar="TYPE=FILE.ikv")
    parser.add_argument("--prompts", nargs="+", default=["none"], choices=PROMPTS)
    parser.add_argument("--texts", type=int, default=12, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--text", type=Path, help="what they are cut from; default: Python's language reference")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()
    args.depths = [0]  # of texts_of(): right behind the prompt

    given = prefixes(args.calibrated, args.types, args.prefix)
    n_tokens = len(ikv.read(args.prefix).tokens)
    result: dict[str, Any] = {"machine": machine.describe(), "kv_type": args.kv_type, "prefix_tokens": n_tokens}
    with tempfile.TemporaryDirectory() as folder:
        models = {
            (path := Path(folder, f"{name}.gguf")): weights.quantize(args.reference, path, name, n_threads=args.threads)
            for name in args.types
        }
        result["rows"] = measure(args, models, given)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sizes.json").write_text(json.dumps(result, indent=1))
    lines = list(table(result["rows"]))
    print("\n".join(["", *lines]))
    (args.out / "sizes.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot(result, args.out / "sizes.png")
    print(f"written: {', '.join(str(args.out / f'sizes.{end}') for end in ('json', 'md', 'png'))}")


if __name__ == "__main__":
    main()
