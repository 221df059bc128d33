"""A conversation with a model behind its prefix: what was said, what of it fits, and the next reply."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.runtime.chat_tokens import ChatTokens
from intactkv_export.runtime.intact_llama import IntactLlama, L

_SEEDS = 1 << 32  # llama.cpp's are 32 bits wide, and the last one means "choose one"


@dataclass
class Sampling:
    """How replies are sampled; as in llama_cpp.Llama.create_completion. max_tokens 0: until the context is full.

    seed: of the whole conversation, each reply draws its own from it; None: another one every time.
    """

    max_tokens: int = 0
    temperature: float = 0.8
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None


@dataclass
class ReplyStats:
    """What one reply cost: tokens, of them those that were already in the cache, seconds."""

    n_prompt: int = 0
    n_cached: int = 0
    n_reply: int = 0
    prompt_seconds: float = 0.0
    reply_seconds: float = 0.0


@dataclass
class Conversation:
    """Messages so far, and the model that answers. `opening` are the messages that are never dropped."""

    llama: IntactLlama
    opening: list[dict[str, str]]
    sampling: Sampling
    notice: Callable[[str], None]
    turns: list[tuple[str, str]] = field(default_factory=list)
    last: ReplyStats = field(default_factory=ReplyStats)

    def __post_init__(self) -> None:
        self._tokens_of = ChatTokens(self.llama)
        given = self.sampling.seed
        self.seed = random.SystemRandom().randrange(_SEEDS - 1) if given is None else given
        self._seeds = random.Random(self.seed)

    def say(self, text: str) -> Iterator[str]:
        """The reply to `text`, piece by piece. Stopped early, what was said so far stays in the conversation.

        Drops the oldest turns, with a notice, when the conversation no longer fits. Raises IntactKVError if the
        message alone does not fit; then the conversation stays as it was.
        """
        prompt = self._fit(text)
        llama, stats = self.llama, ReplyStats(n_prompt=len(prompt))
        n_loads = llama.prefix_stats["loads"]
        stats.n_cached = L.Llama.longest_token_prefix(llama.input_ids[: llama.n_tokens].tolist(), prompt)
        pieces: list[str] = []
        start = first = time.perf_counter()
        try:
            for chunk in llama.create_completion(
                prompt,
                stream=True,
                max_tokens=self.sampling.max_tokens,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                min_p=self.sampling.min_p,
                seed=self._seeds.randrange(_SEEDS - 1),
            ):
                if not pieces:
                    first = time.perf_counter()
                pieces.append(chunk["choices"][0]["text"])
                yield pieces[-1]
            if chunk["choices"][0]["finish_reason"] == "length" and llama.n_tokens + 1 >= llama.n_ctx():
                self.notice(f"the context of {llama.n_ctx()} tokens is full, the reply ends here")
        finally:
            now = time.perf_counter()
            stats.n_reply = max(llama.n_tokens - len(prompt), 0)
            stats.prompt_seconds, stats.reply_seconds = first - start, now - first
            if llama.prefix is not None and llama.prefix_stats["loads"] > n_loads:
                stats.n_cached = len(llama.prefix.tokens)
            self.last = stats
            if reply := "".join(pieces):
                self.turns.append((text, reply))

    def reset(self) -> None:
        """Forget the conversation."""
        self.turns.clear()

    def report(self) -> str:
        """For /stats."""
        s, last, prefix = self.llama.prefix_stats, self.last, self.llama.prefix
        lines = [
            f"prefix     {prefix.contents} from {s['path']}" if prefix else "prefix     none",
            f"cache      {s['kv_type']}, {self.llama.n_tokens} of {self.llama.n_ctx()} tokens used, "
            f"{s['intact_cells']} intact, {s['attention']} attention",
        ]
        if s["path"]:
            lines[0] += f", loaded {s['loads']} times in {s['load_seconds']:.3f} s"
        if s["tail"]:
            lines.append(f"tail       {s['tail']} cells, {s['tail_cells']} of them there now")
        if s["arena_bytes"]:
            lines.append(f"F16 rows   {s['arena_bytes'] / 1e6:.1f} MB")
        lines.append(f"sampling   seed {self.seed}, {self.llama.n_threads} threads")
        if last.n_prompt:
            rate = last.n_reply / last.reply_seconds if last.reply_seconds else 0.0
            lines.append(
                f"last reply {last.n_prompt} tokens of prompt ({last.n_cached} from the cache) in "
                f"{last.prompt_seconds:.2f} s, {last.n_reply} tokens of reply at {rate:.1f}/s"
            )
        return "\n".join(lines)

    def begins_with_prefix(self) -> bool:
        """Whether what is evaluated for a first message begins with the prefix, as it does if both were made so."""
        prefix = self.llama.prefix
        return prefix is not None and self._tokens([], "Hello")[: len(prefix.tokens)] == prefix.tokens

    def _fit(self, text: str) -> list[int]:
        """The prompt's tokens; turns that no longer fit are dropped, but only for a message that does."""
        n_ctx, wanted = self.llama.n_ctx(), self.sampling.max_tokens
        reserve = min(wanted, n_ctx // 4) if wanted > 0 else n_ctx // 4
        kept = list(self.turns)
        while len(prompt := self._tokens(kept, text)) + reserve > n_ctx and kept:
            del kept[0]
        if len(prompt) >= n_ctx:
            begun = ", and the conversation stays as it is" if self.turns else ""
            raise IntactKVError(
                f"the message makes a prompt of {len(prompt)} tokens, the context has {n_ctx}: shorten it, or use a "
                f"larger --ctx-size{begun}"
            )
        if n_dropped := len(self.turns) - len(kept):
            turns = "turn was" if n_dropped == 1 else f"{n_dropped} turns were"
            self.notice(f"the context is full: the oldest {turns} dropped")
            self.turns[:] = kept
        return prompt

    def _tokens(self, turns: list[tuple[str, str]], text: str) -> list[int]:
        messages = list(self.opening)
        for user, assistant in turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        return self._tokens_of([*messages, {"role": "user", "content": text}])


def opening_messages(llama: IntactLlama, system_prompt: str | None) -> list[dict[str, str]]:
    """What a conversation begins with: the messages of the prefix, so that its tokens begin with the prefix.

    Raises UsageError if a system prompt is given and the prefix was computed for another. One that differs from the
    prefix's by white space only is replaced by that, with a warning.
    """
    if llama.prefix is None or llama.prefix.manifest["bos_only"]:
        return [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    opening = llama.prefix_messages  # none: the template's own system prompt
    if system_prompt is not None and [system_prompt] != [message["content"] for message in opening]:
        if opening and opening[0]["content"].split() == system_prompt.split():
            warnings.warn(
                f"the system prompt differs from the one that the prefix {llama.prefix_path} was computed for by white "
                "space only: the prefix's own is used",
                stacklevel=2,
            )
            return opening
        own = repr(opening[0]["content"]) if opening else "of the model's chat template"
        raise UsageError(
            f"the prefix was computed for the system prompt {own}, not for {system_prompt!r}: leave --system-prompt "
            "out, make another prefix with `intactkv-export prefix`, or chat with --no-prefix"
        )
    return opening
