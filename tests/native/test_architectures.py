"""Intact cells in other architectures: sliding windows, soft-capped logits, other head sizes, no KV cache at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from intactkv_export import library
from tests.support import lowlevel, random_models
from tests.support.lowlevel import Context

NAMES = ["llama-mha", "qwen3", "gemma2", "gemma3", "phi3-partial", "mixtral"]
N_PREFIX = 20  # more than the sliding window of 8


def convert(directory: Path) -> Path:
    out = directory.with_name(directory.name + ".gguf")
    command = [sys.executable, str(library.converter_path()), str(directory), "--outtype", "f32", "--outfile", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("random")
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = convert(random_models.build(name, root / name))
        return made[name]

    return get


def tokens(n: int, seed: int = 0) -> list[int]:
    return [1, *(int(t) for t in np.random.default_rng(seed).integers(6, random_models.VOCAB - 16, n - 1))]


@pytest.mark.parametrize("swa_full", [False, True], ids=["window", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_intact_cells(gguf: Callable[[str], Path], name: str, swa_full: bool) -> None:
    if swa_full and name not in ("gemma2", "gemma3"):
        pytest.skip("no sliding window")
    weights = lowlevel.load_model(gguf(name))
    prefix, text = tokens(N_PREFIX), tokens(60, seed=1)
    params = dict(n_ctx=512, n_batch=512, n_ubatch=512, swa_full=swa_full)
    exact = Context(weights, "f16", **params)
    exact.decode(prefix, 0)
    state = exact.save()
    mixed, rounded = Context(weights, "q4_0", **params), Context(weights, "q4_0", **params)
    assert mixed.restore(state)
    assert mixed.n_intact() == N_PREFIX and mixed.attention() != "stock"
    saved = mixed.save()
    rounded.decode(prefix, 0)
    expected = exact.decode(text[:1], N_PREFIX)
    got, plain = mixed.decode(text[:1], N_PREFIX), rounded.decode(text[:1], N_PREFIX)
    # not KL divergence: logits of random weights can be so large that the softmax is all zeros and a one
    assert np.linalg.norm(got - expected) < np.linalg.norm(plain - expected)
    # on and on, past the window and to the next graph; then again from the saved state: the same bits
    first = mixed.decode(text[1:], N_PREFIX + 1)
    assert mixed.n_intact() == N_PREFIX
    again = Context(weights, "q4_0", **params)
    assert again.restore(saved)
    np.testing.assert_array_equal(again.decode(text[:1], N_PREFIX), got)
    np.testing.assert_array_equal(again.decode(text[1:], N_PREFIX + 1), first)
    assert np.isfinite(first).all()
