"""The node that stores new K and V, with a tail: the same rows once more, at F16, on every instruction set."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernel as K
from intactkv_export.library import library_path
from tests.native.test_fused import KV_TYPES
from tests.support.attention_cases import each_isa

pytestmark = pytest.mark.skipif(K.compiler() is None, reason="no C++ compiler for the kernel's test library")


@pytest.fixture(scope="module")
def kernel() -> K.Kernel:
    return K.Kernel(K.build())


@pytest.mark.parametrize("type_k, type_v", [*zip(KV_TYPES, KV_TYPES, strict=True), ("q8_0", "q4_0"), ("q4_1", "q5_0")])
@pytest.mark.parametrize(
    "dims, rot", [((64, 64), (64, 64)), ((128, 64), (128, 64)), ((96, 96), (0, 0)), ((512, 256), (512, 64))]
)
@pytest.mark.parametrize("with_rows", [(True, True), (True, False), (False, True)])
def test_cells_and_rows(
    kernel: K.Kernel,
    type_k: str,
    type_v: str,
    dims: tuple[int, int],
    rot: tuple[int, int],
    with_rows: tuple[bool, bool],
):
    """The cells are those that are stored without rows. The rows are bit for bit what upstream stores in an F16 cache
    with the same rotation; the rows of no token stay as they were."""
    rng = np.random.default_rng(25)
    n_tokens, n_cells, n_rows = 7, 12, 20
    cells = rng.permutation(n_cells)[:n_tokens].astype(np.int64)
    rows = rng.permutation(n_rows)[:n_tokens].astype(np.int64)
    k, v = (rng.standard_normal((n_tokens, 3, dim)).astype(np.float32) * 3 for dim in dims)
    k[1, 1, 5] = 900  # a pivot
    wanted_rows = kernel.store(k, v, ("f16", "f16"), rows, n_rows, rot, fused=False)
    wanted_rows = tuple(x for x, has in zip(wanted_rows, with_rows, strict=True) if has)
    for isa in each_isa(kernel):
        wanted = kernel.store(k, v, (type_k, type_v), cells, n_cells, rot, fused=True)
        for n_threads in (1, 2, 5):
            made = kernel.store(
                k, v, (type_k, type_v), cells, n_cells, rot,
                fused=True, n_threads=n_threads, rows=rows, n_rows=n_rows, with_rows=with_rows,
            )  # fmt: skip
            assert made[:2] == wanted, f"{isa}, {n_threads} threads: cells"
            assert made[2:] == wanted_rows, f"{isa}, {n_threads} threads: rows"


def test_thread_sanitizer(kernel: K.Kernel, tmp_path: Path):
    """Threads of one node write to no common place."""
    program = tmp_path / "store_threads"
    ggml = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or library_path())
    sources = [x for x in sorted(K.ATTENTION.rglob("*.cpp")) if x.name != "attention.cpp"]
    sources.append(K.NATIVE / "tests" / "store_threads.cpp")
    command = [K.compiler(), "-std=c++17", "-O0", "-g", "-fsanitize=thread", "-pthread"]
    command += ["-I", K.ggml_include(K.ROOT / "build" / "kernel"), "-I", K.NATIVE / "src", *sources]
    command += ["-L", ggml, "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{ggml}", "-o", program]
    made = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if "cannot find" in made.stderr and "tsan" in made.stderr:
        pytest.skip("the compiler has no ThreadSanitizer runtime")
    assert made.returncode == 0, made.stderr
    run = subprocess.run([program], env={**os.environ, "TSAN_OPTIONS": "exitcode=66"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
