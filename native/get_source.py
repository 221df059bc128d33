"""Get the pinned llama.cpp source and apply our patch to it.

    python native/get_source.py DEST                write the patched source to the directory DEST
    python native/get_source.py DEST --unpatched    the same without the patch
    python native/get_source.py --archive           print the path of the checked source archive

The source is the llama.cpp that the source distribution of llama-cpp-python carries. pip fetches it by name and
version, with whatever index the user's pip is set up for; its SHA-256 must be the one below. It is kept in the
user's cache directory ($INTACTKV_SOURCE_CACHE names another); $INTACTKV_SOURCE names an archive that is already
there, and then nothing is downloaded.

The patch is applied here, in Python: neither git nor patch(1) is needed, and because the source is pinned to the
byte, every line of the patch must match exactly where the patch says, with no fuzz.

Only the standard library is used. Files whose content stays the same are left alone, so that a changed patch
recompiles only what it touches. Failures are one sentence on stderr and exit code 1.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "llama-cpp-python"
VERSION = "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"

ARCHIVE = f"llama_cpp_python-{VERSION}.tar.gz"
PATCH = Path(__file__).resolve().parent / "llama.cpp.patch"

# Inside the archive: what the libraries, upstream's programs, the converter and the licences need. Tests, examples
# and docs stay out. The second column is the place under DEST.
TOP = f"llama_cpp_python-{VERSION}/"
KEEP = [
    (TOP + "LICENSE.md", "LICENSE.llama-cpp-python"),
    *(
        (TOP + "vendor/llama.cpp/" + name, name)
        for name in (
            "CMakeLists.txt",
            "LICENSE",
            "cmake/",
            "common/",
            "conversion/",
            "convert_hf_to_gguf.py",
            "ggml/",
            "gguf-py/LICENSE",
            "gguf-py/gguf/",
            "include/",
            "licenses/",
            "models/templates/",
            "scripts/ui-assets.cmake",
            "src/",
            "tools/",
            "vendor/",
        )
    ),
]


class SourceError(Exception):
    """Why there is no patched source: one sentence."""


def cache_dir() -> Path:
    """The directory that keeps the source archive between builds."""
    if chosen := os.environ.get("INTACTKV_SOURCE_CACHE"):
        return Path(chosen)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "intactkv-export"


def check(path: Path, remedy: str) -> Path:
    """Return path if it holds the pinned bytes, else raise SourceError that ends in the remedy."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise SourceError(f"cannot read the source archive {path} ({error.strerror}): {remedy}") from error
    if digest.hexdigest() != SHA256:
        raise SourceError(
            f"wrong checksum: {path} has SHA-256 {digest.hexdigest()} but {PACKAGE} {VERSION} has {SHA256}: {remedy}"
        )
    return path


def archive() -> Path:
    """The checked source archive: named by the user, or cached, or downloaded."""
    if named := os.environ.get("INTACTKV_SOURCE"):
        return check(Path(named), f"point INTACTKV_SOURCE at the {PACKAGE} {VERSION} source archive, or unset it")
    path = cache_dir() / ARCHIVE
    if path.exists():
        return check(path, "delete that file and build again")
    download(path)
    return path


