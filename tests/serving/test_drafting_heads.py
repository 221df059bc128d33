"""llama-server with a drafting head (--spec-type draft-mtp) behind a prefix: the reply that it gives without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.prefix import ikv
from tests.support import drafting_heads, hybrids, upstream_archs
from tests.support.hybrids import TOKENS
from tests.support.llama_server import Server

N = 20
PROMPTS = TOKENS[:40], TOKENS[:30] + TOKENS[5:15]  # the second goes on from the first's cells


def replies(gguf: Path, prefixes: str, *options: str) -> list[list[int]]:
    said = []
    with Server(gguf, options=("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on", *options), prefixes=prefixes) as server:
        for prompt in PROMPTS:
            body = {"prompt": prompt, "n_predict": 24, "temperature": 0, "return_tokens": True}
            answer = server.ask("/completion", body)
            assert ("draft_n" in answer["timings"]) == bool(options)
            said.append(answer["tokens"])
    return said


@pytest.mark.slow
@pytest.mark.skipif(not upstream_archs.can_build(), reason="no compiler, or no libllama-common (make tools)")
@pytest.mark.parametrize("name", ["qwen35-dense", "deepseek2-moe"])
def test_the_same_reply(tmp_path: Path, name: str) -> None:
    made = upstream_archs.make(tmp_path, [name.rpartition("-")[0]]).paths[name]
    gguf, file = drafting_heads.append(made, tmp_path / "head.gguf"), tmp_path / "prefix.ikv"
    model, K, V, states = llama_engine.compute(gguf, TOKENS[:N], cache_dtype="f16", n_threads=1)
    for of in (K, V):  # others than are computed, so that it shows who sees them
        of.update({il: (rows * 0.7).astype(np.float16) for il, rows in of.items()})
    file.write_bytes(ikv.build(model, TOKENS[:N], K, V, hybrids.ORIGIN, states))
    alone = replies(gguf, str(file))
    assert replies(gguf, str(file), "--spec-type", "draft-mtp") == alone
    assert replies(gguf, "off") != alone
