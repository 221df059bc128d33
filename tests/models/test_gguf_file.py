"""The header of a GGUF is parsed once for as long as the file stays as it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

import gguf
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file

OLD = 1_600_000_000  # seconds: a file of years ago


def write(path: Path, name: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def name_in(path: Path) -> str:
    return gguf_file.read(path).values["general.name"]


def test_a_file_that_stays_as_it_is_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    write(path, "one")
    written = path.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: written + 3_000_000_000)
    first = gguf_file.read(path)
    assert gguf_file.read(str(path)) is first
    assert gguf_file.read(path, arrays=True) is not first, "arrays are decoded when they are asked for"
    path.chmod(0)
    if not os.access(path, os.R_OK):
        with pytest.raises(IntactKVError, match="Permission denied"):
            gguf_file.read(path)


def test_a_file_that_was_just_written_is_read_again(tmp_path: Path) -> None:
    """Two writes within a tick of the file system's clock cannot be told apart by its times."""
    path = tmp_path / "model.gguf"
    for name in ("one", "two", "six") * 5:
        write(path, name)
        assert name_in(path) == name


@pytest.mark.parametrize("keeps_its_time", [False, True])
def test_a_file_that_changed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keeps_its_time: bool
) -> None:
    path = tmp_path / "model.gguf"
    write(path, "one")
    os.utime(path, (OLD, OLD))
    now = path.stat().st_ctime_ns
    monkeypatch.setattr(time, "time_ns", lambda: now + 3_000_000_000)
    assert name_in(path) == "one"
    time.sleep(0.05)  # longer than a tick: ctime, which nobody can set, moves on
    with path.open("r+b") as file:
        data = file.read().replace(b"one", b"two")
        file.seek(0)
        file.write(data)
    if keeps_its_time:
        os.utime(path, (OLD, OLD))
    assert name_in(path) == "two"
