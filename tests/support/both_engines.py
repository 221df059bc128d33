"""A prefix file of one model by each engine."""

from __future__ import annotations

from pathlib import Path

from intactkv_export.conversion import prefix
from intactkv_export.prefix import Prefix, ikv


def files(directory: Path, out: Path) -> tuple[Prefix, Prefix]:
    """Of a Hugging Face directory by torch, and of the GGUF beside it by llama.cpp; written into `out`."""
    gguf = directory.with_name(f"{directory.name}.gguf")
    made = []
    for engine, reference in (("torch", directory), ("llama", gguf)):
        path = out / f"{engine}.ikv"
        prefix(reference, gguf, system_prompt="Be brief.", engine=engine, out=path)
        made.append(ikv.read(path))
    got, want = made
    assert got.manifest["engine"]["name"] == "torch" and got.tokens == want.tokens and len(got.tokens) > 8
    assert got.manifest["model"] == want.manifest["model"]
    return got, want
