"""A model in llama.cpp with a context for one sequence, on the CPU: tokens in, the state of its cache out."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama.bindings import no_automatic_prefixes
from intactkv_export.libllama.compute_thread import compute
from intactkv_export.libllama.kv_types import KV_TYPES
from intactkv_export.libllama.log import errors_logged
from intactkv_export.libllama.reason import reason
from intactkv_export.libllama.rope import Rope
from intactkv_export.work import usable_cores

N_BATCH = 512  # tokens evaluated at a time, at most


class Context:
    """A GGUF with a llama_context, `ptr`, that has no automatic prefix unless it is to have them: what is decoded is
    computed. A context manager: frees both.

    n_ctx: 0: N_BATCH. cache_type: "f32" (then without flash attention, which works in F16) or another of KV_TYPES.
    n_threads: None: the cores that this process may use. rope: None: the model's own. overrides: integers of the GGUF's
    metadata that are read as others. automatic: with the model's prefixes, and those that LLAMA_INTACTKV names, as in
    any program. Raises IntactKVError if llama.cpp cannot run it.
    """

    def __init__(
        self,
        gguf: str | os.PathLike[str],
        n_ctx: int,
        cache_type: str,
        n_threads: int | None,
        rope: Rope | None = None,
        overrides: Mapping[str, int] | None = None,
        automatic: bool = False,
    ) -> None:
        self._L = L = library.load()
        self._model, self.ptr = None, None
        if not Path(gguf).is_file():
            raise IntactKVError(f"no model at {gguf}: give the path of a GGUF file")
        with errors_logged() as lines:
            model = L.llama_model_default_params()
            model.n_gpu_layers, model.use_extra_bufts = 0, False
            model.kv_overrides = kept = _overrides(overrides or {})
            self._model = L.llama_model_load_from_file(os.fsencode(gguf), model)
            if self._model:
                context = L.llama_context_default_params()
                context.n_ctx, context.n_seq_max = n_ctx or N_BATCH, 1
                context.n_batch = context.n_ubatch = N_BATCH
                context.n_threads = context.n_threads_batch = n_threads or usable_cores()
                context.type_k = context.type_v = KV_TYPES[cache_type]
                context.flash_attn_type = int(cache_type != "f32")
                context.offload_kqv = context.op_offload = False  # a GPU would round in its own ways
                for name, value in (rope or Rope()).llama_kwargs.items():
                    setattr(context, name, value)
                with nullcontext() if automatic else no_automatic_prefixes():
                    self.ptr = L.llama_init_from_model(self._model, context)
        del kept  # it had to live until the model was read
        if not self.ptr:
            self.close()
            raise IntactKVError(f"llama.cpp cannot run {gguf} ({reason(lines)}): check the file and the free memory")

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context and the model."""
        with errors_logged():
            if self.ptr:
                self._L.llama_free(self.ptr)
            if self._model:
                self._L.llama_model_free(self._model)
        self.ptr = self._model = None

    def decode(self, tokens: Sequence[int], start: int) -> None:
        """Evaluate tokens at positions start.. of sequence 0. Raises IntactKVError."""
        batch = self._L.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
            status, lines = compute(self._decode, batch)
            if status:
                why = reason(lines, f"status {status}")
                raise IntactKVError(f"llama.cpp cannot evaluate tokens {start} to {start + len(tokens) - 1} ({why})")
        finally:
            self._L.llama_batch_free(batch)

    def _decode(self, batch: Any) -> tuple[int, list[str]]:
        with errors_logged() as lines:
            return self._L.llama_decode(self.ptr, batch), lines

    def state(self) -> bytes:
        """The state of sequence 0 (llama_state_seq_get_data), as libllama.state reads it."""
        return sequence_state(self.ptr)


def _overrides(values: Mapping[str, int]) -> Any:
    """llama_model_params.kv_overrides, ended by an empty one."""
    L = library.load()
    made = (L.llama_model_kv_override * (len(values) + 1))()
    for entry, (key, value) in zip(made, values.items(), strict=False):
        entry.key, entry.tag, entry.value.val_i64 = key.encode(), L.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return made


def sequence_state(ctx: Any, seq_id: int = 0) -> bytes:
    """The state of a sequence of any llama_context: llama_state_seq_get_data."""
    L = library.load()
    data = (ctypes.c_uint8 * L.llama_state_seq_get_size(ctx, seq_id))()
    n = L.llama_state_seq_get_data(ctx, data, len(data), seq_id)
    return memoryview(data).cast("B")[:n].tobytes()
