"""A reference model and a system prompt go in; quantized GGUFs with their IntactKV come out.

    Hugging Face --converter--> reference.gguf --widened to F32--> engine --> OUT.ikv --.
                                       '--------quantizer--------> TYPE.gguf -----------+--> OUT.gguf

Heavy stages run in processes of their own. Everything on the way lies in one directory beside the outputs, which are
renamed to their names at the very end: they are whole or absent.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from intactkv_export import extras
from intactkv_export.conversion.checks import check_space, check_targets, quantization_types
from intactkv_export.conversion.intact_tokens import Curve, shortest
from intactkv_export.conversion.result import ConvertResult, Output, result
from intactkv_export.engines import Engine, check_device, check_in_torch, compute
from intactkv_export.errors import UsageError
from intactkv_export.libllama import Rope
from intactkv_export.models import (
    KEY_CONVERTED,
    KEY_REFERENCE,
    Reference,
    check_convertible,
    gguf_file,
    identity,
    locate,
    tensor_types,
    weights,
)
from intactkv_export.models import imatrix as imatrices
from intactkv_export.prefix import Rendering, check_prefix_tokens, check_prompt, ikv, outputs, prompt_for
from intactkv_export.work import Progress, Stages, Steps, atomic


def convert(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | Sequence[str] = ("Q4_K_M",),
    system_prompt: str | None = None,
    bos_only: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_args: Mapping[str, Any] | None = None,
    date: str | datetime.date | None = None,
    prefix_tokens: int | str | None = None,
    imatrix: str | os.PathLike[str] | None = None,
    calibrate: bool | Mapping[str, Any] = False,
    embed: bool = True,
    keep_reference: bool = False,
    allow_requantize: bool = False,
    engine: str = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    offload_dir: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    n_ctx: int = 0,
    rope: Rope | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Quantize a reference model and compute its IntactKV prefix.

    reference: a Hugging Face directory or hub id, or a GGUF in F32, F16 or BF16; a quantized one with
        allow_requantize, and the manifest says so.
    out: "dir/name", or with one of the endings: writes name.gguf, or name-TYPE.gguf of each if there are several types,
        and name.ikv. A GGUF that is there already is replaced if a conversion made it.
    quant: types upstream quantizes to (weights.TYPES), a sequence or comma-separated. They share one prefix.
    system_prompt: the text; None: the chat template's own. bos_only: keep only the first token intact, as calibrate
        does without system_prompt, tools, template_args, date and prefix_tokens: trained, it serves every prompt.
    tools, template_args: what else conversations are rendered with: definitions in OpenAI's format, and variables of
        the chat template, as llama-server's chat_template_kwargs. The prefix is of use where the same are given.
    date: the day, YYYY-MM-DD, that the chat template is told it is; None: today, and a prefix ends before a date.
    prefix_tokens: keep the first so many tokens of the prefix; None: all; "auto": the fewest after which the layers'
        error no longer falls for any of the types (intact_tokens.smallest_flat; needs torch), behind a q8_0 cache.
    imatrix: importance matrix of upstream's llama-imatrix, GGUF or .dat.
    calibrate: train the prefix for each type: True, or arguments of calibration.calibrate() other than its defaults
        (for a q8_0 cache, on texts of the reference's own). Each has its own then, name-TYPE.ikv if there are
        several. Needs torch.
    embed: store the prefix in each GGUF too; else only note which reference it belongs to.
    engine: "llama" computes the prefix with llama.cpp, "torch" with transformers; "auto": torch for Hugging Face
        directories of an architecture whose layout is proven, else llama.
    dtype: None: F32; "auto": that of the weights, saving memory and disk at some precision; with the torch engine
        also "float16", "bfloat16". device, offload_dir: of the torch engine (engines/torch_engine.py).
    n_threads: None: the cores that this process may use. n_ctx: of the context that the prefix will be used in; only
    LongRoPE models need it.
    rope: RoPE settings that the prefix will be used with; None: the model's own. Whoever runs the model sets them too.
    keep_reference: of a Hugging Face model, also keep the reference GGUF: name.reference.gguf.
    progress: told of each stage.

    Raises UsageError before any work if the request makes no sense, IntactKVError if the work fails: one sentence
    each. Then nothing is left behind.
    """
    settings = Engine(engine, dtype, device, offload_dir, n_threads, n_ctx, rope or Rope())
    plan = _plan(reference, out, quant, imatrix, bool(calibrate), keep_reference, allow_requantize)
    computed_by = settings.chosen(plan.reference)
    rendering = Rendering.checked(tools, template_args, date)
    bos_only = bos_only or bool(calibrate and system_prompt is prefix_tokens is rendering is None)
    check_prefix_tokens(prefix_tokens, bos_only)
    check_prompt(plan.reference.chat_template, system_prompt, bos_only, rendering)
    if calibrate:
        extras.require("torch", for_="--calibrate")
        if settings.rope:
            raise UsageError(f"--calibrate trains with the model's own RoPE, and {settings.rope} is given: give one")
    if calibrate or prefix_tokens == "auto":
        check_device(calibrate.get("device", device) if isinstance(calibrate, Mapping) else device)

    with atomic.work_directory(plan.base) as directory:
        work = Stages(directory, progress)
        widens = computed_by == "llama" and settings.widens(plan.reference)
        check_space(directory, plan.reference, list(plan.ggufs), widen=widens)
        header = _header(work, plan.reference)
        prompt = prompt_for(header, system_prompt, bos_only, prefix_tokens, settings.rope, rendering)
        if calibrate or prefix_tokens == "auto":
            needs = "--calibrate" if calibrate else "--prefix-tokens auto"
            check_in_torch(plan.reference, header, "cpu", needs, states=prefix_tokens != "auto")
        gguf = weights.reference_gguf(work, plan.reference)
        sha256 = work.run("hash reference", identity, plan.reference)
        quantized = _quantize_all(work, plan, gguf, n_threads)
        curves: dict[str, Curve] = {}
        if prefix_tokens == "auto":
            models = {name: made.path for name, made in quantized.items()}
            prompt, curves = shortest(work, settings, plan.reference, models, prompt)
        prefix = compute(work, settings, plan.reference, gguf, prompt, sha256)
        prefixes = _prefixes(work, plan, quantized, prefix, calibrate, device)
        finished = _finish(work, plan, quantized, prefixes, sha256, embed)
        if plan.kept is not None:
            finished[plan.kept] = _keep_reference(work, plan.reference, gguf, sha256)
        _publish(plan, finished, prefixes)

    outputs = [Output(path, made.type, path.stat().st_size, made.bits_per_weight) for path, made in finished.items()]
    calibrated = {name: _gain(path) for name, path in plan.ikvs.items()} if calibrate else {}
    return result(outputs, next(iter(plan.ikvs.values())), prefix, embed, curves, calibrated, work.done)


