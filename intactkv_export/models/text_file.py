"""Text that a user gives: a file, a pipe, a word of the command line. Bytes go in, text comes out, or one sentence."""

from __future__ import annotations

import codecs
import locale
import os
from pathlib import Path

from intactkv_export.errors import IntactKVError, UsageError

VARIABLE = "INTACTKV_ENCODING"  # --encoding sets it: the processes of a long job inherit it
# UTF-32 first: its mark begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SAMPLE = 1 << 16  # bytes that are looked at for UTF-16 without a mark


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file, see decode(). Raises UsageError if there is none to read, IntactKVError if it is no text."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path} ({error.strerror}): check the path") from error
    return decode(data, str(path))


def decode(data: bytes, name: str) -> str:
    """The text that bytes stand for, every line ending in a line feed, without a byte order mark.

    The encoding is the one that the variable names, else the one that the bytes show (a byte order mark, UTF-16
    without one, UTF-8), else that of the locale. name: of the file or pipe, for the sentence. Raises IntactKVError
    that names the first byte which fits none, UsageError if the named encoding does not exist.
    """
    text = _decode(data, name)
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def argument_text(value: str, name: str) -> str:
    """A word of the command line as text: Python leaves bytes that are not of the locale's encoding as surrogates."""
    return value if value.isascii() or _encodable(value) else decode(os.fsencode(value), name)


def check_encoding(encoding: str) -> str:
    """Raises UsageError if there is no such encoding of text."""
    try:
        "a".encode(encoding)  # refuses what is a codec of bytes too, such as hex
    except (LookupError, ValueError) as error:
        raise UsageError(
            f"there is no text encoding {encoding!r}: give one that Python knows, as latin-1 or utf-16"
        ) from error
    return encoding


def _decode(data: bytes, name: str) -> str:
    if named := os.environ.get(VARIABLE):
        check_encoding(named)
        return _strictly(data, named, f"{name} is not {named}", "name the encoding it has with --encoding")
    for mark, encoding in _MARKS.items():
        if data.startswith(mark):
            advice = "it is damaged, or name the encoding it has with --encoding"
            return _strictly(data, encoding, f"{name} begins as {encoding.upper()} and is not", advice)
    if b"\0" in data:
        wide = _utf16_without_mark(data)
        if wide is None:
            raise IntactKVError(
                f"{name} is not text: byte {data.index(0)} is 0x00: give a text, or name its encoding with --encoding"
            )
        return wide
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        local = locale.getpreferredencoding(False)
        if codecs.lookup(local).name not in ("utf-8", "ascii"):
            advice = "name the encoding it has with --encoding"
            return _strictly(data, local, f"{name} is neither UTF-8 nor {local}, the locale's encoding,", advice)
        raise IntactKVError(
            f"{name} is not UTF-8 at byte {error.start} (0x{data[error.start]:02x}): convert it, or name the encoding "
            "it has with --encoding, as latin-1"
        ) from error


def _strictly(data: bytes, encoding: str, what: str, advice: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise IntactKVError(f"{what} at byte {error.start} (0x{data[error.start]:02x}): {advice}") from error


def _utf16_without_mark(data: bytes) -> str | None:
    """UTF-16 of Western text: every second byte is zero, or nearly so, and no other is. None if it is not that."""
    sample = data[:_SAMPLE]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    if len(data) % 2 or min(even, odd) or max(even, odd) < len(sample) // 4:
        return None
    try:
        return data.decode("utf-16-be" if even else "utf-16-le")
    except UnicodeDecodeError:
        return None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
