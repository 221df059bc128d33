"""Several prefixes in one GGUF: by name, one beside the other, found by readers of before, damage noticed."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export import cli
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import embedding, ikv, of_model
from intactkv_export.runtime import IntactLlama
from tests.support.old_embedding import embed_as_array
from tests.support.smol import SYSTEM_PROMPT, Smol

REFERENCE = {"sha256": "ab" * 32, "dtype": "F16", "name": "x.gguf", "quantized": False}
ORIGIN: dict[str, Any] = {
    "text": "?",
    "messages": None,
    "chat_template_sha256": None,
    "reference": REFERENCE,
    "engine": {"name": "llama", "dtype": "f32", "versions": {}},
    "calibrated": None,
    "created_by": "the tests",
}
LAYER = {"il": 0, "n_head_kv": 1, "head_dim_k": 2, "head_dim_v": 3, "rope_base": 1e4}
ROPE = {"type": "norm", "n_rot": 2, "scale": 1.0, "scaling": "none", "n_ctx_orig": 99, "ext_factor": 0.0}
ROPE |= {"attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "factors": "none"}
MODEL = {
    "arch": "llama",
    "n_ctx_train": 99,
    "n_vocab": 1000,
    "vocab_sha256": "cd" * 32,
    "caches": [{"n_swa": 0, "swa_type": 0, "layers": [LAYER]}],
    "rope": ROPE,
}


def made(*tokens: int, value: float = 1.0) -> ikv.Prefix:
    """A small prefix of these tokens, for no real model."""
    K, V = (np.full((len(tokens), 1, n), value, np.float16) for n in (2, 3))
    return ikv.read(ikv.build(MODEL, tokens, {0: K}, {0: V}, {**ORIGIN, "bos_only": len(tokens) == 1}))


def saved(path: Path, prefix: ikv.Prefix) -> ikv.Prefix:
    ikv.write(path, prefix.data)
    return ikv.read(path)


FIRST, POET, CLERK = made(1), made(1, 5, 7), made(1, 5, 8, 9)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A GGUF of one small tensor."""
    path = tmp_path / "model.gguf"
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IqiQ", 1, 5, 0, 0)  # 5 values of F32
    header = struct.pack("<4sIqq", b"GGUF", 3, 1, 0) + tensor
    path.write_bytes(header + bytes(-len(header) % 32) + b"\x55" * 20)
    return path


@pytest.fixture
def three(plain: Path, tmp_path: Path) -> Path:
    """That model with three prefixes: first-token, poet, clerk."""
    ikv.add(plain, FIRST)
    ikv.add(plain, saved(tmp_path / "poet.ikv", POET))
    ikv.add(plain, CLERK, name="clerk")
    return plain


def names(path: Path) -> list[str]:
    return [one.name for one in embedding.embedded(path)]


def test_one_is_written_as_it_ever_was(plain: Path, tmp_path: Path) -> None:
    for prefix, name in ((FIRST, "first-token"), (POET, "prompt")):
        ikv.add(plain, prefix, tmp_path / "added.gguf")
        ikv.embed(plain, prefix, tmp_path / "embedded.gguf")
        assert (tmp_path / "added.gguf").read_bytes() == (tmp_path / "embedded.gguf").read_bytes()
        values = gguf_file.read(tmp_path / "added.gguf").values
        assert embedding.KEY_NAMES not in values and values[embedding.KEY_SIZE] == len(prefix.data)
        assert names(tmp_path / "added.gguf") == [name] and ikv.read(tmp_path / "added.gguf").name == name
    assert ikv.add(plain, POET, tmp_path / "added.gguf", name="poet").names == ["poet"]  # a name of its own is kept
    assert names(tmp_path / "added.gguf") == ["poet"]


