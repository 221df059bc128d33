"""A first token in sight of all later ones, in torch: llama.cpp agrees, far behind the window too."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.libllama import bindings
from tests.support import in_sight, lowlevel
from tests.support.cache_rows import random_tokens
from tests.support.lowlevel import Context

N = 400  # tokens; the window has 8, its cache 256


@pytest.mark.parametrize(("kv", "tail"), [("f16", 0), ("q8_0", 0), ("q4_0", 6)])
@pytest.mark.parametrize(("name", "n_extra"), [("gemma2", 0), ("gemma3", 0), ("gemma3", 3)])
def test_logits_are_llama_cpps(models, name, n_extra, kv, tail, tmp_path):
    """Measured, relative to the logits: 4e-5 apart for f16, 5e-4 for q8_0, 4e-3 for q4_0 with a tail; 0.1 if the cells
    leave the windows."""
    gguf, (first, *text) = models[name].with_suffix(".gguf"), random_tokens(N + 1)
    prefix = in_sight.write(gguf, tmp_path / "x.ikv", first, n_extra)
    ctx = Context(lowlevel.load_model(gguf), kv, tail=tail, n_ctx=1024, n_batch=16, n_ubatch=16, swa_full=False)
    bindings.load(ctx.ptr, prefix.data)
    parts = [range(a, min(a + 16, N)) for a in range(0, N, 16)] if not tail else [range(i, i + 1) for i in range(N)]
    want = np.concatenate([ctx.decode([text[i] for i in part], 1 + part[0]) for part in parts])
    model = torch_model.load(models[name])
    K, V = torch_model.prefix_rows(prefix)

    def off(seen):
        """By how much the logits are apart: of the tokens just behind the prefix, and far behind the window."""
        cache = model.cache(K, V, kv, tail=tail, extra=n_extra, in_sight=seen)
        with torch.no_grad():
            got = torch.cat([model.forward([text[a : a + 100]], cache) for a in range(0, N, 100)], 1)[0].numpy()
        return [
            float(np.linalg.norm(got[at] - want[at]) / np.linalg.norm(want[at])) for at in (slice(6), slice(300, N))
        ]

    (near, far), (near_without, far_without) = off(prefix.in_sight), off(False)
    assert max(near, far) < {"f16": 1e-3, "q8_0": 5e-3, "q4_0": 0.05}[kv] and far < 0.1 * far_without
    assert near_without == near


def test_gradients_come_from_far_behind_the_window(models):
    """In pieces, as a long text is trained on: late pieces reach the rows of windowed layers only in sight."""
    model = torch_model.load(models["gemma3"])
    tokens = random_tokens(64)
    with torch.no_grad():
        cache = torch_model.layers.empty_cache(model)
        model.forward([tokens[:1]], cache)
        rows = torch_model.layers.cached_rows(model, cache, 1)
    for seen in (True, False):
        K, V = ([x.float().requires_grad_() for x in side] for side in rows)
        cache = None
        for at in range(1, 64, 21):
            cache = model.cache(K, V, "q8_0", grows=False, in_sight=seen, after=cache)
            logits = model.forward([tokens[at : at + 21]], cache)
        logits.logsumexp(-1).sum().backward()
        reached = [bool((v.grad != 0).any()) for v in V]
        assert reached == [seen or il % 6 == 5 for il in range(7)]
