"""IntactKV as trainable parameters: a prefix's K and V, fitted to the quantized model that will read them.

Of a model with recurrent layers also their states after the prefix, which a prefix file holds in float32.

Everything else of the model is frozen and as it will run: dequantized weights, and behind the prefix a cache that is
rounded to the KV type. Objectives:

    kl   the divergence of the model's next-token distributions from the reference's (targets.py)
    mse  what the paper minimizes (arXiv 2403.01241, "IntactKV as trainable parameters"): for each decoder layer half
         the mean squared error of its output against the reference's, summed over the layers

Held-out texts decide: the prefix that diverges least on them, after rounding to F16, is the result. The prefix as the
reference computed it is one of the candidates, so on those texts the result is never worse.

A long text passes in pieces, each behind the cells that the pieces before it left, which have no gradient: what a piece
says is traced back to the prefix and to its own cells. So memory does not grow with the text.

Needs torch and transformers, not llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from intactkv_export.calibration import passes
from intactkv_export.calibration.data import Data, check_same
from intactkv_export.calibration.targets import divergence, joined
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.torch_model import MixedCache, TorchModel, rounding
from intactkv_export.work import atomic

OBJECTIVES = ("kl", "mse", "kl+mse")
LR = 2e-2  # of objectives with kl, relative to each row of K and V
FIRST_LR = 5e-2  # the same, where the first token's is the only row
STATES_LR = 1e-2  # the same, with states: LFM2's first token got worse by 5e-2, and better most by this
_MSE_LR = 2e-4  # the paper's
_COARSE = 0.04  # nats a token: a model that diverges less takes proportionally smaller steps
_CLIP = 0.3  # norm of the gradient, as in the paper
_WARM_UP = 5  # steps
_SAVE = 30  # seconds between two savings of the state, besides those after evaluations
DEPTHS = (0, 256, 1024, 4096)  # tokens of a text, from which on the held-out divergence is told apart
_ACTIVATIONS = 6 << 30  # bytes of activations from which they are computed twice instead of kept

Rows = list[np.ndarray]  # by layer, [n_prefix, n_head_kv, head_dim]
States = list[tuple[np.ndarray, np.ndarray]]  # by recurrent layer, r and s, float32
Trained = tuple[Tensor, Tensor, list[Tensor]]  # K, V, and each r and s of the states, one after another


@dataclass(frozen=True)
class Settings:
    """How to train. lr: of AdamW: its peak (_rate()), relative to each row of K and V (_scale()); for mse as in the
    paper, constant and absolute; None: see peak(). batch: of the shortest texts in a step; of longer ones as many as
    have as many tokens. every: steps between evaluations.

    patience: evaluations without improvement after which training ends. kv_type: of K and V behind the prefix; of
    these cells the newest `tail` are intact. in_sight: no sliding window hides the trained prefix (MixedCache).
    """

    objective: str = "kl"
    steps: int = 100
    lr: float | None = None
    batch: int = 4
    kv_type: tuple[str, str] = ("q8_0", "q8_0")
    tail: int = 0
    seed: int = 0
    every: int = 10
    patience: int = 4
    in_sight: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise UsageError(f"no objective {self.objective!r}: give one of {', '.join(OBJECTIVES)}")


@dataclass
class Result:
    """K, V: float16; states: of recurrent layers, float32; n_extra: how many of the rows are of extra cells; in_sight:
    they are to stay in sight. best_step: after which step they were taken, 0: they are the uncalibrated ones.

    history: (step, held-out divergence) of each evaluation. steps: how many were made. depths: step -> the divergence
    at each of DEPTHS that the held-out texts reach, of each evaluation. lr: the largest of all steps.
    """

    K: Rows
    V: Rows
    states: States
    n_extra: int
    in_sight: bool
    best_step: int
    steps: int
    history: list[tuple[int, float]]
    depths: dict[int, list[float]]
    lr: float

    @property
    def before(self) -> float:
        return self.history[0][1]

    @property
    def after(self) -> float:
        return dict(self.history)[self.best_step]


def train(
    student: TorchModel,
    K: Rows,
    V: Rows,
    data: Data,
    settings: Settings,
    *,
    states: States | None = None,
    n_extra: int = 0,
    before: tuple[Rows, Rows, int] | None = None,
    was_in_sight: bool = False,
    reference: TorchModel | None = None,
    prefix: Sequence[int] = (),
    state: Path | None = None,
    identity: str = "",
    progress: Callable[[int, int, float], None] | None = None,
) -> Result:
    """Train K and V (by layer, rows in llama.cpp's layout) and return the best.

    states: of the recurrent layers after the prefix, which are trained with them.
    n_extra: how many of the rows, the last ones, are of extra cells. before: K, V and the number of extra cells that
    the model has without training, where training begins with others: the first candidate. was_in_sight: whether that
    one stays in sight.
    reference, prefix: the reference model and the prefix's tokens, for an objective with mse. state: a file in which
    the training is kept as it proceeds, and from which it goes on if there is one; on a CPU the result is the same,
    bit for bit. identity: of whatever else the result depends on (model, data), so that a file of another training is
    refused. progress(step, steps, held-out divergence).

    Raises UsageError if the state is of another training, IntactKVError if a gradient is not finite, or the divergence
    before training.
    """
    first = before or (K, V, n_extra)
    begun = {"cells": n_extra, "prefix": _hash(K, V), "before": _hash(*first[:2])}
    about = {**asdict(settings), "identity": identity, "texts": data.sha256(), **begun}
    about = json.loads(json.dumps(about))
    if not settings.in_sight:
        del about["in_sight"]  # as in states of versions that had no such setting
    if states:
        about["states"] = _hash(*(x for pair in states for x in pair))
    run = _Training.start(student, (K, V), first[:2], states or [], len(K[0]) - n_extra, settings)
    if state is not None and state.is_file():
        run.restore(state, about)
    texts_of = passes.steps(data, settings.batch, settings.seed)
    saved = time.monotonic()
    while True:
        if run.evaluated < run.step and (run.step % settings.every == 0 or run.step >= settings.steps):
            rows = run.rounded() if run.step else run.best
            as_used = settings if run.step else replace(settings, in_sight=was_in_sight)
            run.candidate(rows, *_held_out(student, rows, run.n_tokens, data, as_used))
            saved = -math.inf
            if not math.isfinite(run.history[0][1]):
                raise IntactKVError(
                    f"the held-out divergence before training is {run.history[0][1]}, so there is nothing to compare "
                    "with: compute in float32, or give another prefix whose K and V a cache can hold"
                )
        if state is not None and time.monotonic() - saved > _SAVE:
            run.save(state, about)
            saved = time.monotonic()
        if progress is not None:
            progress(run.step, settings.steps, run.history[-1][1])
        if run.step >= settings.steps or run.misses > settings.patience:
            break
        index = texts_of(run.step)
        run.optimizer.zero_grad()
        for group in run.optimizer.param_groups:
            group["lr"] = run.peak(settings) * _rate(run.step, settings)
        for part in passes.together(index, _piece(data, index, settings)):
            for loss in _losses(student, run, data, part, settings, reference, prefix):
                (loss * len(part) / len(index)).backward()
        norm = torch.nn.utils.clip_grad_norm_(run.parameters, _CLIP)
        if not torch.isfinite(norm):
            if state is not None:
                state.unlink(missing_ok=True)  # of settings that lead nowhere: others may begin here
            raise IntactKVError(
                f"the gradient of step {run.step + 1} is {float(norm)}: give a smaller --lr, or compute in float32"
            )
        run.optimizer.step()
        run.step += 1
    return run.result(settings, was_in_sight)


@dataclass
class _Training:
    """What changes from step to step."""

    K: Tensor  # [n_layer, n_prefix, n_head_kv, head_dim], float32, in units of `scale`; so is V
    V: Tensor
    states: list[Tensor]  # [n], float32, in units of theirs
    scale: Trained  # [n_layer, n_prefix, 1, 1]; of a state one number
    optimizer: torch.optim.Optimizer
    best: Trained  # float16, states float32, on the CPU
    n_tokens: int  # of the rows, the others are extra cells'
    step: int = 0
    evaluated: int = -1  # the last step after which there was an evaluation
    best_step: int = 0
    history: list[tuple[int, float]] = field(default_factory=list)
    depths: dict[int, list[float]] = field(default_factory=dict)

    @classmethod
    def start(
        cls,
        student: TorchModel,
        start: tuple[Rows, Rows],
        before: tuple[Rows, Rows],
        states: States,
        n_tokens: int,
        settings: Settings,
    ) -> _Training:
        rows = [torch.tensor(np.stack(x), dtype=torch.float32, device=student.device) for x in start]
        scale_k, scale_v = (_scale(x, settings) for x in rows)
        k, v = (rows[0] / scale_k).requires_grad_(), (rows[1] / scale_v).requires_grad_()
        flat = [torch.tensor(x, dtype=torch.float32, device=student.device) for pair in states for x in pair]
        units = [_unit(x, settings) for x in flat]
        own = [(x / unit).requires_grad_() for x, unit in zip(flat, units, strict=True)]
        optimizer = torch.optim.AdamW([k, v, *own], weight_decay=0.0)  # lr: of each step
        best_k, best_v = (torch.from_numpy(np.stack(x)).half() for x in before)
        best = best_k, best_v, [x.cpu() for x in flat]
        return cls(k, v, own, (scale_k, scale_v, units), optimizer, best, n_tokens)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.K, self.V, *self.states]

    def rows(self) -> Trained:
        """K, V and states as the student reads them."""
        states = [x * unit for x, unit in zip(self.states, self.scale[2], strict=True)]
        return self.K * self.scale[0], self.V * self.scale[1], states

    def rounded(self) -> Trained:
        """K and V as a prefix file holds them: float16; states stay float32."""
        K, V, states = self.rows()
        return K.detach().half(), V.detach().half(), [x.detach() for x in states]

    @property
    def misses(self) -> int:
        """Evaluations since the best one."""
        return sum(step > self.best_step for step, _ in self.history)

    def candidate(self, rows: Trained, divergence: float, by_depth: list[float]) -> None:
        """Take note of the held-out divergence of K and V, float16, and states."""
        self.history.append((self.step, divergence))
        self.evaluated = self.step
        self.depths[self.step] = by_depth
        if divergence < dict(self.history)[self.best_step]:
            self.best_step = self.step
            self.best = rows[0].cpu(), rows[1].cpu(), [x.cpu() for x in rows[2]]

    def peak(self, settings: Settings) -> float:
        """The largest lr, which depends on where training began."""
        return peak(settings, self.history[0][1], self.K.shape[1], bool(self.states))

    def result(self, settings: Settings, was_in_sight: bool) -> Result:
        K, V = (list(x.numpy()) for x in self.best[:2])
        flat = [x.numpy() for x in self.best[2]]
        states = list(zip(flat[::2], flat[1::2], strict=True))
        n_extra, lr = len(K[0]) - self.n_tokens, self.peak(settings)
        in_sight = settings.in_sight if self.best_step else was_in_sight
        return Result(K, V, states, n_extra, in_sight, self.best_step, self.step, self.history, self.depths, lr)

    def save(self, path: Path, about: dict[str, Any]) -> None:
        with atomic.output(path) as file:
            torch.save(
                {
                    "about": about,
                    "K": self.K.detach(),
                    "V": self.V.detach(),
                    "states": [x.detach() for x in self.states],
                    "optimizer": self.optimizer.state_dict(),
                    "best": self.best,
                    "step": self.step,
                    "evaluated": self.evaluated,
                    "best_step": self.best_step,
                    "history": self.history,
                    "depths": self.depths,
                },
                file,
            )

    def restore(self, path: Path, about: dict[str, Any]) -> None:
        kept = torch.load(path, map_location=self.K.device, weights_only=True)
        check_same(path, kept["about"], about)
        with torch.no_grad():
            self.K.copy_(kept["K"])
            self.V.copy_(kept["V"])
            for state, value in zip(self.states, kept.get("states", []), strict=True):
                state.copy_(value)
        self.optimizer.load_state_dict(kept["optimizer"])
        best_k, best_v, *rest = kept["best"]  # versions that had no states kept two
        self.best = best_k.cpu(), best_v.cpu(), [x.cpu() for x in (rest[0] if rest else [])]
        self.step, self.evaluated = kept["step"], kept["evaluated"]
        self.best_step, self.history = kept["best_step"], [(step, value) for step, value in kept["history"]]
        self.depths = kept["depths"]


def kept_in_sight(state: Path) -> bool | None:
    """Whether the training kept in this file has its prefix in sight; None: there is none."""
    if not state.is_file():
        return None
    return bool(torch.load(state, map_location="cpu", weights_only=True)["about"].get("in_sight", False))


def _losses(
    student: TorchModel,
    run: _Training,
    data: Data,
    index: Sequence[int],
    settings: Settings,
    reference: TorchModel | None,
    prefix: Sequence[int],
) -> Iterator[Tensor]:
    """The objective over some texts of one length: a part of it for each piece, of which their sum is the mean over the
    tokens. The caller goes backward from one before it asks for the next."""
    tokens = _tokens(student, data, index)
    mse = "mse" in settings.objective
    cache = None
    for at in passes.pieces(tokens.shape[1], _piece(data, index, settings)):
        cache = _cache(student, run.rows(), run.n_tokens, settings, len(index), cache)
        piece = tokens[:, at]
        with _checkpointed(student, piece.numel()):
            logits, outputs = student.forward(piece, cache, hidden=True) if mse else (student.forward(piece, cache), [])
        loss = torch.zeros((), device=student.device)
        if "kl" in settings.objective:
            loss = loss + _divergence(logits, data, index, at).sum() / tokens.numel()
        if mse:
            assert reference is not None  # the caller's part of the contract
            whole = torch.cat([torch.tensor([list(prefix)] * len(index), device=student.device).long(), tokens], 1)
            with torch.no_grad():
                _, wanted = reference.forward(whole.to(reference.device), hidden=True)
            for output, want in zip(outputs, wanted, strict=True):
                loss = loss + 0.5 * (output.float() - want[:, len(prefix) :].to(output).float()).pow(2).mean()
        yield loss


def _held_out(
    student: TorchModel, rows: Trained, n_tokens: int, data: Data, settings: Settings
) -> tuple[float, list[float]]:
    """Mean divergence over the tokens of the held-out texts, and by DEPTHS; infinite if a cache could not hold these
    rows, of which n_tokens are of tokens."""
    longest = max(len(data.texts[i].tokens) for i in data.held_out)
    depths = [depth for depth in DEPTHS if depth < longest]
    storable = [_storable(student, x, kind, settings.kv_type) for x, kind in zip(rows[:2], "KV", strict=True)]
    if not all(storable + [bool(torch.isfinite(x).all()) for x in rows[2]]):
        return float("inf"), [float("inf")] * len(depths)
    totals, counts = np.zeros(len(depths)), np.zeros(len(depths))
    with torch.no_grad():
        for group in data.by_length(data.held_out).values():
            for index in passes.together(group, _piece(data, group, settings)):
                tokens, cache = _tokens(student, data, index), None
                for at in passes.pieces(tokens.shape[1], _piece(data, index, settings)):
                    cache = _cache(student, rows, n_tokens, settings, len(index), cache)
                    found = _divergence(student.forward(tokens[:, at], cache), data, index, at)
                    bins = np.searchsorted(depths, np.arange(at.start, at.stop), "right") - 1
                    totals += np.bincount(bins, found.double().sum(0).cpu().numpy(), len(depths))
                    counts += np.bincount(bins, minlength=len(depths)) * len(index)
    return float(totals.sum() / counts.sum()), (totals / counts).tolist()


def _piece(data: Data, index: Sequence[int], settings: Settings) -> int:
    """Tokens of these texts, of one length, in one forward pass; for mse the layers' outputs are compared at once."""
    n_tokens = len(data.texts[index[0]].tokens)
    return n_tokens if "mse" in settings.objective else min(n_tokens, passes.PIECE)


def _tokens(student: TorchModel, data: Data, index: Sequence[int]) -> Tensor:
    """[len(index), n], of texts of one length."""
    return torch.from_numpy(np.stack([data.texts[i].tokens for i in index])).long().to(student.device)


def _divergence(logits: Tensor, data: Data, index: Sequence[int], at: slice) -> Tensor:
    """By token, of a piece of some texts."""
    wanted = joined([data.texts[i].targets[at] for i in index])  # type: ignore[index]
    return divergence(logits, *wanted.tensors(logits.device))


def _cache(
    student: TorchModel,
    rows: Trained,
    n_tokens: int,
    settings: Settings,
    batch: int,
    after: MixedCache | None,
) -> MixedCache:
    """As the prefix will be used: these K and V intact, the rest by the settings. after: of the piece before."""
    K, V = (list(x) for x in rows[:2])
    extra = len(K[0]) - n_tokens
    return student.cache(
        K,
        V,
        settings.kv_type,
        batch,
        grows=False,
        tail=settings.tail,
        extra=extra,
        in_sight=settings.in_sight,
        after=after,
        states=list(zip(rows[2][::2], rows[2][1::2], strict=True)) or None,
    )


def _storable(student: TorchModel, rows: Tensor, kind: str, kv_type: tuple[str, str]) -> bool:
    """Finite in F16, also rotated as a quantized cache of llama.cpp holds them, whatever its type turns out to be."""
    size = rounding.rotation("q8_0", student.head_dim, kind == "V")
    return bool(torch.isfinite(rows).all() and torch.isfinite(rounding.rotate(rows.float(), size).half()).all())


def _scale(rows: Tensor, settings: Settings) -> Tensor:
    """The unit of each row of K or V, [n_layer, n_prefix, 1, 1]: its root mean square.

    In SmolLM2 the first token's V is a third to a tenth of the others' in most layers, and the first layer's a fiftieth
    of the late ones': a step that moves some would throw others far off.
    """
    rms = rows.pow(2).mean((2, 3), keepdim=True).sqrt()
    return torch.ones_like(rms) if settings.objective == "mse" else torch.where(rms > 0, rms, torch.ones_like(rms))


def _unit(state: Tensor, settings: Settings) -> Tensor:
    """The unit of a layer's r or s, as that of a row: one number."""
    rms = state.pow(2).mean().sqrt() if state.numel() else torch.zeros((), device=state.device)
    return torch.where((rms > 0) & (settings.objective != "mse"), rms, torch.ones_like(rms))


def peak(settings: Settings, before: float, n_rows: int, states: bool = False) -> float:
    """The lr that is given; else LR (one row: FIRST_LR; with states: STATES_LR), less for one close to the reference.

    before: its held-out divergence before it is calibrated, nats a token. A Q6_K or Q8_0 (SmolLM2: 0.003, 0.001) gets
    worse from LR's steps and better by a tenth of it; a Q4_K_M (0.044) and coarser ones want all of it
    (docs/results/calibration.md).
    """
    if settings.lr is not None:
        return settings.lr
    if settings.objective == "mse":
        return _MSE_LR
    usual = STATES_LR if states else LR if n_rows > 1 else FIRST_LR
    return usual * min(1.0, before / _COARSE)


def _rate(step: int, settings: Settings) -> float:
    """The part of lr in a step: up in the first few, whole to the middle of the training, from there down to 0."""
    if settings.objective == "mse":
        return 1.0
    return min(1.0, (step + 1) / (_WARM_UP + 1), 2 * (1 - step / settings.steps))


@contextmanager
def _checkpointed(student: TorchModel, n_tokens: int) -> Iterator[None]:
    """Within, each decoder layer keeps only its input for the backward pass, if all would be too much to keep."""
    if n_tokens * _activations(student) < _ACTIVATIONS:
        yield
        return
    layers = student.decoder_layers
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own comes back


def _activations(student: TorchModel) -> int:
    """Bytes that the backward pass needs of a token, about, at most: dense layers, or experts one after another."""
    text = student.net.config.get_text_config(decoder=True)
    n_embd, n_ff, n_experts = text.hidden_size, text.intermediate_size, getattr(text, "num_experts_per_tok", 0) or 0
    mlp = 4 * n_ff
    if n_experts:
        mlp = n_experts * (4 * getattr(text, "moe_intermediate_size", n_ff) + 2 * n_embd)
        mlp += 4 * getattr(text, "shared_expert_intermediate_size", 0)
    return int((student.n_layer * (16 * n_embd + mlp) + _recurrence(student)) * student.net.dtype.itemsize)


def _recurrence(student: TorchModel) -> int:
    """Values that recurrent layers keep of a token besides: measured, for 64 tokens that meet each other at once."""
    layout = student.state_layout
    if layout is None or not layout.recurrence:
        return 0
    return len(student.recurrent) * layout.recurrence[0] * (5 * 64 + 6 * layout.recurrence[-1])


def _hash(*arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
