"""Calibrate a prefix for one quantized model: same size, same speed, smaller error.

Two phases, so that one model is in memory at a time (both, for an objective with mse):

    reference   --> texts of its own, or the user's, as tokens, and its
                    likeliest next tokens after each of them (targets.py)         texts-*.npz
    student     the quantized model, dequantized --> training.py                  MODEL.pt
                --> a prefix file with the trained K and V

What is on the way lies in OUT.calibrating/, which is removed at the end: after a kill the same command goes on.

Memory, for a 7B model (n_layer 32, n_embd 4096, n_ff 11008, vocabulary 32000) on a GPU, weights in bfloat16:

    weights, of the reference, then of the student                        2 * 6.7e9          13.5 GB
    activations kept for the backward pass, 1024 tokens at a time         checkpointed        0.3 GB
      (16 * 4096 + 4 * 11008 values a token and layer would be 7.2 GB)    one layer           0.2 GB
    logits in float32, their logarithms and gradients                     3 * 1024 * 32000    0.4 GB
    K and V of the texts while they are sampled, 12 at a time             texts/sampled.py    2.1 GB
    K and V of 64 tokens, float32, gradient and two moments of AdamW      4 * 64 * 2 * 32 * 4096 * 4    0.3 GB

less than 17 GB of 24. The targets take 2 kB a token on disk: 134 MB for 65,536 tokens of text.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import intactkv_export
from intactkv_export import extras
from intactkv_export.engines import check_in_torch
from intactkv_export.errors import UsageError
from intactkv_export.libllama import EXACT, default_tail, kv_pair, rope_of
from intactkv_export.models import KEY_REFERENCE, gguf_file, identity, locate, tensor_types
from intactkv_export.prefix import EXTRA, MAX_EXTRA, Prefix, check_reference, ikv, of_model, outputs
from intactkv_export.work import Progress, atomic, multiplies_bfloat16, peak_bytes, silent

if TYPE_CHECKING:
    from intactkv_export.calibration.training import Result

# objective -> steps, batch, seq_len: for mse the paper's, for kl what measured best
DEFAULTS = {"kl": (100, 4, 1024), "mse": (160, 16, 1024), "kl+mse": (120, 4, 256)}
PHASES = ("texts", "train")
SEQUENCES = 128
_EXACT = 1 << 30  # weights up to which a GPU computes in float32 too: bfloat16 alone costs SmolLM2 0.001 nats
_SEEDS = 1 << 32  # every generator takes these
_COARSE = 6.0  # bits per weight, below which that does not matter to a quantized model


@dataclass(frozen=True)
class Calibrated:
    """A calibrated prefix file and what it took. before, after: held-out divergence, nats a token.

    seconds: of each phase done by this process. peak_bytes: resident memory of this process, or on a GPU the memory
    that torch allocated there.
    """

    out: Path
    n_bytes: int
    n_tokens: int
    contents: str  # tokens and extra cells, in words
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
    sequences: int | None = None,
    cells: int = 0,
    in_sight: bool | None = None,
    kv_type: str | tuple[str, str] = "q8_0",
    tail: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    seed: int = 0,
    allow_requantize: bool = False,
    directory: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Train the K and V of a prefix for a quantized model, and write them as a prefix file.

    reference: the full-precision model, as for convert(). model: a GGUF quantized from it.
    prefix: what to begin with: an `.ikv` or a GGUF with one embedded; None: the model's own (ikv.find). Of the first
        token alone it is trained for every prompt, on texts of all kinds (texts/beginnings.py). A longer one begins
        with the trained first token that is the model's own, if there is one and it is not calibrated itself.
    data: "self": texts that the reference writes itself behind the prefix; else a file (texts.read_user_file).
    objective: training.OBJECTIVES. steps, batch, seq_len: None: those of DEFAULTS. lr: training.Settings.
    sequences: how many texts to sample, or to take of the file at most; one in eight is held out; None: SEQUENCES.
    seq_len: tokens in the long ones; for kl half of the tokens are in short ones (data.Source).
    cells: so many extra cells, which stand for no token, are trained with the prefix; kept if that is better.
    in_sight: no sliding window is to hide the first token and its extra cells from the tokens behind them. That holds
        more of the gain as far as the texts are long, and nothing is known of what is behind; None: what a training
        that goes on was begun with, else as the prefix is.
    kv_type: that the prefix will be used with, "q8_0" or a pair for K and V. tail: how many of the newest cells will be
        intact; None: what the type has by default (libllama.default_tail).
    device, dtype: of torch; None: float32, but bfloat16 elsewhere than on the CPU for more than 2^30 weights, and on a
        CPU that multiplies bfloat16 for a model of less than 6 bits a weight (the reference only if no directory is
        given, for it may be shared by finer models).
    directory: for what is on the way, kept afterwards; it may be shared by calibrations for several models of one
        reference, which then share texts and targets. None: OUT.calibrating, removed at the end; one process at a time.
    progress: told of each phase, with the held-out divergence as its note.

    Raises UsageError for settings that make no sense, IntactKVError if the files do not belong together, or if the
    directory holds a calibration with other settings. OUT is whole or not there.
    """
    extras.require("torch", for_="calibration")
    from intactkv_export.calibration.data import Source
    from intactkv_export.calibration.run import Participants, train
    from intactkv_export.calibration.training import Settings

    out, model = outputs.named(out, ".ikv"), gguf_file.first_part(model)
    default = DEFAULTS.get(objective, DEFAULTS["kl"])
    given = [own if own is not None else usual for own, usual in zip((steps, batch, seq_len), default, strict=True)]
    n_steps, n_batch, n_tokens = given
    n_texts = SEQUENCES if sequences is None else sequences
    pair = kv_pair(kv_type)
    n_tail = default_tail(pair) if tail is None else tail
    if n_tail < 0:
        raise UsageError(f"a tail of {n_tail} tokens: give 0 or more")
    n_tail = 0 if set(pair) <= EXACT else n_tail  # such a cache has none (MixedCache); the prefix file says so
    settings = Settings(objective, n_steps, lr, n_batch, pair, n_tail, seed, every=max(1, -(-n_steps // 3)))
    if min(n_batch, n_tokens) < 1 or n_steps < 0 or n_texts < 2:
        raise UsageError(
            f"{n_steps} steps of {n_batch} sequences of {n_tokens} tokens, {n_texts} in all: give 1 or more, and at "
            "least 2 sequences, of which one is held out"
        )
    if not 0 <= seed < _SEEDS or (lr is not None and not 0 < lr < math.inf):
        raise UsageError(f"seed {seed} and lr {lr}: give a seed of 0 to {_SEEDS - 1} and a finite lr larger than 0")
    if not 0 <= cells <= MAX_EXTRA:
        raise UsageError(f"{cells} extra cells: give 0 to {MAX_EXTRA}")
    found, start = locate(reference, allow_requantize), of_model(model, prefix)
    check_in_torch(found, model, device, "calibration")
    if cells and start.states:
        raise UsageError(
            f"--cells {cells} with recurrent layers, whose states have no cells: leave it out, their states are trained"
        )
    if options := start.manifest.get("rope_options"):
        raise UsageError(f"the prefix {start.source} was made with {rope_of(options)}, which torch cannot train with")
    atomic.destination(out)
    outputs.check_prefix_file(out)
    outputs.check_not_input(out, [*([] if start.source is None else [start.source]), Path(data)])
    work = Path(directory) if directory is not None else out.with_name(f"{out.name}.calibrating")
    report = progress or silent
    check_reference(start, gguf_file.read(model).values.get(KEY_REFERENCE), str(model))
    if directory is not None:
        with atomic.explained(out):
            work.mkdir(exist_ok=True)
    with atomic.kept_directory(work) if directory is None else nullcontext(work):
        report("hash reference", 0, 0)
        check_reference(start, identity(found), str(found.path))
        dtypes = (dtype, dtype) if dtype else _dtypes(model, device, objective, shared=directory is not None)
        who = Participants(found, model, start, _trained_first_token(model, start), work, device, dtypes, report)
        source = Source(str(data), n_texts, n_tokens, seed, "mse" not in objective, objective != "mse")
        trained, about = train(who, settings, source, cells, in_sight)
        made = _build(start, trained, about)
        ikv.write(out, made)
    return Calibrated(
        out,
        len(made),
        len(start.tokens),
        ikv.read(made).contents,
        about,
        trained.history,
        who.seconds,
        peak_bytes(device),
    )


def _dtypes(model: Path, device: str, objective: str, shared: bool) -> tuple[str, str]:
    """To compute in, of the reference and of the model. shared: what the reference says is for other models too."""
    if device != "cpu":
        n_weights = sum(math.prod(x.shape) for shard in gguf_file.shards(model) for x in gguf_file.read(shard).tensors)
        return ("float32", "float32") if n_weights <= _EXACT else ("bfloat16", "bfloat16")
    coarse = tensor_types.bits_per_weight(gguf_file.read(model)) < _COARSE
    fast = "bfloat16" if coarse and objective == "kl" and multiplies_bfloat16() else "float32"
    return "float32" if shared else fast, fast


def _trained_first_token(model: Path, start: Prefix) -> Prefix | None:
    """The model's own prefix, if it is a trained first token with which a longer prefix can begin.

    One that is calibrated already begins as it is: its rows were trained together.
    """
    if len(start.tokens) < 2 or start.manifest["calibrated"] is not None:
        return None
    own = ikv.first_token_of(model)
    if own is None:
        return None
    file_type = gguf_file.read(model).values.get(ikv.KEY_FILE_TYPE)
    trained = own.manifest["calibrated"] is not None and ikv.calibrated_for_another(own, file_type) is None
    fits = own.tokens == start.tokens[:1] and own.manifest["reference"] == start.manifest["reference"]
    return own if trained and fits else None


def _build(start: Prefix, trained: Result, about: dict[str, Any]) -> bytes:
    """The prefix file: as before but for K, V and how they came about."""
    manifest = {key: value for key, value in start.manifest.items() if key not in ("format", "tokens", "model", EXTRA)}
    manifest |= {"calibrated": about, "created_by": f"intactkv-export {intactkv_export.__version__}"}
    if trained.n_extra:
        manifest[EXTRA] = trained.n_extra
    layers = sorted(layer.il for layer in start.layers)
    states = dict(zip(sorted(start.states), trained.states, strict=True))
    K, V = (dict(zip(layers, rows, strict=True)) for rows in (trained.K, trained.V))
    return ikv.build(start.manifest["model"], start.tokens, K, V, manifest, states)
