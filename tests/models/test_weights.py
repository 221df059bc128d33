"""Weights: upstream's converter and quantizer, and what they say when they fail."""

from __future__ import annotations

import struct
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from intactkv_export import library, work
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import gguf_file, imatrix, tensor_types, weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, model):
    """A GGUF small enough to quantize to every type: the first layer of SmolLM2, cut to multiples of 256."""
    gguf = pytest.importorskip("gguf")
    source = gguf.GGUFReader(model("F16"))
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", 1), ("context_length", 64), ("embedding_length", 256), ("feed_forward_length", 256),
        ("attention.head_count", 4), ("attention.head_count_kv", 4), ("vocab_size", 256),
    ):  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key in ("model", "pre"):
        writer.add_string(f"tokenizer.ggml.{key}", source.fields[f"tokenizer.ggml.{key}"].contents())
    for key in ("tokens", "token_type"):
        writer.add_array(f"tokenizer.ggml.{key}", source.fields[f"tokenizer.ggml.{key}"].contents()[:256])
    writer.add_array("tokenizer.ggml.merges", ["a b"])
    for tensor in source.tensors:
        if tensor.name.startswith(("blk.0.", "token_embd", "output_norm")):
            rows = np.concatenate([tensor.data] * 2) if tensor.data.shape[0] == 192 else tensor.data  # K and V
            writer.add_tensor(tensor.name, rows[tuple(slice(256) for _ in rows.shape)].copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def importance(path):
    """An importance matrix for every matrix of a GGUF, all inputs alike but the first."""
    values = {}
    for tensor in gguf_file.read(path).tensors:
        if len(tensor.shape) == 2:
            values[tensor.name] = np.ones(tensor.shape[0], np.float32)
            values[tensor.name][0] = 4
    return values


def write_dat(path, values, n_calls=2, tail=True):
    with open(path, "wb") as file:
        file.write(struct.pack("<i", len(values)))
        for name, x in values.items():
            file.write(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(x)))
            file.write((x * n_calls).astype("<f4").tobytes())
        if tail:
            file.write(struct.pack("<ii", 7, 4) + b"text")


