"""convert and prefix, end to end on the real SmolLM2: what comes out, what is refused, and what is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import numpy as np
import pytest

from intactkv_export import library
from intactkv_export.conversion import convert, prefix
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Context, bindings
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from tests.support import random_architectures, random_models

pytestmark = pytest.mark.skipif(not library.is_patched(), reason="the libraries cannot describe a model")
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
FAST = {"quant": "Q4_0", "n_threads": 2}


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """Two types from a GGUF; what most tests look at."""
    out = tmp_path_factory.mktemp("made") / "smol"
    seen = []
    result = convert(
        model("F16"), out, quant="q4_0, Q2_K,Q4_0", system_prompt=SYSTEM, n_threads=2,
        progress=lambda *step: seen.append(step),
    )  # fmt: skip
    return result, seen


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def loads(gguf):
    """Number of tokens that a context of this model loads from the prefix in the same file."""
    with Context(gguf, 512, "f16", 2) as context:
        return bindings.load_file(context.ptr, gguf)


def test_outputs(made, model):
    result, _ = made
    directory = result.prefix.parent
    assert names(directory) == ["smol-Q2_K.gguf", "smol-Q4_0.gguf", "smol.ikv"]
    assert [(o.path.name, o.type) for o in result.outputs] == [("smol-Q4_0.gguf", "Q4_0"), ("smol-Q2_K.gguf", "Q2_K")]
    found = ikv.read(result.prefix)
    assert result.n_tokens == len(found.tokens) == 24 and result.prefix_bytes == result.prefix.stat().st_size
    assert found.manifest["messages"] == [{"role": "system", "content": SYSTEM}]
    assert found.manifest["engine"]["name"] == result.engine == "llama" and found.manifest["engine"]["dtype"] == "f32"
    assert found.manifest["reference"] == {
        "sha256": result.reference_sha256, "dtype": "F16", "name": "F16.gguf", "quantized": False,
    }  # fmt: skip
    for output in result.outputs:
        assert output.path.stat().st_size == output.n_bytes
        assert gguf_file.read(output.path).values["intactkv.reference.sha256"] == result.reference_sha256
        assert ikv.read(output.path).data == found.data
        assert loads(output.path) == 24
        # besides the prefix it is what upstream's quantizer makes of the same reference
        plain = gguf_file.read(model(output.type)).tensors
        assert [(t.name, t.type, t.shape) for t in gguf_file.read(output.path).tensors] == [
            (t.name, t.type, t.shape) for t in plain
        ]
        begin = gguf_file.read(output.path).tensors[0].offset
        weights_of_it = model(output.type).read_bytes()[plain[0].offset :]
        assert output.path.read_bytes()[begin:] == weights_of_it + bytes(-len(weights_of_it) % 32) + found.data


def test_report(made):
    result, seen = made
    stages = {stage.name: stage for stage in result.stages}
    assert list(stages) == [
        "hash reference", "quantize Q4_0", "quantize Q2_K", "widen to F32", "compute prefix", "embed in Q4_0",
        "embed in Q2_K",
    ]  # fmt: skip
    assert all(stage.seconds > 0 and 10e6 < stage.peak_bytes < 2e9 for stage in stages.values())
    assert stages["compute prefix"].peak_bytes > 5e8  # the weights at F32
    assert ("quantize Q4_0", 272, 272) in seen and ("compute prefix", 24, 24) in seen
    plain = result.to_dict()
    assert plain["outputs"][0]["path"].endswith("smol-Q4_0.gguf") and plain["stages"][0]["name"] == "hash reference"


def test_one_type_without_embedding(model, tmp_path):
    result = convert(model("F16"), tmp_path / "x.gguf", bos_only=True, embed=False, **FAST)
    assert names(tmp_path) == ["x.gguf", "x.ikv"] and result.n_tokens == 1
    values = gguf_file.read(tmp_path / "x.gguf").values
    assert "intactkv.state.offset" not in values and values["intactkv.reference.sha256"] == result.reference_sha256
    assert ikv.find(tmp_path / "x.gguf") == tmp_path / "x.ikv"
    assert ikv.read(tmp_path / "x.ikv").manifest["bos_only"] is True
    # Again, over what is there: replaced.
    old = (tmp_path / "x.ikv").read_bytes()
    convert(model("F16"), tmp_path / "x", **FAST)
    assert names(tmp_path) == ["x.gguf", "x.ikv"] and (tmp_path / "x.ikv").read_bytes() != old


def test_another_prompt(made, model, tmp_path):
    result, _ = made
    gguf = shutil.copy(result.outputs[0].path, tmp_path / "smol.gguf")
    new = prefix(model("F16"), gguf, system_prompt="You are a pirate.", n_threads=2)
    assert new.prefix == tmp_path / "smol.ikv" and new.embedded and "pirate" in new.text
    assert ikv.read(gguf).data == new.prefix.read_bytes() and loads(gguf) == new.n_tokens
    other = prefix(model("F16"), gguf, out=tmp_path / "other.ikv", bos_only=True, n_threads=2, dtype="auto")
    assert not other.embedded and ikv.read(gguf).data == new.prefix.read_bytes()
    assert ikv.read(other.prefix).manifest["engine"]["dtype"] == "f16"
    assert names(tmp_path) == ["other.ikv", "smol.gguf", "smol.ikv"]

    ikv.stamp(gguf, "ab" * 32)
    before = names(tmp_path)
    with pytest.raises(IntactKVError, match=f"{'ab' * 32} and .* to {result.reference_sha256}"):
        prefix(model("F16"), gguf, n_threads=2)
    assert names(tmp_path) == before


def test_requantizing_is_written_down(model, tmp_path):
    result = convert(model("Q4_0"), tmp_path / "x", quant="Q2_K", allow_requantize=True, n_threads=2)
    reference = ikv.read(result.prefix).manifest["reference"]
    assert reference["quantized"] is True and reference["dtype"] == "Q4_0"


def test_hugging_face_and_gguf_give_the_same_prefix(converter, hf_dir, made, tmp_path):
    """torch on the directory, llama.cpp on the GGUF: K and V agree to two roundings of float16."""
    result = convert(hf_dir, tmp_path / "x", system_prompt=SYSTEM, keep_reference=True, **FAST)
    assert result.engine == "torch" and names(tmp_path) == ["x.gguf", "x.ikv", "x.reference.gguf"]
    assert [o.type for o in result.outputs] == ["Q4_0", "reference"] and loads(tmp_path / "x.gguf") == 24
    ours, theirs = ikv.read(result.prefix), ikv.read(made[0].prefix)
    assert ours.tokens == theirs.tokens and ours.manifest["model"] == theirs.manifest["model"]
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        for x, y in ((a.K, b.K), (a.V, b.V)):
            x, y = x.astype(np.float64), y.astype(np.float64)
            assert np.linalg.norm(x - y) < 3.3e-4 * np.linalg.norm(y)
    # The kept reference is that model, for another prompt too.
    again = prefix(tmp_path / "x.reference.gguf", tmp_path / "x.gguf", bos_only=True, n_threads=2)
    assert again.engine == "llama" and again.reference_sha256 == result.reference_sha256
    # And a prompt with torch needs no conversion.
    third = prefix(hf_dir, tmp_path / "x.gguf", system_prompt=SYSTEM, n_threads=2)
    assert [s.name for s in third.stages] == ["hash reference", "describe model", "compute prefix", "embed"]
    assert ikv.read(third.prefix).data == ours.data


@pytest.mark.parametrize("name", ["gemma3"])
def test_other_architectures(converter, tmp_path, name):
    """Random weights, for the structure: both engines agree on what is kept."""
    pytest.importorskip("torch")
    directory = random_models.build(name, tmp_path / "hf")
    tokens = {}
    for engine in ("torch", "llama"):
        result = convert(directory, tmp_path / engine, engine=engine, system_prompt="Be brief.", **FAST)
        tokens[engine] = ikv.read(result.prefix)
        assert result.engine == engine and loads(tmp_path / f"{engine}.gguf") == result.n_tokens
    assert tokens["torch"].tokens == tokens["llama"].tokens
    for a, b in zip(tokens["torch"].layers, tokens["llama"].layers, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        assert np.linalg.norm(np.float64(a.K) - b.K) < 5e-4 * np.linalg.norm(np.float64(b.K))


def test_an_encoder_is_refused_and_leaves_nothing(converter, tmp_path):
    pytest.importorskip("transformers")
    random_architectures.build("T5", tmp_path / "hf")
    with pytest.raises(IntactKVError, match="'t5' cannot carry a prefix: its encoder sees the whole prompt"):
        convert(tmp_path / "hf", tmp_path / "x")
    assert names(tmp_path) == ["hf"]


def test_mamba_has_states_and_no_rows(converter, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=512, hidden_size=64, num_hidden_layers=2, state_size=8)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "hf")
    random_models._tokenizer(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "x", quant="Q8_0", bos_only=True)
    prefix = ikv.read(tmp_path / "x.gguf")
    assert not prefix.layers and sorted(prefix.states) == [0, 1]


# What is refused before any work

BAD = [
    ({"quant": "Q9"}, UsageError, "unknown quantization type 'Q9'"),
    ({"quant": ""}, UsageError, "unknown quantization type ''"),
    ({"quant": []}, UsageError, "no quantization type"),
    ({"quant": "IQ1_S"}, UsageError, "IQ1_S needs an importance matrix"),
    ({"engine": "magic"}, UsageError, "unknown engine 'magic'"),
    ({"engine": "torch"}, UsageError, "is a GGUF"),
    ({"dtype": "float8"}, UsageError, "unknown dtype"),
    ({"dtype": "float16"}, UsageError, "llama engine has no dtype"),
    ({"n_threads": 0}, UsageError, "0 threads"),
    ({"bos_only": True, "system_prompt": "x"}, UsageError, "give one of both"),
    ({"system_prompt": "x<|im_end|>"}, UsageError, "control token"),
    ({"system_prompt": "word " * 9000}, UsageError, "the model's context 8192"),
    ({"imatrix": "absent.dat"}, IntactKVError, "absent.dat: No such file"),
    ({"reference": "absent.gguf"}, UsageError, "no reference model at absent.gguf"),
    ({"reference": "."}, UsageError, "no config.json"),
    ({"out": "."}, UsageError, "is a directory"),
    ({"out": "x/"}, UsageError, "is a directory"),
    ({"out": "absent/x"}, UsageError, "there is no directory"),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[str(change)[:40] for change, _, _ in BAD])
def test_bad_usage(model, tmp_path, monkeypatch, change, error, message):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        convert(**{"reference": model("F16"), "out": "x", **change})
    assert type(caught.value) is error and "\n" not in str(caught.value)
    assert names(tmp_path) == []
    assert time.monotonic() - start < 10  # a second or two on a machine of its own


def test_quantized_reference_without_the_flag(model, tmp_path):
    with pytest.raises(UsageError, match="--allow-requantize"):
        convert(model("Q4_0"), tmp_path / "x")


def test_the_reference_is_not_overwritten(model, tmp_path):
    os.link(model("F16"), tmp_path / "x.gguf")
    with pytest.raises(UsageError, match="is the reference model itself"):
        convert(tmp_path / "x.gguf", tmp_path / "x")
    (tmp_path / "y.ikv").mkdir()
    with pytest.raises(UsageError, match="y.ikv is a directory"):
        convert(model("F16"), tmp_path / "y")


def test_too_little_space(model, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(500_000_000))
    with pytest.raises(IntactKVError, match=r"at least 0.6 GB in .* and 0.5 GB are free"):
        convert(model("F16"), tmp_path / "x")
    assert names(tmp_path) == []


def test_template_of_a_hugging_face_directory_is_tried_first(hf_dir, tmp_path):
    directory = tmp_path / "hf"
    directory.mkdir()
    for file in hf_dir.iterdir():
        (directory / file.name).symlink_to(file)
    for template, message in (("{{ raise_exception('no system role') }}", "no system role"), ("", "no chat template")):
        (directory / "chat_template.jinja").unlink()
        (directory / "chat_template.jinja").write_text(template)
        with pytest.raises(UsageError, match=message):
            convert(directory, tmp_path / "x", system_prompt="x")
    assert names(tmp_path) == ["hf"]


# What goes wrong in the middle

RUN = """
    import resource, sys
    from intactkv_export import convert
    from intactkv_export.errors import IntactKVError
    limit = int(sys.argv[3])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        convert(sys.argv[1], sys.argv[2], quant="Q4_0", n_threads=2, progress=lambda *step: print(*step, flush=True))
    except IntactKVError as error:
        print(error)
        sys.exit(error.exit_code)
