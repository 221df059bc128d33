"""The C API through ctypes: every function, on a real model, and what it says when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import __version__
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def llama(smol: Smol) -> IntactLlama:
    return IntactLlama(smol.gguf, prefix=None, kv_type="q4_0", tail=0, n_ctx=256, n_threads=2)


def test_version_is_that_of_the_package() -> None:
    assert bindings.version() == __version__


def test_describe_is_what_a_manifest_holds(llama: IntactLlama, smol: Smol) -> None:
    model = bindings.describe(llama.ctx)
    assert (model["arch"], model["n_vocab"], len(model["caches"][0]["layers"])) == ("llama", 49152, 30)
    ours = ikv.read(smol.ikv).manifest["model"]
    assert model["vocab_sha256"] == ours["vocab_sha256"] and model["rope"] == ours["rope"]


def test_loading_makes_intact_cells_and_removing_them_unmakes_them(llama: IntactLlama, smol: Smol) -> None:
    data = smol.ikv.read_bytes()
    assert bindings.n_cells(llama.ctx) == bindings.arena_bytes(llama.ctx) == 0
    assert bindings.verify(data) == bindings.verify(data, llama.ctx) == 24
    assert bindings.n_cells(llama.ctx) == 0, "verifying must not load"
    assert bindings.load(llama.ctx, data) == 24
    assert bindings.n_cells(llama.ctx) == bindings.n_cells(llama.ctx, 0) == 24
    assert bindings.arena_bytes(llama.ctx) >= 24 * 30 * 2 * 192 * 2
    assert bindings.attention(llama.ctx) in ("fused", "portable")
    assert bindings.load_file(llama.ctx, smol.bos) == 1, "a prefix replaces the sequence"
    assert bindings.n_cells(llama.ctx) == 1
    llama._ctx.kv_cache_clear()
    assert bindings.n_cells(llama.ctx) == 0


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda ctx, data: bindings.load_file(ctx, "/nonexistent/x.ikv"), "/nonexistent/x.ikv"),
        (lambda ctx, data: bindings.load(ctx, b""), "0 bytes"),
        (lambda ctx, data: bindings.load(ctx, data[:-1]), "INTACTKV"),
        (lambda ctx, data: bindings.verify(data[:5000] + b"?" + data[5001:]), "SHA-256"),
        (lambda ctx, data: bindings.load(ctx, data, 7), "sequence 7"),
    ],
)
def test_failures_are_one_sentence_and_load_nothing(llama: IntactLlama, smol: Smol, call: Any, reason: str) -> None:
    with pytest.raises(IntactKVError) as caught:
        call(llama.ctx, smol.ikv.read_bytes())
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert bindings.n_cells(llama.ctx) == 0


def test_stock_attention_says_that_it_cannot_read_a_prefix(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ATTN", "stock")
    mixed = IntactLlama(smol.gguf, None, "q4_0", n_ctx=256)
    with pytest.raises(IntactKVError, match="INTACTKV_ATTN=stock cannot read F16 cells in a q4_0 cache"):
        bindings.load(mixed.ctx, smol.ikv.read_bytes())
    assert bindings.load(IntactLlama(smol.gguf, None, "f16", n_ctx=256).ctx, smol.ikv.read_bytes()) == len(smol.tokens)


def test_stock_libraries_are_named(stock_lib: Path) -> None:
    code = "from intactkv_export.libllama import bindings; bindings.version()"
    env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_lib)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert "IntactKVError: the llama.cpp libraries in" in done.stderr and str(stock_lib) in done.stderr
