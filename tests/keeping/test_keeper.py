"""The rows of what is kept, beside the prefixes that the model has already."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from intactkv_export.cli.main import main
from intactkv_export.keeping import Directory, Keeper, ServedModel
from intactkv_export.keeping import directory as directories
from intactkv_export.prefix import Prefix, ikv
from tests.support.smol import Smol

MORE = list(range(600, 650))


@pytest.fixture
def keep(smol: Smol, tmp_path: Path) -> Callable[..., tuple[Path, list[str]]]:
    """keep(tokens, prefix, ...): the file in which a model served with these prefixes keeps them, and what is said."""

    def noted(tokens: list[int], *served: Prefix) -> tuple[Path, list[str]]:
        said: list[str] = []
        model = ServedModel(smol.gguf)
        with Directory(tmp_path / "kept", model, 10**9, said.append) as opened:
            note = opened.path / f"{'0' * 16}.tokens"
            about = {"format": 1, "model": str(model.path.absolute()), "requests": 3, "tokens": tokens}
            note.write_text(json.dumps(about))
            assert opened.fitting(served, 1024) == []
            Keeper(opened, 1024, 1, said.append)
            end = time.monotonic() + 120
            while note.exists() and time.monotonic() < end:
                time.sleep(0.1)
        return opened.path / directories.file_name(model.weights_sha256, tokens), said

    return noted


@pytest.mark.parametrize("n", [24, 6])
def test_it_begins_with_the_rows_of_a_prefix_that_is_served(
    smol: Smol, keep: Callable[..., tuple[Path, list[str]]], n: int
) -> None:
    """The model's own would take the place of the reference's in every prompt that is kept."""
    served = ikv.read(smol.ikv)
    path, _ = keep(served.tokens[:n] + MORE, served)
    for new, old in zip(ikv.read(path).layers, served.layers, strict=True):
        np.testing.assert_array_equal(new.K[:n], old.K[:n])
        np.testing.assert_array_equal(new.V[:n], old.V[:n])
    said: list[str] = []
    with Directory(path.parent, ServedModel(smol.gguf), 10**9, said.append) as opened:
        assert [found.source for found in opened.fitting([served])] == [path] and said == []
        assert opened.has(served.tokens[:n] + MORE)
        assert [found.source for found in opened.fitting()] == [path] and said == []


def test_one_that_has_the_models_own_rows_is_left_out_where_there_are_better(
    smol: Smol, keep: Callable[..., tuple[Path, list[str]]]
) -> None:
    served = ikv.read(smol.ikv)
    path, _ = keep(served.tokens[:6] + MORE)
    said: list[str] = []
    with Directory(path.parent, ServedModel(smol.gguf), 10**9, said.append) as opened:
        assert len(opened.fitting()) == 1 and said == []
        assert opened.fitting([served]) == [] and not opened.has(served.tokens[:6] + MORE)
        assert said == [f"{path} is left out: its first rows are not those of {smol.ikv}, which is served now"]


def test_it_has_no_cells_that_stand_for_no_token(
    smol: Smol, keep: Callable[..., tuple[Path, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prefix, "n_extra", 2)
    served = ikv.read(smol.ikv)
    path, said = keep(served.tokens + MORE, served)
    assert not path.exists() and len(said) == 1 and "has cells that a kept one cannot have" in said[0]


@pytest.mark.parametrize("how", ["--rope-freq-scale", "LLAMA_ARG_ROPE_FREQ_SCALE"])
def test_not_where_the_model_is_served_otherwise_than_its_file_says(
    smol: Smol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    if how.startswith("LLAMA"):
        monkeypatch.setenv(how, "0.5")
    more = ["--", how, "0.5"] if how.startswith("--") else []
    assert main(["serve", str(smol.gguf), "--keep", str(tmp_path / "kept"), *more]) == 2
    assert f"--keep computes with the model as its file says, and {how} changes it" in capsys.readouterr().err
