"""Whether native/llama.cpp.patch fits another llama.cpp: which of its hooks do, which do not, and where.

    python native/try_patch.py 0.3.35               a release of llama-cpp-python, fetched with pip
    python native/try_patch.py path/to/llama.cpp    a source tree of llama.cpp, or an archive of llama-cpp-python
    ... --compile                                   compile libllama with it, if every hook fits
    ... --write FILE                                write the patch with the line numbers of that source

The build takes the patch to the line. Here a hook also fits elsewhere in its file, behind the one before it: where the
lines that it expects are there, nearest to where they were. What differs in the saved states (state_layout.py) is told
too. Nothing of the build tree is touched. Only the standard library is used. Exit status: 0 all fits, 1 something does
not, 2 there is no such source.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import get_source
import state_layout

_VENDORED = "vendor/llama.cpp/"
_HOOK = re.compile(r"intactkv::\w+(?:::\w+)*|\bintact\w*|\bin_sight\b")


class NoSource(Exception):
    """Why there is nothing to try the patch on: one sentence."""


@dataclass
class Hunk:
    """A place that the patch changes. old, new: its lines; start: the first's number in the pinned source, from 1."""

    file: str
    start: int
    function: str
    old: list[str]
    new: list[str]

    @property
    def hook(self) -> str:
        """What it adds, by name; else its first line."""
        added = [line.strip() for line in self.new if line not in self.old and line.strip()]
        found = [name for line in added for name in _HOOK.findall(line)]
        return next((name for name in found if "::" in name), (found or added or ["nothing"])[0])


@dataclass
class Found:
    """Where a hunk fits: the line; None: nowhere. why: what is there instead of the first line that is missing."""

    hunk: Hunk
    line: int | None
    why: str = ""