"""


def start(*arguments):
    command = [sys.executable, "-c", textwrap.dedent(RUN), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process, stage):
    for line in process.stdout:
        if line.startswith(stage):
            return
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("limit, target", [(400_000_000, "f32.gguf"), (100_000, "x.gguf")])
def test_disk_full(model, tmp_path, limit, target):
    """A limit on the size of files stands for a full disk."""
    (tmp_path / "x.ikv").write_bytes(b"old")
    process = start(model("F16"), tmp_path / "x", limit)
    said, stderr = process.communicate()
    assert process.returncode == 1 and stderr == ""
    assert f"bytes of {target}" in said.splitlines()[-1]
    assert names(tmp_path) == ["x.ikv"] and (tmp_path / "x.ikv").read_bytes() == b"old"


@pytest.mark.parametrize("stage", ["widen to F32", "embed in Q4_0"])
def test_kill_leaves_no_half_written_output(model, tmp_path, stage):
    process = start(model("F16"), tmp_path / "x", 0)
    wait_for(process, stage)
    process.kill()
    process.communicate()
    assert all(re.fullmatch(r"\.x\.tmp-[0-9a-f]{16}\.d", name) for name in names(tmp_path))
    bos_only = convert(model("F16"), tmp_path / "x", bos_only=True, **FAST)  # cleans up, and works
    assert names(tmp_path) == ["x.gguf", "x.ikv"] and loads(tmp_path / "x.gguf") == bos_only.n_tokens


def test_interruption_leaves_nothing(model, tmp_path):
    process = start(model("F16"), tmp_path / "x", 0)
    wait_for(process, "quantize Q4_0")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode != 0 and "KeyboardInterrupt" in stderr
    assert names(tmp_path) == []
