"""A model that can carry no prefix runs as upstream has it: no arena, no automatic prefix, and no crash."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import own_process, random_architectures, upstream_archs

CODE = """
from tests.support import lowlevel
from tests.support.lowlevel import Context, L
model = lowlevel.load_model({path!r})
ctx = Context(model, "f16", tail=None, n_ctx=256, n_batch=256, n_ubatch=64)
if L.llama_model_has_encoder(model):
    batch = L.llama_batch_get_one((L.llama_token * 3)(7, 8, 9), 3)
    assert L.llama_encode(ctx.ptr, batch) == 0
print(ctx.decode([5, 6, 7], 0).shape, ctx.n_intact(), ctx.n_prefixes())
"""


def check(path: Path) -> None:
    """In a process of its own, as it may crash."""
    done = own_process.run(CODE.format(path=str(path)))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("(3, ") and done.stdout.endswith(" 0 0\n")


@pytest.mark.slow
@pytest.mark.skipif(not upstream_archs.can_build(), reason="no C++ compiler, or no libllama-common (make tools)")
def test_models_of_upstreams_test(tmp_path: Path) -> None:
    """M-RoPE, latents, an indexer beside them, hybrid, recurrent: whether they are refused or not."""
    made = upstream_archs.make(tmp_path, ("qwen2vl", "deepseek2", "deepseek32", "jamba", "mamba"))
    assert not made.crashed and len(made.paths) == 5
    for path in made.paths.values():
        check(path)


@pytest.mark.slow
def test_encoder_and_decoder(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = random_architectures.build("T5", tmp_path / "t5")
    assert random_architectures.to_gguf([source]) == {}
    check(tmp_path / "t5.gguf")
