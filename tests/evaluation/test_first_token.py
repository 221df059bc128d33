"""benchmarks.first_token: its grid on a small model, that it goes on where it was, and its arithmetic."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import first_token
from intactkv_export.texts import default_text
from tests.support.paths import REPO
from tests.support.smol import Smol


def test_the_command_goes_on_where_it_was(smol: Smol, tuned: Path, tmp_path: Path) -> None:
    log, other = tmp_path / "first_token.jsonl", tmp_path / "other.gguf"
    other.symlink_to(smol.gguf)

    def run(*more: str) -> str:
        command = [
            sys.executable,
            "-m",
            "benchmarks.first_token",
            str(smol.reference),
            f"{smol.gguf}={smol.bos}",
            *more,
        ]
        command += ["--kv-types", "f16", "q4_0", "--depths", "8", "20", "--tokens", "8", "--texts", "2"]
        done = subprocess.run([*command, "--out", str(tmp_path)], cwd=REPO, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(f"{other}={tuned}", "--prompts", "none")
    assert len(log.read_text().splitlines()) == 2 * 2 * (2 + 3)
    shown = run("--prompts", "none", "terse")
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == 20 + 8, "those of the first run were not measured again"
    three = {r["mode"]: r["kld"] for r in rows if r["model"] == "other" and r["depth"] == 8 and r["kv_type"] == "f16"}
    assert three.keys() == {"plain", "intact", "trained"} and three["trained"] != three["intact"]
    rows = [r for r in rows if r["model"] == "smol"]
    assert {(r["kv_type"], r["ubatch"], r["tail"] > 0) for r in rows} == {("f16", 128, False), ("q4_0", 16, True)}
    assert {r["mode"] for r in rows} == {"plain", "intact"} and {r["depth"] for r in rows} == {8, 20}
    assert "| smol | q4_0 | terse |" in shown and shown.rstrip().endswith("first_token.md")
    none, terse = (first_token.pooled(rows, kv_type="f16", depth=8, prompt=p) for p in ("none", "terse"))
    assert none["plain"] != terse["plain"] and len(none["plain"]) == 2


def test_ratio_and_its_error() -> None:
    plain = np.random.default_rng(0).gamma(4, 0.1, 200)
    exact = first_token.ratio(list(0.5 * plain), list(plain))
    assert exact.mean == pytest.approx(0.5) and exact.error < 1e-12, "the texts' own spread does not count"
    draws = np.random.default_rng(1).normal(0.5, 0.1, (400, 200)) * plain
    found = [first_token.ratio(list(x), list(plain)) for x in draws]
    assert np.std([x.mean for x in found]) == pytest.approx(np.mean([x.error for x in found]), rel=0.15)


def test_what_is_worse_is_named() -> None:
    def row(mode: str, prompt: str, kld: list[float]) -> dict[str, Any]:
        return {"model": "m", "kv_type": "f16", "depth": 8, "mode": mode, "prompt": prompt, "kld": kld}

    rows = [row("plain", "none", [0.2, 0.3]), row("intact", "none", [0.1, 0.2]), row("trained", "none", [0.15, 0.251])]
    rows += [row("trained", "terse", [0.1, 0.1]), row("plain", "terse", [0.2, 0.3]), row("intact", "terse", [0.1, 0.3])]
    lines = list(first_token.table(rows))
    assert "| m | f16 | 8 | 0.2500 | 0.1750 | 0.1502 | 0.70 ± 0.12 | 0.60 ± 0.13 |" in lines
    assert lines[-2] == "\nWorse than plain or intact by more than two standard errors: 1 of 4 comparisons."
    assert lines[-1].startswith("- m f16 none at 8: trained - intact +0.0505")


def test_only_a_first_token_is_measured(smol: Smol) -> None:
    with pytest.raises(SystemExit, match="has 24 tokens: give one of the first token"):
        first_token.models_of([f"{smol.gguf}={smol.ikv}"])
    with pytest.raises(SystemExit, match="two models are named smol"):
        first_token.models_of([f"{smol.gguf}={smol.bos}"] * 2)


def test_nothing_here_is_trained_on() -> None:
    """Neither the prompts nor the text, by all that is written in the modules that training's texts come from."""
    package = REPO / "intactkv_export"
    modules = [*(package / "texts").glob("*.py"), *(package / "calibration").glob("*.py")]
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules}
    strings = {
        node.value
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    prompts = [prompt for prompt in first_token.PROMPTS.values() if prompt is not None]
    sentences = [part.strip() for prompt in prompts for part in re.split(r"[.;\n]", prompt) if len(part.strip()) > 20]
    assert len(strings) > 100 and len(sentences) > 10
    assert not [(s, x) for s in sentences for x in strings if s.casefold() in x.casefold()]
    text = default_text(whole=True)
    assert not [x for x in strings if len(x) > 40 and x in text]
    readers = {
        path.name for path, tree in trees.items() if "default_text" in ast.dump(tree) or "pydoc" in ast.dump(tree)
    }
    assert readers == {"__init__.py", "chunks.py"}, "where it is and where it is named, and nobody who trains"
