"""What the reference says after each token of the training text: its likeliest next tokens, kept on disk.

The top_k largest log-probabilities and the logarithm of the mass of all others are enough for the divergence of
another model from the reference over {top_k tokens, all others}. That is a lower bound of the KL divergence (data
processing inequality), and the gradient of a lower bound that is tight where the reference has its mass.

For each token 8 * top_k + 4 bytes: 2 kB for 256 of them, 134 MB for 256 sequences of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from intactkv_export.work import Steps, atomic

if TYPE_CHECKING:
    from intactkv_export.torch_model import TorchModel

TOP_K = 256
_PART = 16  # sequences in a file
_PASS = 2048  # tokens in one forward pass, prefixes included


@dataclass(frozen=True)
class Targets:
    """For n sequences of n_tokens tokens. ids: int32 [n, n_tokens, top_k]; log_p: float32, their log-probabilities;
    log_rest: float32 [n, n_tokens], of all other tokens together, -inf if there are none."""

    ids: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray

    def of(self, index: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Those of some sequences, as tensors: arguments of divergence()."""
        chosen = (x[list(index)] for x in (self.ids, self.log_p, self.log_rest))
        ids, log_p, log_rest = (torch.from_numpy(x).to(device) for x in chosen)
        return ids.long(), log_p, log_rest


def make(
    reference: Callable[[], TorchModel],
    prefix: Sequence[int],
    sequences: Sequence[Sequence[int]],
    *,
    top_k: int = TOP_K,
    directory: Path | None = None,
    progress: Steps | None = None,
) -> Targets:
    """The reference's targets for sequences of one length that follow the tokens of a prefix.

    reference: gives the model, called when a part is missing. directory: where finished parts are kept, and found again
    by the next process with the same arguments; None: only in memory. progress(done, total) counts sequences.
    """
    parts = []
    for start in range(0, len(sequences), _PART):
        path = None if directory is None else directory / f"targets-{start:06d}.npz"
        if path is not None and path.is_file():
            with np.load(path) as found:
                parts.append((found["ids"], found["log_p"], found["log_rest"]))
        else:
            parts.append(_part(reference(), prefix, sequences[start : start + _PART], top_k))
            if path is not None:
                with atomic.output(path) as file:
                    np.savez(file, ids=parts[-1][0], log_p=parts[-1][1], log_rest=parts[-1][2])
        if progress is not None:
            progress(min(start + _PART, len(sequences)), len(sequences))
    return Targets(*(np.concatenate(column) for column in zip(*parts, strict=True)))


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


def _part(
    reference: TorchModel, prefix: Sequence[int], sequences: Sequence[Sequence[int]], top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n_prefix = len(prefix)
    step = max(1, _PASS // (n_prefix + len(sequences[0])))
    columns: list[tuple[np.ndarray, ...]] = []
    with torch.inference_mode():
        for start in range(0, len(sequences), step):
            texts = [[*prefix, *sequence] for sequence in sequences[start : start + step]]
            logits = reference.forward(texts)[:, n_prefix:]
            log_p = logits - torch.logsumexp(logits, -1, keepdim=True)
            top, ids = log_p.topk(min(top_k, log_p.shape[-1]))
            log_rest = torch.logsumexp(log_p.scatter(-1, ids, -torch.inf), -1)
            columns.append(tuple(x.cpu().numpy() for x in (ids.int(), top, log_rest)))
    ids, top, log_rest = (np.concatenate(column) for column in zip(*columns, strict=True))
    return ids, top, log_rest
