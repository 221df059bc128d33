"""Reference models: found, recognized, and told apart."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import gguf_file, reference
from intactkv_export.prefix import ikv


def write_hf(directory, tensors, **config):
    """A Hugging Face directory with the files that locate() looks at."""
    safetensors = pytest.importorskip("safetensors.numpy")
    directory.mkdir(exist_ok=True)
    safetensors.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((4, 6)).astype(np.float16) for name in ("b", "a", "c.d")}


def test_identity_of_safetensors_is_as_documented(tmp_path, tensors):
    found = reference.locate(write_hf(tmp_path / "m", tensors))
    assert (found.dtype, found.quantized, found.is_gguf, found.name) == ("F16", False, False, "m")
    lines = [f"{name} F16 4x6 {hashlib.sha256(x.tobytes()).hexdigest()}\n" for name, x in sorted(tensors.items())]
    assert reference.identity(found) == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_identity_depends_on_the_tensors_alone(tmp_path, tensors):
    first = reference.identity(reference.locate(write_hf(tmp_path / "a", tensors)))
    same = write_hf(tmp_path / "b", dict(reversed(tensors.items())), other="setting")
    assert reference.identity(reference.locate(same)) == first
    tensors["a"][1, 2] += 1
    assert reference.identity(reference.locate(write_hf(tmp_path / "c", tensors))) != first
    shards = tmp_path / "shards"
    write_hf(shards, {"a": tensors["a"]})
    (shards / "model.safetensors").rename(shards / "model-00001-of-00002.safetensors")
    write_hf(shards, {n: tensors[n] for n in ("b", "c.d")})
    (shards / "model.safetensors").rename(shards / "model-00002-of-00002.safetensors")
    whole = reference.identity(reference.locate(tmp_path / "c"))
    assert reference.identity(reference.locate(shards)) == whole
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00003-of-00002.safetensors"}
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(IntactKVError, match="lacks model-00003"):
        reference.locate(shards)


def test_gguf(model, tmp_path):
    found = reference.locate(model("F16"))
    assert (found.dtype, found.quantized, found.is_gguf) == ("F16", False, True)
    assert found.n_bytes == model("F16").stat().st_size and "<|im_start|>" in found.chat_template
    first = reference.identity(found)
    # Metadata is not part of it: a stamped copy is the same model, and does not become the one it names.
    stamped = ikv.stamp(model("F16"), "ab" * 32, tmp_path / "x.gguf")
    assert reference.identity(reference.locate(stamped)) == first
    # Unless it says that it was converted from that one, and its tensors are still those.
    kept = ikv.rewrite(stamped, {reference.KEY_CONVERTED: first})
    assert reference.identity(reference.locate(kept)) == "ab" * 32
    ikv.rewrite(stamped, {reference.KEY_CONVERTED: "00" * 32})
    assert reference.identity(reference.locate(stamped)) == first


def test_quantized_is_refused(model, tmp_path, tensors):
    with pytest.raises(UsageError, match=r"quantized \(Q4_0\).*--allow-requantize"):
        reference.locate(model("Q4_0"))
    found = reference.locate(model("Q4_0"), allow_requantize=True)
    assert found.quantized and found.dtype == "Q4_0"
    path = write_hf(tmp_path / "m", tensors, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UsageError, match=r"quantized \(gptq\)"):
        reference.locate(path)
    assert reference.locate(path, allow_requantize=True).quantized


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("absent.gguf", None, "no reference model"),
        ("./a/b/c", None, "no reference model"),
        ("empty.gguf", b"", "is empty"),
        ("text.gguf", b"hello", "GGUF"),
        ("short.gguf", b"GGUF\3\0\0\0", "bytes are needed"),
    ],
)
def test_no_model(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(IntactKVError, match=message) as caught:
        reference.locate(name)
    assert "\n" not in str(caught.value)


def test_cut_off_gguf(model, tmp_path):
    path = tmp_path / "x.gguf"
    with open(model("Q4_0"), "rb") as source, open(path, "wb") as target:
        target.write(source.read(80_000_000))
    with pytest.raises(IntactKVError, match="whole|cut off"):
        reference.locate(path, allow_requantize=True)
    last = max(gguf_file.read(model("Q4_0")).tensors, key=lambda t: t.offset)
    with open(model("Q4_0"), "rb") as source, open(path, "wb") as target:
        target.write(source.read(last.offset + 1))
    with pytest.raises(IntactKVError, match="cut off"):
        reference.locate(path, allow_requantize=True)


def test_broken_directories(tmp_path, tensors):
    path = write_hf(tmp_path / "m", tensors)
    whole = (path / "model.safetensors").read_bytes()
    for broken in (whole[:-1], whole[:20], b"", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 1 << 60) + whole[8:]):
        (path / "model.safetensors").write_bytes(broken)
        with pytest.raises(IntactKVError, match="safetensors|cut off"):
            reference.locate(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(IntactKVError, match="no weights"):
        reference.locate(path)
    for config in ("{", "[]"):
        (path / "config.json").write_text(config)
        with pytest.raises(IntactKVError, match="config.json"):
            reference.locate(path)
    (path / "config.json").unlink()
    with pytest.raises(UsageError, match="no config.json"):
        reference.locate(path)


def test_split_gguf(model, tmp_path):
    """Parts are one model: all must be there, and all tensors count."""
    for i in (1, 3):
        shutil.copy(model("F16"), tmp_path / f"m-{i:05d}-of-00003.gguf")
    with pytest.raises(IntactKVError, match="m-00002-of-00003.gguf is not beside it"):
        reference.locate(tmp_path / "m-00001-of-00003.gguf")
    shutil.copy(model("F16"), tmp_path / "m-00002-of-00003.gguf")
    found = reference.locate(tmp_path / "m-00001-of-00003.gguf")
    assert len(found.files) == 3 and found.n_bytes == 3 * model("F16").stat().st_size


def test_hub(monkeypatch, hf_dir):
    """The hub is asked for what is needed; without network, and nothing downloaded before, it is one sentence."""
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    class Api:
        def model_info(self, name):
            asked["name"] = name
            return hub.hf_api.ModelInfo(id=name, siblings=[{"rfilename": "model.safetensors"}, {"rfilename": "x.bin"}])

    def download(name, **settings):
        asked.update(settings)
        return str(hf_dir)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", download)
    found = reference.locate("organization/model")
    assert (found.path, found.name) == (hf_dir, "organization/model")
    assert asked["name"] == "organization/model" and "*.safetensors" in asked["allow_patterns"]

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", offline)
    with pytest.raises(IntactKVError, match=r"cannot be downloaded \(no route\)") as caught:
        reference.locate("organization/model")
    assert "\n" not in str(caught.value)


def test_templates_of_hugging_face_directories(tmp_path, tensors):
    path = write_hf(tmp_path / "m", tensors)
    assert reference.locate(path).chat_template is None
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    for template, expected in (("X", "X"), (named, "D"), (5, None)):
        (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert reference.locate(path).chat_template == expected
    (path / "chat_template.jinja").write_text("J")
    assert reference.locate(path).chat_template == "J"
