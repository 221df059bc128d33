"""IntactLlama: llama-cpp-python's Llama whose KV cache is quantized behind an intact prefix."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import (
    EXACT,
    KV_TYPES,
    TAIL_MAX,
    Rope,
    bindings,
    compute,
    errors_logged,
    kv_pair,
    quiet_opening,
    reason,
)
from intactkv_export.models import KEY_REFERENCE, gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.replies import CompletionLlama
from intactkv_export.work import usable_cores

L = library.load()  # before anything else imports llama_cpp: on the patched libraries

import numpy as np  # noqa: E402
from llama_cpp import LlamaState  # noqa: E402
from llama_cpp._internals import LlamaContext  # noqa: E402
from llama_cpp.llama_cache import BaseLlamaCache  # noqa: E402

from intactkv_export.runtime import sequence_state  # noqa: E402
from intactkv_export.runtime.evaluated_cells import Batches, can_shift, has_room, held  # noqa: E402
from intactkv_export.runtime.kv_choice import choose_kv_types  # noqa: E402
from intactkv_export.runtime.threads import Turns, takes_turns  # noqa: E402

N_UBATCH = 128  # tokens at once on a CPU: as fast as 512 there, and less to compute again for who goes back


class _Context(LlamaContext):
    """llama_cpp's context, that also evaluates after fork."""

    def decode(self, batch: Any) -> None:
        compute(super().decode, batch)


