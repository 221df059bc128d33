"""The reason of a failure, out of what llama.cpp logs: unit lines as they are, and a real file of an unknown kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from intactkv_export.engines import llama_engine
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary, reason
from intactkv_export.runtime import IntactLlama
from tests.support.smol import Smol


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["llama_model_load: error loading model: unknown model architecture: 'foo'",
             "llama_model_load_from_file_impl: failed to load model"],
            "unknown model architecture: 'foo'",
        ),
        (
            ["gguf_init_from_file_impl: tensor 'x' data is not within the file bounds, model is corrupted",
             "llama_model_load: error loading model: llama_model_loader: failed to load model from a.gguf",
             "llama_model_load_from_file_impl: failed to load model"],
            "tensor 'x' data is not within the file bounds, model is corrupted",
        ),
        (
            ["ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 123",
             "llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache"],
            "failed to allocate buffer of size 123",
        ),
        (["llama_model_quantize: failed to quantize: requantizing from type q8_0 is disabled."],
         "requantizing from type q8_0 is disabled"),
        (["llama_model_load_from_file_impl: failed to load model"], "failed to load model"),
        (["", "==="], "no reason given"),
    ],
)  # fmt: skip
def test_the_first_line_that_says_why(lines: list[str], expected: str) -> None:
    assert reason(lines) == expected


def test_an_unknown_architecture_is_named_wherever_it_is_opened(smol: Smol, tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    data = smol.reference.read_bytes()
    gguf.write_bytes(data[:4096].replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lemur", 1) + data[4096:])
    for open_ in (Vocabulary, IntactLlama, llama_engine.describe):
        with pytest.raises(IntactKVError, match="unknown model architecture: 'lemur'") as caught:
            open_(gguf)
        assert "\n" not in str(caught.value)
