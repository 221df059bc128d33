"""How much of a thread's stack attention takes: threads may have little of it (macOS: 512 KiB, musl: 128)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks import kernel as K

FUNCTION_MAX = 24 << 10  # bytes; the deepest call has one such function and small ones


@pytest.mark.skipif(K.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("source", ["attention.cpp", "store.cpp", "targets/portable.cpp", "targets/avx2.cpp"])
def test_no_function_takes_much_of_the_stack(tmp_path: Path, source: str) -> None:
    include = K.ggml_include(K.ROOT / "build" / "kernel")
    command = [K.compiler(), "-std=c++17", "-O3", "-fPIC", "-fstack-usage", "-I", include, "-I", K.NATIVE / "src"]
    command += ["-c", K.ATTENTION / source, "-o", tmp_path / "out.o"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if "stack-usage" in done.stderr:
        pytest.skip("the compiler has no -fstack-usage")
    assert done.returncode == 0, done.stderr[-2000:]
    usage = [line.split("\t") for line in (tmp_path / "out.su").read_text().splitlines()]
    of = {name: int(size) for name, size, _ in usage}
    if not of:
        pytest.skip("another machine's target")
    deepest = max(of, key=lambda name: of[name])
    assert of[deepest] <= FUNCTION_MAX, f"{deepest}: {of[deepest]} bytes"