@dataclass(frozen=True)
class _Plan:
    """What is to be made, all of it known before the work. ggufs, ikvs: by type, the names they will have; calibrated,
    each type has an `.ikv` of its own. kept: the name of the reference GGUF if it is to be kept."""

    reference: Reference
    base: Path
    ggufs: dict[str, Path]
    ikvs: dict[str, Path]
    kept: Path | None
    imatrix: imatrices.Imatrix | None
    allow_requantize: bool


@dataclass(frozen=True)
class _Made:
    """A GGUF on its way, in the work directory."""

    path: Path
    type: str
    bits_per_weight: float


def _plan(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    quant: str | Sequence[str],
    imatrix: str | os.PathLike[str] | None,
    calibrate: bool,
    keep_reference: bool,
    allow_requantize: bool,
) -> _Plan:
    """Raises UsageError, or IntactKVError for a damaged reference."""
    types, base = quantization_types(quant, imatrix), outputs.without_ending(out)
    found = locate(reference, allow_requantize)
    check_convertible(found)
    names = {t: base.name if len(types) == 1 else f"{base.name}-{t}" for t in types}
    ggufs = {t: base.with_name(f"{name}.gguf") for t, name in names.items()}
    ikvs = {t: base.with_name(f"{name if calibrate else base.name}.ikv") for t, name in names.items()}
    kept = base.with_name(f"{base.name}.reference.gguf") if keep_reference and not found.is_gguf else None
    others = [] if imatrix is None else [Path(imatrix)]
    check_targets([*ggufs.values(), *ikvs.values(), *([kept] if kept else [])], found, others)
    for target in ggufs.values():
        outputs.check_converted(target)
    if kept:
        outputs.check_converted(kept, kept_reference=True)
    matrix = None if imatrix is None else imatrices.read(imatrix)
    return _Plan(found, base, ggufs, ikvs, kept, matrix, allow_requantize)


