"""A prefix inside a GGUF: other programs read the model as before, and what they do to the file is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import gguf_file, reference, weights
from intactkv_export.prefix import embedding, ikv
from intactkv_export.runtime import IntactLlama
from tests.support.old_embedding import embed_as_array
from tests.support.smol import Smol

LOGITS = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], n_ctx=64, n_threads=2, n_batch=64, verbose=False, logits_all=True)
llama.eval(llama.tokenize(b"The sky is"))
print(json.dumps([float(x) for x in llama.scores[llama.n_tokens - 1][:2000]]))
"""


@pytest.fixture
def made(smol: Smol, tmp_path: Path) -> Path:
    """smol.gguf with its prefix embedded."""
    return ikv.embed(smol.gguf, ikv.read(smol.ikv), tmp_path / "made.gguf")


def test_stock_llama_cpp_gives_the_same_logits(smol: Smol, made: Path, stock_lib: Path) -> None:
    env = {**os.environ, library.VARIABLE: str(stock_lib)}
    said = []
    for path in (smol.gguf, made):
        command = [sys.executable, "-c", LOGITS, str(path)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append(json.loads(done.stdout))
    assert said[0] == said[1]


def test_gguf_py_reads_a_small_header(made: Path, smol: Smol) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(made)
    start = int(reader.fields[embedding.KEY_OFFSET].contents()) + reader.data_offset
    size = int(reader.fields[embedding.KEY_SIZE].contents())
    assert made.read_bytes()[start : start + size] == smol.ikv.read_bytes() and start % 32 == 0
    last = reader.tensors[-1]
    assert last.data_offset + last.n_bytes <= start and start + size == made.stat().st_size
    assert embedding.KEY_STATE not in reader.fields


def test_the_file_does_not_grow(smol: Smol, made: Path) -> None:
    whole, bos = ikv.read(smol.ikv), ikv.read(smol.bos)
    first = made.read_bytes()
    ikv.embed(made, bos)
    assert made.stat().st_size == len(first) - len(whole.data) + len(bos.data) and ikv.read(made).tokens == bos.tokens
    ikv.embed(made, whole)
    ikv.embed(made, whole)
    assert made.read_bytes() == first
    ikv.stamp(made, "ab" * 32)
    assert made.stat().st_size < smol.gguf.stat().st_size + 64 and ikv.find(made) is None


def test_files_of_before_are_read_and_renewed(smol: Smol, made: Path, tmp_path: Path) -> None:
    whole, bos = ikv.read(smol.ikv), ikv.read(smol.bos)
    old = embed_as_array(smol.gguf, whole.data, tmp_path / "old.gguf")
    assert ikv.find(old) == old and ikv.read(old).data == whole.data
    ikv.embed(old, whole)
    assert old.read_bytes() == made.read_bytes()
    newer = embed_as_array(made, bos.data, tmp_path / "newer.gguf")  # an old version has embedded again
    assert ikv.read(newer).tokens == bos.tokens
    assert ikv.read(ikv.embed(newer, whole)).data == whole.data and newer.stat().st_size == made.stat().st_size


def test_other_keys_and_bytes_leave_the_prefix_alone(smol: Smol, made: Path) -> None:
    """A program that edits the metadata and copies the rest, one that appends."""
    ikv.rewrite(made, {"general.description": "x" * 1000})
    assert ikv.read(made).data == smol.ikv.read_bytes()
    with open(made, "ab") as file:
        file.write(b"of another program")
    assert ikv.read(made).data == smol.ikv.read_bytes()
    ikv.embed(made, ikv.read(smol.bos))
    assert b"of another program" in made.read_bytes() and ikv.read(made).tokens == ikv.read(smol.bos).tokens


def lost(path: Path) -> str:
    with pytest.raises(IntactKVError, match="is lost: .* embed it again") as caught:
        ikv.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


def test_a_lost_prefix_is_one_sentence(smol: Smol, made: Path, tmp_path: Path, model: Callable[[str], Path]) -> None:
    whole = made.read_bytes()
    size = smol.ikv.stat().st_size
    for n in (1, size - 1, size):
        made.write_bytes(whole[:-n])
        lost(made)
    assert ikv.find(made) == made  # so whoever loads the model hears of it
    with pytest.raises(IntactKVError, match="is lost"):
        IntactLlama(made, n_ctx=64)
    (tmp_path / "made.ikv").write_bytes(smol.ikv.read_bytes())
    assert ikv.find(made) == tmp_path / "made.ikv"
    ikv.embed(made, ikv.read(smol.ikv))  # as the sentence says
    assert made.read_bytes() == whole


def test_written_again_by_others_it_is_lost(smol: Smol, made: Path, tmp_path: Path) -> None:
    """Upstream's quantizer, to larger weights: where the prefix was there are tensors now. And gguf-py."""
    larger = tmp_path / "larger.gguf"
    weights.quantize(made, larger, "F32", progress=lambda *_: None, allow_requantize=True, n_threads=2)
    assert larger.stat().st_size > 2 * made.stat().st_size
    lost(larger)
    before = [(t.name, t.type) for t in gguf_file.read(larger).tensors]
    size = larger.stat().st_size
    ikv.embed(larger, ikv.read(smol.bos))
    assert [(t.name, t.type) for t in gguf_file.read(larger).tensors] == before
    assert larger.stat().st_size >= size + smol.bos.stat().st_size
    assert ikv.read(larger).tokens == ikv.read(smol.bos).tokens


@pytest.mark.parametrize("value", ["x", None])
def test_half_of_the_keys_is_damage(made: Path, value: str | None) -> None:
    ikv.rewrite(made, {embedding.KEY_SIZE: value})
    with pytest.raises(IntactKVError, match="state.size of .* not a number"):
        ikv.read(made)


# Models in parts


@pytest.fixture(scope="module")
def parts(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """smol.gguf in three parts, by gguf-py as upstream's converter splits."""
    gguf = pytest.importorskip("gguf")
    folder, reader = tmp_path_factory.mktemp("parts"), gguf.GGUFReader(smol.gguf)
    writer = gguf.GGUFWriter(folder / "smol.gguf", "llama", split_max_tensors=100)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("smol-0000?-of-00003.gguf"))


def test_parts_are_found_from_any_of_them(parts: list[Path], smol: Smol, tmp_path: Path) -> None:
    assert len(parts) == 3
    here = [tmp_path / path.name for path in parts]
    for path, target in zip(parts, here, strict=True):
        target.symlink_to(path)
    assert ikv.find(here[1]) is None
    (tmp_path / "smol.ikv").write_bytes(smol.ikv.read_bytes())
    for path in here:
        assert gguf_file.shards(path) == here and gguf_file.first_part(path) == here[0]
        assert ikv.find(path) == tmp_path / "smol.ikv"
        assert reference.locate(path, allow_requantize=True).path == here[0]
    typed = [path.rename(path.with_name(path.name.replace("smol", "smol-Q4_0"))) for path in here]
    assert ikv.find(typed[2]) == tmp_path / "smol.ikv"  # as convert names them: several types share one prefix
    here = [path.rename(target) for path, target in zip(typed, here, strict=True)]
    here[2].unlink()
    for path in here[:2]:
        with pytest.raises(IntactKVError, match="smol-00003-of-00003.gguf is not beside it"):
            IntactLlama(path)
    here[0].unlink()
    with pytest.raises(IntactKVError, match="smol-00001-of-00003.gguf is not beside it"):
        ikv.find(here[1])


@pytest.mark.parametrize("out", ["other.gguf", "other", "other-00002-of-00003.gguf"])
def test_embedding_in_parts_gives_a_model_that_loads(parts: list[Path], smol: Smol, tmp_path: Path, out: str) -> None:
    written = ikv.embed(parts[1], ikv.read(smol.ikv), tmp_path / out)
    assert written == tmp_path / "other-00001-of-00003.gguf" and len(list(tmp_path.iterdir())) == 3
    llama = IntactLlama(tmp_path / "other-00003-of-00003.gguf", n_ctx=64, n_threads=2)
    assert llama.prefix is not None and llama.prefix_path == written
    llama.close()
    for part in tmp_path.iterdir():
        assert ikv.read(part).data == smol.ikv.read_bytes()
    assert ikv.embed(parts[0], ikv.read(smol.bos), tmp_path / out) == written, "an earlier copy may be replaced"
    assert ikv.read(written).data == smol.bos.read_bytes()


@pytest.mark.parametrize("out", ["other-00001-of-00002.gguf", "other-00004-of-00003.gguf"])
def test_a_number_that_would_not_load_is_refused(parts: list[Path], smol: Smol, tmp_path: Path, out: str) -> None:
    with pytest.raises(UsageError, match="would not load it: give .*other.gguf"):
        ikv.embed(parts[0], ikv.read(smol.ikv), tmp_path / out)
    with pytest.raises(UsageError, match="would not load"):
        ikv.embed(smol.gguf, ikv.read(smol.ikv), tmp_path / out)
    assert list(tmp_path.iterdir()) == []
