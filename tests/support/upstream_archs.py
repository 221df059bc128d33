"""Tiny random GGUFs of every architecture that upstream's own test (tests/test-llama-archs.cpp) can make.

`make(directory)` writes them with that program, which is compiled here from the pinned source against the libraries in
use: nothing of it is in this repository. Two layers mostly, n_embd 64 to 512, F16 and F32 weights of which none is
trained, 128 tokens in a vocabulary that has no text ("tok_5"; llama.cpp's tokenizer model "test"), 256 positions. Names
are ARCHITECTURE-dense and ARCHITECTURE-moe. A process is started for each architecture: one that crashes is told apart.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kernel import compiler
from tests.support.paths import REPO

SOURCE = "tests/test-llama-archs.cpp"
_HEADERS = re.compile(r"(src|common|include|ggml/include)/[^/]+\.h$")
_NAMES = re.compile(r'\{\s*LLM_ARCH_\w+,\s*"([^"]+)"\s*\}')
SEED = 1
STDEV = (
    0.4  # of all weights: with upstream's 0.1 attention is all but the same for every text, and a prefix changes little
)


@dataclass
class Made:
    """What one call of make() has written."""

    paths: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # architectures of which upstream's program makes none
    crashed: dict[str, str] = field(default_factory=dict)  # architecture: how its process ended


def libraries() -> Path:
    """The directory of the libraries in use. The program needs libllama-common too, which `make tools` builds."""
    from intactkv_export import library

    return Path(os.environ.get(library.VARIABLE) or library.library_path())


def can_build() -> bool:
    """Whether there is a compiler and upstream's common library, which the program is linked with."""
    return compiler() is not None and any(libraries().glob("*llama-common.*"))


def architectures() -> list[str]:
    """Names of all architectures of the pinned source, in its order."""
    names = _NAMES.findall((_source() / "src" / "llama-arch.cpp").read_text(encoding="utf-8"))
    return [name for name in dict.fromkeys(names) if name != "(unknown)"]


def _source() -> Path:
    """The program, the headers that it includes and the list of architectures, from the pinned archive."""
    command = [sys.executable, str(REPO / "native" / "get_source.py"), "--archive"]
    archive = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    target = REPO / "build" / "upstream-archs" / archive.name.removesuffix(".tar.gz")
    if not target.is_dir():
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.partition("/vendor/llama.cpp/")[2]
                if _HEADERS.match(name) or name in (SOURCE, "src/llama-arch.cpp"):
                    file = tar.extractfile(member)
                    assert file is not None
                    (partial / name).parent.mkdir(parents=True, exist_ok=True)
                    (partial / name).write_bytes(file.read())
        partial.rename(target)
    return target


def program() -> Path:
    """Upstream's test program on the libraries in use: compiled once for each directory of libraries."""
    source, lib = _source(), libraries()
    out = source.with_name(f"test-llama-archs-{hashlib.sha256(f'{lib} {source}'.encode()).hexdigest()[:16]}")
    if out.is_file():
        return out
    partial = out.with_name(f"{out.name}.{os.getpid()}")
    command = [compiler() or "g++", "-std=c++17", "-O1", str(source / SOURCE), "-o", str(partial)]
    command += [f"-I{source / name}" for name in ("common", "include", "ggml/include", "src")]
    command += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lllama-common", "-lllama", "-lggml", "-lggml-base"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    partial.rename(out)
    return out


def make(directory: Path, names: Iterable[str] | None = None, *, seed: int = SEED, stdev: float = STDEV) -> Made:
    """Write NAME-dense.gguf and NAME-moe.gguf of the architectures of these names (None: all) into directory.

    The same seed gives the same bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = Made()
    for name in architectures() if names is None else names:
        command = [str(program()), "-a", name, "-o", str(directory), "-s", str(seed), "-d", str(stdev)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
        found = {p.stem: p for kind in ("dense", "moe") if (p := directory / f"{name}-{kind}.gguf").is_file()}
        made.paths |= found
        if done.returncode:
            made.crashed[name] = f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
        elif not found:
            made.left_out.append(name)
    return made


if __name__ == "__main__":
    result = make(Path(sys.argv[1]), sys.argv[2:] or None)
    print(f"{len(result.paths)} models, none for {len(result.left_out)}: {' '.join(result.left_out)}")
    for arch, why in result.crashed.items():
        print(f"{arch}: {why}", file=sys.stderr)
    sys.exit(bool(result.crashed))
