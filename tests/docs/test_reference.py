"""Pages of docs/reference against what they are made from: --help, the sources, the header."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.paths import REPO

REFERENCE = REPO / "docs" / "reference"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", REPO / "docs" / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the command line ---


def test_command_line_page_is_what_help_says(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")  # whatever the terminal
    assert (REFERENCE / "cli.md").read_text(encoding="utf-8") == generate.cli_page(), "run `make docs`"


def test_readme_has_every_command(generate: ModuleType) -> None:
    linked = re.findall(r"\]\(docs/reference/cli\.md#(\w+)\)", (REPO / "README.md").read_text(encoding="utf-8"))
    assert linked == generate.commands()


# --- environment variables ---


def variables_of_python(path: Path, constants: dict[str, str]) -> Iterator[str]:
    """Names that a module reads from os.environ: .get(NAME), [NAME], NAME in os.environ."""

    def is_environ(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        name: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_environ(node.func.value):
            name = node.args[0] if node.func.attr in ("get", "pop", "setdefault") else None
        elif isinstance(node, ast.Subscript) and is_environ(node.value) and isinstance(node.ctx, ast.Load):
            name = node.slice
        elif isinstance(node, ast.Compare) and any(map(is_environ, node.comparators)):
            name = node.left
        if isinstance(name, ast.Constant):
            yield str(name.value)
        elif isinstance(name, ast.Name | ast.Attribute):
            yield constants[name.id if isinstance(name, ast.Name) else name.attr]


def test_environment_page_has_every_variable() -> None:
    python = [p for top in ("intactkv_export", "native", "benchmarks", "tests") for p in (REPO / top).rglob("*.py")]
    native = [p for pattern in ("*.h", "*.cpp") for p in (REPO / "native" / "src").rglob(pattern)]
    constants = {
        target.id: node.value.value
        for path in python
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.endswith("VARIABLE")
    }
    found = {name for path in python for name in variables_of_python(path, constants)} - {"PATH", "PYTHONPATH"}
    for path in native:
        calls = re.findall(r"getenv\((.*?)\)", path.read_text(encoding="utf-8"))
        assert all(re.fullmatch(r'"\w+"', call) for call in calls), path
        found |= {call.strip('"') for call in calls}
    page = (REFERENCE / "environment.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == found


# --- the C API ---


def test_c_api_page_has_every_function_as_declared() -> None:
    header = (REPO / "native" / "include" / "intactkv.h").read_text(encoding="utf-8")
    page = (REFERENCE / "c-api.md").read_text(encoding="utf-8")

    def plain(text: str) -> str:
        return re.sub(r"\s*([(),*])\s*", r"\1", re.sub(r"\s+", " ", text)).strip()

    declared = {plain(text) for text in re.findall(r"LLAMA_API (.*?\));", header, re.DOTALL)}
    text = re.sub(r"```c\n.*?```", "", page, flags=re.DOTALL)
    assert {plain(line) for line in re.findall(r"^    (.* \*?\s?intactkv_\w+\(.*\));$", text, re.MULTILINE)} == declared


def test_c_example_compiles(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    source = next((p for p in (REPO / "build" / name / "source" for name in ("native", "stock")) if p.is_dir()), None)
    if compiler is None or source is None:
        pytest.skip("needs a C compiler and the source that `make build` makes")
    code = re.search(r"```c\n(.*?)```", (REFERENCE / "c-api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code
    (tmp_path / "example.c").write_text(code[1])
    include = [f"-I{path}" for path in (REPO / "native" / "include", source / "include", source / "ggml" / "include")]
    command = [compiler, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", *include, str(tmp_path / "example.c")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
