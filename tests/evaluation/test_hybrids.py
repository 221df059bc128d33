"""Models with recurrent layers: measured as others, but their prefix cannot be cut to its first token."""

from __future__ import annotations

from pathlib import Path

import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.errors import UsageError
from intactkv_export.evaluation import evaluate
from intactkv_export.prefix import ikv
from tests.support import hybrids


def test_no_mode_of_the_first_token(tmp_path: Path) -> None:
    model = hybrids.write_rwkv7(tmp_path / "rwkv7.gguf")
    reference = {"sha256": "1" * 64}
    about, K, V, states = llama_engine.compute(model, hybrids.TOKENS[:4], n_threads=2)
    data = ikv.build(
        about,
        hybrids.TOKENS[:4],
        K,
        V,
        {**hybrids.ORIGIN, "reference": {**hybrids.ORIGIN["reference"], **reference}},
        states,
    )
    (tmp_path / "rwkv7.ikv").write_bytes(data)
    with pytest.raises(
        UsageError, match="'bos': its prefix has states of recurrent layers .* --bos-only .*, only plain"
    ):
        next(evaluate(model, [model], modes=["bos"]))
