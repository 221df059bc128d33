"""What a downloaded file says is shown, never sent: no control character of it reaches a terminal or a page."""

from __future__ import annotations

import ast
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from intactkv_export import cli
from intactkv_export.cli import output
from intactkv_export.escapes import shown, shown_in_json
from intactkv_export.prefix import ikv, inspection
from tests.support.paths import REPO
from tests.support.smol import Smol

EVIL = "\x1b]0;owned\x07\x1b[2J\rfits\x9b1A\u202etxt\x7f"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def test_shown() -> None:
    assert shown(EVIL) == "\\x1b]0;owned\\x07\\x1b[2J\\x0dfits\\x9b1A\\u202etxt\\x7f"
    assert shown("a\tb\nc\r\nd é 你好 🙂 \u200f") == "a\tb\nc\nd é 你好 🙂 \u200f"
    every = "".join(map(chr, range(0x3000)))
    assert not OBEYED.search(shown(every))
    assert json.loads(shown_in_json(json.dumps(EVIL, ensure_ascii=False))) == EVIL


@pytest.fixture(scope="module")
def evil(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prefix file whose every free text tries to take the terminal over, in a file named so too."""
    found = ikv.read(smol.ikv)
    manifest = {k: v for k, v in found.manifest.items() if k not in ("format", "tokens", "model")}
    manifest["text"] = found.manifest["text"] + EVIL
    manifest["reference"] = {**manifest["reference"], "name": EVIL}
    manifest["engine"] = {"name": EVIL, "dtype": EVIL, "versions": {EVIL: EVIL}}
    manifest["created_by"] = f"{EVIL}\nfits        everything"
    manifest["calibrated"] = None
    K, V = ({layer.il: getattr(layer, side) for layer in found.layers} for side in "KV")
    path = tmp_path_factory.mktemp("evil") / f"a{EVIL.replace('/', '')}.ikv"
    tokens: list[int] = found.tokens
    data = ikv.build(found.manifest["model"], tokens, K, V, manifest)
    path.write_bytes(data)
    assert np.array_equal(ikv.read(path).layers[0].K, found.layers[0].K)
    return path


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intactkv_export", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)


def test_every_command_that_names_a_file(evil: Path, smol: Smol, tmp_path: Path) -> None:
    out = tmp_path / f"b{EVIL}.gguf"
    for arguments in (
        ("inspect", evil),
        ("inspect", evil, "-m", smol.gguf),
        ("inspect", evil, "--json"),
        ("verify", evil),
        ("verify", evil, "--json"),
        ("embed", evil, smol.gguf, "-o", out),
        ("extract", out, "-o", tmp_path / f"c{EVIL}.ikv"),
        ("chat", out, "-p", "Hi", "-c", "10"),
        ("inspect", tmp_path / EVIL),
        ("verify", tmp_path / EVIL, "--debug"),
        (EVIL,),
    ):
        done = run(*arguments)
        assert done.returncode == 0 or "\\x1b" in done.stderr, (arguments, done.stderr)
        assert not OBEYED.search(done.stdout + done.stderr), (arguments, done.stdout, done.stderr)
    shown_lines = run("inspect", evil).stdout.splitlines()
    assert not any(line.startswith("fits") for line in shown_lines), "a text cannot add a fact"


def test_a_terminal_gets_colours_from_us_alone(evil: Path) -> None:
    console = Console(width=80, force_terminal=True, color_system="standard", record=True, file=open("/dev/null", "w"))
    for line in inspection.report(ikv.read(evil), None, EVIL):
        console.print(line, soft_wrap=True)
    assert not OBEYED.search(re.sub(r"\x1b\[[0-9;]*m", "", console.export_text(styles=True)))


def test_json_is_read_by_whoever_keeps_to_the_standard(capsys: pytest.CaptureFixture[str]) -> None:
    """A divergence can be infinite, and JSON has no such number."""
    output.print_json({"history": [(1, math.inf), [2, 0.5]], "x": {"y": math.nan}, "path": Path("a"), "n": 3})

    def refuse(name: str) -> None:
        raise ValueError(name)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"history": [[1, None], [2, 0.5]], "x": {"y": None}, "path": "a", "n": 3}


def test_the_page_of_an_analysis() -> None:
    from intactkv_export.analysis import report

    source = (Path(report.__file__).parent / "report.html.jinja").read_text()
    assert "| safe" not in source
    made = report.environment().from_string("{{ x }}{{ y }}").render(x=f"<b>{EVIL}", y=report.Markup("<i>"))
    assert made == f"&lt;b&gt;{shown(EVIL)}<i>"


def test_the_command_line_prints_through_one_door() -> None:
    """print() and the writing of replies are in output.py and terminal.py; rich is given texts that are escaped."""
    for path in sorted(Path(cli.__file__).parent.glob("*.py")):
        names = [
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        assert "print" not in names or path.name == "output.py", path.relative_to(REPO)
