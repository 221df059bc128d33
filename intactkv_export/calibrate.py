"""Calibrate a prefix for one quantized model: same size, same speed, smaller error.

Two phases, so that one model is in memory at a time (both, for an objective with mse):

    reference   --> texts of its own, or the user's, as tokens                    sequences.npy
                --> its likeliest next tokens after each of them (targets.py)     targets-*.npz
    student     the quantized model, dequantized --> training.py                  MODEL.pt
                --> a prefix file with the trained K and V

What is on the way lies in OUT.calibrating/, which is removed at the end: after a kill the same command goes on.

Memory, for a 7B model (n_layer 32, n_embd 4096, n_ff 11008, vocabulary 32000) on a GPU, weights in bfloat16:

    weights, of the reference, then of the student                        2 * 6.7e9          13.5 GB
    activations kept for the backward pass, 1024 tokens at a time         checkpointed        0.3 GB
      (16 * 4096 + 4 * 11008 values a token and layer would be 7.2 GB)    one layer           0.2 GB
    logits in float32, their logarithms and gradients                     3 * 1024 * 32000    0.4 GB
    K and V of the texts while they are sampled, 12 at a time             conversations.py    2.1 GB
    K and V of 64 tokens, float32, gradient and two moments of AdamW      4 * 64 * 2 * 32 * 4096 * 4    0.3 GB

less than 17 GB of 24. The targets take 2 kB a token on disk: 134 MB for 256 sequences of 256 tokens.
"""

from __future__ import annotations

import gc
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import intactkv_export
from intactkv_export import atomic, conversations, engines, gguf_file, prefix_file
from intactkv_export import reference as references
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.prefix_file import Prefix
from intactkv_export.reference import Reference
from intactkv_export.runtime import kv_types
from intactkv_export.vocabulary import Vocabulary

if TYPE_CHECKING:
    from intactkv_export.student import TorchModel
    from intactkv_export.training import Result, Settings

Progress = Callable[..., None]  # stage, done, total, note
# objective -> steps, batch, seq_len: for mse the paper's, for kl what measured best
DEFAULTS = {"kl": (120, 4, 256), "mse": (160, 16, 1024), "kl+mse": (120, 4, 256)}
PHASES = ("data", "targets", "train")
SEQUENCES = 256
_HELD_OUT = 8  # one of so many sequences is not trained on
_EXACT = 1 << 30  # weights up to which a GPU computes in float32 too: bfloat16 alone costs SmolLM2 0.001 nats


@dataclass(frozen=True)
class Calibrated:
    """A calibrated prefix file and what it took. before, after: held-out divergence, nats a token.

    seconds: of each phase done by this process. peak_bytes: resident memory of this process, or on a GPU the memory
    that torch allocated there.
    """

    out: Path
    n_bytes: int
    n_tokens: int
    manifest: dict[str, Any]  # the prefix file's field "calibrated"
    history: list[tuple[int, float]]
    seconds: dict[str, float]
    peak_bytes: int

    @property
    def before(self) -> float:
        return self.manifest["held_out"]["before"]

    @property
    def after(self) -> float:
        return self.manifest["held_out"]["after"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "out": str(self.out)}


