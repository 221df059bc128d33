"""The house keeps its order: imports go down and through the faces, public names stay, rooms are few.

The tower is written down here once, top first; ARCHITECTURE.md says what each floor is for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import intactkv_export
from intactkv_export import library
from tests.support.paths import REPO

PACKAGE = "intactkv_export"
TOWER = (
    "cli", "analysis", "conversion", "calibration", "evaluation", "keeping", "engines", "texts", "serving", "runtime",
    "replies", "torch_model",
    "prefix", "models", "libllama", "work", "extras", "library", "escapes", "errors",
)  # fmt: skip
# Floors that load a large library: others may import them inside functions only.
LOADED_LATE = ("torch_model", "runtime", "replies")
# Modules and floors that are imported inside functions themselves, because such a library is at their top.
WITH_LIBRARIES = {f"{PACKAGE}/calibration/{name}.py" for name in ("run", "training", "targets", "extra_cells")} | {
    "runtime"
}


def arrows(source: str, path: Path) -> Iterator[tuple[int, str, str | None, bool]]:
    """(line, module, name or None, at the top of the module) of each import of this package; name: what is taken."""
    tree = ast.parse(source)
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Name) and branch.test.id == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        at_top = id(node) not in inside and id(node) not in typing
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield node.lineno, alias.name, None, at_top
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            assert node.module is not None
            for alias in node.names:
                yield node.lineno, node.module, alias.name, at_top


def faults(source: str, path: Path) -> list[str]:
    """What is wrong with the imports of a module, a line each. path: relative to the repository."""
    own = path.with_suffix("").parts[1] if len(path.parts) > 1 else ""
    found = []
    for line, module, name, at_top in arrows(source, path):
        parts = module.split(".")
        if len(parts) == 1:  # `from intactkv_export import X`: X is a floor, or a name of the package itself
            if name is None or name not in TOWER:
                continue
            parts, name = [*parts, name], None
        floor = parts[1]
        if floor == own or own not in TOWER:
            continue
        if TOWER.index(floor) < TOWER.index(own):
            found.append(f"{path}:{line} imports {floor}, which stands above {own}")
        elif floor in LOADED_LATE and at_top and not {path.as_posix(), own} & WITH_LIBRARIES:
            found.append(f"{path}:{line} imports {floor} at its top, which loads a large library: do it in a function")
        elif len(parts) > 2 or (name is not None and floor in PACKAGES and name not in face(floor)):
            taken = ".".join([*parts[2:], *([name] if name else [])])
            found.append(f"{path}:{line} takes {taken} of {floor}, which its face does not name")
    return found


PACKAGES = {path.parent.name for path in (REPO / PACKAGE).glob("*/__init__.py")}


def face(package: str) -> set[str]:
    tree = ast.parse((REPO / PACKAGE / package / "__init__.py").read_text())
    names = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return set(ast.literal_eval(names))


def modules() -> list[Path]:
    return sorted(path.relative_to(REPO) for path in (REPO / PACKAGE).rglob("*.py"))


def test_imports_go_down_and_through_the_faces() -> None:
    found = [fault for path in modules() for fault in faults((REPO / path).read_text(), path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("models/weights.py",
         "from intactkv_export.prefix import ikv", "weights.py:1 imports prefix, which stands above models"),
        ("work/atomic.py", "import os\ndef f():\n    from intactkv_export import cli", "atomic.py:3 imports cli"),
        ("evaluation/model.py",
         "from intactkv_export.runtime import IntactLlama", "model.py:1 imports runtime at its top"),
        ("texts/turns.py", "from intactkv_export.prefix.ikv import Prefix", "turns.py:1 takes ikv.Prefix of prefix"),
        ("texts/turns.py", "from intactkv_export.prefix import parse", "turns.py:1 takes parse of prefix"),
    ],
)  # fmt: skip
def test_a_planted_import_is_found(path: str, source: str, fault: str) -> None:
    (found,) = faults(source, Path(PACKAGE, path))
    assert fault in found


def test_the_tower_is_whole() -> None:
    there = PACKAGES | {path.stem for path in (REPO / PACKAGE).glob("*.py") if not path.stem.startswith("__")}
    assert there == set(TOWER)


def test_public_names() -> None:
    """What programs and documents may rely on; `intactkv_export.library` is also a program."""
    from intactkv_export import IntactLlama, convert, library_path

    assert sorted(intactkv_export.__all__) == ["IntactLlama", "convert", "library_path"]
    assert library_path is library.library_path and callable(convert) and isinstance(IntactLlama, type)
    assert {name for name in vars(library) if not name.startswith("_")} >= {
        "library_path",
        "load",
        "is_patched",
        "VARIABLE",
    }
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        intactkv_export.nothing  # noqa: B018


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_a_face_has_a_docstring_and_names_what_is_there(package: str) -> None:
    tree = ast.parse((REPO / PACKAGE / package / "__init__.py").read_text())
    assert ast.get_docstring(tree), package
    kinds = {type(node) for node in tree.body[1:]}
    assert kinds <= {ast.ImportFrom, ast.Assign}, "a docstring, imports, __all__ and nothing else"
    imported = {a.asname or a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert imported == face(package)


def test_rooms_are_few_and_files_short() -> None:
    """At most nine things in a folder; no source of ours over 500 lines."""
    ours = [REPO / PACKAGE, *(REPO / PACKAGE / name for name in sorted(PACKAGES)), REPO / "native/src"]
    ours += [path for path in sorted((REPO / "native/src").rglob("*")) if path.is_dir()]
    for folder in ours:
        names = {p.stem for p in folder.iterdir() if p.suffix in (".py", ".cpp", ".h", ".jinja")}
        names |= {p.name for p in folder.iterdir() if p.is_dir() and p.name not in ("__pycache__", "lib", "include")}
        limit = 20 if folder == REPO / PACKAGE else 9  # the tower itself, and its four singles
        assert len(names - {"__init__", "__main__"}) <= limit, (folder, sorted(names))
    for path in [*(REPO / PACKAGE).rglob("*.py"), *(REPO / "native/src").rglob("*.[ch]*")]:
        assert len(path.read_text().splitlines()) <= 500, path
