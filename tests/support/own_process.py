"""Code in a process of its own: the environment is read when a context is made, and libraries are loaded once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.paths import REPO


def run(code: str, lib: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, as the environment is read when a context is made and libraries are loaded once."""
    full = {**os.environ, **env, "PYTHONPATH": str(REPO)}
    if lib:
        full["LLAMA_CPP_LIB_PATH"] = str(lib)
    return subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, timeout=900)


def load_state(model: Path, kv: str, state: Path, lib: Path | None) -> subprocess.CompletedProcess[str]:
    """llama_state_seq_load_file on the libraries in lib (None: ours); prints whether it did, how many tokens, why."""
    code = f"""
import ctypes
from tests.support import lowlevel
from tests.support.lowlevel import L
lines = []
keep = L.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
ctx = lowlevel.Context(lowlevel.load_model({str(model)!r}), {kv!r})
L.llama_log_set(keep, None)
out, n = (L.llama_token * 100)(), ctypes.c_size_t()
ok = L.llama_state_seq_load_file(ctx.ptr, {str(state)!r}.encode(), 0, out, 100, ctypes.byref(n))
print(bool(ok), n.value, "".join(lines).strip())
"""
    return run(code, lib=lib)
