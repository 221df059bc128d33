"""The figures of an evaluation and their arithmetic: means with errors, percentiles, paired differences.

Chunks of a text are independent, its tokens are not: errors are those of the chunks. All configurations see the same
chunks, so two are compared by the mean of their differences chunk by chunk, and its error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from intactkv_export.evaluation.depths import Way
from intactkv_export.evaluation.modes import PAIRS
from intactkv_export.evaluation.multiple_choice import Answers


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; NaN from a single value."""

    mean: float
    error: float

    def __format__(self, spec: str) -> str:
        """Both numbers as spec says: "+.3f" gives +0.012 ± 0.001."""
        error = "" if math.isnan(self.error) else f" ± {self.error:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{error}"

    def __str__(self) -> str:
        return f"{self:.4f}"

    @property
    def within_noise(self) -> bool:
        """Of a difference: it is below two standard errors, or there is no error to judge by."""
        return not abs(self.mean) > 2 * self.error


@dataclass(frozen=True)
class Figures:
    """One configuration: model, KV type, and how it got the prefix (modes.MODES).

    kld_by_token: float32 [n_chunks, n_tokens], KL divergence of the next-token distribution after each token from the
    reference's, nats. same_top: bool [n_chunks, n_tokens], whether both rank the same token first. nll_by_token:
    float32 [n_chunks, n_tokens - 1], -log probability of each token of the text but the first, nats.
    answers: to the questions, if there were any. depth: tokens of text before those measured. way: how its context
    was made. system_prompt: text of the one between the prefix and the text; None: there was none.
    """

    model: str
    kv_type: str
    mode: str
    kld_by_token: np.ndarray
    same_top: np.ndarray
    nll_by_token: np.ndarray
    answers: Answers | None = None
    depth: int = 0
    way: Way = Way()
    system_prompt: str | None = None

    @property
    def kld(self) -> list[float]:
        """Mean of each chunk."""
        return self.kld_by_token.mean(1, dtype=np.float64).tolist()

    @property
    def top1(self) -> list[float]:
        """Share of equal top tokens of each chunk."""
        return self.same_top.mean(1).tolist()

    @property
    def nll(self) -> list[float]:
        """Mean of each chunk."""
        return self.nll_by_token.mean(1, dtype=np.float64).tolist()

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log probability; the error by the first order of exp."""
        log = summary(self.nll)
        return Estimate(math.exp(log.mean), math.exp(log.mean) * log.error)

    def percentile(self, q: float) -> float:
        """Of the KL divergence, over all tokens."""
        return float(np.percentile(self.kld_by_token, q))


@dataclass(frozen=True)
class Impossible:
    """A KV type that a model cannot have, and why: a sentence."""

    model: str
    kv_type: str
    why: str


@dataclass(frozen=True)
class Difference:
    """Of two configurations, a - b. log_perplexity: the logarithm of the ratio of their perplexities."""

    a: Figures
    b: Figures
    kld: Estimate
    top1: Estimate
    log_perplexity: Estimate


def summary(per_chunk: Sequence[float]) -> Estimate:
    """Mean of independent values, and the standard error of that mean."""
    values = np.asarray(per_chunk, dtype=np.float64)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(float(values.mean()), float(error))


def difference(a: Sequence[float], b: Sequence[float]) -> Estimate:
    """a - b, value by value: its mean and standard error."""
    return summary(np.subtract(a, b).tolist())


def differences(results: Sequence[Figures]) -> Iterator[Difference]:
    """PAIRS, for each model, system prompt, KV type, depth and way."""
    found = {(r.model, r.system_prompt, r.kv_type, r.depth, r.way, r.mode): r for r in results}
    for same in dict.fromkeys(key[:-1] for key in found):
        for pair in PAIRS:
            a, b = (found.get((*same, mode)) for mode in pair)
            if a is not None and b is not None:
                each = (difference(getattr(a, name), getattr(b, name)) for name in ("kld", "top1", "nll"))
                yield Difference(a, b, *each)


def as_json(results: Sequence[Figures], impossible: Sequence[Impossible] = ()) -> dict[str, Any]:
    """All figures, for a program. Of a single chunk there is no error: null."""
    return {
        "impossible": [asdict(x) for x in impossible],
        "results": [_one(r) for r in results],
        "differences": [
            {"model": d.a.model, "kv_type": d.a.kv_type, **_where(d.a), "of": d.a.mode, "from": d.b.mode}
            | {name: _estimate(getattr(d, name), True) for name in ("kld", "top1", "log_perplexity")}
            | ({"tasks": d.a.answers.against(d.b.answers)} if d.a.answers and d.b.answers else {})
            for d in differences(results)
        ],
    }


def _where(r: Figures) -> dict[str, Any]:
    return {"system_prompt": r.system_prompt, "depth": r.depth, "ubatch": r.way.ubatch, "kv_tail": r.way.tail}


def _one(r: Figures) -> dict[str, Any]:
    spread = {"median": r.percentile(50), "p99": r.percentile(99), "max": r.percentile(100)}
    return {
        "model": r.model,
        "kv_type": r.kv_type,
        "mode": r.mode,
        **_where(r),
        "kld": _estimate(summary(r.kld)) | spread | {"by_chunk": r.kld, "by_token": _rounded(r.kld_by_token)},
        "top1": _estimate(summary(r.top1)) | {"by_chunk": r.top1},
        "perplexity": _estimate(r.perplexity) | {"nll_by_chunk": r.nll},
        "tasks": None if r.answers is None else r.answers.as_json(),
    }


def _estimate(x: Estimate, judge: bool = False) -> dict[str, Any]:
    numbers: dict[str, Any] = {"mean": x.mean, "error": None if math.isnan(x.error) else x.error}
    return numbers | ({"within_noise": x.within_noise} if judge else {})


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in values]
