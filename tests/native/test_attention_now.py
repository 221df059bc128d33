"""What intactkv_attention() says is what the graph runs: models whose heads the fused kernel takes, and does not.

The models are tiny and random, written here. The operations of each graph are counted while it runs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from intactkv_export import library
from tests.support import lowlevel
from tests.support.lowlevel import Context, L

N_EMBD, N_HEAD, N_LAYER, N_VOCAB = 64, 2, 2, 64
OPERATIONS = {"CUSTOM", "FLASH_ATTN_EXT", "SOFT_MAX"}  # fused attention; upstream's, with flash attention and without


def write(path: Path, head: int, swa: int | None = None) -> Path:
    """A Llama of two layers, or with swa a Gemma 4 whose first layer has a sliding window and heads of that size."""
    rng = np.random.default_rng(2403)
    arch = "gemma4" if swa else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(256)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(N_LAYER)
    writer.add_feed_forward_length(N_EMBD)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(N_VOCAB)
    writer.add_tokenizer_model("no_vocab")
    if swa:
        for key, value in {"key_length_swa": swa, "value_length_swa": swa, "sliding_window": 128}.items():
            writer.add_uint32(f"gemma4.attention.{key}", value)
        writer.add_array("gemma4.attention.sliding_window_pattern", [True, False])
        writer.add_uint32("gemma4.embedding_length_per_layer_input", 0)
        writer.add_uint32("gemma4.rope.dimension_count_swa", swa)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, shape[-1] ** -0.5, shape) if len(shape) > 1 else np.ones(shape)
        writer.add_tensor(f"{name}.weight", values.astype(np.float32))

    add("token_embd", N_VOCAB, N_EMBD)
    add("output", N_VOCAB, N_EMBD)
    add("output_norm", N_EMBD)
    for i in range(N_LAYER):
        size = swa if swa and i == 0 else head
        for name in ("attn_q", "attn_k", "attn_v"):
            add(f"blk.{i}.{name}", size * N_HEAD, N_EMBD)
        add(f"blk.{i}.attn_output", N_EMBD, size * N_HEAD)
        for name in ("ffn_up", "ffn_gate", "ffn_down"):
            add(f"blk.{i}.{name}", N_EMBD, N_EMBD)
        for name in ("attn_norm", "ffn_norm", *(("post_attention_norm", "post_ffw_norm") if swa else ())):
            add(f"blk.{i}.{name}", N_EMBD)
        if swa:
            add(f"blk.{i}.attn_q_norm", size)
            add(f"blk.{i}.attn_k_norm", size)
    if swa:
        add("rope_freqs", head // 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Counted:
    """A ggml_backend_sched_eval_callback that counts OPERATIONS."""

    def __init__(self) -> None:
        ggml = ctypes.CDLL(str(next(library.library_path().glob("*ggml-base*"))))
        ggml.ggml_op_desc.restype, ggml.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        self.ran: set[str] = set()

        def callback(tensor: int, ask: bool, _: Any) -> bool:
            self.ran.update({ggml.ggml_op_desc(tensor).decode()} & OPERATIONS)
            return not ask

        field = dict(L.llama_context_params._fields_)["cb_eval"]
        self._keep = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(callback)
        self.cb_eval = ctypes.cast(self._keep, field)


def said_and_ran(path: Path, k: str, v: str | None = None, **params: Any) -> list[tuple[str, set[str]]]:
    """What attention is said and which OPERATIONS run, in a context without a prefix, then with one if it loads."""
    model = lowlevel.load_model(path)
    source = Context(model, "f16", swa_full=True)
    source.decode(range(20), 0)
    state = source.save()
    counted = Counted()
    ctx = Context(model, k, v, cb_eval=counted.cb_eval, swa_full=True, **params)
    found = []
    for pos in (0, 20):
        if pos and not ctx.restore(state):
            break
        said = ctx.attention()
        counted.ran.clear()
        ctx.decode([1, 2, 3], pos)
        found.append((said, set(counted.ran)))
        L.llama_memory_clear(ctx.memory, True)
    return found


FUSED, FLASH, SOFT_MAX = ({name} for name in ("CUSTOM", "FLASH_ATTN_EXT", "SOFT_MAX"))


@pytest.mark.parametrize("head", [64, 48, 512])
def test_heads_that_the_kernel_takes(tmp_path: Path, head: int) -> None:
    path = write(tmp_path / "model.gguf", head)
    assert said_and_ran(path, "f16") == [("fused", FUSED)] * 2
    assert said_and_ran(path, "bf16") == [("fused", FUSED)] * 2
    assert said_and_ran(path, "f32") == [("stock", FLASH)] * 2
    assert said_and_ran(path, "bf16", "f32") == [("stock", FLASH), ("portable", FLASH)]


@pytest.mark.parametrize("head", [40, 72, 528])
def test_heads_that_the_kernel_does_not_take(tmp_path: Path, head: int) -> None:
    path = write(tmp_path / "model.gguf", head)
    assert said_and_ran(path, "f16") == [("stock", FLASH)] * 2  # its cells hold the prefix exactly: none is intact
    assert said_and_ran(path, "bf16") == [("stock", FLASH), ("portable", FLASH)]


def test_a_quantized_cache_with_heads_too_large_for_the_kernel(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", 544)
    assert said_and_ran(path, "q8_0") == [("stock", FLASH), ("portable", FLASH)]


def test_without_flash_attention(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", 64)
    assert said_and_ran(path, "q8_0", "f16", flash_attn_type=0) == [("stock", SOFT_MAX)]  # and refuses the prefix
    assert said_and_ran(path, "q8_0", flash_attn_type=-1) == [("fused", FUSED)] * 2  # llama.cpp turns it on


@pytest.mark.parametrize("base, swa", [(64, 40), (40, 64)])
def test_fused_is_said_only_if_every_layer_is(tmp_path: Path, base: int, swa: int) -> None:
    path = write(tmp_path / "model.gguf", base, swa)
    assert said_and_ran(path, "bf16") == [("stock", FUSED | FLASH), ("portable", FUSED | FLASH)]
    path = write(tmp_path / "model.gguf", 64, 128)
    assert said_and_ran(path, "bf16") == [("fused", FUSED)] * 2


def test_without_a_vocabulary_no_prefix_and_all_else(tmp_path: Path) -> None:
    """Such a model has the kernel and a tail; what a prefix would be compared with is not there, which is said."""
    context = Context(lowlevel.load_model(write(tmp_path / "m.gguf", 64)), "q4_0", tail=8, n_ctx=256)
    context.decode([5, 6, 7], 0)
    assert context.n_intact() == 3
    lib = L.llama_cpp._lib
    lib.intactkv_describe.argtypes, lib.intactkv_describe.restype = [ctypes.c_void_p], ctypes.c_char_p
    lib.intactkv_error.restype = ctypes.c_char_p
    assert lib.intactkv_describe(context.ptr) is None
    assert b"it has no vocabulary" in lib.intactkv_error()
