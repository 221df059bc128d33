"""Why llama.cpp failed, as a part of a sentence: the first thing it logged says that, the last only that it failed."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FUNCTION = re.compile(r"^(?:[A-Za-z_~][\w:~<>]*(?:\(\))?: )+")  # "llama_model_load: ", of the function that logs
# What only says that something failed: the reason stands before it, or after it in the same line.
_ANNOUNCED = re.compile(r"^(?:error loading model(?: \w+)*|failed to (?:initialize the context|quantize|load model)): ")
_EMPTY = re.compile(r"failed to (?:load model|open GGUF file|quantize)\b.*|error loading model")


def reason(lines: Sequence[str], otherwise: str = "no reason given") -> str:
    """The reason in the error lines of errors_logged(), without the name of the function and the final full stop.

    The first line that names one; of none, the first line; otherwise: of no lines at all.
    """
    said = [_plain(line) for line in lines if line.strip(" \n=")]
    return next((text for text in said if text and not _EMPTY.fullmatch(text)), said[0] if said else otherwise)


def _plain(line: str) -> str:
    text = line.strip()
    for pattern in (_FUNCTION, _ANNOUNCED, _FUNCTION):
        text = pattern.sub("", text)
    return text.rstrip(".")
