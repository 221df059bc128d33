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
from tests.support import random_architectures, random_hybrids, random_models


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


@pytest.mark.slow
def test_a_nemotron_h_without_experts_is_none_of_a_mixture(tmp_path: Path) -> None:
    """As its checkpoints have it, and as transformers writes it."""
    pytest.importorskip("transformers")
    sources = [random_hybrids.build("nemotron-h", tmp_path / name) for name in ("of_the_hub", "written")]
    config = json.loads((sources[1] / "config.json").read_text())
    del config["hybrid_override_pattern"]
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention", "mlp"]
    config |= {"layers_block_type": kinds, "num_experts_per_tok": 2}
    (sources[1] / "config.json").write_text(json.dumps(config))
    random_models.to_gguf(sources)
    for source in sources:
        gguf = source.with_name(f"{source.name}.gguf")
        assert gguf_file.read(gguf).values["general.architecture"] == "nemotron_h"
        assert {f"blk.{il}.ffn_up.weight" for il in (1, 4)} <= {t.name for t in gguf_file.read(gguf).tensors}
        about = llama_engine.describe(gguf)
        assert [x["il"] for x in about["recurrent"]["layers"] if x["n_s"]] == [0, 3]


@pytest.mark.slow
def test_drafting_heads_that_the_weights_lack(tmp_path: Path) -> None:
    """transformers leaves them out when it saves a model, whose settings go on to name them."""
    pytest.importorskip("transformers")
    sources = []
    for name, named in [
        ("Qwen3_5", {}),
        ("Qwen3Next", {"mtp_num_hidden_layers": 1}),
        ("Glm4Moe", {"num_nextn_predict_layers": 1}),
    ]:
        sources.append(random_architectures.build(name, tmp_path / name))
        config = json.loads((sources[-1] / "config.json").read_text())
        (sources[-1] / "config.json").write_text(json.dumps(config | named))
    assert random_architectures.to_gguf(sources) == {}
    for source in sources:
        assert llama_engine.describe(source.with_name(f"{source.name}.gguf"))["caches"]  # it loads: nothing is missing


@pytest.mark.parametrize(
    "names, drafts",
    [
        (["model.layers.1.mlp.up_proj.weight"], False),
        (["model.layers.2.eh_proj.weight"], True),
        (["mtp.fc.weight"], True),
        (["model.vision_tower.encoder.layers.5.norm.weight"], False),
    ],
)
def test_tensors_of_drafting_heads(tmp_path: Path, names: list[str], drafts: bool) -> None:
    torch, safetensors = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    (tmp_path / "config.json").write_text("{}")
    safetensors.save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert weights._drafts(tmp_path, {"num_hidden_layers": 2}) is drafts
    assert weights._drafts(tmp_path, {"text_config": {"num_hidden_layers": 2}}) is drafts
    assert weights._drafts(tmp_path, {})
