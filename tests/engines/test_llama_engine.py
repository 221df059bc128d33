"""The llama engine against the torch engine in float32: the real SmolLM2, and structures of other models."""

from __future__ import annotations

import os

import numpy as np
import pytest

from intactkv_export import library, work
from intactkv_export.engines import llama_engine as engine
from intactkv_export.engines import torch_engine as torch_engine
from intactkv_export.engines.rows import to_float16
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import state
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.models import weights
from intactkv_export.prefix import make_prompt
from tests.support import random_models

pytestmark = pytest.mark.skipif(not library.is_patched(), reason="the libraries cannot describe a model")
ROUNDING = 2.3e-4  # relative error of one rounding to float16, as measured: 2.04e-4 to 2.21e-4


@pytest.fixture(scope="module")
def tokens(model):
    from intactkv_export.models import gguf_file

    with Vocabulary(model("F16")) as vocabulary:
        template = gguf_file.read(model("F16")).values["tokenizer.chat_template"]
        return make_prompt(vocabulary, template, None).tokens


@pytest.fixture(scope="module")
def f32(model, models_dir):
    path = models_dir / "F32.gguf"
    if not path.is_file():
        partial = path.with_name(f"F32.gguf.{os.getpid()}")
        weights.quantize(model("F16"), partial, "F32", n_threads=2)
        partial.rename(path)
    return path


def errors(a, b):
    """Relative error of each layer, [n_layer]."""
    assert sorted(a) == sorted(b)
    return np.array([np.linalg.norm(np.float64(a[il]) - b[il]) / np.linalg.norm(np.float64(b[il])) for il in sorted(b)])


def test_agrees_with_torch_to_the_rounding(model, hf_dir, f32, tokens):
    """Weights at F32 leave the one rounding to float16; the other ways cost what the module's docstring says."""
    about, K, V, _ = engine.compute(f32, tokens, n_threads=2)
    truth = work.run(torch_engine.compute_float32, hf_dir, tokens, about).value[:2]
    for ours, theirs in zip((K, V), truth, strict=True):
        assert len(ours) == 30 and all(x.dtype == np.float16 and x.shape == (24, 3, 64) for x in ours.values())
        assert errors(ours, theirs).max() < ROUNDING
    for cache_dtype, k, v in (("f32", 5.1e-4, 1.0e-3), ("f16", 5.3e-4, 1.05e-3)):
        other, K, V, _ = engine.compute(model("F16"), tokens, cache_dtype=cache_dtype, n_threads=2)
        assert other == about
        assert errors(K, truth[0]).mean() == pytest.approx(k, rel=0.15)
        assert errors(V, truth[1]).mean() == pytest.approx(v, rel=0.15)


def test_one_batch_or_many(model, tokens, monkeypatch):
    """A prefix longer than a batch is evaluated in parts: the same rows to the rounding of another order of sums."""
    seen = []
    tokens = (tokens * 4)[:80]
    _, K, V, _ = engine.compute(model("F16"), tokens, n_threads=2, progress=lambda *n: seen.append(n))
    monkeypatch.setattr(engine, "N_BATCH", 32)
    _, k, v, _ = engine.compute(model("F16"), tokens, n_threads=2, progress=lambda *n: seen.append(n))
    assert seen == [(80, 80), (32, 80), (64, 80), (80, 80)]
    assert errors(K, k).max() < 2e-3 and errors(V, v).max() < 2e-3
    first = {il: x[:32] for il, x in K.items()}, {il: x[:32] for il, x in k.items()}
    assert errors(*first).max() < 2e-3


@pytest.mark.parametrize("name, n_tokens, n_ctx", [("gemma3", 20, 0), ("gemma2", 20, 0), ("phi3-longrope", 20, 1024)])
def test_other_structures(tmp_path, name, n_tokens, n_ctx):
    """Two caches, one with a window that the prefix has left; factors of LongRoPE that depend on the context."""
    pytest.importorskip("torch")
    directory = random_models.build(name, tmp_path / name)
    gguf = tmp_path / "x.gguf"
    work.run(weights.huggingface_to_gguf, directory, gguf, "F32")
    tokens = [1, *range(100, 100 + n_tokens - 1)]
    about, K, V, _ = engine.compute(gguf, tokens, n_threads=2, n_ctx=n_ctx)
    assert about == engine.describe(gguf, max(n_ctx, n_tokens + 1))
    if n_ctx:
        assert about["rope"]["factors"] != engine.describe(gguf, n_tokens + 1)["rope"]["factors"]
    k, v, _ = torch_engine.compute_float32(directory, tokens, about)
    dropped = 0
    for cache in state.shapes(about):
        kept = cache.positions(n_tokens)
        gone = sorted(set(range(n_tokens)) - set(kept))
        dropped += len(gone) * len(cache.layers)
        for il in (layer.il for layer in cache.layers):
            for ours, theirs in ((K[il], k[il]), (V[il], v[il])):
                assert not ours[gone].any()
                assert np.linalg.norm(ours[kept] - theirs[kept]) < 4e-4 * np.linalg.norm(theirs[kept])
    assert bool(dropped) == name.startswith("gemma")


def test_refusals(model, tmp_path):
    with pytest.raises(UsageError, match="unknown cache type"):
        engine.compute(model("F16"), [1], cache_dtype="q8_0")
    with pytest.raises(IntactKVError, match="no model at"):
        engine.compute(tmp_path / "absent.gguf", [1])
    (tmp_path / "x.gguf").write_bytes(model("F16").read_bytes()[:3_000_000])
    with pytest.raises(IntactKVError, match="llama.cpp cannot run") as caught:
        engine.compute(tmp_path / "x.gguf", [1])
    assert "\n" not in str(caught.value)
    with pytest.raises(IntactKVError, match="cannot evaluate tokens 0 to 0"):
        engine.compute(model("F16"), [49152])


def test_beyond_float16():
    rows = {3: np.ones((2, 1, 4), np.float32)}
    rows[3][1, 0, 2] = 70000
    with pytest.raises(IntactKVError, match="K of layer 3, token 1, head 0 is 70000, beyond float16"):
        to_float16(rows, "K")
