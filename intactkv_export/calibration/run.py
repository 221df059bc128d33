"""The phases of a calibration, one model in memory at a time: the reference writes and answers, the student learns."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from intactkv_export import torch_model
from intactkv_export.calibration import extra_cells, training
from intactkv_export.calibration.data import Data, Source, gather, same_source
from intactkv_export.errors import UsageError
from intactkv_export.models import Reference, gguf_file, identity, locate
from intactkv_export.prefix import IN_SIGHT, Prefix, has_windows, ikv
from intactkv_export.work import Progress


@dataclass
class Participants:
    """What takes part in one calibration, and what it took: seconds, by phase, of what this process did.

    first: a trained prefix of the first token, with which the prefix's training begins; None: it begins with itself.
    dtypes: to compute in, of the reference and of the model.
    """

    reference: Reference
    model: Path
    prefix: Prefix
    first: Prefix | None
    directory: Path
    device: str
    dtypes: tuple[str, str]
    report: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The file in which training is kept as it proceeds."""
        return self.directory / f"{self.model.stem}.pt"

    def load(self, path: Path, dtype: str) -> torch_model.TorchModel:
        """A model in torch, found to mean the same rows as the prefix's. Raises IntactKVError."""
        self.report(f"load {path.name}", 0, 0)
        factors = torch_model.prefix_factors(self.prefix)
        model = torch_model.load(path, device=self.device, dtype=dtype, rope_factors=factors, states=True)
        text = model.net.config.get_text_config(decoder=True)
        torch_model.from_huggingface.check(text, self.prefix.manifest["model"], str(path))
        return model

    @contextmanager
    def phase(self, name: str) -> Iterator[_Phase]:
        """Within, the time of a phase is taken; what it yields tells of its progress."""
        start = time.perf_counter()

        def tell(done: int, total: int, held_out: float | None = None) -> None:
            self.report(name, done, total, "" if held_out is None else f"held-out KLD {held_out:.4f}")

        yield tell
        self.seconds[name] = time.perf_counter() - start


class _Phase(Protocol):
    def __call__(self, done: int, total: int, held_out: float | None = None) -> None: ...


class _Loaded:
    """The reference in memory, from the first call to close()."""

    def __init__(self, who: Participants) -> None:
        self._who = who
        self._model: torch_model.TorchModel | None = None

    def __call__(self) -> torch_model.TorchModel:
        if self._model is None:
            self._model = self._who.load(self._who.reference.path, self._who.dtypes[0])
        return self._model

    def close(self) -> None:
        self._model = None
        gc.collect()


def train(
    who: Participants, settings: training.Settings, source: Source, n_cells: int, in_sight: bool | None = None
) -> tuple[training.Result, dict[str, Any]]:
    """All phases: the trained prefix, and the manifest's field "calibrated". n_cells: extra cells that it has at least,
    if they pay. in_sight: whether sliding windows are not to hide it; None: as it was begun."""
    reference, mse = _Loaded(who), "mse" in settings.objective
    settings = replace(settings, in_sight=_stays_in_sight(who, in_sight))
    data = _data(who, source, reference)
    if not mse:
        reference.close()  # before the student comes
    weights = locate(who.model, allow_requantize=True)
    sha256 = identity(weights)
    with who.phase("train") as tell:
        student = who.load(who.model, who.dtypes[1])
        before = (*torch_model.prefix_rows(who.prefix), who.prefix.n_extra)
        K, V, n_extra = _start(who, student, data, n_cells)
        trained = training.train(
            student,
            K,
            V,
            data,
            settings,
            states=torch_model.prefix_states(who.prefix),
            n_extra=n_extra,
            before=before,
            was_in_sight=who.prefix.in_sight,
            reference=reference() if mse else None,
            prefix=who.prefix.tokens,
            state=who.state,
            identity=sha256,
            progress=tell,
        )
    return trained, _about(who, settings, source, data, trained, weights, sha256)


def _stays_in_sight(who: Participants, asked: bool | None) -> bool:
    """What was asked for; else what a training that goes on was begun with, or what the prefix has."""
    can = len(who.prefix.tokens) == 1 and has_windows(who.prefix.manifest)
    if asked and not can:
        why = "no layer of the model has a sliding window" if len(who.prefix.tokens) == 1 else "only a first token can"
        raise UsageError(f"the prefix of {who.prefix.contents} cannot be kept in sight, {why}: leave it out")
    if asked is not None:
        return asked
    begun = training.kept_in_sight(who.state)
    return can and (who.prefix.in_sight if begun is None else begun)


def _start(
    who: Participants, student: torch_model.TorchModel, data: Data, n_cells: int
) -> tuple[training.Rows, training.Rows, int]:
    """K and V that training begins with, and how many of the rows are of extra cells."""
    K, V = torch_model.prefix_rows(who.prefix)
    n_extra, n_tokens = who.prefix.n_extra, len(who.prefix.tokens)
    if who.first is not None:
        own = torch_model.prefix_rows(who.first)
        K, V = ([np.concatenate([a[:1], b[1:n_tokens], a[1:]]) for a, b in zip(*x, strict=True)]
                for x in zip(own, (K, V), strict=True))  # fmt: skip
        n_extra = who.first.n_extra
    if n_cells > n_extra:
        text = data.texts[data.trained[0]].tokens.tolist()
        more = extra_cells.of_text(student, who.prefix.tokens, text, n_cells - n_extra)
        K, V = ([np.concatenate([a, b]) for a, b in zip(*x, strict=True)] for x in zip((K, V), more, strict=True))
    return K, V, max(n_cells, n_extra)


def _data(who: Participants, source: Source, reference: _Loaded) -> Data:
    """The texts, and what the reference says of them."""
    same_source(who.directory, source, who.prefix, who.dtypes[0])
    with who.phase("texts") as tell:
        return gather(who.directory, source, who.prefix, who.model, reference, tell)


def _about(
    who: Participants,
    settings: training.Settings,
    source: Source,
    data: Data,
    trained: training.Result,
    weights: Reference,
    sha256: str,
) -> dict[str, Any]:
    return {
        "objective": settings.objective,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "lr": trained.lr,
        "batch": settings.batch,
        "seq_len": source.seq_len,
        "kv_type": "/".join(dict.fromkeys(settings.kv_type)),
        "kv_tail": settings.tail,
        "seed": settings.seed,
        "dtype": who.dtypes[1],
        "first_token": None if who.first is None else who.first.sha256,
        **({IN_SIGHT: True} if trained.in_sight else {}),
        "data": {
            "kind": "self" if source.data == "self" else Path(source.data).name,
            "sha256": data.sha256(),
            "n_sequences": len(data.trained),
            "n_tokens": data.n_tokens(data.trained),
        },
        "model": {
            "name": who.model.name,
            "sha256": sha256,
            "type": weights.dtype,
            "file_type": gguf_file.read(who.model).values.get(ikv.KEY_FILE_TYPE),
        },
        "held_out": {
            "before": trained.before,
            "after": trained.after,
            "n_tokens": data.n_tokens(data.held_out),
            "by_depth": [
                {"depth": depth, "before": before, "after": after}
                for depth, before, after in zip(
                    training.DEPTHS, trained.depths[0], trained.depths[trained.best_step], strict=False
                )
            ],
        },
    }
