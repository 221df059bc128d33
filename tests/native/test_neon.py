"""The NEON kernels, built with a cross compiler and run under an emulator, against float64 and the x86 kernels' bound.

Debian: apt-get install g++-aarch64-linux-gnu qemu-user-static. On a 64-bit ARM machine test_fused.py already runs them.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from benchmarks import kernel as K
from tests.support.attention_cases import (
    FITTED,
    error,
    exact,
    hadamard,
    random_case,
    rows_to_round,
    stored,
)

CROSS = shutil.which("aarch64-linux-gnu-g++")
QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

pytestmark = [
    pytest.mark.skipif(platform.machine() == "aarch64", reason="this machine is ARM: test_fused.py runs NEON"),
    pytest.mark.skipif(K.compiler() is None, reason="no C++ compiler for the kernel's test library"),
    pytest.mark.skipif(CROSS is None, reason="no aarch64-linux-gnu-g++ (package g++-aarch64-linux-gnu)"),
    pytest.mark.skipif(QEMU is None, reason="no qemu-aarch64 (package qemu-user-static)"),
]


@pytest.fixture(scope="module")
def kernel() -> K.Kernel:
    return K.Kernel(K.build())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """attention_file for 64-bit ARM, statically linked."""
    directory = tmp_path_factory.mktemp("neon")
    include = K.ggml_include(K.ROOT / "build" / "kernel")
    sources = K.sources_without_ggml()
    command = [CROSS, "-std=c++17", "-O2", "-static", "-pthread", "-I", include, "-I", K.NATIVE / "src", *sources]
    subprocess.run([*map(str, command), "-o", str(directory / "attention_file")], check=True)
    return directory / "attention_file"


def emulate(program: Path, kernel: K.Kernel, case: K.Case, isa: str, cpu: str) -> np.ndarray:
    """The case on the emulated CPU, cells that were split (their maxima are exponents of 2) merged in float64."""
    n_stream, n_tokens, n_head, _ = case.q.shape
    dim_v = case.v.shape[-1]
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    kernel.write(case, source)
    subprocess.run([str(QEMU), "-cpu", cpu, str(program), isa, str(source), str(target)], check=True)
    out = np.fromfile(target, "<f4").astype(np.float64)
    if out.size == n_stream * n_tokens * n_head * dim_v:
        return out.reshape(n_stream, n_tokens, n_head, dim_v)
    out = out.reshape(n_stream, -1, n_tokens, n_head, 2 + dim_v)
    top, total, values = out[..., 0], out[..., 1], out[..., 2:]
    if case.sinks is not None:
        sink = np.broadcast_to(case.sinks.astype(np.float64) * np.log2(np.e), top[:, :1].shape)
        top = np.concatenate([top, sink], 1)
        total = np.concatenate([total, np.ones_like(sink)], 1)
        values = np.concatenate([values, np.zeros_like(values[:, :1])], 1)
    weight = np.exp2(top - np.maximum(top.max(1, keepdims=True), -1e30)) * (total > 0)
    merged = (weight[..., None] * values).sum(1) / np.maximum((weight * total).sum(1), 1e-300)[..., None]
    return hadamard(merged, case.rot_v)


def check(program: Path, kernel: K.Kernel, case: K.Case) -> None:
    truth = exact(kernel, case)
    x86 = error(kernel.run(case, fused=True)[0], truth)
    for isa, cpu in [("neon-dotprod", "max"), ("neon", "cortex-a53"), ("portable", "cortex-a53")]:
        neon = error(emulate(program, kernel, case, isa, cpu), truth)
        assert neon <= 1.1 * x86 + 3e-6, f"{isa}: {neon:.3g}, x86 {x86:.3g}"


def test_dot_products_are_found_at_run_time(program: Path):
    found = {
        cpu: subprocess.run([str(QEMU), "-cpu", cpu, str(program), "neon-dotprod"]).returncode
        for cpu in ("max", "cortex-a53")
    }
    assert found == {"max": 0, "cortex-a53": 3}


@pytest.mark.parametrize("n_tokens", [1, 5, 40])
@pytest.mark.parametrize("kv_type", ["f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"])
def test_types(program: Path, kernel: K.Kernel, kv_type: str, n_tokens: int):
    check(program, kernel, random_case(1, type_k=kv_type, n_tokens=n_tokens, n_intact=30))


@pytest.mark.parametrize(
    "options",
    [
        {"dim_k": 80, "type_k": "f16"},
        {"dim_k": 128, "n_head": 8, "n_head_kv": 1},
        {"dim_k": 192, "dim_v": 128, "type_k": "q4_0", "n_tokens": 9},
        {"dim_k": 256, "mask": "values", "max_bias": 8.0, "n_tokens": 3},
        {"softcap": 10.0, "sinks": np.linspace(-2, 2, 6, dtype=np.float32), "n_kv": 900},
        {"mask": "random", "n_stream": 2, "n_tokens": 20, "sinks": np.zeros(6, np.float32)},
        {"n_kv": 1, "mask": None},
        {"dim_k": 128, "dim_v": 64, "rot_k": 128, "rot_v": 64},
        {"rot_k": 64, "rot_v": 64, "n_kv": 900, "n_tokens": 20},
        *(
            {
                "dim_k": 576,
                "dim_v": 512,
                "n_head_kv": 1,
                "latents": True,
                "type_k": kv_type,
                "n_tokens": n,
                "n_intact": 30,
            }
            for kv_type in ("f16", "q8_0", "q4_1")
            for n in (1, 7)
        ),
    ],
    ids=str,
)
def test_shapes_and_options(program: Path, kernel: K.Kernel, options: dict):
    check(program, kernel, random_case(2, **options))


@pytest.mark.parametrize("kv_type", FITTED)
def test_blocks_are_those_of_x86(program: Path, kernel: K.Kernel, kv_type: str):
    x = rows_to_round()
    want = stored(kernel, x, kv_type)
    source, target = program.with_suffix(".in"), program.with_suffix(".out")
    source.write_bytes(x.tobytes())
    for isa, cpu in [("neon-dotprod", "max"), ("neon", "cortex-a53"), ("portable", "cortex-a53")]:
        command = [QEMU, "-cpu", cpu, program, isa, source, target, K.TYPES[kv_type], x.size]
        subprocess.run([*map(str, command)], check=True)
        assert target.read_bytes()[: len(want)] == want, isa


def test_extreme_integers(program: Path, kernel: K.Kernel):
    case = random_case(3, n_kv=200, mask=None)
    case.q = np.where(case.q > 1.6, -1, 1).astype(np.float32)
    case.k = np.where(case.k > 3.2, -1, 1).astype(np.float32)
    check(program, kernel, case)
