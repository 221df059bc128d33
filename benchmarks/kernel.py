"""The fused kernel and upstream's attention op as Python functions over numpy arrays.

Builds native/tests/attention_test.cpp with the kernel's own sources against the installed ggml libraries (a compiler is
needed), once per state of the sources, under build/kernel/.
"""

from __future__ import annotations

import ctypes as C
import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NATIVE = ROOT / "native"
ATTENTION = NATIVE / "src" / "attention"

# ggml_type, ggml.h of the pinned source
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}
# bytes of 32 values
BLOCK_BYTES = {"f16": 64, "bf16": 64, "q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}


class _Case(C.Structure):
    _fields_ = (
        [(n, C.c_int32) for n in ("dim_k", "dim_v", "n_head", "n_head_kv", "n_tokens", "n_kv", "n_stream")]
        + [(n, C.c_int32) for n in ("type_k", "type_v", "mask_heads", "mask_streams", "mask_tokens", "n_rows")]
        + [(n, C.c_int32) for n in ("rot_k", "rot_v")]
        + [(n, C.c_float) for n in ("scale", "max_bias", "softcap")]
        + [(n, C.c_void_p) for n in ("q", "k", "v", "mask", "sinks", "arena_k", "arena_v", "row_of_cell")]
    )


@dataclass
class Case:
    """One attention call. float32 unless said otherwise; None where optional.

    q [n_stream, n_tokens, n_head, dim_k], k [n_stream, n_kv, n_head_kv, dim_k], v likewise with dim_v,
    mask float16 [mask_streams, mask_heads, >= n_tokens, n_kv], sinks [n_head],
    arena_k and arena_v [n_rows, n_head_kv, dim], row_of_cell int32 [n_stream, n_kv] (-1: ordinary).
    latents: V is the first values of K's rows, and arena_v of arena_k's; of one KV head.
    rot_k, rot_v: K and V are given as a rotated cache holds them, in blocks of so many values; q is not rotated, and
    the result is turned back (fused attention only).
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    type_k: str
    type_v: str
    mask: np.ndarray | None = None
    sinks: np.ndarray | None = None
    arena_k: np.ndarray | None = None
    arena_v: np.ndarray | None = None
    row_of_cell: np.ndarray | None = None
    scale: float = 1.0
    max_bias: float = 0.0
    softcap: float = 0.0
    rot_k: int = 0
    rot_v: int = 0
    latents: bool = False


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def sources() -> list[Path]:
    """The translation units of fused attention and the C entry points around them."""
    return [*sorted(ATTENTION.rglob("*.cpp")), NATIVE / "tests" / "attention_test.cpp"]


def sources_without_ggml() -> list[Path]:
    """The kernel as a program that needs no ggml library: for emulators and sanitizers."""
    targets = sorted((ATTENTION / "targets").glob("*.cpp"))
    return [ATTENTION / "call.cpp", *targets, NATIVE / "tests" / "attention_file.cpp"]


def ggml_include(build: Path) -> Path:
    """ggml's headers, taken from the pinned source archive."""
    out = build / "include"
    if not (out / "ggml.h").is_file():
        command = [sys.executable, str(NATIVE / "get_source.py"), "--archive"]
        archive = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member in tar:
                if "/vendor/llama.cpp/ggml/include/" in member.name and member.name.endswith(".h"):
                    file = tar.extractfile(member)
                    assert file is not None
                    (out / Path(member.name).name).write_bytes(file.read())
    return out


def build(flags: tuple[str, ...] = ("-O3",), name: str = "native", ggml: Path | None = None) -> Path:
    """Compiles the shared library (if its sources changed) and returns its path.

    ggml: directory of the ggml libraries; the installed ones by default, or LLAMA_CPP_LIB_PATH.
    """
    if ggml is None:
        if directory := os.environ.get("LLAMA_CPP_LIB_PATH"):
            ggml = Path(directory)
        else:
            from intactkv_export.library import library_path

            ggml = library_path()
    work = ROOT / "build" / "kernel"
    include = ggml_include(work)
    compile_flags = ["-std=c++17", "-fPIC", "-pthread", *flags, "-I", str(include), "-I", str(NATIVE / "src")]
    hashed = hashlib.sha256(" ".join([compiler() or "", str(ggml), *compile_flags]).encode())
    for path in [*sources(), *sorted(ATTENTION.rglob("*.h"))]:
        hashed.update(path.read_bytes())
    library = work / f"{name}-{hashed.hexdigest()[:16]}.so"
    if library.is_file():
        return library
    objects = work / f"{library.stem}.{os.getpid()}"
    objects.mkdir()
    try:
        running = []
        for source in sources():
            target = objects / (source.stem + ".o")
            command = [compiler() or "g++", *compile_flags, "-c", str(source), "-o", str(target)]
            running.append((source, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
            if len(running) % (os.cpu_count() or 1) == 0:
                _finish(running)
        _finish(running)
        partial = objects / library.name
        link = [compiler() or "g++", "-shared", "-pthread", *flags, *map(str, sorted(objects.glob("*.o")))]
        link += ["-L", str(ggml), "-lggml-base", "-lggml-cpu", f"-Wl,-rpath,{ggml}", "-o", str(partial)]
        subprocess.run(link, check=True)
        for old in work.glob(f"{name}-*.so"):
            old.unlink()
        partial.rename(library)
    finally:
        shutil.rmtree(objects)
    return library


def build_of(checkout: Path) -> Path:
    """What build() of another checkout of this repository makes there, of its kernel."""
    command = [sys.executable, "-c", "from benchmarks import kernel; print(kernel.build())"]
    return Path(subprocess.run(command, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


def _finish(running: list) -> None:
    while running:
        source, process = running.pop()
        _, error = process.communicate()
        if process.returncode != 0:
            raise RuntimeError(f"{source.name} does not compile: {error}")


class Kernel:
    """The library that build() made."""

    def __init__(self, path: Path):
        self.lib = C.CDLL(str(path))
        self.lib.fused_test_isa.argtypes = [C.c_char_p]
        self.lib.fused_test_isa.restype = C.c_bool
        self.lib.fused_test_chosen.restype = C.c_char_p
        self.lib.fused_test_round.argtypes = [C.c_int32, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64]
        self.lib.fused_test_round.restype = None
        self.lib.fused_test_quantize.argtypes = [C.c_int32, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64]
        self.lib.fused_test_quantize.restype = C.c_int64
        self.lib.fused_test_read_bandwidth.argtypes = [C.c_int32, C.c_int64, C.c_int32]
        self.lib.fused_test_read_bandwidth.restype = C.c_double
        run = self.lib.fused_test_run
        run.argtypes = [C.POINTER(_Case), C.c_int32, C.c_int32, C.c_void_p, C.c_int32, C.c_int32, C.c_void_p]
        run.restype = C.c_bool

    def choose(self, isa: str | None) -> bool:
        """Uses this instruction set from now on (None: the best). False: this machine has not got it."""
        return self.lib.fused_test_isa(isa.encode() if isa else None)

    def isa(self) -> str:
        return self.lib.fused_test_chosen().decode()

    def rounded(self, values: np.ndarray, kv_type: str) -> np.ndarray:
        """What a cache of this type holds of the values [..., n_head_kv, dim]; rows are quantized as a whole."""
        values = np.ascontiguousarray(values, np.float32)
        out = np.empty_like(values)
        row = values.shape[-1] * values.shape[-2]
        self.lib.fused_test_round(TYPES[kv_type], values.ctypes.data, out.ctypes.data, values.size, row)
        return out

    def quantized(self, values: np.ndarray, kv_type: str) -> bytes:
        """The bytes that a cache of this type holds of the values [..., n_head_kv, dim]."""
        values = np.ascontiguousarray(values, np.float32)
        row = values.shape[-1] * values.shape[-2]
        kv = TYPES[kv_type]
        out = C.create_string_buffer(self.lib.fused_test_quantize(kv, None, None, values.size, row))
        self.lib.fused_test_quantize(kv, values.ctypes.data, out, values.size, row)
        return out.raw

    def write(self, case: Case, path: Path) -> None:
        """Writes the case as native/tests/attention_file.cpp reads it."""
        n_stream, n_tokens, n_head, dim_k = case.q.shape
        _, n_kv, n_head_kv, dim_v = case.v.shape
        k, v = self.quantized(case.k, case.type_k), b"" if case.latents else self.quantized(case.v, case.type_v)
        mask = (0, 0, 0) if case.mask is None else case.mask.shape
        arena = case.arena_k if case.arena_k is not None else case.arena_v
        header = struct.pack(
            "<15i3f5i",
            *(dim_k, dim_v, n_head, n_head_kv, n_tokens, n_kv, n_stream, TYPES[case.type_k], TYPES[case.type_v]),
            *(mask[1], mask[0], mask[2], 0 if arena is None else len(arena)),
            *(case.rot_k, case.rot_v),
            *(case.scale, case.max_bias, case.softcap),
            *(len(k) // (n_stream * n_kv), len(v) // (n_stream * n_kv)),
            *(case.sinks is not None, case.arena_k is not None, case.arena_v is not None and not case.latents),
        )
        arrays = [
            (case.mask, "<f2"),
            (case.sinks, "<f4"),
            (case.arena_k, "<f2"),
            (None if case.latents else case.arena_v, "<f2"),
            (case.row_of_cell, "<i4"),
        ]
        rest = [np.ascontiguousarray(array, dtype).tobytes() for array, dtype in arrays if array is not None]
        path.write_bytes(b"".join([header, case.q.astype("<f4").tobytes(), k, v, *rest]))

    def store(
        self,
        k: np.ndarray,
        v: np.ndarray,
        types: tuple[str, str],
        cells: np.ndarray,
        n_cells: int,
        rot: tuple[int, int],
        *,
        fused: bool,
        n_threads: int = 1,
        rows: np.ndarray | None = None,
        n_rows: int = 0,
        with_rows: tuple[bool, bool] = (True, True),
    ) -> tuple[bytes, ...]:
        """The bytes of a cache of n_cells, zero before, after K [n_tokens, n_head_kv, dim] and V went into cells
        (int64 [n_tokens]): by upstream's nodes or by fused_store().

        rows (int64 [n_tokens]): which of n_rows F16 rows, zero before, fused_store() writes besides, of K and of V if
        with_rows says so; their bytes follow."""
        n_tokens, n_head_kv, dim_k = k.shape
        dim_v = v.shape[-1]
        out = [
            C.create_string_buffer(n_cells * n_head_kv * x.shape[-1] // 32 * BLOCK_BYTES[t])
            for x, t in zip((k, v), types, strict=True)
        ]
        row_out = [
            C.create_string_buffer(n_rows * n_head_kv * x.shape[-1] * 2) if n_rows and has else None
            for x, has in zip((k, v), with_rows, strict=True)
        ]
        self.lib.fused_test_store(
            int(fused), n_threads, *(TYPES[t] for t in types), dim_k, dim_v, n_head_kv, n_tokens, n_cells, *rot,
            k.ctypes.data_as(C.c_void_p), v.ctypes.data_as(C.c_void_p), cells.ctypes.data_as(C.c_void_p), *out,
            n_rows, None if rows is None else rows.ctypes.data_as(C.c_void_p), *row_out,
        )  # fmt: skip
        return tuple(x.raw for x in [*out, *row_out] if x is not None)

    def widened(self, values: np.ndarray) -> np.ndarray:
        """float16 values as float32, by the chosen instruction set."""
        out = np.empty(values.shape, np.float32)
        self.lib.fused_test_widen(
            values.ctypes.data_as(C.c_void_p), out.ctypes.data_as(C.c_void_p), C.c_int64(out.size)
        )
        return out

    def run(
        self, case: Case, *, fused: bool, n_threads: int = 1, repeat: int = 0, n_layer: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Result float32 [n_stream, n_tokens, n_head, dim_v], and the seconds of `repeat` more runs, which use
        n_layer copies of K and V in turn. Raises ValueError if fused attention does not support the case."""
        return self._run(case, int(fused), n_threads, repeat, n_layer)

    def compare(self, case: Case, *, n_threads: int, repeat: int, n_layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Seconds [repeat] of fused attention and of upstream's op, run in turn."""
        _, seconds = self._run(case, 2, n_threads, repeat, n_layer)
        return seconds[::2], seconds[1::2]

    def read_bandwidth(self, n_threads: int, n_bytes: int = 1 << 29, repeat: int = 8) -> float:
        """Bytes per second that n_threads read together, the best of some tries."""
        return self.lib.fused_test_read_bandwidth(n_threads, n_bytes, repeat)

    def _run(self, case: Case, which: int, n_threads: int, repeat: int, n_layer: int) -> tuple[np.ndarray, np.ndarray]:
        n_stream, n_tokens, n_head, dim_k = case.q.shape
        _, n_kv, n_head_kv, dim_v = case.v.shape
        keep = []

        def pointer(a: np.ndarray | None, dtype: type) -> int | None:
            if a is None:
                return None
            keep.append(np.ascontiguousarray(a, dtype))
            return keep[-1].ctypes.data

        mask = (0, 0, 0) if case.mask is None else case.mask.shape
        arena = case.arena_k if case.arena_k is not None else case.arena_v
        c = _Case(
            dim_k, dim_v, n_head, n_head_kv, n_tokens, n_kv, n_stream,
            TYPES[case.type_k], TYPES[case.type_v],
            mask[1], mask[0], mask[2], 0 if arena is None else len(arena),
            case.rot_k, case.rot_v, case.scale, case.max_bias, case.softcap,
            pointer(case.q, np.float32), pointer(case.k, np.float32),
            pointer(None if case.latents else case.v, np.float32),
            pointer(case.mask, np.float16), pointer(case.sinks, np.float32),
            pointer(case.arena_k, np.float32),
            pointer(None if case.latents else case.arena_v, np.float32),
            pointer(case.row_of_cell, np.int32),
        )  # fmt: skip
        out = np.full((n_stream, n_tokens, n_head, dim_v), np.nan, np.float32)
        seconds = np.zeros(repeat * (2 if which == 2 else 1))
        ok = self.lib.fused_test_run(
            C.byref(c), which, n_threads, out.ctypes.data, repeat, n_layer, seconds.ctypes.data
        )
        if not ok:
            raise ValueError(
                f"fused attention does not support K {case.type_k} of head size {dim_k}, V {case.type_v} of {dim_v}"
            )
        return out, seconds
