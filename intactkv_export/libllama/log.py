"""What llama.cpp has to say about a failure: it logs the reason and returns only that it failed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from intactkv_export import library

ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Collectors(threading.local):
    """Of each thread: the lists that its error lines go to, the innermost last."""

    def __init__(self) -> None:
        self.lists: list[list[str]] = []


_collectors = _Collectors()
_installing = threading.Lock()
_installed: Any = None  # our callback as llama.cpp has it: made once, never freed, since any thread may be in it
_next: Any = None  # where lines go that no thread collects: what was installed when ours was


@contextmanager
def errors_logged() -> Iterator[list[str]]:
    """Collect the error lines that llama.cpp logs in this thread in this block, and keep its other lines quiet.

    Blocks may be nested and may run in several threads at once: each gets its own lines. Lines of other threads go
    where they went before.
    """
    _install()
    lines: list[str] = []
    _collectors.lists.append(lines)
    try:
        yield lines
    finally:
        _collectors.lists.pop()


@contextmanager
def quiet_opening() -> Iterator[None]:
    """Open a model in this thread without llama_cpp's way of keeping it quiet, and quiet all the same.

    llama_cpp points the process's stdout and stderr at /dev/null while a model loads: other threads lose what they
    write, and two that load at once leave both there for ever.
    """
    internals = library.load()._internals
    with _installing:
        if not isinstance(internals.suppress_stdout_stderr, _Redirection):
            internals.suppress_stdout_stderr = _Redirection(internals.suppress_stdout_stderr)
            library.load().llama.suppress_stdout_stderr = internals.suppress_stdout_stderr
    before = _Redirection.local.off
    _Redirection.local.off = True
    try:
        yield
    finally:
        _Redirection.local.off = before


class _Off(threading.local):
    off = False


class _Redirection:
    """llama_cpp's suppress_stdout_stderr, which does nothing in threads that open a model of ours."""

    local = _Off()

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(self, disable: bool = True) -> Any:
        return nullcontext() if self.local.off else self._original(disable=disable)


def _install() -> None:
    """Have llama.cpp call _collect, unless it does; a program may have set a callback of its own since."""
    global _installed, _next
    llama_cpp = library.load()
    now, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    with _installing:
        llama_cpp.llama_log_get(ctypes.byref(now), ctypes.byref(data))
        if _installed is not None and _address(now) == _address(_installed):
            return
        if _installed is None:
            _installed = llama_cpp.llama_log_callback(_collect)
        _next = (now, data) if _address(now) else None
        llama_cpp.llama_log_set(_installed, None)


def _address(callback: Any) -> int | None:
    return ctypes.cast(callback, ctypes.c_void_p).value


def _collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    if _collectors.lists:
        if level == ERROR and text.strip():
            _collectors.lists[-1].append(text.decode("utf-8", "replace").strip())
    elif (following := _next) is not None:
        callback, data = following
        callback(level, text, data)
