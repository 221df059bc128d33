"""Models without the heads of multi-token prediction that their config.json or their architecture lets expect."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import library, work
from intactkv_export.models import gguf_file, weights
from tests.support import random_hybrids, random_latents


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, name, settings",
    [
        (random_hybrids, "qwen3.5", {}),
        (random_hybrids, "qwen3.5", {"mtp_num_hidden_layers": 1}),
        (random_latents, "glm4-moe-lite", {"num_nextn_predict_layers": 1}),
    ],
    ids=["taken for granted", "counted", "a layer more"],
)
def test_a_model_saved_without_its_drafting_head_is_converted(
    tmp_path: Path, kind: Any, name: str, settings: dict[str, int]
) -> None:
    pytest.importorskip("transformers")
    source = kind.build(name, tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **settings}))
    work.run(_converted, source, tmp_path / "out.gguf")
    made = gguf_file.read(tmp_path / "out.gguf")
    layers = {tensor.name.split(".")[1] for tensor in made.tensors if tensor.name.startswith("blk.")}
    assert (
        made.values[f"{made.values['general.architecture']}.block_count"] == len(layers) == config["num_hidden_layers"]
    )


def _converted(source: Path, out: Path) -> None:
    """In a process of its own: with the tiny tokenizer of random models, which upstream's converter does not know."""
    script = library.converter_path()
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]
    import_module("conversion").load_all_models()
    text = import_module("conversion.base").TextModel
    below = [text]
    for cls in below:
        cls.set_vocab = text._set_vocab_sentencepiece
        below += cls.__subclasses__()
    weights.huggingface_to_gguf(source, out, "F32")


@pytest.mark.parametrize(
    "tensor, drafting",
    [
        ("mtp.fc.weight", True),
        ("model.mtp.layers.0.mlp.up_proj.weight", True),
        ("model.layers.4.eh_proj.weight", True),
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.embed_tokens.weight", False),
    ],
)
def test_tensors_of_a_drafting_head(tensor: str, drafting: bool) -> None:
    assert weights._is_drafting(tensor, {"num_hidden_layers": 4}) is drafting
    assert weights._is_drafting(tensor, {"text_config": {"num_hidden_layers": 4}}) is drafting