def hunks(patch: str) -> list[Hunk]:
    """The places that a unified diff changes, in its order."""
    found: list[Hunk] = []
    file = ""
    left: list[int] = [0, 0]  # lines of the hunk that is being read: of old, of new
    for line in patch.splitlines():
        header = re.match(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@ ?(.*)", line)
        if not any(left) and line.startswith("--- "):
            file = line[4:].split("\t")[0].strip().partition("/")[2]
        elif not any(left) and header:
            found.append(Hunk(file, int(header[1]), header[4].strip(), [], []))
            left = [int(header[2] or 1), int(header[3] or 1)]
        elif any(left):
            kind, text = line[:1] or " ", line[1:]
            if kind in " -":
                found[-1].old.append(text)
                left[0] -= 1
            if kind in " +":
                found[-1].new.append(text)
                left[1] -= 1
    return found


def place(hunk: Hunk, lines: Sequence[str], after: int) -> Found:
    """Where in a file's lines the hunk fits, behind `after` lines that are taken: nearest to where it was."""
    n = len(hunk.old)
    at = [i for i in range(after, len(lines) - n + 1) if list(lines[i : i + n]) == hunk.old]
    if at:
        return Found(hunk, min(at, key=lambda i: abs(i - (hunk.start - 1))) + 1)
    return Found(hunk, None, _missing(hunk, lines))


def _missing(hunk: Hunk, lines: Sequence[str]) -> str:
    """The first line that the hunk expects and the file has nowhere, or that its lines do not follow each other."""
    there = {line.strip() for line in lines}
    for line in hunk.old:
        if line.strip() and line.strip() not in there:
            return f"{line.strip()!r} is not there"
    return "its lines do not follow each other there"


def try_on(patch: str, files: dict[str, str]) -> list[Found]:
    """Where each hunk fits. files: path in llama.cpp -> text."""
    result: list[Found] = []
    taken: dict[str, int] = {}
    for hunk in hunks(patch):
        if hunk.file not in files:
            result.append(Found(hunk, None, "there is no such file"))
            continue
        found = place(hunk, files[hunk.file].splitlines(), taken.get(hunk.file, 0))
        if found.line is not None:
            taken[hunk.file] = found.line - 1 + len(hunk.old)
        result.append(found)
    return result


def moved(patch: str, found: Sequence[Found]) -> str:
    """The patch with the line numbers of the source that it was tried on."""
    lines = iter(found)
    shift = {"": 0}
    file = ""
    out = []
    for line in patch.splitlines(keepends=True):
        if line.startswith("--- "):
            file = line
            shift[file] = 0
        header = re.match(r"@@ -\d+((?:,\d+)?) \+\d+((?:,\d+)?) @@(.*)", line, re.DOTALL)
        if header:
            one = next(lines)
            assert one.line is not None  # the caller has looked
            line = f"@@ -{one.line}{header[1]} +{one.line + shift[file]}{header[2]} @@{header[3]}"
            shift[file] += len(one.hunk.new) - len(one.hunk.old)
        out.append(line)
    return "".join(out)


def source(name: str, directory: Path) -> Path:
    """The llama.cpp of that name: a tree is taken as it is, anything else is unpacked below directory."""
    path = Path(name)
    if path.is_dir():
        inside = [path, path / _VENDORED]
        tree = next((x for x in inside if (x / state_layout.HEADER).is_file()), None)
        if tree is None:
            raise NoSource(f"{name} has no {state_layout.HEADER}: give the directory of llama.cpp's source")
        return tree
    if not path.is_file() and re.fullmatch(r"[\w.]+", name) is None:
        raise NoSource(f"there is no {name}: give a version of {get_source.PACKAGE}, or the path of a source")
    archive = path if path.is_file() else _fetch(name, directory)
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                inside = member.name.partition("/")[2]
                if member.isfile() and ".." not in inside and ("/" not in inside or inside.startswith(_VENDORED)):
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file always has content
                    (directory / inside).parent.mkdir(parents=True, exist_ok=True)
                    (directory / inside).write_bytes(content.read())
    except (OSError, tarfile.TarError) as error:
        raise NoSource(f"cannot unpack {archive} ({error}): give a source archive of {get_source.PACKAGE}") from error
    tree = directory / _VENDORED
    if not (tree / state_layout.HEADER).is_file():
        raise NoSource(f"{archive} carries no llama.cpp: give a source archive of {get_source.PACKAGE}")
    return tree


def _fetch(version: str, directory: Path) -> Path:
    """The source archive of a release, by pip; the pinned one as the build has it."""
    if version == get_source.VERSION:
        return get_source.archive()
    done = get_source.pip_download(version, str(directory))
    archive = next(directory.glob("*.tar.gz"), None)
    if archive is None:
        reason = get_source.pip_reason(done.stdout).partition(" (from versions")[0]
        raise NoSource(f"cannot get {get_source.PACKAGE} {version} (pip: {reason}): give a version that there is")
    return archive


def compile_with(tree: Path, patch: str, directory: Path) -> str:
    """Compile libllama of the tree with the patch and our code; "" or why it does not."""
    files = {}
    for inside, name in get_source.KEEP:
        path = tree / name if _VENDORED in inside else tree.parent.parent / inside.partition("/")[2]
        for found in path.rglob("*") if path.is_dir() else [path]:
            if found.is_file():
                files[name + found.relative_to(path).as_posix() if path.is_dir() else name] = found.read_bytes()
    get_source.apply_patch(files, patch.encode())
    native, build = (
        directory / "native",
        directory / "build" / "native",
    )  # as the repository has them: ccache knows them
    shutil.copytree(get_source.PATCH.parent, native, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        get_source.PATCH.parents[1] / "intactkv_export",
        directory / "intactkv_export",
        ignore=lambda place, names: [n for n in names if n != "__init__.py"],
    )
    (native / "get_source.py").write_text("# the source is there already: native/try_patch.py\n")
    get_source.write(files, build / "source")
    for command in (
        ["cmake", "-S", str(native), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", *_ninja()],
        ["cmake", "--build", str(build), "--target", "llama", "--parallel", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if "error" in line.lower()]
            return "\n".join(lines[:20] or done.stdout.splitlines()[-20:])
    return ""


def _ninja() -> list[str]:
    return ["-G", "Ninja"] if shutil.which("ninja") else []


def function_at(hunk: Hunk, lines: Sequence[str]) -> str:
    """The function, or the class, that the hunk changes in the pinned source."""
    same = len(os.path.commonprefix([hunk.old, hunk.new]))
    for line in reversed(lines[: hunk.start - 1 + same]):
        if found := re.match(r"(?:(?:class|struct) (\w+)[^;]*|[A-Za-z_][^;=()]*?([\w:~]+)\(.*)$", line):
            return f"{found[1]}" if found[1] else f"{found[2]}()"
    return hunk.function or "its first lines"


def report(found: Sequence[Found], pinned: Mapping[str, bytes]) -> list[str]:
    """A line for each hunk that does not fit, then how many do. pinned: the files that the patch is made for."""
    lines = []
    for number, one in enumerate(found, 1):
        if one.line is None:
            hunk = one.hunk
            where = function_at(hunk, pinned[hunk.file].decode().splitlines())
            lines.append(
                f"{hunk.file}: hunk {number} of {len(found)} ({hunk.hook}) does not fit in {where} (line "
                f"{hunk.start} of the pinned source): {one.why}"
            )
    fits = [one for one in found if one.line is not None]
    elsewhere = sum(one.line != one.hunk.start for one in fits)
    lines.append(f"{len(fits)} of {len(found)} hunks fit, {elsewhere} of them at another line")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Whether llama.cpp.patch fits another llama.cpp")
    parser.add_argument("source", help="a version of llama-cpp-python, a source tree of llama.cpp, or an archive")
    parser.add_argument("--compile", action="store_true", help="compile libllama with it, if every hook fits")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the patch with that source's line numbers")
    arguments = parser.parse_args()
    patch = get_source.PATCH.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory(prefix="try-patch-") as temporary:
        Path(temporary, "source").mkdir()
        try:
            tree = source(arguments.source, Path(temporary, "source"))
        except (NoSource, get_source.SourceError) as error:
            print(f"intactkv-export: {error}", file=sys.stderr)
            return 2
        names = {hunk.file for hunk in hunks(patch)}
        files = {n: (tree / n).read_text(encoding="utf-8") for n in names if (tree / n).is_file()}
        found = try_on(patch, files)
        fits = all(one.line is not None for one in found)
        try:
            lines = report(found, {} if fits else get_source.read(get_source.archive()))
        except get_source.SourceError as error:
            print(f"intactkv-export: {error}", file=sys.stderr)
            return 2
        differs = state_layout.differences(state_layout.read(tree))
        print("\n".join([*lines, *differs]))
        if not fits:
            return 1
        patch = moved(patch, found)
        if arguments.write:
            arguments.write.write_text(patch, encoding="utf-8")
        if arguments.compile:
            why = compile_with(tree, patch, Path(temporary, "build"))
            print(f"it does not compile:\n{why}" if why else "libllama compiles with it")
            return 1 if why or differs else 0
        return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
