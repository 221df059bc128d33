"""What cannot be evaluated: KV types that a model cannot have beside those it can, texts beyond its context."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from intactkv_export import evaluation, library
from intactkv_export.cli.main import main
from intactkv_export.conversion import convert
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation import Texts
from tests.support import random_models
from tests.support.smol import Smol

pytestmark = pytest.mark.skipif(not library.is_patched(), reason="the libraries cannot describe a model")


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_no_block_divides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """80 values are no multiple of the 32 of a q8_0 block: f16 is measured, the others are named."""
    pytest.importorskip("torch")
    path = random_models.build("llama-head80", tmp_path / "hf")
    convert(path, tmp_path / "x", quant="Q8_0")
    command = ["eval", str(path), str(tmp_path / "x.gguf"), "--tokens", "16", "--chunks", "1"]
    command += ["--kv-type", "q8_0,f16,q4_0", "--modes", "plain"]
    assert main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "f16 plain" in said
    for name in ("q8_0", "q4_0"):
        assert f"{name} is not possible: " in said and "its heads are 80 values wide" in said
    assert main([*command, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [(x["kv_type"], x["mode"]) for x in made["results"]] == [("f16", "plain")]
    assert [(x["model"], x["kv_type"]) for x in made["impossible"]] == [("x", "q8_0"), ("x", "q4_0")]
    with pytest.raises(IntactKVError, match="cannot be q8_0, its heads are 80 values wide"):
        list(evaluation.evaluate(path, [tmp_path / "x.gguf"], kv_types=["q8_0"], texts=Texts(1, 16)))


def test_a_text_beyond_the_context_is_refused_before_the_work(smol: Smol) -> None:
    seen: list[str] = []
    with pytest.raises(UsageError, match=r"9000 tokens behind the prefix of 24 makes 9024, and .* trained for 8192"):
        list(
            evaluation.evaluate(
                smol.reference, [smol.gguf], smol.ikv, texts=Texts(1, 9000), progress=lambda *step: seen.append(step[0])
            )
        )
    assert seen == []
    with pytest.raises(UsageError, match="8192 tokens behind the prefix of 1 makes 8193"):
        list(evaluation.evaluate(smol.reference, [smol.gguf], smol.bos, texts=Texts(tokens=[[1] * 8192])))