def download(path: Path) -> None:
    """Fetch the source archive with pip to path; it appears there only when complete and checked."""
    print(f"intactkv-export: downloading the source of {PACKAGE} {VERSION} with pip", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as directory:
            done = pip_download(VERSION, directory)
            if done.returncode != 0:
                raise SourceError(
                    f"cannot download {PACKAGE} {VERSION} (pip: {pip_reason(done.stdout)}): check the network and "
                    f"pip's index settings, or get {ARCHIVE} elsewhere and set INTACTKV_SOURCE to its path"
                )
            fetched = check(
                Path(directory) / ARCHIVE,
                f"the index served other bytes, so get {ARCHIVE} elsewhere and set INTACTKV_SOURCE to its path",
            )
            fetched.replace(path)
    except OSError as error:
        raise SourceError(
            f"cannot write to the source cache {path.parent} ({error.strerror}): "
            "set INTACTKV_SOURCE_CACHE to a directory that can be written"
        ) from error


def pip_download(version: str, directory: str) -> subprocess.CompletedProcess[str]:
    """pip, which fetches the source archive of a version into a directory; its output says why it could not."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", directory]
    command += ["--no-binary", PACKAGE, "--disable-pip-version-check", f"{PACKAGE}=={version}"]
    # pip asks the package for its metadata, which needs its build backend. When we run inside our own build
    # that backend is here already, and pip need not fetch it once more into an environment of its own.
    if importlib.util.find_spec("scikit_build_core"):
        command += ["--no-build-isolation"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def pip_reason(output: str) -> str:
    """The first line of pip's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    # Retries name the cause (no route, no such host, refused); the ERROR that follows only says "no version found".
    for mark in ("connection broken by", "ERROR:", "No module named pip"):
        for line in lines:
            if mark in line:
                return line.removeprefix("WARNING: ").removeprefix("ERROR: ").split(" connection broken by ")[-1]
    return lines[-1] if lines else "no output"


def read(path: Path) -> dict[str, bytes]:
    """The files to keep from the archive: place under DEST -> content."""
    files: dict[str, bytes] = {}
    with tarfile.open(path, "r:gz") as tar:
        for member in tar:
            for inside, place in KEEP:
                found = member.name.startswith(inside) if inside.endswith("/") else member.name == inside
                if found and member.isfile():
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file always has content
                    files[place + member.name[len(inside) :]] = content.read()
    return files


def apply_patch(files: dict[str, bytes], patch: bytes) -> None:
    """Apply a unified diff to files, in place. The diff may only change files that exist.

    Raises SourceError naming the file, the line and both texts if one line is not what the patch expects.
    """
    name = ""
    old: list[bytes] = []
    new: list[bytes] = []
    taken = 0  # lines of old already copied or replaced

    def finish() -> None:
        if name:
            files[name] = b"".join(new + old[taken:])

    lines = patch.splitlines(keepends=True)
    at = 0
    while at < len(lines):
        line = lines[at]
        at += 1
        if line.startswith(b"--- "):
            finish()
            name = line[4:].split(b"\t")[0].strip().decode().partition("/")[2]
            if name not in files:
                raise SourceError(
                    f"the patch does not apply: it changes {name or line.strip().decode()!r}, which "
                    f"{PACKAGE} {VERSION} does not have: make the patch again from that version's source"
                )
            old, new, taken = files[name].splitlines(keepends=True), [], 0
        elif line.startswith(b"@@ "):
            match = re.match(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", line)
            if not match or not name:
                raise SourceError(f"the patch does not apply: line {at} of it is not a hunk header: {text(line)}")
            old_left, new_left = (1 if count is None else int(count) for count in match.group(2, 4))
            start = int(match[1]) - (1 if old_left else 0)
            new += old[taken:start]
            taken = start
            while old_left > 0 or new_left > 0:
                body = lines[at] if at < len(lines) else b""
                at += 1
                kind, content = body[:1], body[1:]
                if at < len(lines) and lines[at].startswith(b"\\"):  # "\ No newline at end of file"
                    content = content.rstrip(b"\r\n")
                    at += 1
                if kind in (b" ", b"\n", b"-"):  # some editors strip the blank that marks an empty context line
                    content = b"\n" if kind == b"\n" else content
                    found = old[taken] if taken < len(old) else b"the end of the file"
                    if found != content:
                        raise SourceError(
                            f"the patch does not apply: line {taken + 1} of {name} is {text(found)}, the patch "
                            f"expects {text(content)}: make the patch again from the source of {PACKAGE} {VERSION}"
                        )
                    taken += 1
                    old_left -= 1
                if kind in (b" ", b"\n", b"+"):
                    new.append(content)
                    new_left -= 1
                if kind not in (b" ", b"\n", b"-", b"+"):
                    raise SourceError(f"the patch does not apply: line {at} of it is not part of a hunk: {text(body)}")
    finish()


def text(line: bytes) -> str:
    return repr(line.decode(errors="replace").strip())


def write(files: dict[str, bytes], dest: Path) -> None:
    """Make dest hold exactly these files, touching only those whose content differs."""
    for name, content in files.items():
        path = dest / name
        if path.is_file() and path.read_bytes() == content:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for path in dest.rglob("*"):
        if path.is_file() and path.relative_to(dest).as_posix() not in files:
            path.unlink()


def get_source(dest: Path, patched: bool = True) -> None:
    """Make dest hold the source, patched or not; cheap when it does already."""
    try:
        patch = PATCH.read_bytes() if patched else b""
    except OSError as error:
        raise SourceError(
            f"cannot read the patch {PATCH} ({error.strerror}): restore it from the repository"
        ) from error
    # What dest was made from. It is removed first and written last: an interrupted run is done again.
    stamp = dest.with_name(dest.name + ".stamp")
    made_from = hashlib.sha256(SHA256.encode() + repr(KEEP).encode() + patch).hexdigest()
    if stamp.is_file() and dest.is_dir() and stamp.read_text() == made_from:
        return
    files = read(archive())
    apply_patch(files, patch)
    try:
        stamp.unlink(missing_ok=True)
        dest.mkdir(parents=True, exist_ok=True)
        write(files, dest)
        stamp.write_text(made_from)
    except OSError as error:
        raise SourceError(
            f"cannot write the source to {dest} ({error.strerror}): make room, or build in another directory"
        ) from error


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["--archive"]:
                print(archive())
            case [dest]:
                get_source(Path(dest))
            case [dest, "--unpatched"]:
                get_source(Path(dest), patched=False)
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except SourceError as error:
        print(f"intactkv-export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
