"""The reasons that llama.cpp logs: each thread gets its own, and what a program has set stays set."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from intactkv_export import library
from intactkv_export.libllama import errors_logged
from tests.support.paths import REPO


def fails(path: Path) -> list[str]:
    L = library.load()
    with errors_logged() as lines:
        assert not L.llama_model_load_from_file(str(path).encode(), L.llama_model_default_params())
    return lines


def test_each_thread_gets_its_own_lines(tmp_path: Path) -> None:
    found: dict[int, list[list[str]]] = {}

    def work(i: int) -> None:
        found[i] = [fails(tmp_path / f"none-{i}.gguf") for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, all_lines in found.items():
        assert len(all_lines) == 50 and all(lines for lines in all_lines)
        assert not [line for lines in all_lines for line in lines if "none-" in line and f"none-{i}.gguf" not in line]


def test_blocks_are_nested(tmp_path: Path) -> None:
    with errors_logged() as outer:
        inner = fails(tmp_path / "inner.gguf")
        assert inner and not outer
        library.load().llama_model_load_from_file(b"outer.gguf", library.load().llama_model_default_params())
    assert outer and not any("inner" in line for line in outer)


def test_a_callback_of_the_program_gets_what_no_block_collects() -> None:
    code = """
from intactkv_export import library
from intactkv_export.libllama import errors_logged
L = library.load()
seen = []
def load(name):
    L.llama_model_load_from_file(name, L.llama_model_default_params())
for i in range(3):
    callback = L.llama_log_callback(lambda level, text, data: seen.append(text))
    L.llama_log_set(callback, None)
    with errors_logged() as lines:
        load(b"/none/block.gguf")
    assert lines and not any(b"block" in text for text in seen)
    load(b"/none/program.gguf")
    assert any(b"program" in text for text in seen)
    seen.clear()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
