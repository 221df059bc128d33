"""What llama.cpp has to say about a failure: it logs the reason and returns only that it failed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from intactkv_export import library

ERROR = 4  # GGML_LOG_LEVEL_ERROR


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs in this block, and keep the rest of its log quiet.

    The log is one for the whole process. After the block it goes where llama_cpp sends it.
    """
    llama_cpp = library.load()
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        if level == ERROR and text.strip():
            lines.append(text.decode("utf-8", "replace").strip())

    llama_cpp.llama_log_set(collect, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(llama_cpp._logger.llama_log_callback, None)