def write_gguf(path, values, counts=(4,)):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    n = np.array(counts, np.float32)
    for name, x in values.items():
        writer.add_tensor(f"{name}.in_sum2", (np.broadcast_to(x, (len(n), len(x))) * n[:, None]).astype(np.float32))
        writer.add_tensor(f"{name}.counts", n[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_names_are_upstreams():
    L = library.load()
    constants = {n: getattr(L, n) for n in dir(L) if n.startswith("LLAMA_FTYPE_")}
    for name, ftype in weights.TYPES.items():
        assert ftype == constants["LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"]
    # NVFP4 is a type that upstream reads and does not quantize to; GUESSED is none.
    assert set(constants.values()) - set(weights.TYPES.values()) == {39, 1024}
    assert weights.type_name(" q4_k ") == "Q4_K_M"
    with pytest.raises(UsageError, match="unknown quantization type 'Q9'.*Q4_K_M"):
        weights.type_name("Q9")


def test_quantizes_to_every_type(tiny, tmp_path):
    """What needs an importance matrix is refused without one and done with one; the estimate is a lower bound."""
    write_dat(tmp_path / "i.dat", importance(tiny))
    matrix = imatrix.read(tmp_path / "i.dat")
    for name in weights.TYPES:
        out = tmp_path / f"{name}.gguf"
        if name in weights.NEEDS_IMATRIX:
            with pytest.raises(IntactKVError, match="importance matrix|imatrix"):
                weights.quantize(tiny, out, name, n_threads=2)
        bits = weights.quantize(tiny, out, name, imatrix=matrix, n_threads=2)
        assert bits >= weights.least_bits(name), name
        assert bits == pytest.approx(tensor_types.bits_per_weight(gguf_file.read(out)))
        assert gguf_file.read(out).values["general.file_type"] == weights.TYPES[name]


def test_importance_matrices_of_both_formats_are_one(tiny, tmp_path):
    values = importance(tiny)
    write_dat(tmp_path / "i.dat", values)
    write_dat(tmp_path / "old.dat", values, tail=False)
    write_gguf(tmp_path / "i.gguf", values)
    read = [imatrix.read(tmp_path / name) for name in ("i.dat", "old.dat", "i.gguf")]
    for one in read:
        assert set(one.values) == set(values)
        for name, x in values.items():
            np.testing.assert_array_equal(one.values[name], x)
    assert [(one.dataset, one.n_chunks) for one in read] == [("text", 7), ("", 0), ("text", 7)]
    outputs = []
    for one in (read[0], read[2], None):
        weights.quantize(tiny, tmp_path / "q.gguf", "Q2_K", imatrix=one, n_threads=2)
        outputs.append(gguf_file.read(tmp_path / "q.gguf"))
        last = outputs[-1].tensors[-1].offset
        outputs[-1] = outputs[-1].values, (tmp_path / "q.gguf").read_bytes()[last:]
    assert outputs[0][1] == outputs[1][1] != outputs[2][1]  # it matters, and both formats say the same
    assert outputs[0][0]["quantize.imatrix.file"] == "i.dat" and outputs[0][0]["quantize.imatrix.chunks_count"] == 7
    # experts: one that never ran counts all inputs alike
    write_gguf(tmp_path / "e.gguf", {"x": np.array([2, 4], np.float32)}, counts=(3, 0))
    np.testing.assert_array_equal(imatrix.read(tmp_path / "e.gguf").values["x"], [2, 4, 1, 1])


def test_importance_matrices_that_are_none(tiny, tmp_path):
    path = tmp_path / "i.dat"
    write_dat(path, importance(tiny))
    whole = path.read_bytes()
    for content in (b"", b"abc", struct.pack("<i", 0), whole[:-9], whole[:100], b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(IntactKVError) as caught:
            imatrix.read(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(IntactKVError, match="no importance matrix"):
        imatrix.read(tiny)
    write_dat(path, {"x": np.array([1, np.nan], np.float32)})
    with pytest.raises(IntactKVError, match="NaN"):
        imatrix.read(path)
    write_dat(path, {n: x[:-1] for n, x in importance(tiny).items()})
    with pytest.raises(IntactKVError, match="imatrix size 255"):
        weights.quantize(tiny, tmp_path / "q.gguf", "Q4_K_M", imatrix=imatrix.read(path))


def test_progress_counts_tensors(tiny, tmp_path):
    seen = []
    done = work.run(weights.quantize, tiny, tmp_path / "q.gguf", "Q8_0", progress=lambda *n: seen.append(n))
    n = len(gguf_file.read(tiny).tensors)
    assert seen == [(i + 1, n) for i in range(n)]
    assert 8 < done.value < 9


def test_requantizing_needs_permission(model, tmp_path):
    with pytest.raises(IntactKVError, match="requantizing from type q"):
        weights.quantize(model("Q4_0"), tmp_path / "q.gguf", "Q2_K")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello"])
def test_quantizing_no_model(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(IntactKVError, match="cannot be quantized to Q8_0") as caught:
        weights.quantize(tmp_path / "x.gguf", tmp_path / "q.gguf", "Q8_0")
    assert "\n" not in str(caught.value)


def test_disk_full_while_quantizing(tiny, tmp_path):
    """Upstream does not notice a failed write: it is found out, here by a limit on the size of files."""
    code = """
        import pathlib, resource, sys
        from intactkv_export.models import weights
        from intactkv_export.errors import IntactKVError
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            weights.quantize(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), "Q8_0")
        except IntactKVError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), tiny, tmp_path / "q.gguf"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    assert "cannot write more than" in said and said.count("\n") == 1


def test_widening_is_exact(tiny, tmp_path):
    weights.quantize(tiny, tmp_path / "f32.gguf", "F32")
    gguf = pytest.importorskip("gguf")
    for a, b in zip(gguf.GGUFReader(tiny).tensors, gguf.GGUFReader(tmp_path / "f32.gguf").tensors, strict=True):
        assert b.tensor_type.name == "F32"
        np.testing.assert_array_equal(np.asarray(a.data, np.float32), b.data)


def test_converter(converter, hf_dir, model, tmp_path):
    """A real Hugging Face directory: the tensors of the GGUF it was made from, bit for bit."""
    work.run(weights.huggingface_to_gguf, hf_dir, tmp_path / "x.gguf", "F16")
    gguf = pytest.importorskip("gguf")
    expected = {t.name: t for t in gguf.GGUFReader(model("F16")).tensors}
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        assert tensor.data.tobytes() == expected.pop(tensor.name).data.tobytes()
    assert not expected


@pytest.mark.parametrize(
    "config, message",
    [
        ('{"architectures": ["NothingForCausalLM"]}', "NothingForCausalLM is not supported"),
        ('{"architectures": ["LlamaForCausalLM"]}', "cannot convert"),
        (None, "config.json"),
    ],
)
def test_converter_refuses(converter, tmp_path, config, message):
    pytest.importorskip("torch")
    if config:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(IntactKVError, match=message) as caught:
        work.run(weights.huggingface_to_gguf, tmp_path, tmp_path / "x.gguf")
    assert "\n" not in str(caught.value) and "upstream's converter" in str(caught.value)
