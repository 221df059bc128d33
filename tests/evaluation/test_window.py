"""eval --window beside llama-perplexity itself: the same text, the same tokens, the same figure."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from intactkv_export import evaluation, library
from intactkv_export.cli.main import app
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation import Texts
from intactkv_export.texts import cut_windows, default_text
from tests.support.smol import Smol

WINDOW, N = 64, 4
# SmolLM2's vocabulary adds no first token of itself
FIRST = ["--override-kv", "tokenizer.ggml.add_bos_token=bool:true"]


def perplexity(*arguments: Any, prefixes: str) -> str:
    """What llama-perplexity says, on an F16 cache."""
    program = library.programs_path() / "llama-perplexity"
    command = [program, "-c", WINDOW, "-t", 2, "-fa", "on", "--no-escape", *FIRST, *arguments]
    environment = {**library.environment(patient=True), "LLAMA_INTACTKV": prefixes}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def divergence(said: str) -> float:
    found = re.search(r"Mean    KLD: +([\d.]+)", said)
    assert found, said[-2000:]
    return float(found[1])


@pytest.mark.slow
def test_it_measures_what_llama_perplexity_does(smol: Smol, tmp_path: Path) -> None:
    """Plain and behind the first token's prefix, which the program has from the library, by no flag of ours."""
    try:
        library.programs_path()
    except IntactKVError as error:
        pytest.skip(f"{error} (`make tools`)")
    text, base = tmp_path / "text.txt", tmp_path / "base.kld"
    text.write_text(default_text(whole=True)[100_000:104_000] + "\n")
    perplexity("-m", smol.reference, "-f", text, "--chunks", N, "--kl-divergence-base", base, prefixes="off")
    tokens = memoryview(base.read_bytes())[20:].cast("i")[: WINDOW * N].tolist()
    assert [tokens[i * WINDOW + 1 : (i + 1) * WINDOW - 1] for i in range(N)] == cut_windows(
        smol.reference, text.read_text(), N, WINDOW
    )
    theirs = {
        mode: divergence(
            perplexity("-m", smol.gguf, "-f", text, "--kl-divergence", "--kl-divergence-base", base, prefixes=named)
        )
        for mode, named in (("plain", "off"), ("prompt", str(smol.bos)))
    }
    paths = [*map(str, (smol.reference, smol.gguf)), "--prefix", str(smol.bos), "--text", str(text)]
    numbers = ["--window", str(WINDOW), "--chunks", str(N), "--threads", "2"]
    done = CliRunner().invoke(app, ["eval", *paths, "--kv-type", "f16", *numbers, "--json"])
    assert done.exit_code == 0, done
    ours = {r["mode"]: r["kld"]["mean"] for r in json.loads(done.stdout)["results"]}
    for mode, kld in theirs.items():
        assert ours[mode] == pytest.approx(kld, rel=0.03), (ours, theirs)
    assert abs(ours["plain"] - ours["prompt"]) > 0.1 * ours["plain"]  # so neither is the other


def test_what_cannot_be_windows(smol: Smol) -> None:
    def evaluate(**kwargs: Any) -> None:
        given = {"prefix": smol.bos, "window": WINDOW, "texts": Texts(2, text=default_text()), **kwargs}
        list(evaluation.evaluate(smol.reference, [smol.gguf], **given))

    for kwargs, said in (
        ({"prefix": smol.ikv}, f"has {len(smol.tokens)}: give a prefix of the first token"),
        ({"system_prompt": "You are terse."}, "a system prompt more"),
        ({"depths": [16]}, "leave out --depths or --window"),
        ({"window": 4}, "a window of 4 tokens measures nothing"),
        ({"texts": Texts(2, text=evaluation.SELF)}, "windows are cut from a text"),
    ):
        with pytest.raises(UsageError, match=said):
            evaluate(**kwargs)
    with pytest.raises(IntactKVError, match="2 windows of 64 need 128: give a longer text"):
        evaluate(texts=Texts(2, text="A short text."))
