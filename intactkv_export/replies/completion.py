"""Completions: the one place where tokens that a model generates become the text that callers get, whole or streamed.

create_completion, create_chat_completion, the chat handlers and the server of llama_cpp all come through
Llama._create_completion, which CompletionLlama replaces. A streamed reply and a whole one are the same pieces.
"""

from __future__ import annotations

import random
import sys
import time
import uuid
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.replies import drafts
from intactkv_export.replies.reply_text import ReplyText, Tokenizer, decoder
from intactkv_export.replies.token_logprobs import Logprobs, TokenLogprobs

L = library.load()  # before anything else imports llama_cpp: on the patched libraries

from llama_cpp import Llama, LogitsProcessorList  # noqa: E402

_NO_SEED = (None, -1, L.LLAMA_DEFAULT_SEED)  # llama.cpp's word for "any"


class CompletionLlama(Llama):
    """A `llama_cpp.Llama` whose replies have the whole text, at the same cost for every token.

    Seeds: without one, here or in a call, every reply has a new one; `last_seed` is the last that was used. With
    Llama(seed=...) or set_seed() replies differ too, and are the same in every process that asks the same.
    Drafts (draft_model) work in every context, and need no more memory than without.
    """

    last_seed: int | None = None
    no_drafts_in: Sequence[int] = ()  # a beginning of sequences that may be loaded as a whole, so is not guessed

    def __init__(
        self, model_path: str, *, seed: int | None = None, draft_model: Any = None, tokenizer: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(model_path, tokenizer=tokenizer, **kwargs)
        self._seed_is_given = False
        if seed not in _NO_SEED:
            self.set_seed(seed)
        self.draft_model = draft_model
        if tokenizer is None:
            self.tokenizer_ = self.tokenizer()

    def tokenizer(self) -> Tokenizer:
        """As Llama.tokenizer()."""
        return Tokenizer(self)

    def set_seed(self, seed: int) -> None:
        """As Llama.set_seed()."""
        self._seed, self._seed_is_given = seed, True

    @property
    def draft_model(self) -> drafts.Drafts | None:
        """What guesses tokens ahead; set to a llama_cpp LlamaDraftModel or to None at any time."""
        return self._drafts

    @draft_model.setter
    def draft_model(self, model: Any) -> None:
        self._drafts = None if model is None else drafts.Drafts(model, self)

    def eval(self, tokens: Sequence[int]) -> None:
        """As Llama.eval()."""
        tokens = list(tokens)
        if self._drafts is not None and self._drafts.are_in(tokens) and not self._logits_all:
            drafts.evaluate(self, tokens)
        else:
            super().eval(tokens)

    def sample(self, *args: Any, idx: int | None = None, **kwargs: Any) -> int:
        """As Llama.sample()."""
        self._n_before_sampled = self.n_tokens if idx is None else idx + 1
        return super().sample(*args, idx=idx, **kwargs)

    def _init_sampler(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        if logits_processor is not None and self._drafts is not None:
            logits_processor = LogitsProcessorList([self._before_sampled(one) for one in logits_processor])
        return super()._init_sampler(*args, logits_processor=logits_processor, **kwargs)

    def _before_sampled(self, processor: Any) -> Any:
        """A logits processor that is not shown guessed tokens as if they were a part of the text."""
        return lambda ids, logits: processor(ids[: self._n_before_sampled], logits)

    def _create_completion(
        self,
        prompt: str | list[int],
        *,
        suffix: str | None = None,
        stop: str | list[str] | None = None,
        seed: int | None = None,
        model: str | None = None,
        stream: bool = False,
        **settings: Any,
    ) -> Iterator[dict[str, Any]]:
        one = _Completion(self, prompt, suffix, [stop] if isinstance(stop, str) else list(stop or []), **settings)
        one.restore_from_cache()
        self._seed = self.last_seed = self._seed_for(seed)
        head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model_path if model is None else model,
        }

        def response(text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
            choice = {"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
            return {**head, "choices": [choice]}

        if stream:
            for text, logprobs in one.pieces():
                yield response(text, logprobs, None)
            yield response("", None, one.finish_reason)
            one.save_to_cache()
            return
        pieces = list(one.pieces())
        one.save_to_cache()
        text = "".join(text for text, _ in pieces)
        yield {**response(text, one.joined(pieces), one.finish_reason), "usage": one.usage}

    def _seed_for(self, seed: int | None) -> int:
        """Of the next reply, 32 bits."""
        if seed in _NO_SEED:
            if not self._seed_is_given:
                return random.SystemRandom().randrange(L.LLAMA_DEFAULT_SEED)
            seed = random.Random(self._seed).randint(0, 2**32)  # as Llama has it, so that its replies are the same
        return int(seed) & 0xFFFFFFFF

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the arguments that make an equal one."""
        state = super().__getstate__()
        state["seed"] = self._seed if self._seed_is_given else None
        state["draft_model"] = None if self._drafts is None else self._drafts.model
        state["tokenizer"] = None if isinstance(self.tokenizer_, Tokenizer) else self.tokenizer_
        return state


class _Completion:
    """One reply: the tokens of its prompt, and the pieces of its text as they come."""

    def __init__(
        self,
        llama: CompletionLlama,
        prompt: str | list[int],
        suffix: str | None,
        stops: list[str],
        *,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        logprobs: int | None = None,
        echo: bool = False,
        stopping_criteria: Any = None,
        logits_processor: Any = None,
        logit_bias: dict[int, float] | None = None,
        **sampling: Any,
    ) -> None:
        if logprobs is not None and not llama._logits_all:
            raise ValueError("logprobs is not supported for models created with logits_all=False")
        self._llama, self._echo, self._n_logprobs = llama, echo, logprobs
        self._prompt = prompt
        self.prompt_tokens, self._suffix = _prompt_tokens(llama, prompt, suffix)
        self.reply_tokens: list[int] = []
        self.finish_reason = "length"
        n_free = llama._n_ctx - len(self.prompt_tokens)
        if n_free <= 0:  # in the words that the server of llama_cpp looks for
            raise ValueError(f"Requested tokens ({len(self.prompt_tokens)}) exceed context window of {llama._n_ctx}")
        self._max_tokens = min(max_tokens, n_free) if max_tokens is not None and max_tokens > 0 else n_free
        begins_text = len(prompt) == 0
        self._text = ReplyText(decoder(llama.tokenizer_, self.prompt_tokens, begins_text), stops)
        if logit_bias is not None:
            bias = _bias(logit_bias, llama.n_vocab())
            logits_processor = LogitsProcessorList([*(logits_processor or []), bias])
        self._sampling = {
            **sampling,
            "temp": temperature,
            "stopping_criteria": stopping_criteria,
            "logits_processor": logits_processor,
        }

    @property
    def usage(self) -> dict[str, int]:
        n_prompt, n_reply = len(self.prompt_tokens), len(self.reply_tokens)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_reply, "total_tokens": n_prompt + n_reply}

    def restore_from_cache(self) -> None:
        """Take the state of llama.cache that shares more of the prompt than what the context holds, if there is one."""
        llama = self._llama
        if not llama.cache:
            return
        try:
            state = llama.cache[self.prompt_tokens]
        except KeyError:
            self._say("cache miss")
            return
        held, saved = llama._input_ids.tolist(), state.input_ids[: state.n_tokens].tolist()
        longest = llama.longest_token_prefix
        if longest(saved, self.prompt_tokens) > longest(held, self.prompt_tokens):
            try:
                llama.load_state(state)
            except IntactKVError as error:  # a cache that is shared with another model, prefix or KV type
                warnings.warn(f"what the cache holds for this prompt is not used: {error}", stacklevel=4)
            else:
                self._say("cache hit")

    def save_to_cache(self) -> None:
        """Leave the state to llama.cache."""
        if self._llama.cache:
            self._llama.cache[self.prompt_tokens + self.reply_tokens] = self._llama.save_state()
            self._say("cache saved")

    def pieces(self) -> Iterator[tuple[str, Logprobs | None]]:
        """The reply in pieces of text, a token each with logprobs."""
        llama = self._llama
        logprobs = None if self._n_logprobs is None else TokenLogprobs(llama, self._text, self._n_logprobs)
        prompt_text = self._prompt_text() if self._echo or logprobs else ""
        if logprobs is not None:
            logprobs.text_offset = len(prompt_text)
        if llama.verbose:
            llama._ctx.reset_timings()
        with closing(self._tokens()) as tokens:
            for token in tokens:
                if self._echo and not self.reply_tokens:
                    yield prompt_text, logprobs.of_prompt(self.prompt_tokens) if logprobs else None
                place = len(self.prompt_tokens) + len(self.reply_tokens)
                if L.llama_vocab_is_eog(llama._model.vocab, token):
                    self.finish_reason = "stop"
                    break
                self.reply_tokens.append(token)
                text = self._text.add(token)
                if logprobs is not None:
                    logprobs.add(token, place, text)
                    yield from logprobs.ready()
                elif ready := self._text.ready():
                    yield ready, None
                if self._text.stopped:
                    self.finish_reason = "stop"
                    break
                if len(self.reply_tokens) >= self._max_tokens:
                    break
        if llama.verbose:
            llama._ctx.print_timings()
        text = self._text.end()
        if logprobs is not None:
            yield from logprobs.rest(text)
        elif ready := self._text.ready():
            yield ready, None
        if self._suffix:
            yield self._suffix, None

    def joined(self, pieces: list[tuple[str, Logprobs | None]]) -> Logprobs | None:
        """The logprobs of a whole reply."""
        if self._n_logprobs is None:
            return None
        keys = ("tokens", "text_offset", "token_logprobs", "top_logprobs")
        return {key: [x for _, part in pieces if part is not None for x in part[key]] for key in keys}

    def _tokens(self) -> Generator[int, None, None]:
        """What the model generates. Afterwards the context holds the prompt and the reply, and no guessed tokens."""
        llama, ended = self._llama, False
        generated = llama.generate(self.prompt_tokens, **self._sampling)
        try:
            for token in generated:
                ended = bool(L.llama_vocab_is_eog(llama._model.vocab, token))
                yield token
            self.finish_reason, ended = "stop", True  # by its stopping_criteria
        finally:
            generated.close()
            if llama.draft_model is not None:
                n_evaluated = len(self.reply_tokens) - (not ended)  # the last is sampled only
                drafts.forget_from(llama, len(self.prompt_tokens) + max(n_evaluated, 0))

    def _prompt_text(self) -> str:
        if isinstance(self._prompt, str):
            return self._prompt
        return self._llama.detokenize(self._prompt).decode("utf-8", "replace")

    def _say(self, what: str) -> None:
        if self._llama.verbose:
            print(f"Llama._create_completion: {what}", file=sys.stderr)


def _prompt_tokens(llama: CompletionLlama, prompt: str | list[int], suffix: str | None) -> tuple[list[int], str | None]:
    """(tokens to evaluate, what is appended to the reply).

    A model with tokens for it is asked for what comes between prompt and suffix; behind the reply of any other the
    suffix is appended. Tokens are taken as they are, text gets the BOS and EOS that the model wants.
    """
    model = llama._model
    marks = [get(model.vocab) for get in (L.llama_vocab_fim_pre, L.llama_vocab_fim_suf, L.llama_vocab_fim_mid)]
    infill = suffix is not None and -1 not in marks
    if isinstance(prompt, str):
        tokens = llama.tokenize(prompt.encode(), add_bos=False, special=not infill) if prompt else []
    else:
        tokens = [int(token) for token in prompt]
    if infill and suffix is not None:
        before, after = [marks[0], *tokens], [marks[1], *_inner_tokens(llama, suffix)]
        tokens = [*after, *before, marks[2]] if llama.spm_infill else [*before, *after, marks[2]]
    if isinstance(prompt, str) or infill:
        cls, sep = model.token_cls(), model.token_sep()
        bos = llama.token_bos() if cls == -1 else cls
        if model.add_bos_token() and bos != -1:
            tokens = [bos, *tokens]
        if model.add_eos_token() or sep != -1:
            tokens = [*tokens, llama.token_eos() if sep == -1 else sep]
    if tokens[:2] == [llama.token_bos()] * 2:
        warnings.warn(
            f'the prompt begins with two "{model.token_get_text(tokens[0])}", which makes replies worse: leave out '
            "the one in the text",
            RuntimeWarning,
            stacklevel=4,
        )
    if not tokens:
        if llama.token_bos() == -1:
            raise ValueError("the prompt is empty and the model has no BOS token: give it a text to begin with")
        tokens = [llama.token_bos()]
    return tokens, None if infill else suffix


def _inner_tokens(llama: CompletionLlama, text: str) -> list[int]:
    """Tokens of a text in the middle of another: without the space that some tokenizers put in front."""
    mark = "☺"
    alone, together = (llama.tokenize(t.encode(), add_bos=False, special=False) for t in (mark, mark + text))
    if text and together[: len(alone)] == alone:
        return together[len(alone) :]
    return llama.tokenize(text.encode(), add_bos=False, special=False) if text else []


def _bias(logit_bias: dict[int, float], n_vocab: int) -> Any:
    """A logits processor that adds to the logits of some tokens. Raises UsageError for one that does not exist."""
    tokens = np.array([int(token) for token in logit_bias], dtype=np.intp)
    if len(bad := tokens[(tokens < 0) | (tokens >= n_vocab)]):
        raise UsageError(f"logit_bias has token {bad[0]}, the vocabulary has {n_vocab}: give others")
    added = np.array([float(value) for value in logit_bias.values()], dtype=np.single)

    def add(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
        biased = np.array(logits)
        biased[tokens] += added
        return biased

    return add
