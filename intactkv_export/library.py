"""The patched llama.cpp libraries: where they are, and llama_cpp loaded on them.

`python -m intactkv_export.library` prints their directory, so that any program that uses llama-cpp-python can be
started on them:

    LLAMA_CPP_LIB_PATH=$(python -m intactkv_export.library) python program.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import intactkv_export
from intactkv_export.errors import IntactKVError, first_line

VARIABLE = "LLAMA_CPP_LIB_PATH"

# How often a thread of ggml looks whether the others have come before it sleeps. GNU's OpenMP looks 300 000 times, some
# milliseconds at each of the hundreds of barriers of a token: beside another busy process the thread that waits burns
# the core which the one waited for needs. A thousand is about what it costs to wake a thread that sleeps.
_SPINS = "GOMP_SPINCOUNT", "1000"


def library_path() -> Path:
    """The directory of the patched libraries (libllama and ggml). Raises IntactKVError if they were not built."""
    return _installed("lib")


def converter_path() -> Path:
    """Upstream's `convert_hf_to_gguf.py`, beside the packages it imports. Raises IntactKVError if not installed."""
    return _installed("_converter") / "convert_hf_to_gguf.py"


def programs_path() -> Path:
    """The directory of upstream's programs. Raises IntactKVError if they were not built (-DINTACTKV_TOOLS=ON)."""
    return _installed("bin")


def environment(patient: bool = False) -> dict[str, str]:
    """For a program of upstream's in a process of its own: it runs on the libraries that LLAMA_CPP_LIB_PATH names.

    patient: its threads wait asleep, as ours do (_SPINS).
    """
    own = dict(os.environ)
    chosen = own.get(VARIABLE)
    if chosen and Path(chosen) != library_path():
        name = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
        own[name] = os.pathsep.join(filter(None, (chosen, own.get(name))))
    if patient and "OMP_WAIT_POLICY" not in own:
        own.setdefault(*_SPINS)
    return own


def load() -> Any:
    """The llama_cpp module on the patched libraries, or on those that LLAMA_CPP_LIB_PATH names.

    Sets LLAMA_CPP_LIB_PATH, so that child processes load the same libraries. Their threads wait asleep (_SPINS) unless
    the environment says how OpenMP's threads are to wait, or the process has GNU's OpenMP in use already. Raises
    IntactKVError if llama_cpp was imported before with other libraries, or if the libraries cannot be loaded.
    """
    imported = sys.modules.get("llama_cpp.llama_cpp")
    if imported is None:
        path = os.environ.get(VARIABLE) or str(library_path())
        os.environ[VARIABLE] = path
        try:
            with _patient_threads():
                import_module("llama_cpp")
        except (ImportError, OSError, RuntimeError) as error:
            raise IntactKVError(
                f"cannot load llama_cpp with the libraries in {path} ({first_line(error)}): "
                f"install intactkv-export again, or correct {VARIABLE} if you have set it"
            ) from error
    elif not hasattr(imported._lib, "intactkv_version") and VARIABLE not in os.environ:
        raise IntactKVError(
            f"llama_cpp was imported before intactkv_export with the libraries in {imported._base_path}, which have "
            f"no intact cells: import and load intactkv_export first, or set {VARIABLE}={library_path()}"
        )
    return sys.modules["llama_cpp"]


@contextmanager
def _patient_threads() -> Iterator[None]:
    """GNU's OpenMP reads its settings once, when it is loaded. Then they are taken back: they are not the process's."""
    if "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ:  # the user's choice
        yield
        return
    name, value = _SPINS
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def is_patched() -> bool:
    """Whether the libraries that llama_cpp is on have intact cells (the symbol intactkv_version)."""
    return hasattr(load().llama_cpp._lib, "intactkv_version")


def _installed(name: str) -> Path:
    # An editable install has two directories: the sources, and what the build made.
    for directory in intactkv_export.__path__:
        if (path := Path(directory, name)).is_dir():
            return path
    raise IntactKVError(
        f"{name!r}, which the build makes, is not in {list(intactkv_export.__path__)}: "
        "install the package with `pip install .` or `make build`"
    )


if __name__ == "__main__":
    try:
        print(library_path())
    except IntactKVError as error:
        sys.exit(f"intactkv-export: {error}")
