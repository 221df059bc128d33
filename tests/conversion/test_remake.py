"""prefix REFERENCE --like FILE: the same tokens, by the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.cli.main import main
from intactkv_export.conversion import remake
from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.prefix import ikv
from tests.support.smol import Smol


def changed(prefix: ikv.Prefix, out: Path, factor: float = 1.0, **changes: Any) -> Path:
    """A prefix with other rows and other fields of its manifest."""
    rest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    rows = [{x.il: (getattr(x, side) * factor).astype(np.float16) for x in prefix.layers} for side in "KV"]
    model = {**prefix.manifest["model"], **changes.pop("model", {})}
    out.write_bytes(ikv.build(model, prefix.tokens, *rows, {**rest, **changes}))
    return out


def test_it_has_the_tokens_of_one_and_the_rows_of_the_reference(
    smol: Smol, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Made by the quantized model: other rows. Made again: those that the reference has for these tokens."""
    full = ikv.read(smol.ikv)
    description, K, V, _ = llama_engine.compute(smol.gguf, full.tokens, cache_dtype="f16", n_threads=2)
    about = {k: v for k, v in full.manifest.items() if k not in ("format", "tokens", "model")}
    own = {"model": "smol.gguf", "weights_sha256": "0" * 64, "n_bytes": 1, "mtime_ns": 1, "requests": 3}
    kept = tmp_path / "kept-0123456789abcdef.ikv"
    kept.write_bytes(ikv.build(description, full.tokens, K, V, {**about, "kept": own, "messages": None}))
    before = kept.read_bytes()
    out = tmp_path / "agent.ikv"
    assert main(["prefix", str(smol.reference), "--like", str(kept), "-o", str(tmp_path / "agent"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n_tokens"] == len(full.tokens)
    made = ikv.read(out)
    assert kept.read_bytes() == before and ikv.read(kept).kept == own
    assert made.tokens == full.tokens and made.kept is None and made.manifest["text"] == full.manifest["text"]
    assert made.manifest["reference"] == full.manifest["reference"]
    for new, wanted, old in zip(made.layers, full.layers, ikv.read(kept).layers, strict=True):
        for side in "KV":
            a, b, c = (getattr(x, side).astype(np.float32) for x in (new, wanted, old))
            assert np.abs(a - b).max() < 0.02 * np.abs(b).max() and np.abs(c - b).max() > 3 * np.abs(a - b).max()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"calibrated": {"by": "tests"}}, UsageError, "were trained"),
        ({"model": {"vocab_sha256": "1" * 64}}, IntactKVError, "the SHA-256 of its vocabulary differs"),
        (
            {"model": {"arch": "qwen2"}},
            IntactKVError,
            "its architecture differs (qwen2 in the one, llama in the other)",
        ),
        (
            {
                "reference": {"sha256": "2" * 64, "dtype": "Q4_0", "name": "x", "quantized": True},
                "kept": {"model": "x", "weights_sha256": "3" * 64, "n_bytes": 1, "mtime_ns": 1, "requests": 3},
            },
            IntactKVError,
            "belongs to the reference model 2222",
        ),
    ],
)
def test_what_is_of_another_model_or_was_trained_is_refused(
    smol: Smol, tmp_path: Path, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    like = changed(ikv.read(smol.ikv), tmp_path / "like.ikv", **changes)
    with pytest.raises(error) as refused:
        remake(smol.reference, like, tmp_path / "out.ikv")
    assert said in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"like.ikv"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no model is given that the prefix is for"),
        (["--like", "IKV"], "give --out NAME.ikv"),
        (["--like", "IKV", "-o", "IKV"], "is read here"),
        (["--like", "IKV", "-o", "x.ikv", "-s", "You are a poet."], "leave out --system-prompt"),
        (["--like", "IKV", "-o", "x.ikv", "--embed"], "leave out --embed"),
    ],
)
def test_wrong_usage(smol: Smol, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    given = [str(smol.ikv) if word == "IKV" else word for word in arguments]
    assert main(["prefix", str(smol.reference), *given]) == 2
    text = capsys.readouterr().err
    assert said in text and text.count("\n") == 1
