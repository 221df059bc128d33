"""A quantized SmolLM2, stamped with its reference, and prefix files for it: made once, kept with the test models."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from intactkv_export.engines import llama_engine as engine
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.models import reference
from intactkv_export.prefix import ikv, make_prompt

SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@dataclass(frozen=True)
class Smol:
    """Paths. gguf: Q4_0 with the reference's identity. ikv: its system prompt's prefix, bos: of the first token."""

    reference: Path
    gguf: Path
    ikv: Path
    bos: Path

    @property
    def tokens(self) -> list[int]:
        return ikv.read(self.ikv).tokens


@pytest.fixture(scope="session")
def smol(models_dir: Path, model: Callable[[str], Path]) -> Smol:
    """What the tests of everything behind convert start from."""
    made = Smol(model("F16"), *(models_dir / name for name in ("smol.gguf", "smol-prompt.ikv", "smol-bos.ikv")))
    if not made.ikv.is_file():
        found = reference.locate(made.reference)
        sha256 = reference.identity(found)
        ikv.stamp(model("Q4_0"), sha256, made.gguf)
        with Vocabulary(made.reference) as vocabulary:
            for path, bos_only in ((made.bos, True), (made.ikv, False)):
                system = None if bos_only else SYSTEM_PROMPT
                made_of = make_prompt(vocabulary, found.chat_template, system, bos_only)
                description, K, V, _ = engine.compute(made.reference, made_of.tokens, n_threads=2)
                manifest = {
                    "text": made_of.text,
                    "messages": made_of.messages,
                    "bos_only": bos_only,
                    "chat_template_sha256": made_of.chat_template_sha256,
                    "reference": {"sha256": sha256, "dtype": "F16", "name": "F16.gguf", "quantized": False},
                    "engine": {"name": "llama", "dtype": "f32", "versions": engine.versions()},
                    "calibrated": None,
                    "created_by": "the tests",
                }
                partial = path.with_name(f"{path.name}.{os.getpid()}")
                partial.write_bytes(ikv.build(description, made_of.tokens, K, V, manifest))
                partial.rename(path)
    return made
