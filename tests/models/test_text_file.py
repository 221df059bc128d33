"""Files of text as editors and shells write them: encodings, byte order marks, line endings; else one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import read_text, text_file

TEXT = "Zürich\n\tand 你好\n"


@pytest.fixture(autouse=True)
def no_named_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(text_file.VARIABLE, raising=False)
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale: "UTF-8")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_encodings_that_show_themselves(tmp_path: Path, encoding: str, ending: str) -> None:
    (tmp_path / "text").write_bytes(TEXT.replace("\n", ending).encode(encoding))
    assert read_text(tmp_path / "text") == TEXT


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark(encoding: str) -> None:
    assert text_file.decode("Grüße, 你".encode(encoding), "x") == "Grüße, 你"


def test_the_locale_and_the_named_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    data = "Zürich €".encode("cp1252")
    with pytest.raises(IntactKVError, match=r"^x is not UTF-8 at byte 1 \(0xfc\): .*--encoding"):
        text_file.decode(data, "x")
    monkeypatch.setattr("locale.getpreferredencoding", lambda do_setlocale: "cp1252")
    assert text_file.decode(data, "x") == "Zürich €"
    assert text_file.decode("Zürich €".encode(), "x") == "Zürich €", "what is UTF-8 is UTF-8 in any locale"
    with pytest.raises(IntactKVError, match=r"neither UTF-8 nor cp1252, the locale's encoding, at byte 1 \(0x81\)"):
        text_file.decode(b"a\x81", "x")
    monkeypatch.setenv(text_file.VARIABLE, "latin-1")
    assert text_file.decode("Zürich".encode("latin-1"), "x") == "Zürich"
    monkeypatch.setenv(text_file.VARIABLE, "klingon")
    with pytest.raises(UsageError, match="klingon"):
        text_file.decode(b"a", "x")


@pytest.mark.parametrize("data", [b"\x7fELF\0\0\1\0", b"a\0b", b"\0" * 64, bytes(range(256)) * 4])
def test_what_is_no_text(data: bytes) -> None:
    with pytest.raises(IntactKVError, match=f"x is not text: byte {data.index(0)} is 0x00"):
        text_file.decode(data, "x")


def test_a_mark_that_lies() -> None:
    with pytest.raises(IntactKVError, match=r"begins as UTF-8 and is not at byte 3 \(0xff\)"):
        text_file.decode(b"\xef\xbb\xbf\xff", "x")


def test_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read .* \\(No such file or directory\\)"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="Is a directory"):
        read_text(tmp_path)


def test_words_of_the_command_line() -> None:
    assert text_file.argument_text("Zürich 你", "-s") == "Zürich 你"
    assert text_file.argument_text("Zürich".encode().decode("ascii", "surrogateescape"), "-s") == "Zürich"
    with pytest.raises(IntactKVError, match="-s is not UTF-8 at byte 1"):
        text_file.argument_text("Z\udcfcrich", "-s")
