"""What the reference says after each token of the training text: its likeliest next tokens, kept on disk.

The top_k largest log-probabilities and the logarithm of the mass of all others are enough for the divergence of
another model from the reference over {top_k tokens, all others}. That is a lower bound of the KL divergence (data
processing inequality), and the gradient of a lower bound that is tight where the reference has its mass.

For each token 8 * top_k + 4 bytes: 2 kB for 256 of them, 134 MB for 65,536 tokens of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from intactkv_export.torch_model import TorchModel

TOP_K = 256
_PASS = 2048  # tokens in one forward pass, prefixes included


@dataclass(frozen=True)
class Targets:
    """For some texts of n_tokens tokens, [n] of them or one. ids: int32 [n, n_tokens, top_k]; log_p: float32, their
    log-probabilities; log_rest: float32 [n, n_tokens], of all other tokens together, -inf if there are none."""

    ids: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int | slice) -> Targets:
        return Targets(self.ids[index], self.log_p[index], self.log_rest[index])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Arguments of divergence()."""
        ids, log_p, log_rest = (torch.from_numpy(x).to(device) for x in (self.ids, self.log_p, self.log_rest))
        return ids.long(), log_p, log_rest


def joined(parts: Sequence[Targets], join: Callable[[list[np.ndarray]], np.ndarray] = np.stack) -> Targets:
    """Several as one, each array by join(): np.stack makes those of single texts of one length into those of all."""
    return Targets(join([x.ids for x in parts]), join([x.log_p for x in parts]), join([x.log_rest for x in parts]))


def of_logits(logits: Tensor, top_k: int = TOP_K) -> Targets:
    """What the reference's logits say, float32 [..., n_vocab]."""
    total = torch.logsumexp(logits, -1, keepdim=True)
    top, ids = logits.topk(min(top_k, logits.shape[-1]))
    log_rest = torch.logsumexp(logits.scatter(-1, ids, -torch.inf), -1) - total[..., 0]
    return Targets(*(x.cpu().numpy() for x in (ids.int(), top - total, log_rest)))


def make(
    reference: TorchModel,
    prefix: Sequence[int],
    texts: Sequence[Sequence[int]],
    *,
    top_k: int = TOP_K,
    progress: Callable[[int], None] | None = None,
) -> Targets:
    """The reference's targets for texts of one length that follow the tokens of a prefix.

    progress(n): told how many texts are done.
    """
    step = max(1, _PASS // (len(prefix) + len(texts[0])))
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), step):
            whole = [[*prefix, *text] for text in texts[start : start + step]]
            parts.append(of_logits(reference.forward(whole)[:, len(prefix) :], top_k))
            if progress is not None:
                progress(min(start + step, len(texts)))
    return joined(parts, np.concatenate)


def divergence(logits: Tensor, ids: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
    """KL divergence, nats, of a model's logits [..., n_vocab], float32, from the targets [..., top_k], [...]: [...].

    The model's own normalization is exact: over the whole vocabulary.
    """
    total = torch.logsumexp(logits, -1)
    log_q = logits.gather(-1, ids) - total[..., None]
    # log(1 - sum of q), which in float32 has no meaning, and no gradient, below 1e-6
    kept = torch.logsumexp(log_q, -1).clamp(max=-1e-6)
    log_q_rest = torch.log(-torch.expm1(kept))
    p_rest = log_rest.exp()
    rest = torch.where(p_rest > 0, p_rest * (log_rest - log_q_rest), torch.zeros_like(p_rest))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + rest
