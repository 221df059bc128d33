"""What our readers of saved states assume of llama.cpp: the versions, and the functions that write the bytes.

    python native/state_layout.py SOURCE     compare the llama.cpp in a directory with it; exit status 1 if it differs

A prefix file is a state that stock llama.cpp writes and reads. Its bytes are read in three places of our own: READERS.
Upstream raises a version when the bytes change, but not always; so the text of the functions that write them is
compared too, without comments and spaces. When this fails: read what has changed upstream, make the readers follow, and
let old files be read as they are (a file says its version); then write the new versions and digests here
(`--digests SOURCE`).
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

READERS = "intactkv_export/libllama/state.py, native/src/prefix_file/parse.cpp, native/src/cells/state.cpp"
HEADER = "include/llama.h"
VERSIONS = {"LLAMA_STATE_SEQ_VERSION": 3, "LLAMA_SESSION_VERSION": 10}

# (file, function): digest of its text in the pinned source
FUNCTIONS: dict[tuple[str, str], str] = {
    ("src/llama-context.cpp", "llama_context::state_seq_save_file"): "55acff0fa9f3fc8a",
    ("src/llama-context.cpp", "llama_context::state_seq_write_data"): "82fc37e46280045d",
    ("src/llama-context.cpp", "llama_context::state_write_data"): "4eebda555ee06c60",
    ("src/llama-kv-cache.cpp", "llama_kv_cache::state_write"): "308c7e42433350e2",
    ("src/llama-kv-cache.cpp", "llama_kv_cache::state_write_meta"): "416b6bcc1e370362",
    ("src/llama-kv-cache.cpp", "llama_kv_cache::state_write_data"): "6663c3094c501076",
    ("src/llama-kv-cache-iswa.cpp", "llama_kv_cache_iswa::state_write"): "6db93a1a416dc917",
    ("src/llama-memory-hybrid.cpp", "llama_memory_hybrid::state_write"): "5ba5c0424dae86f7",
    ("src/llama-memory-hybrid-iswa.cpp", "llama_memory_hybrid_iswa::state_write"): "544a9fa13636d922",
    ("src/llama-memory-recurrent.cpp", "llama_memory_recurrent::state_write"): "e95142f165a811ea",
    ("src/llama-memory-recurrent.cpp", "llama_memory_recurrent::state_write_meta"): "c5c2bbdaa9f3b3ad",
    ("src/llama-memory-recurrent.cpp", "llama_memory_recurrent::state_write_data"): "25f0c8d242a93825",
}


def digest(source: str, function: str) -> str | None:
    """Of a function's text without comments and spaces; None: there is no such function."""
    found = re.search(rf"^\w[^\n;]*\b{re.escape(function)}\(.*?^\}}", source, re.MULTILINE | re.DOTALL)
    if found is None:
        return None
    plain = re.sub(r"//[^\n]*|/\*.*?\*/|\s+", "", found[0], flags=re.DOTALL)
    return hashlib.sha256(plain.encode()).hexdigest()[:16]


def versions(header: str) -> dict[str, int]:
    """The state versions that llama.h defines."""
    found = re.findall(r"^#define\s+(LLAMA_\w+_VERSION)\s+(\d+)", header, re.MULTILINE)
    return {name: int(value) for name, value in found if name in VERSIONS}


def differences(files: Mapping[str, str]) -> list[str]:
    """A sentence for each thing that is not as the readers assume. files: unpatched, path in llama.cpp -> text."""
    now = versions(files.get(HEADER, ""))
    said = [
        f"{HEADER}: {name} is {now.get(name, 'not there')}, our readers know {known}: see what upstream has changed in "
        f"its states and make {READERS} follow"
        for name, known in VERSIONS.items()
        if now.get(name) != known
    ]
    for (path, function), known in FUNCTIONS.items():
        if (found := digest(files.get(path, ""), function)) != known:
            what = "is not there" if found is None else f"has changed ({known} -> {found})"
            said.append(
                f"{path}: {function}, which writes a part of a state, {what}: see whether the bytes are others, and "
                f"make {READERS} follow"
            )
    return said


def read(directory: Path) -> dict[str, str]:
    """The files that differences() looks at, of a llama.cpp source directory; those that are not there are left out."""
    names = {HEADER, *(path for path, _ in FUNCTIONS)}
    return {name: (directory / name).read_text(errors="replace") for name in names if (directory / name).is_file()}


if __name__ == "__main__":
    texts = read(Path(sys.argv[-1]))
    if sys.argv[1] == "--digests":
        for place in FUNCTIONS:
            print(f'    ("{place[0]}", "{place[1]}"): "{digest(texts.get(place[0], ""), place[1])}",')
        sys.exit(0)
    problems = differences(texts)
    print("\n".join(problems) or "states are written as our readers assume")
    sys.exit(1 if problems else 0)
