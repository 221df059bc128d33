"""What measures a model without a prefix, or computes one, is not given the one in its GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest

from intactkv_export.libllama import Context, bindings
from intactkv_export.prefix import ikv
from intactkv_export.runtime import IntactLlama
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def made(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ikv.embed(smol.gguf, ikv.read(smol.bos), tmp_path_factory.mktemp("embedded") / "made.gguf")


def test_contexts_of_the_engines(made: Path, smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for gguf, named in ((made, None), (smol.gguf, None), (smol.gguf, smol.ikv)):
        if named is not None:
            monkeypatch.setenv("LLAMA_INTACTKV", str(named))
        with Context(gguf, 64, "f16", 2) as context:
            assert bindings.prefix_names(context.ptr) == []
            context.decode(smol.tokens, 0)
            states.append(context.state())
    assert states[0] == states[1] == states[2]


def test_intact_llama_gives_what_it_was_told(made: Path, smol: Smol) -> None:
    """Evaluations, benchmarks and chats are such."""
    for prefix in (None, "auto", smol.ikv):
        llama = IntactLlama(made, prefix, "q8_0", n_ctx=256, n_threads=2)
        assert bindings.prefix_names(llama.ctx) == {None: [], "auto": [str(made)], smol.ikv: [str(smol.ikv)]}[prefix]
        llama.eval([*smol.tokens, 100])
        assert bindings.n_not_computed(llama.ctx) == 0
        assert llama.intact_cells == {None: 0, "auto": 1, smol.ikv: len(smol.tokens)}[prefix]
        llama.close()