@takes_turns(
    calls=("eval", "sample", "embed", "reset", "save_state", "load_state", "shift_context"),
    replies=("generate", "_create_completion"),
    reads=("_prefix_stats",),
)
class IntactLlama(CompletionLlama):
    """A `llama_cpp.Llama` that begins every sequence with the prefix, when its tokens begin with the prefix.

    Whenever tokens are evaluated from a position inside the prefix, and the sequence begins with the whole prefix,
    the prefix is loaded and evaluation continues behind it. Otherwise the result is the ordinary one, as if there
    were no prefix: a sequence that leaves the prefix before its end is computed from position 0. This holds for every
    method of Llama, since all of them evaluate through eval().

    Without a tail results never depend on what other sequences left in the cache, to the last bit: a sequence that
    goes back keeps whole batches only (fewer than n_ubatch tokens are computed again: 128 on a CPU unless given),
    because the last bits of a token's result depend on how many tokens were evaluated with it. For the same reason a
    conversation that goes on turn by turn, its replies computed token by token, can differ in these bits from the same
    text evaluated at once after reset(); at temperature 0 that can be another word. A draft_model's guesses are batches
    too, and those that it gets wrong are dropped without computing the rest again. Cells that a sliding window has
    dropped (swa_full=False) are computed again, from the start of the sequence.

    The context has n_ctx() tokens everywhere: llama.cpp rounds n_ctx up to a multiple of 256, and the prefix's extra
    cells, which stand for no token, take their number of it. The logits of a prefix of one token, where the sequence
    ends with it, are computed without them: they are at its position, and llama.cpp cannot remove it alone.

    Calls from several threads take turns: a call has the model until it returns, a streamed reply until it has been
    read, closed, or left unread for a second while another call waits. After fork the model works in the child too,
    unless another thread was evaluating at that moment.

    A sequence that ends with the prefix needs its last token evaluated, for the logits: that token then attends to
    the intact cells before it, and afterwards the prefix is loaded again, so its own cell is intact too. With
    logits_all=True the other prefix tokens are evaluated as well, from an empty cache, for their logits only.

    Models with recurrent layers (hybrids, Mamba, RWKV) keep one state of a sequence and cannot step back in it: a
    sequence that goes back is computed again from its beginning, and one that ends with the prefix has all of it
    evaluated for the logits of its last token, before the prefix takes its place.

    model_path: the quantized model, a GGUF, or any of its parts (NAME-00001-of-00003.gguf).
    prefix: an `.ikv` file or a GGUF that has one embedded, the name of one of several in the model, or one that was
        read (ikv.Prefix); "auto": the first that LLAMA_INTACTKV names, or the one embedded in the model, of several
        the default, or the file beside it, or none (ikv.own); None: none.
    kv_type: type of the KV cache, or a pair of types for K and V: f16, q8_0, q5_1, q5_0, q4_1, q4_0, bf16, iq4_nl,
        f32; None: q8_0, or f16, with a warning, where the model's heads do not fit it. Flash attention is on:
        quantized caches and prefixes need it.
    tail: how many of the newest cells are intact too; None: $INTACTKV_TAIL, or 128 where K or V has less than 8 bits a
        value and our kernel reads the cache, else 0. The tokens of one ubatch see each other at F16 whatever it is.
    llama_kwargs: as of llama_cpp.Llama (n_ctx, n_threads, n_gpu_layers, ...), whose type_k, type_v are kv_type.
        n_threads, n_threads_batch: None: the cores that this process may use.

    Raises UsageError for settings that exclude each other, IntactKVError if the model or the prefix cannot be
    loaded, or does not fit. On stock llama.cpp libraries a prefix loads into an f16 cache only.
    """

    def __init__(
        self,
        model_path: str | Path,
        prefix: str | Path | ikv.Prefix | None = "auto",
        kv_type: str | tuple[str, str] | None = None,
        tail: int | None = None,
        **llama_kwargs: Any,
    ) -> None:
        self.prefix: ikv.Prefix | None = None
        self.prefix_path: Path | None = None
        asked = None if kv_type is None else kv_pair(kv_type)
        self.n_tokens = 0
        self._from_prefix = False  # cells of positions 0.. are those of the prefix, as far as both go
        self._batches = Batches()
        self._n_loads, self._load_seconds = 0, 0.0
        self._owner: dict[str, str] | None = None
        _check(llama_kwargs, tail)
        model_path = gguf_file.shards(model_path)[0]
        if not model_path.is_file():
            raise IntactKVError(f"no model at {model_path}: give the path of a GGUF file")
        self.kv_type, why = choose_kv_types(asked, gguf_file.read(model_path).values)
        if why:
            warnings.warn(why, stacklevel=2)
        self._load_model(str(model_path), llama_kwargs)
        self._tail_asked = tail
        if tail is not None and not llama_kwargs.get("vocab_only"):
            self._set_tail(tail)
        if prefix is not None and not llama_kwargs.get("vocab_only"):  # then there is no cache to load it into
            if not isinstance(prefix, ikv.Prefix):
                prefix = ikv.own(model_path) if prefix == "auto" else ikv.named(model_path, prefix)
            if prefix is not None:
                self._take_prefix(prefix, bool(llama_kwargs.get("chat_format")))
        self._keep_text_text()
        self._turns = Turns(self)

    def _keep_text_text(self) -> None:
        """The names of control tokens in messages are text, as far as the chat format leaves tokenizing to us."""
        from intactkv_export.runtime.chat_tokens import formatter_of_prefix, text_stays_text

        name = self.chat_format
        if name == "chat_template.default" and (formatter := formatter_of_prefix(self)) is not None:
            self._chat_handlers[name] = L.llama_chat_format.chat_formatter_to_chat_completion_handler(formatter)
        handler = self._chat_handlers.get(name)
        if handler is None:
            with suppress(L.llama_chat_format.LlamaChatCompletionHandlerNotFoundException):  # said when it is used
                handler = L.llama_chat_format.get_chat_completion_handler(name)
        if getattr(handler, "__qualname__", "").startswith("chat_formatter_to_chat_completion_handler."):
            self._chat_handlers[name] = text_stays_text(handler)

    def _load_model(self, model_path: str, llama_kwargs: dict[str, Any]) -> None:
        type_k, type_v = (KV_TYPES[name] for name in self.kv_type)
        # llama.cpp ends the process where embeddings are pooled and n_ubatch is less than n_batch
        if not (llama_kwargs.get("n_gpu_layers") or llama_kwargs.get("embedding")):
            llama_kwargs = {"n_ubatch": N_UBATCH, **llama_kwargs}
        rope = Rope().llama_kwargs  # all of it as the model says: llama_cpp's defaults overrule a model's YaRN settings
        settings = {"verbose": False, **rope, **llama_kwargs, "flash_attn": True, "type_k": type_k, "type_v": type_v}
        settings |= {name: settings.get(name) or usable_cores() for name in ("n_threads", "n_threads_batch")}
        with quiet_opening(), errors_logged() as lines, bindings.no_automatic_prefixes():  # it gives its own
            try:
                super().__init__(model_path, **settings)
            except ValueError as error:
                raise IntactKVError(f"{error} ({reason(lines)})" if lines else str(error)) from error
            except TemplateError as error:
                raise IntactKVError(f"the chat template of {model_path} cannot be compiled ({error})") from error
        self._ctx.__class__ = _Context
        self._size_arrays()

    def _size_arrays(self) -> None:
        """llama_cpp sizes these by the n_ctx asked for, llama.cpp has rounded it up."""
        self._n_ctx = n_ctx = self.n_ctx()
        self.input_ids: np.ndarray = np.zeros(n_ctx, np.intc)
        self.scores: np.ndarray = np.empty((n_ctx if self._logits_all else self.n_batch, self._n_vocab), np.single)

    def _set_tail(self, tail: int) -> None:
        if library.is_patched():
            bindings.set_tail(self.ctx, tail)
        elif tail > 0 and not set(self.kv_type) <= EXACT:
            raise IntactKVError(
                f"the llama.cpp libraries in {L.llama_cpp._base_path} are stock, they keep no tail of {tail} cells: "
                "leave it out, or use the libraries that `python -m intactkv_export.library` names"
            )

    def _take_prefix(self, prefix: ikv.Prefix, chosen_format: bool) -> None:
        path = prefix.source
        if prefix.n_cells >= len(self.input_ids):
            raise IntactKVError(
                f"the prefix in {path} has {prefix.contents}, the context only n_ctx = {len(self.input_ids)}: use a "
                "larger n_ctx"
            )
        if not has_room(L, self.ctx, self.context_params, prefix.n_extra, prefix.in_sight):
            raise IntactKVError(
                f"the prefix in {path} has {prefix.n_extra} extra cells, for which the cache of the sliding window has "
                f"no room beside n_ubatch = {self.context_params.n_ubatch}: use swa_full=True, or a smaller n_ubatch"
            )
        if self.lora_path is not None:
            raise UsageError(
                f"the prefix {path} was computed without the LoRA {self.lora_path}: use one of them, or prefix=None"
            )
        if library.is_patched():
            with errors_logged():
                bindings.add_prefix(self.ctx, prefix.data, str(path))
            bindings.set_automatic(self.ctx, False)  # eval() says when
        elif not set(self.kv_type) <= EXACT:
            raise IntactKVError(
                f"the llama.cpp libraries in {L.llama_cpp._base_path} are stock, they can keep a prefix only in an "
                f'f16 cache and this one is {"/".join(self.kv_type)}: use kv_type="f16", or the libraries that '
                "`python -m intactkv_export.library` names"
            )
        self.prefix = prefix
        self.prefix_path = path
        self._size_arrays()
        self.no_drafts_in = prefix.tokens
        if not chosen_format and "chat_template.default" in self._chat_handlers:
            # The prefix renders the model's own template, a format that llama_cpp guesses from it may differ.
            self.chat_format = "chat_template.default"
        if KEY_REFERENCE not in self.metadata:
            warnings.warn(
                f"{self.model_path} does not say which reference it was quantized from: only its structure could be "
                f"compared with the prefix {path}",
                stacklevel=3,
            )
        if (other := ikv.calibrated_for_another(prefix, self.metadata.get(ikv.KEY_FILE_TYPE))) is not None:
            warnings.warn(
                f"the prefix {path} was calibrated for {other}, and {self.model_path} is quantized otherwise: an "
                "uncalibrated prefix, or one calibrated for this file, will serve it better",
                stacklevel=3,
            )

    # Evaluation

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those already evaluated, which may load the prefix instead of computing it.

        Raises IntactKVError if they do not fit into the context; then nothing has changed.
        """
        tokens, prefix = list(tokens), self.prefix
        if bad := [token for token in tokens if not 0 <= token < self.n_vocab()]:
            raise UsageError(f"token {bad[0]} is not in the vocabulary, which has {self.n_vocab()}: give others")
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise IntactKVError(
                f"{len(tokens)} tokens after {self.n_tokens} do not fit into the context of {self.n_ctx()}: "
                "use shift_context(), or a larger n_ctx"
            )
        tokens = self._go_back() + tokens
        if prefix is not None and tokens and self.n_tokens < len(prefix.tokens):
            sequence = self.input_ids[: self.n_tokens].tolist() + tokens
            if sequence[: len(prefix.tokens)] == prefix.tokens:
                tokens = sequence[len(prefix.tokens) :]
                self._start_with(prefix, logits=not tokens)
            elif self._from_prefix:
                tokens = sequence
                self.n_tokens = 0
                self._from_prefix = False
        self._compute(tokens)

    @property
    def _has_states(self) -> bool:
        """Whether layers keep a state of the sequence, in which one cannot step back. A model of a hybrid architecture
        that has no such layer is treated so too."""
        return bool(self._is_recurrent or self._is_hybrid)

    def _go_back(self) -> list[int]:
        """After n_tokens was made smaller: make it that of the last whole batch; the tokens that this leaves out."""
        n = self.n_tokens
        if self._has_states:
            memory = L.llama_get_memory(self.ctx)
            if n == 0 or L.llama_memory_seq_rm(memory, 0, n, -1):
                return []
            self.n_tokens = 0
            return self.input_ids[:n].tolist()
        if n == 0 or n >= self._batches.last:
            return []
        keep = n if self.draft_model is not None else self._batches.whole(n)
        if not held(L, self.ctx, keep):
            keep = 0
        self.n_tokens = keep
        return self.input_ids[keep:n].tolist()

    def _compute(self, tokens: Sequence[int]) -> None:
        start = self.n_tokens
        try:
            super().eval(tokens)
        finally:
            self._batches.add(start, self.n_tokens, self.n_batch, self.context_params.n_ubatch)

    def _start_with(self, prefix: ikv.Prefix, logits: bool) -> None:
        if self._has_states:
            if logits or self._logits_all:  # without intact cells: there is no stepping back before the last token
                self.n_tokens = 0
                self._compute(prefix.tokens)
            self._load(prefix)
            return
        if self._logits_all:
            self.n_tokens = 0
            self._compute(prefix.tokens[:-1])
        self._load(prefix)
        if logits or self._logits_all:
            self.n_tokens = len(prefix.tokens) - 1
            self._compute(prefix.tokens[-1:])
            self._load(prefix)

    def _load(self, prefix: ikv.Prefix) -> None:
        start = time.perf_counter()
        self._from_prefix = True
        if library.is_patched():
            with errors_logged():
                bindings.load_held(self.ctx, 0)
        else:
            sequence_state.load_prefix_file(L, self.ctx, prefix.data)
        self.n_tokens = len(prefix.tokens)
        self._batches = Batches([self.n_tokens])
        self.input_ids[: self.n_tokens] = prefix.tokens
        self._n_loads += 1
        self._load_seconds += time.perf_counter() - start

    # What is there

    def n_ctx(self) -> int:
        """How many tokens the context has: as many as the cache has cells, but for the prefix's extra ones."""
        return super().n_ctx() - (0 if self.prefix is None else self.prefix.n_extra)

    @property
    def intact_cells(self) -> int:
        """Number of cells that attention reads at F16 now, the tail's too. 0 for an f16 cache: none differs."""
        return bindings.n_cells(self.ctx) if library.is_patched() else 0

    @property
    def tail(self) -> int:
        """How many of the newest cells are intact, whatever they are. 0: there is no tail."""
        return bindings.tail(self.ctx) if library.is_patched() else 0

    @property
    def prefix_messages(self) -> list[dict[str, str]]:
        """What a chat begins with so that it uses the prefix: Prefix.messages, or [] where there is no prefix."""
        return [] if self.prefix is None else self.prefix.messages

    @property
    def prefix_tools(self) -> list[dict[str, Any]]:
        """The tools that the prefix was made with: a chat that begins with prefix_messages and names no others has
        these. [] where there are none."""
        return [] if self.prefix is None else self.prefix.tools

    @property
    def prefix_stats(self) -> dict[str, Any]:
        """The prefix in use: where it is from, how often and how fast it was loaded; and what is intact now, of the
        prefix and of the tail, and occupies how many bytes."""
        return self._prefix_stats()

    def _prefix_stats(self) -> dict[str, Any]:
        patched = library.is_patched()
        return {
            "path": None if self.prefix_path is None else str(self.prefix_path),
            "tokens": 0 if self.prefix is None else len(self.prefix.tokens),
            "extra_cells": 0 if self.prefix is None else self.prefix.n_extra,
            "kv_type": "/".join(dict.fromkeys(self.kv_type)),
            "intact_cells": self.intact_cells,
            "tail": self.tail,
            "tail_cells": bindings.n_tail_cells(self.ctx) if patched else 0,
            "arena_bytes": bindings.arena_bytes(self.ctx) if patched else 0,
            "attention": bindings.attention(self.ctx) if patched else "stock",
            "loads": self._n_loads,
            "load_seconds": self._load_seconds,
        }

    # State

    def save_state(self) -> sequence_state.IntactState:
        """The tokens evaluated so far, their cells, and what these belong to. Raises IntactKVError.

        Its size is that of the cells, plus, with logits_all=True, that of the logits.
        """
        if self._has_states and (again := self._go_back()):
            self.eval(again)
        n = self.n_tokens
        scores = self.scores[:n] if self._logits_all else self.scores[:0]
        self._ctx.kv_cache_seq_rm(-1, n, -1)  # what a sequence that went back has left
        return sequence_state.IntactState(
            self._belongs_to(), self.input_ids[:n].copy(), scores.copy(), sequence_state.read_cells(L, self.ctx),
            self._seed, list(self._batches.ends), self._from_prefix,
        )  # fmt: skip

    def load_state(self, state: LlamaState) -> None:
        """Go on where a state was saved. Raises IntactKVError for a state that is damaged, or of another model,
        prefix, kv_type, n_ctx or version: then nothing has changed, or the sequence is empty.
        """
        sequence_state.check(state, self._belongs_to())
        self.n_tokens, self._from_prefix, self._batches = 0, False, Batches()
        self._requires_eval = True
        sequence_state.write_cells(L, self.ctx, state.llama_state)
        n = state.n_tokens
        self.input_ids[:n], self.scores[: len(state.scores)] = state.input_ids, state.scores
        self.n_tokens, self._from_prefix, self._batches = n, state.from_prefix, Batches(list(state.batches))
        self._seed = state.seed

    def set_cache(self, cache: BaseLlamaCache | None) -> None:
        """As Llama.set_cache(). Models may share a cache: each sees its own states only."""
        super().set_cache(cache and sequence_state.OwnStates(cache, self._belongs_to()))

    def _belongs_to(self) -> dict[str, str]:
        if self._owner is None:
            self._owner = sequence_state.owner(self)
        return self._owner

    def sequence_now(self) -> tuple[Any, ...]:
        """For a reply that has to wait: what go_on_with() needs to take it up again."""
        return self.input_ids[: self.n_tokens].tolist(), self._sampler, self._mirostat_mu, self._seed

    def go_on_with(self, sequence: tuple[Any, ...]) -> None:
        """Take up a sequence that another call has replaced: its tokens are evaluated again."""
        tokens, self._sampler, self._mirostat_mu, self._seed = sequence
        self.n_tokens = 0
        if tokens:
            self.eval(tokens)

    def shift_context(self, n_discard: int | None = None) -> int:
        """Make room: forget the n_discard oldest tokens behind the prefix and move the later ones up.

        n_discard: None: half of the tokens behind the prefix. Returns the number of tokens discarded. A sequence
        without the prefix loses its first tokens. As llama.cpp's programs do it (llama_memory_seq_add): the moved
        cells still carry what they saw of the discarded ones. Where the cache cannot shift (quantized, with heads of
        other than 64, 128, ... values or RoPE on a part of them), the later tokens are evaluated again.
        """
        n_keep = len(self.prefix.tokens) if self.prefix is not None and self._from_prefix else 0
        n_free = max(self.n_tokens - n_keep, 0)
        n_discard = min(n_free // 2 if n_discard is None else n_discard, n_free)
        if n_discard > 0:
            after = n_keep + n_discard
            if self._has_states or not can_shift(L, self.ctx, self.context_params.type_k, self.metadata):
                later = self.input_ids[after : self.n_tokens].tolist()
                self.n_tokens = n_keep
                self._requires_eval = True
                if later:
                    self.eval(later)
                return n_discard
            self._ctx.kv_cache_seq_rm(0, n_keep, after)
            self._ctx.kv_cache_seq_shift(0, after, self.n_tokens, -n_discard)
            self.input_ids[n_keep : self.n_tokens - n_discard] = self.input_ids[after : self.n_tokens].copy()
            self.n_tokens -= n_discard
            self._batches.shift(n_keep, n_discard)
            self._requires_eval = True
        return n_discard

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the arguments that make an equal IntactLlama."""
        state = super().__getstate__()
        for name in ("flash_attn", "type_k", "type_v"):
            del state[name]
        return {
            **state,
            "prefix": None if self.prefix is None else ikv.given(self.prefix),
            "kv_type": self.kv_type,
            "tail": self._tail_asked,
        }

    def close(self) -> None:
        """As Llama.close()."""
        if (turns := getattr(self, "_turns", None)) is not None:
            why = f"this IntactLlama of {self.model_path} was closed: open the model again"
            turns.close(super().close, why)
            # What reaches the library past the turns (tokenize, n_ctx, ...) would read memory that is freed.
            for name in ("_model", "_ctx", "_batch", "tokenizer_"):
                setattr(self, name, _Closed(why))
        elif hasattr(self, "_stack"):  # else: refused before there was anything to close
            super().close()


class _Closed:
    """In place of a part of llama_cpp's that was freed: whatever is asked of it is refused."""

    def __init__(self, why: str) -> None:
        self._why = why

    def __getattr__(self, name: str) -> Any:
        raise IntactKVError(self._why)


def _check(llama_kwargs: dict[str, Any], tail: int | None) -> None:
    if tail is not None and not (isinstance(tail, int) and 0 <= tail <= TAIL_MAX):
        raise UsageError(
            f"tail={tail!r}: give the number of newest cells that stay at F16, 0 for none, {TAIL_MAX} at most, or "
            "leave it out"
        )
    for name in ("type_k", "type_v"):
        if name in llama_kwargs:
            raise UsageError(f'{name}={llama_kwargs[name]!r}: IntactLlama takes kv_type="q8_0" or kv_type=(k, v)')
    if not llama_kwargs.get("flash_attn", True):
        raise UsageError("flash_attn=False: a quantized KV cache and a prefix both need flash attention")
