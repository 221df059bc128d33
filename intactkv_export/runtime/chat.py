"""A conversation with a model behind its prefix: in a terminal, for one message, or from a pipe."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError, UsageError, first_line
from intactkv_export.libllama import kv_pair
from intactkv_export.models import gguf_file
from intactkv_export.runtime.intact_llama import IntactLlama, L

_CONTEXT = 4096  # tokens; the KV cache of more is rarely wanted on a small device
HELP = """\
/reset   forget the conversation (the prefix stays)
/stats   what the prefix, the cache and the last reply cost
/help    this list
/quit    leave; so does Ctrl-D
Ctrl-C stops a reply, and clears the line when there is none."""


@dataclass
class Sampling:
    """How replies are sampled; as in llama_cpp.Llama.create_completion. max_tokens 0: until the context is full."""

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
class Chat:
    """Messages so far, and the model that answers. `opening` are the messages that are never dropped."""

    llama: IntactLlama
    opening: list[dict[str, str]]
    sampling: Sampling
    notice: Callable[[str], None]
    turns: list[tuple[str, str]] = field(default_factory=list)
    last: ReplyStats = field(default_factory=ReplyStats)

    def __post_init__(self) -> None:
        template = self.llama.metadata.get("tokenizer.chat_template")
        if template is None:
            raise IntactKVError(
                f"{self.llama.model_path} has no chat template, so nothing says how it marks turns: "
                "use IntactLlama.create_completion() for a base model"
            )
        self._formatter = L.llama_chat_format.Jinja2ChatFormatter(
            template, *(self._token_text(t) for t in (self.llama.token_eos(), self.llama.token_bos()))
        )

    def say(self, text: str) -> Iterator[str]:
        """The reply to `text`, piece by piece. Stopped early, what was said so far stays in the conversation.

        Drops the oldest turns, with a notice, when the conversation no longer fits. Raises IntactKVError if the
        message alone does not fit.
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
                seed=self.sampling.seed,
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
        s, last = self.llama.prefix_stats, self.last
        lines = [
            f"prefix     {s['tokens']} tokens from {s['path']}" if s["path"] else "prefix     none",
            f"cache      {s['kv_type']}, {self.llama.n_tokens} of {self.llama.n_ctx()} tokens used, "
            f"{s['intact_cells']} intact, {s['attention']} attention",
        ]
        if s["path"]:
            lines.append(
                f"           F16 rows {s['arena_bytes'] / 1e6:.1f} MB, loaded {s['loads']} times in "
                f"{s['load_seconds']:.3f} s"
            )
        if last.n_prompt:
            rate = last.n_reply / last.reply_seconds if last.reply_seconds else 0.0
            lines.append(
                f"last reply {last.n_prompt} tokens of prompt ({last.n_cached} from the cache) in "
                f"{last.prompt_seconds:.2f} s, {last.n_reply} tokens of reply at {rate:.1f}/s"
            )
        return "\n".join(lines)

    def _fit(self, text: str) -> list[int]:
        n_ctx = self.llama.n_ctx()
        wanted = self.sampling.max_tokens
        reserve = min(wanted, n_ctx // 4) if wanted > 0 else n_ctx // 4
        n_dropped = 0
        while len(prompt := self._tokens(text)) + reserve > n_ctx and self.turns:
            del self.turns[0]
            n_dropped += 1
        if n_dropped:
            turns = "turn was" if n_dropped == 1 else f"{n_dropped} turns were"
            self.notice(f"the context is full: the oldest {turns} dropped")
        if len(prompt) >= n_ctx:
            raise IntactKVError(
                f"the message makes a prompt of {len(prompt)} tokens, the context has {n_ctx}: use a larger --ctx-size"
            )
        return prompt

    def _tokens(self, text: str) -> list[int]:
        messages = list(self.opening)
        for user, assistant in self.turns:
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        messages.append({"role": "user", "content": text})
        try:
            text = self._formatter(messages=messages).prompt
        except Exception as error:  # a template is a program: anything can happen
            raise IntactKVError(
                f"the chat template of {self.llama.model_path} refuses this conversation ({first_line(error)}): "
                "leave out --system-prompt, or use /reset"
            ) from error
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def _token_text(self, token: int) -> str:
        return self.llama._model.token_get_text(token) if token != -1 else ""


def opening_messages(llama: IntactLlama, system_prompt: str | None) -> list[dict[str, str]]:
    """What a conversation begins with: the messages of the prefix, so that its tokens begin with the prefix.

    Raises UsageError if a system prompt is given and the prefix was computed for another.
    """
    prefix = llama.prefix.manifest if llama.prefix is not None else None
    if prefix is None or prefix["bos_only"]:
        return [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    opening = prefix["messages"] or []  # none: the template's own system prompt
    if system_prompt is not None and [system_prompt] != [message["content"] for message in opening]:
        own = repr(opening[0]["content"]) if opening else "of the model's chat template"
        raise UsageError(
            f"the prefix was computed for the system prompt {own}, not for {system_prompt!r}: leave --system-prompt "
            "out, make another prefix with `intactkv-export prefix`, or chat with --no-prefix"
        )
    return opening


def once(chat: Chat, text: str) -> None:
    """Answer one message on stdout, and nothing else there."""
    for piece in chat.say(text):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def interactive(chat: Chat) -> None:
    """Talk in a terminal until /quit or Ctrl-D."""
    _use_history()
    s = chat.llama.prefix_stats
    prefix = f"prefix of {s['tokens']} tokens at F16" if s["tokens"] else "no prefix"
    print(f"{Path(chat.llama.model_path).name}: {s['kv_type']} cache, {prefix}. /help lists the commands.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if text == "/quit":
            return
        if text == "/reset":
            chat.reset()
        elif text == "/stats":
            print(chat.report())
        elif text == "/help":
            print(HELP)
        elif text.startswith("/"):
            print(f"no command {text.split()[0]}\n{HELP}")
        elif text:
            _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    try:
        once(chat, text)
    except KeyboardInterrupt:
        print("\n[stopped]")
    except IntactKVError as error:  # this message did not work, the next may
        print(f"intactkv-export: {error}", file=sys.stderr)


def _use_history() -> None:
    """Line editing and history, where Python has readline."""
    try:
        import readline
    except ImportError:
        return
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "intactkv-export" / "history"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
    readline.set_history_length(1000)

    def save() -> None:
        with contextlib.suppress(OSError):
            readline.write_history_file(path)

    atexit.register(save)


def notice_on_stderr(text: str) -> None:
    """Where a chat says what it had to do."""
    print(f"[{text}]", file=sys.stderr)


def open_chat(
    model: Path,
    *,
    prefix: str | Path | None = "auto",
    kv_type: str | tuple[str, str] = "q8_0",
    n_ctx: int | None = None,
    n_threads: int | None = None,
    system_prompt: str | None = None,
    sampling: Sampling | None = None,
    **llama_kwargs: Any,
) -> Chat:
    """A chat with a model, its prefix loaded when the first message is evaluated. Raises IntactKVError.

    n_ctx: None: what the model was trained for, at most 4096; 0: all that it was trained for.
    """
    kv_type = kv_pair(kv_type)
    if n_ctx is None:
        header = gguf_file.read(model).values
        n_ctx = min(header.get(f"{header.get('general.architecture')}.context_length") or _CONTEXT, _CONTEXT)
    llama = IntactLlama(
        model, prefix, kv_type, n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, **llama_kwargs
    )
    return Chat(llama, opening_messages(llama, system_prompt), sampling or Sampling(), notice_on_stderr)