def _header(work: Stages, reference: Reference) -> Path:
    """A GGUF with the reference's vocabulary and chat template."""
    if reference.is_gguf:
        return reference.path
    header = work.directory / "vocabulary.gguf"
    work.run("read vocabulary", weights.huggingface_to_gguf, reference.path, header, vocab_only=True)
    return header


def _quantize_all(work: Stages, plan: _Plan, gguf: Path, n_threads: int | None) -> dict[str, _Made]:
    """The reference in each type, under the names they will have: a calibrated prefix keeps the name of its model."""
    directory = work.directory / "quantized"
    directory.mkdir()
    quantized = {}
    for name, target in plan.ggufs.items():
        path = directory / target.name
        bits = work.run(
            f"quantize {name}",
            weights.quantize,
            gguf,
            path,
            name,
            counted=True,
            imatrix=plan.imatrix,
            allow_requantize=plan.allow_requantize,
            n_threads=n_threads,
        )
        quantized[name] = _Made(path, name, bits)
    return quantized


def _prefixes(
    work: Stages,
    plan: _Plan,
    quantized: Mapping[str, _Made],
    prefix: ikv.Prefix,
    calibrate: bool | Mapping[str, Any],
    device: str,
) -> dict[str, Path]:
    """The prefix file of each type: one for all, or calibrated one for each."""
    original = work.directory / "prefix.ikv"
    ikv.write(original, prefix.data)
    if not calibrate:
        return dict.fromkeys(quantized, original)
    settings = {"device": device, **({} if calibrate is True else dict(calibrate))}
    prefixes = {}
    for name, made in quantized.items():
        prefixes[name] = work.directory / f"calibrated-{name}.ikv"
        work.run(
            f"calibrate {name}",
            _calibrate,
            plan.reference.path,
            made.path,
            original,
            prefixes[name],
            work.directory / "calibration" if len(quantized) > 1 else None,
            plan.allow_requantize,
            settings,
            counted=True,
        )
    return prefixes


def _calibrate(
    reference: Path,
    model: Path,
    prefix: Path,
    out: Path,
    directory: Path | None,
    allow_requantize: bool,
    settings: dict[str, Any],
    progress: Steps,
) -> None:
    from intactkv_export.calibration import PHASES, calibrate

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage in PHASES:  # each of which gets half of the bar
            progress(1000 * PHASES.index(stage) + 1000 * done // max(total, 1), 1000 * len(PHASES))

    calibrate(
        reference,
        model,
        prefix=prefix,
        out=out,
        directory=directory,
        allow_requantize=allow_requantize,
        progress=report,
        **settings,
    )


def _finish(
    work: Stages,
    plan: _Plan,
    quantized: Mapping[str, _Made],
    prefixes: Mapping[str, Path],
    sha256: str,
    embed: bool,
) -> dict[Path, _Made]:
    """Each GGUF with its prefix, or with a note of its reference, by the name it will have."""
    finished = {}
    for name, target in plan.ggufs.items():
        path = work.directory / target.name
        if embed:
            work.run(f"embed in {name}", ikv.embed_file, quantized[name].path, prefixes[name], path)
        else:
            work.run(f"stamp {name}", ikv.stamp, quantized[name].path, sha256, path)
        quantized[name].path.unlink()
        finished[target] = _Made(path, name, quantized[name].bits_per_weight)
    return finished


def _keep_reference(work: Stages, reference: Reference, gguf: Path, sha256: str) -> _Made:
    path = work.directory / "kept.gguf"
    return _Made(path, "reference", work.run("keep reference", _keep, gguf, reference, sha256, path))


def _keep(gguf: Path, reference: Reference, sha256: str, out: Path) -> float:
    """Copy the reference GGUF, noting which Hugging Face model it is; returns its bits per weight."""
    header = gguf_file.read(gguf)
    own = identity(Reference(gguf.name, gguf, True, [gguf], reference.dtype, reference.quantized, None))
    ikv.rewrite(gguf, {KEY_REFERENCE: sha256, KEY_CONVERTED: own}, out)
    return tensor_types.bits_per_weight(header)


def _publish(plan: _Plan, finished: Mapping[Path, _Made], prefixes: Mapping[str, Path]) -> None:
    """Give everything its name."""
    for target, made in finished.items():
        atomic.publish(made.path, target)
    for target, path in {plan.ikvs[name]: prefixes[name] for name in plan.ikvs}.items():
        atomic.publish(path, target)


def _gain(path: Path) -> dict[str, Any]:
    """What calibration brought, as the prefix file says."""
    return {"prefix": path, **ikv.read(path).manifest["calibrated"]["held_out"]}
