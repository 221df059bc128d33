"""What commands print: one JSON object, or lines for the eye."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def print_result(result: Any, as_json: bool) -> None:
    """What convert or prefix made: files, then what each stage took."""
    if as_json:
        print_json(result.to_dict())
        return
    print(f"\n{'file':40} {'size':>12} {'bits/weight':>12}")
    for made in result.outputs:
        print(f"{short_path(made.path):40} {megabytes(made.n_bytes):>12} {made.bits_per_weight:12.2f}")
    for path in [made["prefix"] for made in result.calibrated.values()] or [result.prefix]:
        print(f"{short_path(path):40} {megabytes(path.stat().st_size):>12}")
    for name, curve in result.curves.items():
        _print_curve(name, curve)
    where = " and embedded" if result.embedded else ""
    for name, made in result.calibrated.items():
        print(f"\n{name}: held-out KL divergence {made['before']:.4f}, calibrated {made['after']:.4f}")
    print(f"\nprefix: {result.n_tokens} tokens at F16, by the {result.engine} engine, in a file of its own{where}")
    print(f"\n{'stage':24} {'time':>9} {'peak memory':>14}")
    for stage in result.stages:
        print(f"{stage.name:24} {stage.seconds:7.1f} s {megabytes(stage.peak_bytes):>14}")


def _print_curve(name: str, curve: Any) -> None:
    """What --prefix-tokens auto went by."""
    print(f"\n{name}: {curve.chosen} of {curve.counts[-1]} tokens have to be intact: the layers' mean squared error is")
    print(f"{'intact tokens':>14}  relative to none")
    for count, error in zip(curve.counts, curve.relative, strict=True):
        print(f"{count:14}  {error:.3f}{'  flat from here' if count == curve.chosen else ''}")


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def short_path(path: Path) -> str:
    """Relative to where we are, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))
