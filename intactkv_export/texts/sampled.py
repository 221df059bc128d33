"""Texts that the reference writes itself behind a prefix: what it is calibrated on when there is no other data.

Every sequence is exactly n_tokens long and follows the prefix's last token as it would in a conversation, rendered by
the model's own chat template. All sequences of a batch grow by a token at a time, so none needs padding.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prefix, ikv
from intactkv_export.texts.seeds import FOLLOW_UPS, OPENINGS, QUESTIONS
from intactkv_export.texts.turns import Turns
from intactkv_export.work import Steps

if TYPE_CHECKING:
    from intactkv_export.torch_model import TorchModel

TOP_P = 0.95  # at temperature 1: what the reference would say, less the tail that derails a long text
_BATCH = 256  # sequences sampled at a time, at most
_CACHE = 2 << 30  # bytes of K and V they may take together
_CHUNK = 512  # tokens of the prefix in one forward pass


def sample(
    model: TorchModel,
    prefix: Prefix,
    vocabulary: Vocabulary,
    chat_template: str | None,
    *,
    n: int,
    n_tokens: int,
    seed: int,
    documents: bool = False,
    progress: Steps | None = None,
) -> list[list[int]]:
    """n conversations of n_tokens tokens behind the prefix, sampled by the model (the reference) itself.

    The first message is one of QUESTIONS; each reply is sampled; the next message is one of FOLLOW_UPS or, every
    second time, written by the model too, as in Magpie (arXiv 2406.08464). documents: every second conversation begins
    with a document instead, one of OPENINGS that the model continues. The same for a seed on one device.
    progress(done, total) counts tokens.
    """
    import torch

    turns = Turns(prefix, vocabulary, chat_template)
    choose = random.Random(seed)
    questions, openings = _spread(QUESTIONS, n, choose), _spread(OPENINGS, n, choose)
    rows = [
        _Row(turns, random.Random(choose.random()), deque(turns.opening(opening)), user=True)
        if documents and i % 2
        else _Row(turns, random.Random(choose.random()), deque(turns.first(question)))
        for i, (question, opening) in enumerate(zip(questions, openings, strict=True))
    ]
    ends = {token for token in range(model.n_vocab) if vocabulary.ends_reply(token)}
    generator = torch.Generator().manual_seed(seed)
    at_a_time = _batch(model, len(prefix.tokens) + n_tokens)
    for start in range(0, n, at_a_time):
        batch = rows[start : start + at_a_time]
        logits = _Logits(model, prefix.tokens, len(batch))
        for i in range(n_tokens):
            drawn = _draw(logits.last, generator).tolist()
            column = [row.take(token, token in ends) for row, token in zip(batch, drawn, strict=True)]
            if i + 1 < n_tokens:
                logits.advance([[token] for token in column])
            if progress is not None:
                progress(start * n_tokens + (i + 1) * len(batch), n * n_tokens)
    return [row.tokens for row in rows]


def sample_from(
    reference: Path,
    gguf: Path,
    prefix: bytes,
    *,
    n: int,
    n_tokens: int,
    seed: int,
    device: str = "cpu",
    progress: Steps | None = None,
) -> list[list[int]]:
    """As sample(), from files: a stage of its own. gguf: the reference as one, for its tokenizer."""
    from intactkv_export import torch_model

    template = gguf_file.read(gguf).values.get("tokenizer.chat_template")
    behind = ikv.read(prefix)
    model = torch_model.load(reference, device=device, rope_factors=torch_model.prefix_factors(behind))
    with Vocabulary(gguf) as vocabulary:
        return sample(model, behind, vocabulary, template, n=n, n_tokens=n_tokens, seed=seed, progress=progress)


def _spread(texts: Sequence[str], n: int, choose: random.Random) -> list[str]:
    """n of the texts in a random order, each as often as the others, give or take one."""
    chosen: list[str] = []
    while len(chosen) < n:
        chosen += choose.sample(texts, len(texts))
    return chosen[:n]


def _batch(model: TorchModel, n_tokens: int) -> int:
    """How many sequences of n_tokens tokens are sampled at a time: as many as the memory for their K and V allows."""
    token = 2 * model.n_layer * model.n_head_kv * model.head_dim * model.net.dtype.itemsize
    return min(_BATCH, max(1, _CACHE // (n_tokens * token)))


@dataclass
class _Row:
    """A conversation that is being written. forced: tokens that come next whatever the model says."""

    turns: Turns
    choose: random.Random
    forced: deque[int]
    tokens: list[int] = field(default_factory=list)
    user: bool = False  # the model writes the user's turn
    n_turns: int = 0

    def take(self, drawn: int, ends: bool) -> int:
        """The next token: a forced one, or the one that was drawn, unless it ends the turn."""
        if not self.forced and (ends or (self.user and drawn == self.turns.to_reply[0])):
            self.forced.extend(self._between())
        token = self.forced.popleft() if self.forced else drawn
        self.tokens.append(token)
        return token

    def _between(self) -> list[int]:
        if self.user:
            self.user = False
            return self.turns.to_reply
        self.n_turns += 1
        self.user = self.n_turns % 2 == 0
        return self.turns.to_user if self.user else self.turns.next(self.choose.choice(FOLLOW_UPS))


class _Logits:
    """The model behind its own prefix, for several sequences that grow by a token at a time."""

    def __init__(self, model: TorchModel, prefix: Sequence[int], n: int) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache()
        self.last: Any = None
        for start in range(0, len(prefix), _CHUNK):
            self.advance([prefix[start : start + _CHUNK]])
        self._cache.batch_repeat_interleave(n)
        self.last = self.last.expand(n, -1)  # type: ignore[attr-defined]

    def advance(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens, [n, some]; last: logits [n, n_vocab] after the last of them."""
        import torch

        with torch.inference_mode():
            self.last = self._model.forward(tokens, self._cache)[:, -1]


def _draw(logits: Any, generator: Any) -> Any:
    """One token a row, [n], from the nucleus of TOP_P of logits [n, n_vocab]."""
    import torch

    p = torch.softmax(logits, -1)
    return _draw_from(p, p.cumsum(-1), generator)


def _draw_from(p: Any, sums: Any, generator: Any) -> Any:
    """Without sorting: a token drawn from all of them is in the nucleus if those likelier than it weigh less than
    TOP_P; else another is drawn."""
    import torch

    uniform = torch.rand(len(p), 1, generator=generator).to(p.device) * sums[:, -1:]
    drawn = torch.searchsorted(sums, uniform).clamp(max=p.shape[-1] - 1)
    above = torch.where(p > p.gather(-1, drawn), p, 0).sum(-1)
    again = (above >= TOP_P).nonzero()[:, 0]
    drawn = drawn[:, 0]
    if len(again):
        drawn[again] = _draw_from(p[again], sums[again], generator)
    return drawn
