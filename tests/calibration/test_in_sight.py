"""A first token that is trained in sight of all later ones: of models with sliding windows, if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.calibration import calibrate, training
from intactkv_export.conversion import convert
from intactkv_export.errors import UsageError
from intactkv_export.prefix import ikv, inspection
from tests.support.log_probs import llama_log_probs

QUICK: dict[str, Any] = {"steps": 4, "batch": 2, "seq_len": 40, "sequences": 16, "lr": 3e-2}


@pytest.fixture
def falling(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every step seems better than those before. What _held_out() was told of each: whether it is in sight."""
    told: list[bool] = []

    def held_out(student: Any, rows: Any, n_tokens: Any, data: Any, settings: Any) -> tuple[float, list[float]]:
        told.append(settings.in_sight)
        return 100.0 - len(told), [1.0]

    monkeypatch.setattr(training, "_held_out", held_out)
    return told


@pytest.fixture(scope="module")
def pair(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(reference, model with a prefix of the first token that is not trained), with windows of 8 tokens."""
    reference = models["gemma3"].with_suffix(".gguf")
    made = convert(reference, tmp_path_factory.mktemp("sight") / "tiny", quant="Q4_0", bos_only=True)
    return reference, made.outputs[0].path


def test_trained_so(pair: tuple[Path, Path], falling: list[bool], tmp_path: Path) -> None:
    """And what is trained is what llama.cpp then computes, far behind the windows too."""
    made = calibrate(*pair, out=tmp_path / "x.ikv", cells=2, in_sight=True, **QUICK)
    prefix = ikv.read(made.out)
    assert made.manifest["in_sight"] is True and prefix.in_sight and prefix.n_extra == 2
    assert falling[0] is False and set(falling[1:]) == {True}  # the first is what the model has without training
    lines = " ".join(str(line).strip() for line in inspection.report(prefix, None, None))
    assert "in sight of every token behind it" in lines
    assert inspection.as_json(prefix)["manifest"]["calibrated"]["in_sight"] is True
    chunks = [np.random.default_rng(0).integers(20, 500, 60).tolist()]
    want = llama_log_probs(pair[1], made.out, "f16", prefix.tokens, chunks)
    model = torch_model.load(pair[1], round_activations=True)
    far = {}
    for seen in (True, False):
        with torch.no_grad():
            cache = model.cache(*torch_model.prefix_rows(prefix), "f16", extra=2, in_sight=seen)
            got = torch.log_softmax(model.forward(chunks, cache), -1)
        far[seen] = float((got - want)[:, 20:].norm() / want[:, 20:].norm())  # probabilities are all 0 or 1
    assert far[True] < 0.2 * far[False]


def test_what_was_not_trained_is_not_in_sight(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = calibrate(*pair, out=tmp_path / "x.ikv", in_sight=True, **{**QUICK, "steps": 0})
    assert "in_sight" not in made.manifest and not ikv.read(made.out).in_sight


def test_trained_again(pair: tuple[Path, Path], falling: list[bool], tmp_path: Path) -> None:
    """The first candidate is what it begins with, as that is used."""
    once = calibrate(*pair, out=tmp_path / "once.ikv", in_sight=True, **QUICK)
    falling.clear()
    twice = calibrate(*pair, prefix=once.out, out=tmp_path / "twice.ikv", **{**QUICK, "steps": 0})
    assert falling == [True] and twice.manifest["in_sight"] is True
    falling.clear()
    without = calibrate(*pair, prefix=once.out, out=tmp_path / "without.ikv", in_sight=False, **QUICK)
    assert falling[0] and not any(falling[1:]) and not ikv.read(without.out).in_sight


def test_a_run_of_an_earlier_version_goes_on_as_it_was(
    pair: tuple[Path, Path], falling: list[bool], tmp_path: Path
) -> None:
    settings = {**QUICK, "directory": tmp_path / "work"}
    old = calibrate(*pair, out=tmp_path / "old.ikv", in_sight=False, **settings)
    kept = torch.load(tmp_path / "work" / "tiny.pt", weights_only=True)
    assert "in_sight" not in kept["about"] and "in_sight" not in old.manifest
    again = calibrate(*pair, out=tmp_path / "again.ikv", **settings)  # not in sight, unless asked
    assert again.out.read_bytes() == old.out.read_bytes()
    with pytest.raises(UsageError, match=r"other settings \(in_sight is None there and True here\)"):
        calibrate(*pair, out=tmp_path / "other.ikv", in_sight=True, **settings)


def test_only_where_there_are_windows_and_of_the_first_token(
    pair: tuple[Path, Path], models: dict[str, Path], falling: list[bool], tmp_path: Path
) -> None:
    reference = models["llama-gqa"].with_suffix(".gguf")
    plain = convert(reference, tmp_path / "plain", quant="Q4_0", bos_only=True).outputs[0].path
    made = calibrate(reference, plain, out=tmp_path / "x.ikv", **QUICK)
    assert "in_sight" not in made.manifest and not any(falling)
    with pytest.raises(UsageError, match="1 token cannot be kept in sight, no layer of the model has a sliding window"):
        calibrate(reference, plain, out=tmp_path / "x.ikv", in_sight=True, **QUICK)
    prompt = convert(pair[0], tmp_path / "prompt", quant="Q4_0", system_prompt="Sing.").outputs[0].path
    made = calibrate(pair[0], prompt, out=tmp_path / "y.ikv", **QUICK)
    assert "in_sight" not in made.manifest and not any(falling)
    with pytest.raises(UsageError, match=r"cannot be kept in sight, only a first token can: leave it out"):
        calibrate(pair[0], prompt, out=tmp_path / "y.ikv", in_sight=True, **QUICK)
