"""Hugging Face directories: the template that transformers uses, and what upstream's converter could not read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import work
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import check_convertible, gguf_file, huggingface, locate, weights
from intactkv_export.prefix import prompt_for
from tests.support import random_models

OLD, NEW = (
    "{{ bos_token }}{% for m in messages %}" + mark + "{{ m['content'] }}{% endfor %}" for mark in ("old", "new")
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    return random_models.build("llama-gqa", tmp_path_factory.mktemp("hf") / "Tiny-Model")


def directory(tmp_path: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "m"
    path.mkdir()
    safetensors.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.mark.parametrize("old", [OLD, [{"name": "default", "template": OLD}], None])
def test_one_template_transformers_choice_everywhere(tiny: Path, tmp_path: Path, old: Any) -> None:
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "Tiny-Model"
    shutil.copytree(tiny, path)
    settings = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": old}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(NEW)
    assert locate(path).chat_template == NEW
    assert transformers.AutoTokenizer.from_pretrained(path).chat_template == NEW
    gguf = tmp_path / "x.gguf"
    work.run(weights.huggingface_to_gguf, path, gguf, "F16", vocab_only=True)
    values = gguf_file.read(gguf).values
    assert values["tokenizer.chat_template"] == NEW and values["general.name"] == "Tiny Model"
    assert "new" in prompt_for(gguf, "Hi", False, None).text
    assert sorted(x.name for x in tmp_path.iterdir()) == ["Tiny-Model", "x.gguf"]
    assert json.loads((path / "tokenizer_config.json").read_text()) == settings, "the directory stays as it was"


def test_templates_by_name(tmp_path: Path) -> None:
    path = directory(tmp_path, {"a": np.zeros((2, 2), np.float16)})
    (path / "chat_template.jinja").write_text("J")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    assert huggingface.chat_template(path) == "J"
    with huggingface.with_template(path, tmp_path / "scratch") as linked:
        written = json.loads((linked / "tokenizer_config.json").read_text())["chat_template"]
        assert written == [{"name": "default", "template": "J"}, {"name": "tool_use", "template": "T"}]
        assert (linked / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    assert not (tmp_path / "scratch").exists() and not (path / "tokenizer_config.json").exists()


PACKED = {"a.weight": np.zeros((8, 8), np.uint32), "a.scales": np.zeros((8, 1), np.float16)}
PLAIN = {"a.weight": np.zeros((8, 64), np.float16), "a.position_ids": np.zeros(4, np.int64)}


@pytest.mark.parametrize(
    ("tensors", "config", "method"),
    [
        (PACKED, {"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        (PACKED, {}, "U32"),
        (PLAIN, {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_what_another_tool_quantized(tmp_path: Path, tensors: Any, config: Any, method: str) -> None:
    path = directory(tmp_path, tensors, **config)
    with pytest.raises(UsageError, match=rf"quantized \({method}\)"):
        locate(path)
    with pytest.raises(IntactKVError, match=rf"quantized \({method}\) in a way that upstream's converter cannot read"):
        check_convertible(locate(path, allow_requantize=True))


def test_what_is_not_quantized(tmp_path: Path) -> None:
    found = locate(directory(tmp_path, PLAIN))
    assert (found.dtype, found.quantized) == ("F16", False)
    check_convertible(found)


def test_a_directory_without_a_tokenizer_that_can_be_read(tmp_path: Path) -> None:
    path = directory(tmp_path, PLAIN)
    (path / "tokenizer.json").unlink()
    with pytest.raises(IntactKVError, match=r"has no tokenizer: put tokenizer.json or tokenizer.model"):
        check_convertible(locate(path))
    (path / "tekken.json").write_text("{}")
    with pytest.raises(IntactKVError, match=r"has a tokenizer only as tekken.json"):
        check_convertible(locate(path))
    (path / "tokenizer.model").write_bytes(b"")
    check_convertible(locate(path))


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    path = directory(tmp_path, PLAIN, vocab_size=3)
    tokens = {"model": {"vocab": {"a": 0, "b": 1, "c": 2}}, "added_tokens": [{"id": 3, "content": "[PAD]"}]}
    (path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(IntactKVError, match=r"1 tokens beyond the 3 .* the first is '\[PAD\]' with number 3: resize"):
        check_convertible(locate(path))
    (path / "tokenizer.model").write_bytes(b"")  # upstream reads this one, and leaves such tokens out
    check_convertible(locate(path))


def test_what_newer_transformers_call_otherwise(hf_dir: Path, tmp_path: Path) -> None:
    """GPT-NeoX's rotary_pct is a part of rope_parameters since transformers 5: KeyError in upstream's converter."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 32}
    config = transformers.GPTNeoXConfig(vocab_size=49152, **sizes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    settings.pop("rotary_pct", None)
    (tmp_path / "m" / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf_dir / name, tmp_path / "m")
    with pytest.raises(IntactKVError, match=r"written by transformers \S+, has no 'rotary_pct'.*older transformers"):
        work.run(weights.huggingface_to_gguf, tmp_path / "m", tmp_path / "x.gguf")
