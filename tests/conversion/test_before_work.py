"""What is refused before any long stage, and what `auto` makes of it instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import library
from intactkv_export.calibration import calibrate
from intactkv_export.conversion import convert, prefix
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.prefix import ikv
from tests.support import random_families, random_models
from tests.support.smol import Smol

pytestmark = pytest.mark.skipif(not library.is_patched(), reason="the libraries cannot describe a model")
LONG = "You are a very helpful assistant, and this is a prompt of more than sixteen tokens."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("tiny")
    random_models.build("mistral-window", root / "mistral-window")
    random_families.build("apertus", root / "apertus")
    return root


def stages(**settings: Any) -> tuple[list[str], BaseException | None]:
    """The stages that a conversion got to, and what ended it."""
    seen: list[str] = []
    try:
        convert(quant="Q8_0", progress=lambda stage, *_: seen.append(stage), **settings)
    except IntactKVError as error:
        return list(dict.fromkeys(seen)), error
    return list(dict.fromkeys(seen)), None


@pytest.mark.parametrize("settings", [{"engine": "torch"}, {"calibrate": True}, {"prefix_tokens": "auto"}])
def test_a_device_that_is_not_there(hf_dir: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    seen, error = stages(reference=hf_dir, out=tmp_path / "x", device="cuda", **settings)
    assert type(error) is UsageError and "cannot compute on the device 'cuda'" in str(error) and "\n" not in str(error)
    assert seen == [] and list(tmp_path.iterdir()) == []


def test_a_device_of_other_commands(smol: Smol, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for run in (
        lambda: calibrate(smol.reference, smol.gguf, prefix=smol.ikv, out=tmp_path / "x.ikv", device="nonsense"),
        lambda: prefix(smol.reference, smol.gguf, out=tmp_path / "x.ikv", prefix_tokens="auto", device="nonsense"),
    ):
        with pytest.raises(UsageError, match="cannot compute on the device 'nonsense'"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_trained_with(tiny: Path, tmp_path: Path) -> None:
    path = tiny / "apertus"
    for settings in ({"calibrate": True}, {"prefix_tokens": "auto"}):
        seen, error = stages(reference=path, out=tmp_path / "x", **settings)
        assert error is not None and "architecture 'apertus'" in str(error) and str(path) in str(error)
        assert seen == ["read vocabulary"] and list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_a_window_that_llama_cpp_ignores(tiny: Path, tmp_path: Path) -> None:
    """Both engines compute what llama.cpp's model does; auto needs not choose another one."""
    path = tiny / "mistral-window"
    assert convert(path, tmp_path / "x", quant="Q8_0", system_prompt=LONG).engine == "torch"
    made = {"torch": tmp_path / "x.ikv", "llama": tmp_path / "z.ikv"}
    prefix(path, tmp_path / "x.gguf", system_prompt=LONG, engine="llama", out=made["llama"])
    both = [ikv.read(path) for path in made.values()]
    assert [p.manifest["engine"]["name"] for p in both] == list(made) and len(both[0].tokens) > 16
    for a, b in zip(*(p.layers for p in both), strict=True):
        assert np.allclose(a.K, b.K, rtol=2e-3, atol=2e-3) and np.allclose(a.V, b.V, rtol=2e-3, atol=2e-3)
