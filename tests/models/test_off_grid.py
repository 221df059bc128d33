"""benchmarks.off_grid: the same function, and no weight on the grid it came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.off_grid import off_grid
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file, tensor_types, weights
from intactkv_export.texts import default_text
from tests.support import random_models
from tests.support.lowlevel import Context, load_model
from tests.support.paths import REPO


def log_probs(path: Path, tokens: list[int]) -> np.ndarray:
    """F64 [n_tokens, n_vocab]."""
    logits = Context(load_model(path), "f16").decode(tokens, 0).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kld(p: np.ndarray, q: np.ndarray) -> float:
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def off(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 off its grid, by the command."""
    out = tmp_path_factory.mktemp("off") / "off.gguf"
    command = [sys.executable, "-m", "benchmarks.off_grid", str(model("F16")), str(out)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def test_the_function_stays_and_the_grid_is_left(model: Any, off: Path, tmp_path: Path) -> None:
    with Vocabulary(model("F16")) as vocabulary:
        tokens = vocabulary.tokenize(default_text(), special=False)[:256]
    weights.quantize(off, tmp_path / "Q4_0.gguf", "Q4_0", n_threads=2)
    on_grid, same = log_probs(model("F16"), tokens), log_probs(off, tokens)
    plain, harder = log_probs(model("Q4_0"), tokens), log_probs(tmp_path / "Q4_0.gguf", tokens)
    assert kld(on_grid, same) < 1e-4, "the function"
    assert kld(same, harder) > 1.15 * kld(on_grid, plain) > 0.1, "the grid"


def test_metadata_and_shapes_are_kept(model: Any, off: Path) -> None:
    before, after = (gguf_file.read(path, arrays=True) for path in (model("F16"), off))
    assert dict(before.values) == dict(after.values)
    names = [{t.name: (t.shape, t.type) for t in made.tensors} for made in (before, after)]
    assert names[0] == names[1]
    assert not [path for path in off.parent.iterdir() if path != off], "no temporary file is left"


@pytest.mark.parametrize("name", ["llama-bias", "llama-gqa", "gemma3"])
def test_the_function_to_a_float(name: str, tmp_path: Path) -> None:
    """Biases, groups of query heads, norms behind matrices, tied embeddings and none: in F32, nothing is lost."""
    pytest.importorskip("torch")
    directory = random_models.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    source, out = tmp_path / f"{name}.gguf", tmp_path / "off.gguf"
    off_grid(source, out, f32=True)
    tokens = np.random.default_rng(0).integers(10, 400, 48).tolist()
    before, after = log_probs(source, tokens), log_probs(out, tokens)
    np.testing.assert_allclose(after, before, atol=0.03)  # the cache is F16
    changed = {
        t.name
        for a, b in zip(_tensors(source), _tensors(out), strict=True)
        for t in [a[0]]
        if not np.allclose(a[1], b[1])
    }
    assert {"blk.0.attn_norm.weight", "blk.0.attn_v.weight", "blk.0.attn_output.weight"} <= changed
    assert ("blk.0.attn_v.bias" in changed) == (name == "llama-bias")
    assert ("output_norm.weight" in changed) == (name != "gemma3"), "tied: the embedding reads it too"
    assert "token_embd.weight" not in changed and "blk.0.post_ffw_norm.weight" not in changed


def _tensors(path: Path) -> list[tuple[gguf_file.Tensor, np.ndarray]]:
    found = gguf_file.read(path).tensors
    assert all(tensor_types.type_name(t.type) == "F32" for t in found)
    return [(t, np.memmap(path, np.float32, "r", t.offset, t.shape[::-1])) for t in sorted(found, key=lambda t: t.name)]


def test_what_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized, .*--allow-requantize widens it"):
        off_grid(model("Q4_0"), tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="is the model itself"):
        off_grid(model("F16"), model("F16"))
    with open(tmp_path / "other.gguf", "wb") as file:
        gguf_file.copy(model("F16"), file, {"general.architecture": "phi3"})
    with pytest.raises(UsageError, match="of the architecture phi3"):
        off_grid(tmp_path / "other.gguf", tmp_path / "x.gguf")
    with open(tmp_path / "stamped.gguf", "wb") as file:
        gguf_file.copy(model("F16"), file, {"intactkv.reference": "abc"})
    with pytest.raises(UsageError, match="give the reference itself"):
        off_grid(tmp_path / "stamped.gguf", tmp_path / "x.gguf")
    with pytest.raises(IntactKVError, match="does not fit F16 any more"):
        off_grid(model("F16"), tmp_path / "x.gguf", sigma=8)
    assert not (tmp_path / "x.gguf").exists()
