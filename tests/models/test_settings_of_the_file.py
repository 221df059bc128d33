"""Settings that config.json has and transformers leaves out or renames reach upstream's converter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import work
from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file, weights
from tests.support import random_architectures


@pytest.mark.slow
def test_layers_of_granite_4_h_are_what_the_file_says(tmp_path: Path) -> None:
    """transformers calls them full_attention and linear_attention: all were taken for Mamba layers."""
    transformers = pytest.importorskip("transformers")
    source = random_architectures.build("GraniteMoeHybrid", tmp_path / "granite")
    assert json.loads((source / "config.json").read_text())["layer_types"] == ["mamba", "attention"] * 2
    renamed = transformers.AutoConfig.from_pretrained(source).layer_types
    work.run(weights.huggingface_to_gguf, source, tmp_path / "out.gguf", "F32")
    names = {tensor.name for tensor in gguf_file.read(tmp_path / "out.gguf").tensors}
    assert {f"blk.{il}.attn_k.weight" for il in (1, 3)} <= names, renamed
    try:  # the model runs: whether it can carry a prefix is another question
        llama_engine.describe(tmp_path / "out.gguf")
    except IntactKVError as error:
        assert "cannot carry a prefix" in str(error)


@pytest.mark.parametrize(
    "found, own, expected",
    [
        ({"a": 1}, {"a": 2, "rotary_pct": 0.25}, {"a": 1, "rotary_pct": 0.25}),
        ({"layer_types": ["full_attention"]}, {"layer_types": ["attention"]}, {"layer_types": ["attention"]}),
        ({"sizes": [1, 2]}, {"sizes": [3, 4]}, {"sizes": [1, 2]}),
        ({"names": ["a", "b"]}, {"names": ["c"]}, {"names": ["a", "b"]}),
        ({"text_config": {"a": 1}}, {"text_config": {"b": 2}}, {"text_config": {"a": 1, "b": 2}}),
    ],
)
def test_what_the_file_says(found: dict[str, Any], own: dict[str, Any], expected: dict[str, Any]) -> None:
    assert weights._with_own(found, own) == expected
