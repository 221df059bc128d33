"""What IntactKV is worth in bits per weight: KL divergence from the reference over file size, all types.

    python -m benchmarks.sizes REFERENCE.gguf PREFIX.ikv [--types Q2_K Q4_0 ...] [--calibrated Q4_0=FILE.ikv ...]
        [--kv-type f16] [--out build/benchmarks]

Quantizes the reference to each type, evaluates it without a prefix, with the reference's prefix, and with a calibrated
one where it is given, as `intactkv-export eval` does. Writes sizes.json and sizes.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.kernel import ROOT
from intactkv_export.analysis.plots import CONFIGURATIONS
from intactkv_export.evaluation import evaluate, summary
from intactkv_export.models import weights

TYPES = ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0"]


def rows_of(args: argparse.Namespace, models: list[Path], modes: list[str], calibrated: Path | None) -> list[dict]:
    rows = []
    for figures in evaluate(
        args.reference, models, args.prefix, calibrated=calibrated, kv_types=[args.kv_type], modes=modes,
        n_threads=args.threads,
    ):  # fmt: skip
        path = next((model for model in models if model.stem == figures.model), None)
        if path is not None:
            kld = summary(figures.kld)
            row = {"type": path.stem, "bytes": path.stat().st_size, "mode": figures.mode}
            rows.append({**row, "kld": kld.mean, "error": kld.error})
            print(
                f"{path.stem:8} {row['bytes'] / 1e6:7.1f} MB {figures.mode:10} {kld.mean:.4f} ± {kld.error:.4f}",
                flush=True,
            )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.2, 4.5))
    for mode, (color, line, label) in CONFIGURATIONS.items():
        own = sorted((row for row in result["rows"] if row["mode"] == mode), key=lambda row: row["bytes"])
        if own:
            size = [row["bytes"] / 1e6 for row in own]
            axis.plot(size, [row["kld"] for row in own], linestyle=line, marker="o", color=color, label=label)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES, choices=sorted(weights.TYPES))
    parser.add_argument("--calibrated", nargs="+", default=[], metavar="TYPE=FILE.ikv")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    given = dict(pair.split("=", 1) for pair in args.calibrated)
    result: dict[str, Any] = {"machine": machine.describe(), "kv_type": args.kv_type, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        models = [Path(folder, f"{name}.gguf") for name in args.types]
        for model in models:
            weights.quantize(args.reference, model, model.stem, n_threads=args.threads)
        result["rows"] += rows_of(args, models, ["plain", "prompt"], None)
        for model in models:
            if model.stem in given:
                result["rows"] += rows_of(args, [model], ["calibrated"], Path(given[model.stem]))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sizes.json").write_text(json.dumps(result, indent=1))
    plot(result, args.out / "sizes.png")
    print(f"written: {args.out / 'sizes.json'}, {args.out / 'sizes.png'}")


if __name__ == "__main__":
    main()
