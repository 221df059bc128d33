"""Texts that the reference writes itself behind a prefix: what it is calibrated on when there is no other data.

Every sequence is exactly n_tokens long and follows the prefix's last token as it would in a conversation, rendered by
the model's own chat template. All sequences of a batch grow by a token at a time, so none needs padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prefix, Rendering, chat_template_of, ikv
from intactkv_export.texts.beginnings import begin
from intactkv_export.texts.growing import Growing
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
    """n texts of n_tokens tokens behind the prefix, sampled by the model (the reference) itself.

    The first message is one of QUESTIONS; each reply is sampled; the next message is one of FOLLOW_UPS or, every
    second time, written by the model too, as in Magpie (arXiv 2406.08464). documents: beginnings.begin(). The same for
    a seed on one device. progress(done, total) counts tokens.
    """
    texts = begin(prefix, vocabulary, chat_template, n=n, seed=seed, documents=documents)
    at_a_time = batch_size(prefix, len(prefix.tokens) + n_tokens)
    for start in range(0, n, at_a_time):
        batch = texts[start : start + at_a_time]

        def tell(done: int, start: int = start, size: int = len(batch)) -> None:
            if progress is not None:
                progress(start * n_tokens + done * size, n * n_tokens)

        write(model, prefix, vocabulary, batch, n_tokens=n_tokens, seed=seed + start, written=tell)
    return [text.tokens for text in texts]


def batch_size(prefix: Prefix, n_tokens: int) -> int:
    """How many texts of n_tokens tokens are sampled at a time: what their K and V, float32, leave room for."""
    a_token = sum(4 * rows[0].size for layer in prefix.layers for rows in (layer.K, layer.V))
    return min(_BATCH, max(1, _CACHE // (n_tokens * a_token)))


def write(
    model: TorchModel,
    prefix: Prefix,
    vocabulary: Vocabulary,
    texts: Sequence[Growing],
    *,
    n_tokens: int,
    seed: int,
    observe: Callable[[int, Any], None] | None = None,
    written: Callable[[int], None] | None = None,
) -> None:
    """Let texts grow side by side until each has n_tokens tokens.

    observe(i, logits): told, after the i-th token of each, what the model says of the next: [len(texts), n_vocab].
    written: told how many tokens each has.
    """
    import torch

    ends = torch.zeros(model.n_vocab, dtype=torch.bool)
    ends[[token for token in range(model.n_vocab) if vocabulary.ends_reply(token)]] = True
    generator = torch.Generator().manual_seed(seed)
    logits = _Logits(model, prefix.tokens, len(texts), n_tokens)
    for i in range(n_tokens):
        drawn = _draw(logits.last, generator).cpu()
        pairs = zip(texts, drawn.tolist(), ends[drawn].tolist(), strict=True)
        column = [text.take(token, its_end) for text, token, its_end in pairs]
        if observe is not None or i + 1 < n_tokens:
            logits.advance([[token] for token in column])
        if observe is not None:
            observe(i, logits.last)
        if written is not None:
            written(i + 1)


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

    behind = ikv.read(prefix)
    template = chat_template_of(gguf_file.read(gguf).values, Rendering.of(behind.manifest))
    factors = torch_model.prefix_factors(behind)
    model = torch_model.load(reference, device=device, rope_factors=factors, states=True)
    with Vocabulary(gguf) as vocabulary:
        return sample(model, behind, vocabulary, template, n=n, n_tokens=n_tokens, seed=seed, progress=progress)


class _Logits:
    """The model behind its own prefix, for n sequences that grow by a token at a time, to n_tokens."""

    def __init__(self, model: TorchModel, prefix: Sequence[int], n: int, n_tokens: int) -> None:
        self._model, self._cache = model, model.roomy_cache(len(prefix) + n_tokens)
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
