"""Other releases of llama.cpp: the patch is tried on them (make try-patch), and a change of saved states is seen."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from intactkv_export.libllama import state
from tests.support.paths import REPO

NATIVE = REPO / "native"
GRAPH = "src/llama-graph.cpp"


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"native_{name}", NATIVE / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    spec.loader.exec_module(loaded)
    return loaded


get_source, layout, try_patch = (module(name) for name in ("get_source", "state_layout", "try_patch"))


@pytest.fixture(scope="module")
def pinned() -> dict[str, bytes]:
    """The pinned source as it is upstream."""
    files: dict[str, bytes] = get_source.read(get_source.archive())
    return files


@pytest.fixture
def tree(pinned: dict[str, bytes], tmp_path: Path) -> Callable[..., Path]:
    """tree(path=(old, new), ...): a source directory, these texts of its files replaced."""

    def make(changes: dict[str, tuple[str, str]] | None = None) -> Path:
        for name, content in pinned.items():
            if name.startswith(("src/llama", "include/")):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                text = content.decode()
                for old, new in [(changes or {})[name]] if name in (changes or {}) else []:
                    assert old in text
                    text = text.replace(old, new)
                (tmp_path / name).write_text(text)
        return tmp_path

    return make


def tried(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(NATIVE / "try_patch.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# --- saved states ---


def texts(files: dict[str, bytes]) -> dict[str, str]:
    return {name: content.decode(errors="replace") for name, content in files.items()}


def test_states_are_as_our_readers_assume(pinned: dict[str, bytes]) -> None:
    """Fails when a new source is pinned whose states may be others: what it says is what to look at."""
    assert layout.differences(texts(pinned)) == []


def test_readers_know_the_versions_of_the_guard() -> None:
    parse = (NATIVE / "src" / "prefix_file" / "parse.cpp").read_text()
    known = re.search(r"STATE_VERSION = (\d+);", parse)
    assert known and int(known[1]) == state.VERSION == layout.VERSIONS["LLAMA_STATE_SEQ_VERSION"]
    for path in layout.READERS.split(", "):
        assert (REPO / path).is_file()


def test_a_raised_version_is_named(pinned: dict[str, bytes]) -> None:
    files = texts(pinned)
    files[layout.HEADER] = files[layout.HEADER].replace("LLAMA_STATE_SEQ_VERSION 3", "LLAMA_STATE_SEQ_VERSION 4")
    (said,) = layout.differences(files)
    assert "LLAMA_STATE_SEQ_VERSION is 4" in said and "our readers know 3" in said
    assert "libllama/state.py" in said and "prefix_file/parse.cpp" in said


def test_a_changed_writer_is_named_but_not_a_comment(pinned: dict[str, bytes]) -> None:
    name = "src/llama-kv-cache.cpp"
    files = texts(pinned)
    begins = files[name].index("void llama_kv_cache::state_write_data(")
    at = files[name].index("{\n", begins) + 2
    whole = files[name]
    files[name] = whole[:at] + "    // a word about it\n\n" + whole[at:]
    assert layout.differences(files) == []
    files[name] = whole[:at] + "    io.write(&at, sizeof(at));\n" + whole[at:]
    (said,) = layout.differences(files)
    assert said.startswith(f"{name}: llama_kv_cache::state_write_data,") and "has changed" in said
    files[name] = whole.replace("llama_kv_cache::state_write_data(", "llama_kv_cache::state_write_rows(")
    assert "is not there" in layout.differences(files)[0]


# --- the patch ---


def test_the_pinned_source_takes_every_hook(tree: Callable[..., Path]) -> None:
    done = tried(tree())
    n = get_source.PATCH.read_text().count("\n@@ ")
    assert (done.returncode, done.stdout) == (0, f"{n} of {n} hunks fit, 0 of them at another line\n")


def test_hooks_at_other_lines_fit(pinned: dict[str, bytes], tree: Callable[..., Path], tmp_path: Path) -> None:
    changes = {GRAPH: ("\n", "\n\n")}  # every line elsewhere: no hunk has what it expects
    moved = {GRAPH: ('#include "llama-graph.h"\n', '// one more line\n#include "llama-graph.h"\n')}
    done = tried(tree(moved), "--write", tmp_path / "moved.patch")
    assert done.returncode == 0 and re.search(r", \d\d of them at another line\n", done.stdout)
    files: dict[str, Any] = {name: (tmp_path / name).read_bytes() for name in pinned if name.startswith("src/llama")}
    get_source.apply_patch(files, (tmp_path / "moved.patch").read_bytes())
    assert b"intactkv::" in files[GRAPH]
    done = tried(tree(changes))
    assert done.returncode == 1 and done.stdout.count(f"{GRAPH}: hunk ") > 10


def test_a_hook_that_does_not_fit_is_named(tree: Callable[..., Path]) -> None:
    old = "llm_graph_input_attn_kv_iswa * llm_graph_context::build_attn_inp_kv_iswa() const"
    line = "return (llm_graph_input_attn_kv_iswa *) res->add_input(std::move(inp));"
    done = tried(tree({GRAPH: (line, line.replace("std::move(inp)", "inp"))}))
    assert old in (NATIVE / "llama.cpp.patch").read_text()
    failing = [said for said in done.stdout.splitlines() if "does not fit" in said]
    assert done.returncode == 1 and len(failing) == 1, done.stdout
    assert failing[0].startswith(f"{GRAPH}: hunk ") and "intact" in failing[0]
    assert "in llm_graph_context::build_attn_inp_kv_iswa()" in failing[0] and line in failing[0]


def test_states_of_another_release_are_told(tree: Callable[..., Path]) -> None:
    done = tried(tree({layout.HEADER: ("LLAMA_STATE_SEQ_VERSION 3", "LLAMA_STATE_SEQ_VERSION 4")}))
    assert done.returncode == 1 and "LLAMA_STATE_SEQ_VERSION is 4" in done.stdout


def test_no_such_source(tmp_path: Path) -> None:
    for name, why in ((tmp_path, "has no include/llama.h"), (tmp_path / "nowhere", "there is no")):
        done = tried(name)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("intactkv-export: ") and why in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "broken.tar.gz").write_bytes(b"nothing")
    assert "cannot unpack" in tried(tmp_path / "broken.tar.gz").stderr
