"""What is kept in a directory, for whom, and what has to go."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.cli.main import main
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.keeping import Directory, ServedModel, entries
from intactkv_export.keeping import directory as directories
from intactkv_export.prefix import ikv
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def own(smol: Smol) -> ServedModel:
    return ServedModel(smol.gguf)


@pytest.fixture(scope="module")
def kept(smol: Smol, own: ServedModel) -> Callable[..., bytes]:
    """kept(tokens, ...): the bytes of a prefix that the model has kept, of a few tokens; the rows are any."""
    old = ikv.read(smol.ikv)

    def make(tokens: list[int], **about: Any) -> bytes:
        rest = {k: v for k, v in old.manifest.items() if k not in ("format", "tokens", "model")}
        rows = [{x.il: np.asarray(getattr(x, side)[: len(tokens)]) for x in old.layers} for side in "KV"]
        manifest = {**rest, "kept": {**own.about, "requests": 3, **about}}
        return ikv.build(old.manifest["model"], tokens, *rows, manifest)

    return make


@dataclass
class Place:
    """A directory, what is said of it, and files in it that were used in this order."""

    path: Path
    model: ServedModel
    said: list[str]
    make: Callable[..., bytes]
    now: int = 1_000_000_000

    def open(self, n_bytes: int = 10**9) -> Directory:
        return Directory(self.path, self.model, n_bytes, self.said.append)

    def put(self, tokens: list[int], name: str | None = None, **about: Any) -> Path:
        path = self.path / (name or directories.file_name(self.model.weights_sha256, tokens))
        directories.write(path, self.make(tokens, **about))
        self.now += 10
        os.utime(path, (self.now, self.now))
        return path

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.path.iterdir()} - {".lock"}


@pytest.fixture
def place(tmp_path: Path, own: ServedModel, kept: Callable[..., bytes]) -> Place:
    (tmp_path / "kept").mkdir(mode=0o700)
    return Place(tmp_path / "kept", own, [], kept)


def test_it_is_this_users_alone_and_one_servers(tmp_path: Path, own: ServedModel) -> None:
    said: list[str] = []
    with Directory(tmp_path / "a" / "b", own, 1, said.append) as opened:
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
        with pytest.raises(IntactKVError, match="another server keeps its prompts in"):
            Directory(opened.path, own, 1, said.append)
    Directory(opened.path, own, 1, said.append).__exit__(None, None, None)
    assert said == []
    opened.path.chmod(0o755)
    with Directory(opened.path, own, 1, said.append):
        assert "can be read by others" in said[0]
    with pytest.raises(UsageError, match="is no directory"):
        Directory(own.path, own, 1, said.append)


def test_what_fits_is_loaded_and_the_rest_left_with_a_word(place: Place, smol: Smol) -> None:
    """Of another model, of another version, torn: it stays where it is, for whom it may be of use."""
    mine = place.put([11, 2, 3])
    moved = place.put([4, 5, 6], mtime_ns=7)  # the file was copied: its weights say that they are the same
    other = place.put([7, 8, 9], "other.ikv", weights_sha256="0" * 64, mtime_ns=7)
    (place.path / "torn.ikv").write_bytes(mine.read_bytes()[:-9])
    (place.path / "notes.txt").write_text("no prefix")
    (place.path / "own.ikv").write_bytes(smol.ikv.read_bytes())
    before = place.names
    with place.open() as opened:
        found = opened.fitting()
    assert [prefix.source.name for prefix in found if prefix.source] == [
        "own.ikv", moved.name, mine.name,
    ]  # fmt: skip
    assert all(not prefix.data for prefix in found)
    assert len(place.said) == 2
    assert f"{other} is left out: it is of another model" in place.said[0]
    assert "torn.ikv is left out: " in place.said[1]
    assert place.names == before


def test_the_longest_unused_goes_and_a_pinned_one_never(place: Place) -> None:
    """Another model's too: the limit is the directory's. Renaming one pins it."""
    old = place.put([1, 2, 3])
    pinned = place.put([1, 2, 4], "mine.ikv")
    other = place.put([1, 2, 5], weights_sha256="0" * 64, mtime_ns=7)
    newer = place.put([1, 2, 6])
    size = old.stat().st_size
    new = place.put([1, 2, 7])
    with place.open(int(3.5 * size)) as opened:
        assert opened.make_room(new) == [old]
    os.utime(other)  # used
    with place.open(int(2.5 * size)) as opened:
        assert opened.make_room(new) == [newer]
    with place.open(size // 2) as opened:
        assert set(opened.make_room(new)) == {other, new}  # it alone is larger
    assert place.names == {pinned.name}


def test_a_kept_one_goes_where_another_has_its_tokens(place: Place, smol: Smol) -> None:
    """A longer one, or one that the user has made: at full precision, with prefix --like."""
    short, long = place.put([11, 2, 3]), place.put([11, 2, 3, 4, 5])
    with place.open() as opened:
        assert opened.has([11, 2]) and opened.has([11, 2, 3, 4, 5]) and not opened.has([11, 2, 3, 9])
        assert opened.make_room(long) == [short]
    prompt = place.put(smol.tokens)
    (place.path / "full.ikv").write_bytes(smol.ikv.read_bytes())
    with place.open() as opened:
        assert [prefix.source for prefix in opened.fitting()] == [place.path / "full.ikv", long]
    assert not prompt.exists()


def test_one_that_the_context_has_no_room_for_is_in_no_others_place(place: Place) -> None:
    """With a larger context it was kept, and what it begins with was not."""
    long = place.put([1, 2, 3, 4, 5])
    with place.open() as opened:
        assert [prefix.source for prefix in opened.fitting(n_ctx=6)] == [long] and opened.has([1, 2])
        assert opened.fitting(n_ctx=5) == [] and not opened.has([1, 2])
        assert "is left out: it takes 5 tokens and the context has 5" in place.said[0]
        short = place.put([1, 2])
        assert opened.make_room(short) == [] and {long.name, short.name} == place.names
        assert [prefix.source for prefix in opened.fitting(n_ctx=5)] == [short]


def test_kill_9_in_mid_write_loses_nothing_else(place: Place) -> None:
    mine = place.put([1, 2, 3])
    before = mine.read_bytes()
    target = place.path / directories.file_name("x", [9])
    code = (
        "import sys\nfrom intactkv_export.work import atomic\n"
        f"with atomic.output({str(target)!r}) as file:\n"
        "    file.write(bytes(1 << 20)); file.flush(); print('half', flush=True); sys.stdin.read()"
    )
    writing = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writing.stdout is not None and writing.stdout.readline() == "half\n"
    (place.path / ".0123456789abcdef.tokens.tmp").write_text('{"format":1,"tok')
    with place.open() as opened:  # what is being written is not touched
        assert len(place.names) == 2 and [x.source for x in opened.fitting()] == [mine]
    writing.send_signal(signal.SIGKILL)
    writing.wait()
    with place.open() as opened:
        assert place.names == {mine.name}
        assert [x.source for x in opened.fitting()] == [mine] and mine.read_bytes() == before
    assert place.said == []


def test_notes(place: Place, tmp_path: Path) -> None:
    def note(name: str, **values: Any) -> Path:
        whole = {"format": 1, "model": str(place.model.path.absolute()), "requests": 3, "tokens": [1, 2], **values}
        path = place.path / f"{name * 16}.tokens"
        path.write_text(json.dumps(whole))
        return path

    mine, other, old = note("a"), note("b", model="/other.gguf"), note("c", model="/gone.gguf")
    os.utime(old, (1, 1))
    note("d", tokens="no list"), note("e", format=2)
    (place.path / f"{'f' * 16}.tokens").write_text('{"format":1,')
    (place.path / f"{'1' * 16}.tokens").mkdir()
    (place.path / "thesis.tokens").write_text("the user's own")
    with place.open() as opened:
        found = list(opened.wanted())
    assert [(wanted.path, wanted.tokens, wanted.requests) for wanted in found] == [(mine, [1, 2], 3)]
    assert place.names == {mine.name, other.name, f"{'1' * 16}.tokens", "thesis.tokens"} and len(place.said) == 3


def test_inspect_lists_them(place: Place, smol: Smol, capsys: pytest.CaptureFixture[str]) -> None:
    mine, pinned = place.put([1, 2, 3]), place.put([4, 5], "mine.ikv")
    (place.path / "full.ikv").write_bytes(smol.ikv.read_bytes())
    (place.path / "torn.ikv").write_bytes(mine.read_bytes()[:-9])
    assert main(["inspect", str(place.path)]) == 0
    text = capsys.readouterr().out
    assert "4 prefixes in" in text
    assert (
        "  3 tokens, made by a served model itself, smol.gguf\n" in text and "  24 tokens, made from F16.gguf\n" in text
    )
    assert f"{mine.name}: 0.1 MB, last used 2001-09-09" in text and "torn.ikv" in text and "not to be used: " in text
    assert main(["inspect", str(place.path), "--json"]) == 0
    listed = {Path(x["file"]).name: x for x in json.loads(capsys.readouterr().out)["prefixes"]}
    assert {name: x.get("pinned") for name, x in listed.items()} == {
        mine.name: False, pinned.name: True, "full.ikv": True, "torn.ikv": None,
    }  # fmt: skip
    assert listed[mine.name]["kept"]["model"] == "smol.gguf" and listed["full.ikv"]["kept"] is None
    assert listed[pinned.name]["tokens"] == 2 and "problem" in listed["torn.ikv"]
    assert main(["inspect", str(place.path), "--name", "x"]) == 2
    assert main(["verify", str(mine)]) == 0
    assert "made by smol.gguf itself" in capsys.readouterr().out
    assert [entry.pinned for entry in entries(place.path)] == [True, False, True, True]


def test_weights_are_read_only_where_nothing_says_whose_they_are(
    place: Place, smol: Smol, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of a large model starts at once, though prefixes of another one lie beside its own."""
    place.put([1, 2, 3])
    place.put([4, 5, 6], weights_sha256="0" * 64, mtime_ns=7)
    place.model = ServedModel(smol.gguf)
    monkeypatch.setattr("intactkv_export.keeping.model.identity", lambda _: pytest.fail("all of the model was read"))
    with place.open() as opened:
        assert len(opened.fitting()) == 1
