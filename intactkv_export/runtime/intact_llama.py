"""IntactLlama: llama-cpp-python's Llama whose KV cache is quantized behind an intact prefix."""

from __future__ import annotations

import ctypes
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import EXACT, KV_TYPES, Rope, bindings, errors_logged, kv_pair, reason
from intactkv_export.models import KEY_REFERENCE
from intactkv_export.prefix import ikv
from intactkv_export.replies import CompletionLlama
from intactkv_export.work import usable_cores

L = library.load()  # before anything else imports llama_cpp: on the patched libraries

from llama_cpp import LlamaState  # noqa: E402


class IntactLlama(CompletionLlama):
    """A `llama_cpp.Llama` that begins every sequence with the prefix, when its tokens begin with the prefix.

    Whenever tokens are evaluated from a position inside the prefix, and the sequence begins with the whole prefix,
    the prefix is loaded and evaluation continues behind it. Otherwise the result is the ordinary one, as if there
    were no prefix: a sequence that leaves the prefix before its end is computed from position 0, so results never
    depend on what was in the cache before. This holds for every method of Llama, since all of them evaluate through
    eval().

    A sequence that ends with the prefix needs its last token evaluated, for the logits: that token then attends to
    the intact cells before it, and afterwards the prefix is loaded again, so its own cell is intact too. With
    logits_all=True the other prefix tokens are evaluated as well, from an empty cache, for their logits only.

    model_path: the quantized model, a GGUF.
    prefix: an `.ikv` file or a GGUF that has one embedded; "auto": the one embedded in the model, or the file beside
        it (ikv.find), or none; None: none.
    kv_type: type of the KV cache, or a pair of types for K and V: f16, q8_0, q5_1, q5_0, q4_1, q4_0, bf16, iq4_nl,
        f32. Flash attention is on: quantized caches and prefixes need it.
    llama_kwargs: as of llama_cpp.Llama (n_ctx, n_threads, n_gpu_layers, ...), whose type_k, type_v are kv_type.
        n_threads, n_threads_batch: None: the cores that this process may use.

    Raises UsageError for settings that exclude each other, IntactKVError if the model or the prefix cannot be
    loaded, or does not fit. On stock llama.cpp libraries a prefix loads into an f16 cache only.
    """

    def __init__(
        self,
        model_path: str | Path,
        prefix: str | Path | None = "auto",
        kv_type: str | tuple[str, str] = "q8_0",
        **llama_kwargs: Any,
    ) -> None:
        self.prefix: ikv.Prefix | None = None
        self.prefix_path: Path | None = None
        self.kv_type = kv_pair(kv_type)
        self.n_tokens = 0
        self._from_prefix = False  # cells of positions 0.. are those of the prefix, as far as both go
        self._n_loads, self._load_seconds = 0, 0.0
        _check(llama_kwargs)
        self._load_model(str(model_path), llama_kwargs)
        if prefix is not None:
            path = ikv.find(model_path) if prefix == "auto" else Path(prefix)
            if path is not None:
                self._take_prefix(path, bool(llama_kwargs.get("chat_format")))

    def _load_model(self, model_path: str, llama_kwargs: dict[str, Any]) -> None:
        if not Path(model_path).is_file():
            raise IntactKVError(f"no model at {model_path}: give the path of a GGUF file")
        type_k, type_v = (KV_TYPES[name] for name in self.kv_type)
        rope = Rope().llama_kwargs  # all of it as the model says: llama_cpp's defaults overrule a model's YaRN settings
        settings = {"verbose": False, **rope, **llama_kwargs, "flash_attn": True, "type_k": type_k, "type_v": type_v}
        settings |= {name: settings.get(name) or usable_cores() for name in ("n_threads", "n_threads_batch")}
        with errors_logged() as lines:
            try:
                super().__init__(model_path, **settings)
            except ValueError as error:
                raise IntactKVError(f"{error} ({reason(lines)})" if lines else str(error)) from error
            except TemplateError as error:
                raise IntactKVError(f"the chat template of {model_path} cannot be compiled ({error})") from error

    def _take_prefix(self, path: Path, chosen_format: bool) -> None:
        prefix = ikv.read(path)
        if len(prefix.tokens) >= len(self.input_ids):
            raise IntactKVError(
                f"the prefix in {path} has {len(prefix.tokens)} tokens, the context only n_ctx = "
                f"{len(self.input_ids)}: use a larger n_ctx"
            )
        if self.lora_path is not None:
            raise UsageError(
                f"the prefix {path} was computed without the LoRA {self.lora_path}: use one of them, or prefix=None"
            )
        if library.is_patched():
            with errors_logged():
                bindings.verify(prefix.data, self.ctx)
        elif not set(self.kv_type) <= EXACT:
            raise IntactKVError(
                f"the llama.cpp libraries in {L.llama_cpp._base_path} are stock, they can keep a prefix only in an "
                f'f16 cache and this one is {"/".join(self.kv_type)}: use kv_type="f16", or the libraries that '
                "`python -m intactkv_export.library` names"
            )
        self.prefix = prefix
        self.prefix_path = path
        self.no_drafts_in = prefix.tokens
        if not chosen_format and "chat_template.default" in self._chat_handlers:
            # The prefix renders the model's own template, a format that llama_cpp guesses from it may differ.
            self.chat_format = "chat_template.default"
        if KEY_REFERENCE not in self.metadata:
            warnings.warn(
                f"{self.model_path} does not say which reference it was quantized from: only its structure could be "
                f"compared with the prefix {path}",
                stacklevel=4,
            )
        if (other := ikv.calibrated_for_another(prefix, self.metadata.get(ikv.KEY_FILE_TYPE))) is not None:
            warnings.warn(
                f"the prefix {path} was calibrated for {other}, and {self.model_path} is quantized otherwise: an "
                "uncalibrated prefix, or one calibrated for this file, will serve it better",
                stacklevel=4,
            )

    # Evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those already evaluated, which may load the prefix instead of computing it."""
        tokens, prefix = list(tokens), self.prefix
        if prefix is not None and tokens and self.n_tokens < len(prefix.tokens):
            sequence = self.input_ids[: self.n_tokens].tolist() + tokens
            if sequence[: len(prefix.tokens)] == prefix.tokens:
                tokens = sequence[len(prefix.tokens) :]
                self._start_with(prefix, logits=not tokens)
            elif self._from_prefix:
                tokens = sequence
                self.n_tokens = 0
                self._from_prefix = False
        super().eval(tokens)

    def _start_with(self, prefix: ikv.Prefix, logits: bool) -> None:
        if self._logits_all:
            self.n_tokens = 0
            super().eval(prefix.tokens[:-1])
        self._load(prefix)
        if logits or self._logits_all:
            self.n_tokens = len(prefix.tokens) - 1
            super().eval(prefix.tokens[-1:])
            self._load(prefix)

    def _load(self, prefix: ikv.Prefix) -> None:
        start = time.perf_counter()
        self._from_prefix = True
        if library.is_patched():
            with errors_logged():
                bindings.load(self.ctx, prefix.data)
        else:
            _load_on_stock(self.ctx, prefix.data)
        self.n_tokens = len(prefix.tokens)
        self.input_ids[: self.n_tokens] = prefix.tokens
        self._n_loads += 1
        self._load_seconds += time.perf_counter() - start

    # What is there

    @property
    def intact_cells(self) -> int:
        """Number of cells that attention reads at F16 now. 0 for an f16 cache, where no cell differs."""
        return bindings.n_cells(self.ctx) if library.is_patched() else 0

    @property
    def prefix_messages(self) -> list[dict[str, str]]:
        """What a chat begins with so that it uses the prefix: Prefix.messages, or [] where there is no prefix."""
        return [] if self.prefix is None else self.prefix.messages

    @property
    def prefix_stats(self) -> dict[str, Any]:
        """The prefix in use: where it is from, what it occupies (bytes), how often and how fast it was loaded."""
        patched = library.is_patched()
        return {
            "path": None if self.prefix_path is None else str(self.prefix_path),
            "tokens": 0 if self.prefix is None else len(self.prefix.tokens),
            "kv_type": "/".join(dict.fromkeys(self.kv_type)),
            "intact_cells": self.intact_cells,
            "arena_bytes": bindings.arena_bytes(self.ctx) if patched else 0,
            "attention": bindings.attention(self.ctx) if patched else "stock",
            "loads": self._n_loads,
            "load_seconds": self._load_seconds,
        }

    # State

    def save_state(self) -> LlamaState:
        """As Llama.save_state(). Whether the cache holds the prefix is part of the state."""
        state = super().save_state()
        state.from_prefix = self._from_prefix
        return state

    def load_state(self, state: LlamaState) -> None:
        """As Llama.load_state(). A state that was computed without the prefix stays as it is."""
        super().load_state(state)
        self._from_prefix = getattr(state, "from_prefix", False)

    def shift_context(self, n_discard: int | None = None) -> int:
        """Make room: forget the n_discard oldest tokens behind the prefix and move the later ones up.

        n_discard: None: half of the tokens behind the prefix. Returns the number of tokens discarded. A sequence
        without the prefix loses its first tokens. As llama.cpp's programs do it (llama_memory_seq_add): the moved
        cells still carry what they saw of the discarded ones. Raises IntactKVError if the model's cache cannot shift.
        """
        if not L.llama_memory_can_shift(L.llama_get_memory(self.ctx)):
            raise IntactKVError(f"the KV cache of {self.model_path} cannot be shifted: reset() and evaluate again")
        n_keep = len(self.prefix.tokens) if self.prefix is not None and self._from_prefix else 0
        n_free = max(self.n_tokens - n_keep, 0)
        n_discard = min(n_free // 2 if n_discard is None else n_discard, n_free)
        if n_discard > 0:
            after = n_keep + n_discard
            self._ctx.kv_cache_seq_rm(0, n_keep, after)
            self._ctx.kv_cache_seq_shift(0, after, self.n_tokens, -n_discard)
            self.input_ids[n_keep : self.n_tokens - n_discard] = self.input_ids[after : self.n_tokens].copy()
            self.n_tokens -= n_discard
        return n_discard

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the arguments that make an equal IntactLlama."""
        state = super().__getstate__()
        for name in ("flash_attn", "type_k", "type_v"):
            del state[name]
        return {**state, "prefix": self.prefix_path, "kv_type": self.kv_type}

    def close(self) -> None:
        """As Llama.close()."""
        if hasattr(self, "_stack"):  # else: refused before there was anything to close
            super().close()


def _check(llama_kwargs: dict[str, Any]) -> None:
    for name in ("type_k", "type_v"):
        if name in llama_kwargs:
            raise UsageError(f'{name}={llama_kwargs[name]!r}: IntactLlama takes kv_type="q8_0" or kv_type=(k, v)')
    if not llama_kwargs.get("flash_attn", True):
        raise UsageError("flash_attn=False: a quantized KV cache and a prefix both need flash attention")


def _load_on_stock(ctx: Any, data: bytes) -> None:
    """Load a verified prefix by what every llama.cpp has: llama_state_seq_load_file."""
    with tempfile.NamedTemporaryFile(suffix=".ikv") as file, errors_logged() as lines:
        file.write(data)
        file.flush()
        tokens, n = (L.llama_token * L.llama_n_ctx(ctx))(), ctypes.c_size_t()
        if L.llama_state_seq_load_file(ctx, file.name.encode(), 0, tokens, len(tokens), ctypes.byref(n)) == 0:
            raise IntactKVError(f"llama.cpp refused the prefix: {reason(lines, 'it does not fit')}")