def test_three_are_found_by_name(three: Path) -> None:
    assert names(three) == ["first-token", "poet", "clerk"]
    assert ikv.read(three).data == FIRST.data == ikv.read(three, "first-token").data
    assert ikv.read(three, "poet").data == POET.data and ikv.read(three, "clerk").data == CLERK.data
    assert [prefix.name for prefix in ikv.read_all(three)] == names(three)
    assert of_model(three).tokens == [1] and of_model(three, "clerk").data == CLERK.data
    with pytest.raises(IntactKVError, match="no prefix of this name but first-token, poet, clerk"):
        of_model(three, "baker")
    with pytest.raises(IntactKVError, match="no prefix named 'baker', it has first-token, poet, clerk"):
        ikv.read(three, "baker")


def test_the_keys_are_as_agreed(three: Path) -> None:
    """Readers of before find the first; the arrays name all, aligned, one behind the other, up to the end."""
    gguf = gguf_file.read(three)
    offsets, sizes = gguf.values[embedding.KEY_OFFSETS], gguf.values[embedding.KEY_SIZES]
    assert (offsets[0], sizes[0]) == (gguf.values[embedding.KEY_OFFSET], gguf.values[embedding.KEY_SIZE])
    assert sizes == [len(prefix.data) for prefix in (FIRST, POET, CLERK)]
    raw = three.read_bytes()[gguf.data :]
    for offset, size, prefix in zip(offsets, sizes, (FIRST, POET, CLERK), strict=True):
        assert offset % 32 == 0 and raw[offset : offset + size] == prefix.data
    ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
    assert [end + -end % 32 for end in ends[:-1]] == offsets[1:] and ends[-1] == len(raw)
    reader = pytest.importorskip("gguf").GGUFReader(three)
    assert reader.fields[embedding.KEY_NAMES].contents() == ["first-token", "poet", "clerk"]
    assert [int(x) for x in reader.fields[embedding.KEY_OFFSETS].contents()] == offsets
    assert [int(kind) for kind in reader.fields[embedding.KEY_SIZES].types] == [9, 10]  # an array of uint64


def test_the_same_name_or_tokens_take_its_place(three: Path, tmp_path: Path) -> None:
    size = three.stat().st_size
    trained, other = made(1, 5, 7, value=2.0), made(1, 6, 6)
    done = ikv.add(three, saved(tmp_path / "poet-trained.ikv", trained))
    assert done.name == "poet" and done.replaced == ["poet"] and ikv.read(three, "poet").data == trained.data
    done = ikv.add(three, made(1, value=3.0))
    assert (done.name, done.names[0]) == ("first-token", "first-token"), "the default stays the default"
    done = ikv.add(three, other, name="poet")
    assert done.replaced == ["poet"] and ikv.read(three, "poet").data == other.data
    done = ikv.add(three, made(1, 5, 8, 9), name="poet")  # clerk's tokens, poet's name
    assert sorted(done.replaced) == ["clerk", "poet"] and names(three) == ["first-token", "poet"]
    ikv.add(three, CLERK, name="clerk", default=True)
    assert names(three) == ["clerk", "first-token"] and ikv.read(three).data == CLERK.data
    assert three.stat().st_size < size
    assert ikv.add(three, POET).name == "prompt" and ikv.add(three, made(1, 2)).name == "prompt-2"


def test_removed_one_by_one_it_is_the_model_that_it_was(plain: Path, three: Path, tmp_path: Path) -> None:
    ikv.stamp(plain, REFERENCE["sha256"], tmp_path / "stamped.gguf")
    assert ikv.remove(three, "first-token").names == ["poet", "clerk"] and ikv.read(three).name == "poet"
    assert ikv.remove(three, "clerk").names == ["poet"] and names(three) == ["poet"]
    with pytest.raises(IntactKVError, match="no prefix named 'clerk', it has poet"):
        ikv.remove(three, "clerk")
    assert ikv.remove(three, "poet").names == [] and ikv.find(three) is None
    assert three.read_bytes() == (tmp_path / "stamped.gguf").read_bytes()


