"""benchmarks.sizes: a trained first token among types and prompts, what it is worth in bits, and the plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import sizes
from tests.support.paths import REPO
from tests.support.smol import Smol


def test_the_command(smol: Smol, tuned: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "benchmarks.sizes", str(smol.reference), str(smol.bos), "--types", "Q4_0", "Q8_0"]
    command += ["--calibrated", f"Q4_0={tuned}", "--prompts", "none", "terse", "--texts", "2", "--tokens", "8"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "sizes.json").read_text())["rows"]
    modes = [(row["type"], row["mode"]) for row in rows]
    assert modes == [("Q4_0", mode) for mode in ("plain", "intact", "trained")] + [
        ("Q8_0", "plain"),
        ("Q8_0", "intact"),
    ]
    for row in rows:
        assert {name: len(kld) for name, kld in row["kld_by_text"].items()} == {"none": 2, "terse": 2}
    used = [row["prefix_bytes"] for row in rows[:3]]
    assert used == [0, smol.bos.stat().st_size, tuned.stat().st_size]
    assert len({row["kld"] for row in rows[:3]}) == 3 and rows[0]["kld"] > 5 * rows[3]["kld"]
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


def test_what_it_is_worth() -> None:
    def row(name: str, mode: str, bits: float, kld: float) -> dict[str, Any]:
        both = {"none": [kld, kld]}
        return {"type": name, "mode": mode, "bits_per_weight": bits, "bytes": 1, "kld": kld, "kld_by_text": both}

    rows = [
        row("a", "plain", 4, 0.4),
        row("b", "plain", 4.2, 0.5),
        row("c", "plain", 6, 0.1),
        row("d", "plain", 8, 0.01),
    ]
    assert sizes.bits_of_plain(rows, 0.2) == pytest.approx(5), "half way, by the logarithm"
    assert sizes.bits_of_plain(rows, 0.5) != sizes.bits_of_plain(rows, 0.5), "worse than the smallest type"
    assert np.isnan(sizes.bits_of_plain(rows, 0.001))
    rows += [row("a", "intact", 4, 0.3), row("a", "trained", 4, 0.2)]
    rows += [row(name, "intact", 0, kld) for name, kld in (("b", 0.1), ("c", 0.1), ("d", 0.01))]
    lines = list(sizes.table(rows))
    assert lines[2] == ("| a | 4.00 | 0.0 | 0.4000 | 0.3000 | 0.2000 | 0.75 ± 0.00 | 0.50 ± 0.00 | +1.00 |")
    assert lines[3].endswith("| 0.20 ± 0.00 |  |  |"), "a plain type that is behind all others has no bits to compare"
    assert lines[4].endswith("| +0.00 |")


def test_calibrated_prefixes_are_of_the_same_tokens(smol: Smol, tuned: Path) -> None:
    assert sizes.prefixes([f"Q4_0={tuned}"], ["Q4_0"], smol.bos) == {"Q4_0": tuned}
    for pair, prefix, message in (
        (f"Q5_0={tuned}", smol.bos, "the types that are measured are Q4_0"),
        (f"Q4_0={smol.bos}", smol.bos, "not calibrated"),
        (f"Q4_0={tuned}", smol.ikv, "of 1 other tokens"),
    ):
        with pytest.raises(SystemExit, match=message):
            sizes.prefixes([pair], ["Q4_0"], prefix)
