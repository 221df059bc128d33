"""The command line: real processes, exit codes, and one sentence for each error."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import __version__, cli
from intactkv_export.prefix import embedding, ikv
from tests.support import extra_cells
from tests.support.smol import SYSTEM_PROMPT, Smol


def run(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intactkv_export", *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 900, **kwargs})


def said(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one sentence of a failure."""
    assert done.returncode == code, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("intactkv-export: "), done.stderr
    assert done.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def converted(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A directory with out.gguf and out.ikv, and what convert printed."""
    folder = tmp_path_factory.mktemp("converted")
    done = run("convert", smol.reference, "-o", "out", "-q", "Q4_0", "-s", SYSTEM_PROMPT, "-t", 2, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_convert_writes_both_files_and_ends_with_a_table(
    converted: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = converted
    assert sorted(path.name for path in folder.iterdir()) == ["out.gguf", "out.ikv"]
    for part in ("out.gguf", "out.ikv", "bits/weight", "24 tokens", "peak memory", "compute prefix"):
        assert part in done.stdout
    assert "\x1b" not in done.stdout + done.stderr and "compute prefix ..." in done.stderr.splitlines()


def test_inspect(converted: tuple[Path, subprocess.CompletedProcess[str]], smol: Smol) -> None:
    folder, _ = converted
    done = run("inspect", "out.gguf", cwd=folder)
    assert done.returncode == 0 and "embedded" in done.stdout and "* 0 <|im_start|>" in done.stdout
    assert "\x1b" not in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    made = json.loads(run("inspect", "out.ikv", "-m", "out.gguf", "--json", cwd=folder).stdout)
    assert made["manifest"]["messages"][0]["content"] == SYSTEM_PROMPT and made["pivots"] == [0]
    assert run("inspect", "out.ikv", env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}, cwd=folder).returncode == 0
    assert "no prefix embedded" in said(run("inspect", smol.reference), 1)


def test_inspect_has_colours_in_a_terminal(smol: Smol) -> None:
    out = bytearray()

    def keep(fd: int) -> bytes:
        data = os.read(fd, 4096)
        out.extend(data)
        return data

    pid, fd = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        os.execv(sys.executable, [sys.executable, "-m", "intactkv_export", "inspect", str(smol.ikv)])
    try:
        while keep(fd):
            pass
    except OSError:
        pass
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and b"\x1b[" in out


def test_verify(converted: tuple[Path, subprocess.CompletedProcess[str]], smol: Smol, tmp_path: Path) -> None:
    folder, _ = converted
    for arguments in (["out.ikv"], ["out.gguf"], ["out.ikv", "-m", "out.gguf"], ["out.ikv", "--json"]):
        done = run("verify", *arguments, cwd=folder)
        assert (done.returncode, done.stderr) == (0, "") and "24" in done.stdout
    data = bytearray((folder / "out.ikv").read_bytes())
    data[len(data) // 2] ^= 1
    broken = tmp_path / "broken.ikv"
    broken.write_bytes(data)
    assert "SHA-256" in said(run("verify", broken), 1)
    broken.write_bytes(data[:1000])
    assert "cut off" in said(run("verify", broken), 1)
    broken.write_bytes(b"")
    assert "empty" in said(run("verify", broken), 1)
    assert "nowhere.ikv" in said(run("verify", tmp_path / "nowhere.ikv"), 1)


def test_embed_and_extract(smol: Smol, tmp_path: Path) -> None:
    gguf = tmp_path / "with.gguf"
    assert run("embed", smol.ikv, smol.gguf, "-o", gguf).returncode == 0
    assert embedding.KEY_SIZE in ikv.gguf_file.read(gguf).values
    assert run("extract", gguf).returncode == 0
    assert (tmp_path / "with.ikv").read_bytes() == smol.ikv.read_bytes()
    assert "no prefix embedded" in said(run("extract", smol.gguf, "-o", tmp_path / "x.ikv"), 1)
    assert not (tmp_path / "x.ikv").exists()


def test_a_prefix_with_extra_cells(smol: Smol, tmp_path: Path) -> None:
    """Every command about a prefix says that it has some, and none loses them."""
    with_extra = extra_cells.write(smol.ikv, smol.reference, tmp_path / "x.ikv")
    both = "24 tokens and 16 extra cells"
    assert f"{both}, whole" in run("verify", "x.ikv", cwd=tmp_path).stdout
    assert f"{both}, whole, fits {smol.gguf}" in run("verify", "x.ikv", "-m", smol.gguf, cwd=tmp_path).stdout
    made = json.loads(run("verify", "x.ikv", "--json", cwd=tmp_path).stdout)
    assert (made["tokens"], made["extra_cells"]) == (24, 16)
    assert f"x.gguf: {both}" in run("embed", "x.ikv", smol.gguf, "-o", "x.gguf", cwd=tmp_path).stdout
    assert both in run("inspect", "x.gguf", cwd=tmp_path).stdout
    assert f"back.ikv: {both}" in run("extract", "x.gguf", "-o", "back.ikv", cwd=tmp_path).stdout
    assert (tmp_path / "back.ikv").read_bytes() == with_extra.data


def test_prefix_for_another_prompt(
    converted: tuple[Path, subprocess.CompletedProcess[str]], smol: Smol, tmp_path: Path
) -> None:
    model = tmp_path / "out.gguf"
    shutil.copyfile(converted[0] / "out.gguf", model)
    (tmp_path / "prompt.txt").write_text("You are a pirate.")
    arguments = ["prefix", smol.reference, "-m", model, "-s", "@prompt.txt", "-o", "pirate", "-t", 2, "--json"]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    made = json.loads(done.stdout)
    assert Path(made["prefix"]) == tmp_path / "pirate.ikv" and "pirate" in made["text"]
    chat = run("chat", model, "--prefix", tmp_path / "pirate.ikv", "-p", "Hi", "-n", 2, "-t", 2)
    assert (chat.returncode, chat.stderr) == (0, "") and chat.stdout.strip()
    wrong = run("chat", model, "--prefix", tmp_path / "pirate.ikv", "-p", "Hi", "-s", "Be nice.")
    assert "pirate" in said(wrong, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (["frobnicate"], 2, "frobnicate"),
        (["chat"], 2, "model"),
        (["chat", "x.gguf", "--temp", "hot"], 2, "temp"),
        (["chat", "nowhere.gguf", "-p", "hi"], 1, "nowhere.gguf"),
        (["chat", "nowhere.gguf", "-p", " "], 2, "no message"),
        (["chat", "nowhere.gguf", "-p", "hi", "--kv-type", "q9"], 2, "q9"),
        (["chat", "nowhere.gguf", "-p", "hi", "--prefix", "x", "--no-prefix"], 2, "--no-prefix"),
        (["chat", "nowhere.gguf", "-p", "hi", "--system-prompt", "@nowhere.txt"], 2, "nowhere.txt"),
        (["convert", "nowhere", "-o", "out"], 2, "nowhere"),
        (["convert", "nowhere", "-o", "out", "--quant", "Q17"], 2, "Q17"),
        (["prefix", "nowhere", "-m", "nowhere.gguf"], 1, "nowhere.gguf"),
        (["embed", "nowhere.ikv", "nowhere.gguf"], 1, "nowhere.ikv"),
        (["extract", "nowhere.gguf"], 1, "nowhere.gguf"),
    ],
)
def test_errors_are_one_sentence(tmp_path: Path, arguments: list[str], code: int, reason: str) -> None:
    assert reason in said(run(*arguments, cwd=tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def test_quantized_reference_needs_the_flag(packaged_gguf: Path, tmp_path: Path) -> None:
    assert "--allow-requantize" in said(run("convert", packaged_gguf, "-o", "out", cwd=tmp_path), 2)


def test_traceback_only_with_debug(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert "Traceback" in run("extract", "nowhere.gguf", "--debug", cwd=tmp_path).stderr

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("of our own making")

    monkeypatch.setattr(ikv, "extract", broken)
    assert cli.main(["extract", "x.gguf"]) == 1
    err = capsys.readouterr().err
    assert "internal error: ZeroDivisionError: of our own making" in err and "--debug" in err and "Traceback" not in err


def test_ctrl_c_during_convert_leaves_nothing(smol: Smol, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "intactkv_export", "convert", str(smol.reference), "-o", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("widen"):
                break
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        assert child.wait(600) == 130
        assert "Traceback" not in child.stderr.read()
    assert list(tmp_path.iterdir()) == []


def test_help_is_the_manual(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    top = capsys.readouterr().out
    for command in ("convert", "prefix", "inspect", "verify", "embed", "extract", "chat", "version"):
        assert f"\n  {command}" in top
        assert cli.main([command, "--help"]) == 0
        page = capsys.readouterr().out
        assert command == "version" or f"\n  intactkv-export {command} " in page, "an example"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["intactkv-export"] == facts["libraries built from intactkv-export"] == __version__


def test_a_closed_pipe_is_no_error_message(smol: Smol) -> None:
    command = f"{sys.executable} -m intactkv_export inspect {smol.ikv} --json | head -c 10"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 10


def test_unstamped_model_warns_in_one_line(smol: Smol, model: Callable[[str], Path]) -> None:
    done = run("verify", smol.ikv, "-m", model("Q4_0"))
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("intactkv-export: warning: ")
