"""What commands print: one JSON object, or lines for the eye. Nothing here lets a text command the terminal."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from intactkv_export.escapes import shown, shown_in_json


def say(text: str) -> None:
    """Print a result on stdout, control characters of what came out of files and models written out."""
    print(shown(text))


def remark(text: str) -> None:
    """Print on stderr what is no result; where that is closed or full, nobody is listening."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(shown(text), file=sys.stderr)


def print_result(result: Any, as_json: bool) -> None:
    """What convert or prefix made: files, then what each stage took."""
    if as_json:
        print_json(result.to_dict())
        return
    say(f"\n{'file':40} {'size':>12} {'bits/weight':>12}")
    for made in result.outputs:
        say(f"{short_path(made.path):40} {megabytes(made.n_bytes):>12} {made.bits_per_weight:12.2f}")
    for path in [made["prefix"] for made in result.calibrated.values()] or [result.prefix]:
        say(f"{short_path(path):40} {megabytes(path.stat().st_size):>12}")
    for name, curve in result.curves.items():
        _print_curve(name, curve)
    where = " and embedded" if result.embedded else ""
    for name, made in result.calibrated.items():
        print_gain(f"{name}, {short_path(made['prefix'])}", made, made["prefix"].stat().st_size)
    tokens = f"{result.n_tokens} token{'s' if result.n_tokens > 1 else ''}"
    say(f"\nprefix: {tokens} at F16, by the {result.engine} engine, in a file of its own{where}")
    say(f"\n{'stage':24} {'time':>9} {'peak memory':>14}")
    for stage in result.stages:
        say(f"{stage.name:24} {stage.seconds:7.1f} s {megabytes(stage.peak_bytes):>14}")


def print_gain(name: str, held_out: dict[str, Any], n_bytes: int) -> None:
    """What a calibration brought. held_out: of the prefix file's manifest; n_bytes: its size."""
    say(f"\n{name}: {megabytes(n_bytes)}, trained")
    say(f"KL divergence from the reference, nats a token, {held_out['n_tokens']:,} tokens of held-out texts:")
    say(f"{'depth':>14} {'before':>9} {'trained':>9}  trained/before")
    for line in [{"depth": "all", **held_out}, *held_out["by_depth"]]:
        depth = line["depth"] if line["depth"] == "all" else f"from {line['depth']}"
        ratio = line["after"] / line["before"] if line["before"] else 1.0
        say(f"{depth:>14} {line['before']:9.4f} {line['after']:9.4f}  {ratio:.2f}")


def _print_curve(name: str, curve: Any) -> None:
    """What --prefix-tokens auto went by."""
    say(f"\n{name}: {curve.chosen} of {curve.counts[-1]} tokens have to be intact: the layers' mean squared error is")
    say(f"{'intact tokens':>14}  relative to none")
    for count, error in zip(curve.counts, curve.relative, strict=True):
        say(f"{count:14}  {error:.3f}{'  flat from here' if count == curve.chosen else ''}")


def megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 100_000 else f"{n_bytes / 1e3:,.1f} kB"


def short_path(path: Path) -> str:
    """Relative to where we are, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def print_json(value: Any) -> None:
    """Values as they are: what a terminal would obey is written as JSON writes it, and a number that JSON has no way
    to write, infinite or none, as null."""
    print(shown_in_json(json.dumps(_writable(value), ensure_ascii=False, default=str)))


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _writable(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_writable(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
