"""tool: upstream's programs, run as they are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import library, serving
from intactkv_export.errors import IntactKVError
from tests.serving.conftest import free_port
from tests.support.smol import Smol

TOOL = [sys.executable, "-m", "intactkv_export", "tool"]
WANTED = {"llama-server", "llama-cli", "llama-perplexity", "llama-bench", "llama-batched-bench", "ggml-rpc-server"}


def tool(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=300, **kwargs)


def test_programs_are_listed_and_run(programs: None) -> None:
    """All of them start: they find the libraries beside them, wherever the process stands."""
    listed = tool()
    assert set(listed.stdout.split()) == WANTED and listed.returncode == 0
    for name in WANTED:
        done = tool(name, "--help", cwd="/")
        assert done.returncode == 0 and "--threads" in done.stdout + done.stderr, (name, done)


def test_exit_codes_and_options_are_the_programs(programs: None) -> None:
    assert tool("llama-bench", "--no-such-option").returncode == 1
    done = tool("llama-server", "--debug", "--version")
    assert "invalid argument: --debug" in done.stderr  # ours is for our own command line
    unknown = tool("llama-serve")
    assert (
        unknown.returncode == 2 and "there is no program 'llama-serve': give one of ggml-rpc-server" in unknown.stderr
    )


def test_a_prefix_that_cannot_be_read_is_said_first(programs: None, smol: Smol, tmp_path: Path) -> None:
    """llama-bench would not say why it gets no context."""
    torn = tmp_path / "torn.ikv"
    torn.write_bytes(smol.ikv.read_bytes()[:-100])
    for named in (torn, tmp_path, tmp_path / "none"):
        done = tool("llama-bench", "-m", smol.gguf, "-fa", 1, env={**os.environ, "LLAMA_INTACTKV": str(named)})
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done
        assert done.stderr.startswith("intactkv-export: LLAMA_INTACTKV names a prefix that cannot be used: "), done
        assert str(named) in done.stderr, done


def test_it_runs_on_our_library(programs: None, smol: Smol) -> None:
    """It refuses a tail with stock attention."""
    done = tool(
        "llama-bench", "-m", smol.gguf, "-fa", 1, "-ctk", "q8_0", "-ctv", "q4_0", "-p", 16, "-n", 4, "-r", 1, "-t", 2,
        "-o", "json", env={**os.environ, "INTACTKV_ATTN": "stock", "INTACTKV_TAIL": "64"},
    )  # fmt: skip
    assert done.returncode == 1 and "failed to create context" in done.stderr, done


def test_it_runs_on_the_libraries_that_are_named(programs: None, smol: Smol, stock_lib: Path) -> None:
    """LLAMA_CPP_LIB_PATH, as everything else here: on stock libraries nothing reads INTACTKV_ATTN."""
    done = tool(
        "llama-bench", "-m", smol.gguf, "-fa", 1, "-ctk", "q8_0", "-ctv", "q4_0", "-p", 16, "-n", 4, "-r", 1, "-t", 2,
        env={**os.environ, "INTACTKV_ATTN": "stock", "INTACTKV_TAIL": "64", "LLAMA_CPP_LIB_PATH": str(stock_lib)},
    )  # fmt: skip
    assert done.returncode == 0, done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGPIPE])
def test_signals_reach_the_program(programs: None, number: signal.Signals) -> None:
    """It has taken the process over, and what Python ignores is not ignored."""
    with subprocess.Popen([*TOOL, "ggml-rpc-server", "--port", str(free_port())], stdout=-3, stderr=-3) as process:
        try:
            for _ in range(200):
                if b"ggml-rpc-server" in Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0]:
                    break
                time.sleep(0.05)
            time.sleep(0.2)
            process.send_signal(number)
            assert process.wait(10) == -number
        finally:
            process.kill()


def test_not_built_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_there() -> Path:
        raise IntactKVError("it is not there")

    monkeypatch.setattr(library, "programs_path", not_there)
    for call in (serving.program_names, lambda: serving.program_path("llama-server")):
        with pytest.raises(IntactKVError, match="were not built: install with `make tools`"):
            call()


def test_licences_of_what_they_bring(programs: None) -> None:
    licences = library.programs_path().parent / "licenses"
    words = {
        "cpp-httplib": "MIT", "miniaudio": "Public Domain", "stb_image": "Public Domain", "subprocess": "public domain",
        "xxhash": "Redistribution",
    }  # fmt: skip
    for name, word in words.items():
        assert word in (licences / f"LICENSE.{name}").read_text(), name