def test_others_bytes_and_keys_stay(three: Path) -> None:
    ikv.rewrite(three, {"general.description": "x" * 1000})
    assert ikv.read(three, "clerk").data == CLERK.data
    with open(three, "ab") as file:
        file.write(b"others'")  # fewer than the alignment
    ikv.add(three, made(1, 2))
    assert b"others'" in three.read_bytes() and len(names(three)) == 4
    ikv.embed(three, POET)
    assert names(three) == ["prompt"] and b"others'" in three.read_bytes()


def test_files_of_before_get_more(plain: Path, tmp_path: Path) -> None:
    old = embed_as_array(plain, POET.data, tmp_path / "old.gguf")
    assert names(old) == ["prompt"]
    assert ikv.add(old, FIRST).names == ["prompt", "first-token"] and ikv.read(old, "prompt").data == POET.data


def u64(*values: int) -> list[gguf_file.Uint64]:
    return [gguf_file.Uint64(value) for value in values]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "lengths": ({embedding.KEY_NAMES: ["first-token", "poet"]}, "names 2 prefixes, with 3 offsets and 3 sizes"),
    "a name": ({embedding.KEY_NAMES: ["first-token", "a/b", "c"]}, "prefix 1 of .* is named 'a/b'"),
    "no name": ({embedding.KEY_NAMES: ["first-token", "", "c"]}, "prefix 1 of .* is named ''"),
    "twice": ({embedding.KEY_NAMES: ["poet", "poet", "c"]}, "two prefixes named 'poet'"),
    "no array": ({embedding.KEY_SIZES: None}, "intactkv.prefix.sizes is no array"),
    "no names": ({embedding.KEY_NAMES: "poet"}, "intactkv.prefix.names is no array"),
    "texts": ({embedding.KEY_OFFSETS: ["32", "a", "b"]}, "intactkv.prefix.offsets of .* is '32', not a number"),
    "the first": ({embedding.KEY_SIZE: gguf_file.Uint64(7)}, "an old version has embedded another"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_keys_are_one_sentence(three: Path, name: str) -> None:
    changes, reason = BAD[name]
    ikv.rewrite(three, changes)
    for read in (ikv.read, embedding.embedded, lambda path: list(ikv.read_all(path))):
        with pytest.raises(IntactKVError, match=reason) as caught:
            read(three)
        assert "\n" not in str(caught.value) and str(three) in str(caught.value)
    with pytest.warns(UserWarning, match=f"left out .*{reason}"):
        assert ikv.add(three, CLERK).names == ["prompt"]  # a model can be mended
    assert ikv.read(three).data == CLERK.data


def test_overlapping_or_lost_bytes(three: Path, tmp_path: Path) -> None:
    gguf = gguf_file.read(three)
    offsets, sizes = gguf.values[embedding.KEY_OFFSETS], gguf.values[embedding.KEY_SIZES]
    for offset in (offsets[0], offsets[1] + 32):
        ikv.rewrite(three, {embedding.KEY_OFFSETS: u64(offsets[0], offsets[1], offset)}, tmp_path / "x.gguf")
        with pytest.raises(IntactKVError, match="two prefixes of .* overlap, one of"):
            ikv.read(tmp_path / "x.gguf")
    for changes in ({embedding.KEY_OFFSETS: u64(*offsets[:2], 2**63)}, {embedding.KEY_SIZES: u64(*sizes[:2], 2**63)}):
        ikv.rewrite(three, changes, tmp_path / "x.gguf")
        with pytest.raises(IntactKVError, match="the prefix clerk embedded in .* is lost"):
            ikv.read(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(three.read_bytes()[:-1])
    with pytest.raises(IntactKVError, match="the prefix clerk embedded in .* is lost"):
        ikv.read(tmp_path / "x.gguf")
    damaged = bytearray(three.read_bytes())
    damaged[gguf.data + offsets[1] + 40] ^= 1
    (tmp_path / "x.gguf").write_bytes(damaged)
    assert ikv.read(tmp_path / "x.gguf").data == FIRST.data
    with pytest.raises(IntactKVError, match="x.gguf, prefix poet: the prefix file is damaged"):
        list(ikv.read_all(tmp_path / "x.gguf"))


@pytest.mark.parametrize("name", ["", "a b", "ä", "x" * 65, "a/b", "a\n"])
def test_names_that_cannot_be(plain: Path, tmp_path: Path, name: str) -> None:
    before = plain.read_bytes()
    with pytest.raises(UsageError, match="a prefix cannot be called") as caught:
        ikv.add(plain, POET, name=name)
    assert "\n" not in str(caught.value) and plain.read_bytes() == before
    if name and "/" not in name and "\n" not in name:  # of a file it is no reason to refuse
        ikv.add(plain, FIRST)
        assert ikv.add(plain, saved(tmp_path / f"{name}.ikv", POET)).name == "prompt"


# With a real model


@pytest.fixture(scope="module")
def both(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """smol.gguf with first-token, the default, and helper."""
    path = tmp_path_factory.mktemp("both") / "both.gguf"
    ikv.embed(smol.gguf, ikv.read(smol.bos), path)
    ikv.add(path, ikv.read(smol.ikv), name="helper")
    return path


def test_a_model_takes_the_default_or_one_by_name(both: Path, smol: Smol) -> None:
    first = IntactLlama(both, n_ctx=64, n_threads=2)
    assert first.prefix is not None and first.prefix.name == "first-token" and first.prefix_messages == []
    first.close()
    helper = IntactLlama(both, "helper", n_ctx=64, n_threads=2)
    assert helper.prefix is not None and helper.prefix_messages[0]["content"] == SYSTEM_PROMPT
    helper.eval([*smol.tokens, 5])
    assert helper.prefix_stats["loads"] == 1
    again = pickle.loads(pickle.dumps(helper))
    assert again.prefix.name == "helper" and again.prefix.data == helper.prefix.data
    again.close()
    helper.close()


def test_commands(both: Path, smol: Smol, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str | Path, code: int = 0) -> str:
        assert cli.main([str(x) for x in arguments]) == code
        return "".join(capsys.readouterr())

    model = tmp_path / "model.gguf"
    said("embed", smol.bos, smol.gguf, "-o", model)
    text = said("embed", smol.ikv, model)
    assert "as smol-prompt; the default is first-token, beside it smol-prompt" in text
    assert "in place of smol-prompt" in said("embed", smol.ikv, model, "--name", "helper", "--default")
    lines = said("verify", model).splitlines()
    assert lines == [
        f"{model}, helper: 24 tokens, whole, fits {model}",
        f"{model}, first-token: 1 token, whole, fits {model}",
    ]
    text = said("inspect", model)
    assert "2 prefixes in" in text and "\n  helper       24 tokens" in text
    assert "embedded as first-token: 1 token" in " ".join(text.split())
    assert "first-token" not in said("inspect", model, "--name", "helper")
    assert '"name": "helper"' in said("inspect", model, "--json")
    said("extract", model, "--name", "first-token")
    assert (tmp_path / "first-token.ikv").read_bytes() == smol.bos.read_bytes()
    assert "no prefix named 'poet', it has helper, first-token" in said("extract", model, "--name", "poet", code=1)
    assert "a prefix cannot be called 'a b'" in said("embed", smol.ikv, model, "--name", "a b", code=2)
    assert "no MODEL is given" in said("embed", smol.ikv, code=2)
    assert "leave them out" in said("embed", "--remove", "helper", smol.ikv, model, code=2)
    assert "helper removed, the default is first-token" in said("embed", "--remove", "helper", model)
    assert "no prefix is left" in said("embed", "--remove", "first-token", model)
    assert model.read_bytes() == smol.gguf.read_bytes()