def calibrate(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    prefix: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str],
    data: str | os.PathLike[str] = "self",
    objective: str = "kl",
    steps: int | None = None,
    lr: float | None = None,
    batch: int | None = None,
    seq_len: int | None = None,
    sequences: int = SEQUENCES,
    kv_type: str | tuple[str, str] = "q8_0",
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    allow_requantize: bool = False,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Train the K and V of a prefix for a quantized model, and write them as a prefix file.

    reference: the full-precision model, as for convert(). model: a GGUF quantized from it.
    prefix: what to begin with: an `.ikv` or a GGUF with one embedded; None: the model's own (prefix_file.find).
    data: "self": conversations that the reference writes itself behind the prefix, every second of them beginning
        with a document (conversations.sample); else a file (conversations.read).
    objective: training.OBJECTIVES. steps, batch, seq_len: None: those of DEFAULTS. lr: training.Settings.
    sequences: how many to sample, or to take of the file at most; one in eight is held out.
    kv_type: that the prefix will be used with, "q8_0" or a pair for K and V.
    device, dtype: of torch; None: float32, or elsewhere than on the CPU bfloat16 for more than 2^30 weights.
    directory: for what is on the way, kept afterwards; it may be shared by calibrations for several models of one
        reference, which then share data and targets. None: OUT.calibrating, removed at the end.
    progress: called with (stage, done, total, note).

    Raises UsageError for settings that make no sense, IntactKVError if the files do not belong together, or if the
    directory holds a calibration with other settings. OUT is whole or not there.
    """
    out, model = Path(out), Path(model)
    if missing := engines.missing_for_torch():
        raise UsageError(f"calibration needs {missing}, not installed: pip install 'intactkv-export[convert]'")
    from intactkv_export import training

    default = DEFAULTS.get(objective, DEFAULTS["kl"])
    given = [own if own is not None else usual for own, usual in zip((steps, batch, seq_len), default, strict=True)]
    n_steps, n_batch, n_tokens = given
    settings = training.Settings(objective, n_steps, lr, n_batch, kv_types(kv_type), seed, every=max(1, n_steps // 6))
    if min(n_batch, n_tokens) < 1 or n_steps < 0 or sequences < 2:
        raise UsageError(
            f"{n_steps} steps of {n_batch} sequences of {n_tokens} tokens, {sequences} in all: give 1 or more, and at "
            "least 2 sequences, of which one is held out"
        )
    found = references.locate(reference, allow_requantize)
    start = _prefix(model, prefix)
    work = Path(directory) if directory is not None else out.with_name(f"{out.name}.calibrating")
    with atomic.explained(out):
        work.mkdir(exist_ok=True)
    run = _Run(found, model, start, work, device, dtype or _dtype(model, device), progress)
    run.check()
    trained, about = run.train(settings, str(data), sequences, n_tokens)
    made = _build(start, trained, about)
    prefix_file.write(out, made)
    if directory is None:
        shutil.rmtree(work, ignore_errors=True)
    return Calibrated(out, len(made), len(start.tokens), about, trained.history, run.seconds, _peak_bytes(device))


@dataclass
class _Run:
    """What takes part in one calibration."""

    reference: Reference
    model: Path
    prefix: Prefix
    work: Path
    device: str
    dtype: str
    report: Progress | None

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._loaded: TorchModel | None = None

    def check(self) -> None:
        """Reference, model and prefix must belong together. Raises IntactKVError."""
        theirs = self.prefix.manifest["reference"]["sha256"]
        stamped = gguf_file.read(self.model).values.get(prefix_file.KEY_REFERENCE)
        self._progress("hash reference", 0, 0)
        ours = references.identity(self.reference)
        for sha256, name in ((ours, str(self.reference.path)), (stamped, f"the reference of {self.model}")):
            if sha256 not in (None, theirs):
                raise IntactKVError(
                    f"the prefix {self.prefix.source} was computed from the reference model {theirs} and {name} is "
                    f"{sha256}: give the files that belong together"
                )

    def train(self, settings: Settings, data: str, n: int, n_tokens: int) -> tuple[Result, dict[str, Any]]:
        """Both phases: the trained prefix, and the manifest's field "calibrated"."""
        from intactkv_export import student, targets, training

        mse = "mse" in settings.objective
        sequences = self._sequences(data, n, n_tokens, settings.seed)
        n_held_out = max(1, len(sequences) // _HELD_OUT)
        needed = sequences[:n_held_out] if settings.objective == "mse" else sequences
        with self._timed("targets") as done:
            wanted = targets.make(
                self._reference_model, self.prefix.tokens, needed.tolist(), directory=self.work, progress=done
            )
        if not mse:
            self._loaded = None  # freed before the student comes
            gc.collect()
        K, V = student.prefix_rows(self.prefix)
        weights = references.locate(self.model, allow_requantize=True)
        identity = references.identity(weights)
        with self._timed("train") as done:
            trained = training.train(
                self._load(self.model),
                K,
                V,
                training.Data(sequences, wanted, n_held_out),
                settings,
                reference=self._reference_model() if mse else None,
                prefix=self.prefix.tokens,
                state=self.work / f"{self.model.stem}.pt",
                identity=identity,
                progress=done,
            )
        about = {
            "objective": settings.objective,
            "steps": trained.steps,
            "best_step": trained.best_step,
            "lr": training.peak(settings, trained.before),
            "batch": settings.batch,
            "seq_len": n_tokens,
            "kv_type": "/".join(dict.fromkeys(settings.kv_type)),
            "seed": settings.seed,
            "dtype": self.dtype,
            "data": {
                "kind": "self" if data == "self" else Path(data).name,
                "sha256": conversations.data_hash(sequences.tolist()),
                "n_sequences": len(sequences) - n_held_out,
                "n_tokens": (len(sequences) - n_held_out) * n_tokens,
            },
            "model": {
                "name": self.model.name,
                "sha256": identity,
                "type": weights.dtype,
                "file_type": gguf_file.read(self.model).values.get(prefix_file.KEY_FILE_TYPE),
            },
            "held_out": {"before": trained.before, "after": trained.after, "n_tokens": n_held_out * n_tokens},
        }
        return trained, about

    def _sequences(self, data: str, n: int, n_tokens: int, seed: int) -> np.ndarray:
        """int32 [at most n, n_tokens]: sampled or read once, then found in the work directory."""
        path, about_path = self.work / "sequences.npy", self.work / "data.json"
        about = {"data": data, "sequences": n, "seq_len": n_tokens, "seed": seed, "dtype": self.dtype,
                 "reference": self.prefix.manifest["reference"]["sha256"], "prefix": self.prefix.sha256}  # fmt: skip
        if about_path.is_file():
            from intactkv_export.training import check_same

            check_same(self.work, json.loads(about_path.read_text()), about)
        else:
            with atomic.output(about_path) as file:
                file.write(json.dumps(about).encode())
        if not path.is_file():
            with self._timed("data") as done, atomic.output(path) as file:
                np.save(file, np.asarray(self._texts(data, n, n_tokens, seed, done), np.int32))
        sequences = np.load(path)
        if len(sequences) < 2:
            raise IntactKVError(
                f"{data} gives one sequence of {n_tokens} tokens, and one is held out: give more text, or a smaller "
                "--seq-len"
            )
        return sequences

    def _texts(self, data: str, n: int, n_tokens: int, seed: int, done: Callable[[int, int], None]) -> list[list[int]]:
        template = gguf_file.read(self.model).values.get("tokenizer.chat_template")
        with Vocabulary(self.model) as vocabulary:
            if data == "self":
                return conversations.sample(
                    self._reference_model(),
                    self.prefix,
                    vocabulary,
                    template,
                    n=n,
                    n_tokens=n_tokens,
                    seed=seed,
                    documents=True,
                    progress=done,
                )
            texts = conversations.read(data, self.prefix, vocabulary, template, n_tokens=n_tokens)
        order = np.random.default_rng(seed).permutation(len(texts))[:n]
        return [texts[i] for i in order]

    def _reference_model(self) -> TorchModel:
        """The reference, which stays in memory until _loaded is set to None."""
        if self._loaded is None:
            self._loaded = self._load(self.reference.path)
        return self._loaded

    def _load(self, path: Path) -> TorchModel:
        from intactkv_export import student
        from intactkv_export.engines import torch as engine

        self._progress(f"load {path.name}", 0, 0)
        model = student.load(path, device=self.device, dtype=self.dtype)
        text = model.net.config.get_text_config(decoder=True)
        engine.check(text, self.prefix.manifest["model"], len(self.prefix.tokens), str(path))
        return model

    def _progress(self, stage: str, done: int, total: int, note: str = "") -> None:
        if self.report is not None:
            self.report(stage, done, total, note)

    def _timed(self, stage: str) -> _Timed:
        return _Timed(self, stage)


class _Timed:
    """A phase: how long it took, and its progress."""

    def __init__(self, run: _Run, stage: str) -> None:
        self._run, self._stage = run, stage

    def __enter__(self) -> Callable[..., None]:
        self._start = time.perf_counter()
        return self._progress

    def __exit__(self, *_: object) -> None:
        self._run.seconds[self._stage] = time.perf_counter() - self._start

    def _progress(self, done: int, total: int, held_out: float | None = None) -> None:
        note = "" if held_out is None else f"held-out KLD {held_out:.4f}"
        self._run._progress(self._stage, done, total, note)


def _prefix(model: Path, given: str | os.PathLike[str] | None) -> Prefix:
    path = Path(given) if given is not None else prefix_file.find(model)
    if path is None:
        raise UsageError(
            f"{model} has no prefix embedded or beside it: make one with `intactkv-export prefix`, or name it with "
            "--prefix"
        )
    return prefix_file.read(path)


def _dtype(model: Path, device: str) -> str:
    n_weights = sum(math.prod(x.shape) for shard in gguf_file.shards(model) for x in gguf_file.read(shard).tensors)
    return "float32" if device == "cpu" or n_weights <= _EXACT else "bfloat16"


def _build(start: Prefix, trained: Result, about: dict[str, Any]) -> bytes:
    """The prefix file: as before but for K, V and how they came about."""
    manifest = {key: value for key, value in start.manifest.items() if key not in ("format", "tokens", "model")}
    manifest |= {"calibrated": about, "created_by": f"intactkv-export {intactkv_export.__version__}"}
    layers = sorted(layer.il for layer in start.layers)
    K, V = (dict(zip(layers, rows, strict=True)) for rows in (trained.K, trained.V))
    return prefix_file.build(start.manifest["model"], start.tokens, K, V, manifest)


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
