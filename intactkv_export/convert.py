"""A reference model and a system prompt go in; quantized GGUFs with their IntactKV come out.

    Hugging Face --converter--> reference.gguf --widened to F32--> engine --> OUT.ikv --.
                                       '--------quantizer--------> TYPE.gguf -----------+--> OUT.gguf

Heavy stages run in processes of their own. Everything on the way lies in one directory beside the outputs, which are
renamed to their names at the very end: they are whole or absent.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from intactkv_export import atomic, compute, engines, ggml_types, gguf_file, prefix_file, prompt, weights
from intactkv_export import imatrix as imatrices
from intactkv_export import reference as references
from intactkv_export.compute import Engine
from intactkv_export.curve import Curve
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.reference import Reference
from intactkv_export.stages import Progress, Stage, Stages
from intactkv_export.vocabulary import Vocabulary

_WEIGHT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Output:
    """A GGUF that was written. type: as in weights.TYPES, or "reference"."""

    path: Path
    type: str
    n_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ConvertResult:
    """What came out, and what it took.

    outputs: the GGUFs; prefix: the `.ikv`. curves: by type, or by the model's name, what prefix_tokens="auto" chose by.
    calibrated: by type, {"prefix": its `.ikv`, "before", "after": held-out KL divergence}; prefix is the first of them.
    """

    outputs: list[Output]
    prefix: Path
    prefix_bytes: int
    n_tokens: int
    text: str
    engine: str
    reference_sha256: str
    embedded: bool
    curves: dict[str, Curve]
    calibrated: dict[str, dict[str, Any]]
    stages: list[Stage]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: paths as text."""
        return _plain(asdict(self))


def convert(
    reference: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    quant: str | Sequence[str] = ("Q4_K_M",),
    system_prompt: str | None = None,
    bos_only: bool = False,
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
    progress: Progress | None = None,
) -> ConvertResult:
    """Quantize a reference model and compute its IntactKV prefix.

    reference: a Hugging Face directory or hub id, or a GGUF in F32, F16 or BF16; a quantized one with
        allow_requantize, and the manifest says so.
    out: "dir/name": writes name.gguf, or name-TYPE.gguf of each if there are several types, and name.ikv.
    quant: types upstream quantizes to (weights.TYPES), a sequence or comma-separated. They share one prefix.
    system_prompt: the text; None: the chat template's own. bos_only: keep only the first token intact.
    prefix_tokens: keep the first so many tokens of the prefix; None: all; "auto": the fewest after which the layers'
        error no longer falls for any of the types (curve.choose; needs torch), behind a q8_0 cache.
    imatrix: importance matrix of upstream's llama-imatrix, GGUF or .dat.
    calibrate: train the prefix for each type: True, or arguments of calibrate.calibrate() other than its defaults (for
        a q8_0 cache, on texts of the reference's own). Each has its own then, name-TYPE.ikv if there are
        several. Needs torch.
    embed: store the prefix in each GGUF too; else only note which reference it belongs to.
    engine: "llama" computes the prefix with llama.cpp, "torch" with transformers; "auto": torch for Hugging Face
        directories of an architecture whose layout is proven, else llama.
    dtype: None: F32; "auto": that of the weights, saving memory and disk at some precision; with the torch engine
        also "float16", "bfloat16". device, offload_dir: of the torch engine (engines/torch.py).
    n_threads: None: all cores. n_ctx: of the context that the prefix will be used in; only LongRoPE models need it.
    keep_reference: of a Hugging Face model, also keep the reference GGUF: name.reference.gguf.
    progress: called with (stage, done, total); total is 0 where it is unknown.

    Raises UsageError before any work if the request makes no sense, IntactKVError if the work fails: one sentence
    each. Then nothing is left behind.
    """
    settings = Engine(engine, dtype, device, offload_dir, n_threads, n_ctx)
    types = _types(quant, imatrix)
    base = _base(out)
    found = references.locate(reference, allow_requantize)
    engine = settings.chosen(found)
    targets = {t: base.with_name(f"{base.name}.gguf" if len(types) == 1 else f"{base.name}-{t}.gguf") for t in types}
    shared, kept = base.with_name(f"{base.name}.ikv"), base.with_name(f"{base.name}.reference.gguf")
    ikvs = {t: target.with_suffix(".ikv") if calibrate else shared for t, target in targets.items()}
    keep_reference = keep_reference and not found.is_gguf
    _check_targets([*targets.values(), *ikvs.values(), *([kept] if keep_reference else [])], found)
    matrix = None if imatrix is None else imatrices.read(imatrix)
    _check_prefix_tokens(prefix_tokens, bos_only)
    _check_prompt(found, system_prompt, bos_only)
    if calibrate and (missing := engines.missing_for_torch()):
        raise UsageError(f"--calibrate needs {missing}, not installed: pip install 'intactkv-export[convert]'")

    with atomic.work_directory(base) as directory:
        work = Stages(directory, progress)
        _check_space(directory, found, types, widen=engine == "llama" and settings.widens(found))
        header = found.path
        if not found.is_gguf:
            header = directory / "vocabulary.gguf"
            work.run("read vocabulary", weights.huggingface_to_gguf, found.path, header, vocab_only=True)
        made = _prompt(header, system_prompt, bos_only, prefix_tokens)
        gguf = compute.reference_gguf(work, found)
        identity = work.run("hash reference", references.identity, found)
        # under the names they will have: a calibrated prefix keeps the name of its model
        (directory / "quantized").mkdir()
        quantized = {name: directory / "quantized" / target.name for name, target in targets.items()}
        bits_per_weight = {
            name: work.run(
                f"quantize {name}", weights.quantize, gguf, path, name, counted=True,
                imatrix=matrix, allow_requantize=allow_requantize, n_threads=n_threads,
            )
            for name, path in quantized.items()
        }  # fmt: skip

        curves: dict[str, Curve] = {}
        if prefix_tokens == "auto":
            made, curves = compute.shortest(work, found, quantized, made, device)
        prefix = compute.compute(work, settings, found, gguf, made, identity)
        original = directory / "prefix.ikv"
        prefix_file.write(original, prefix.data)
        prefixes = dict.fromkeys(targets, original)
        if calibrate:
            for name, path in quantized.items():
                prefixes[name] = directory / f"calibrated-{name}.ikv"
                work.run(
                    f"calibrate {name}", _calibrate, found.path, path, original, prefixes[name],
                    directory / "calibration", allow_requantize, device,
                    {} if calibrate is True else dict(calibrate), counted=True,
                )  # fmt: skip

        finished: list[tuple[Path, Path, str, float]] = []
        for name, target in targets.items():
            final = directory / target.name
            if embed:
                work.run(f"embed in {name}", _embed, quantized[name], prefixes[name], final)
            else:
                work.run(f"stamp {name}", prefix_file.stamp, quantized[name], identity, final)
            quantized[name].unlink()
            finished.append((final, target, name, bits_per_weight[name]))
        if keep_reference:
            final = directory / kept.name
            bits = work.run("keep reference", _keep, gguf, found, identity, final)
            finished.append((final, kept, "reference", bits))
        for final, target, _, _ in finished:
            atomic.publish(final, target)
        for target, final in {ikvs[name]: prefixes[name] for name in targets}.items():
            atomic.publish(final, target)

    outputs = [Output(target, name, target.stat().st_size, bits) for _, target, name, bits in finished]
    made_of = {name: prefix_file.read(path).manifest["calibrated"] for name, path in ikvs.items()} if calibrate else {}
    calibrated = {name: {"prefix": ikvs[name], **about["held_out"]} for name, about in made_of.items()}
    return _result(outputs, next(iter(ikvs.values())), prefix, embed, curves, calibrated, work)


def prefix(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    system_prompt: str | None = None,
    bos_only: bool = False,
    prefix_tokens: int | str | None = None,
    embed: bool | None = None,
    allow_requantize: bool = False,
    engine: str = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    offload_dir: str | os.PathLike[str] | None = None,
    n_threads: int | None = None,
    n_ctx: int = 0,
    progress: Progress | None = None,
) -> ConvertResult:
    """Another prefix for a model that is quantized already: a GGUF made from this reference.

    out: the `.ikv` to write; None: MODEL.ikv beside the model. embed: also store it in the model; None: if the model
    has one embedded, which would hide the new file, and `out` is not given. Otherwise as convert(). Raises
    IntactKVError if the model was quantized from another reference, by identity or by structure.
    """
    settings = Engine(engine, dtype, device, offload_dir, n_threads, n_ctx)
    model = Path(model)
    stamped = gguf_file.read(model).values
    target = _base(model if out is None else out)
    target = target.with_name(f"{target.name}.ikv")
    if embed is None:
        embed = out is None and prefix_file.KEY_STATE in stamped
    found = references.locate(reference, allow_requantize)
    engine = settings.chosen(found)
    _check_targets([target], found)
    _check_prefix_tokens(prefix_tokens, bos_only)
    made = _prompt(model, system_prompt, bos_only, prefix_tokens)
    with atomic.work_directory(target) as directory:
        work = Stages(directory, progress)
        _check_space(directory, found, [], widen=engine == "llama" and settings.widens(found))
        identity = work.run("hash reference", references.identity, found)
        theirs = stamped.get(prefix_file.KEY_REFERENCE)
        if theirs not in (None, identity):
            raise IntactKVError(
                f"{model} was quantized from the reference model {theirs} and {found.path} is {identity}: give the "
                "reference it was quantized from"
            )
        curves: dict[str, Curve] = {}
        if prefix_tokens == "auto":
            made, curves = compute.shortest(work, found, {model.name: model}, made, device)
        gguf = compute.reference_gguf(work, found) if engine == "llama" else None
        new = compute.compute(work, settings, found, gguf, made, identity, reader=model)
        prefix_file.write(directory / target.name, new.data)
        if embed:
            work.run("embed", _embed, model, directory / target.name, model)
        atomic.publish(directory / target.name, target)
    return _result([], target, new, embed, curves, {}, work)


def _prompt(gguf: Path, system_prompt: str | None, bos_only: bool, prefix_tokens: int | str | None) -> prompt.Prompt:
    """Prefix tokens by the GGUF's tokenizer; refused if its header tells that the model can have no prefix."""
    values = gguf_file.read(gguf).values
    arch = values.get("general.architecture")
    with Vocabulary(gguf) as vocabulary:
        why_not = vocabulary.refusal()
        if why_not:
            raise IntactKVError(f"a model of architecture {arch!r} cannot carry a prefix: {why_not}")
        made = prompt.make(vocabulary, values.get("tokenizer.chat_template"), system_prompt, bos_only)
        if isinstance(prefix_tokens, int):
            made = prompt.first(made, prefix_tokens, vocabulary)
    limit = values.get(f"{arch}.context_length")
    if isinstance(limit, int) and len(made.tokens) >= limit:
        raise UsageError(f"the prefix has {len(made.tokens)} tokens, the model's context {limit}: shorten the prompt")
    return made


def _check_prefix_tokens(prefix_tokens: int | str | None, bos_only: bool) -> None:
    if isinstance(prefix_tokens, str) and prefix_tokens != "auto":
        raise UsageError(f"--prefix-tokens is {prefix_tokens!r}: give a number of tokens, or auto")
    if prefix_tokens == "auto" and (missing := engines.missing_for_torch()):
        raise UsageError(
            f"--prefix-tokens auto runs the quantized model in torch, and {missing} is not installed: "
            "pip install 'intactkv-export[convert]', or give a number of tokens"
        )
    if bos_only and prefix_tokens is not None:
        raise UsageError(f"--bos-only keeps one token and --prefix-tokens says {prefix_tokens}: give one of both")


def _check_prompt(found: Reference, system_prompt: str | None, bos_only: bool) -> None:
    """What can be known about the prompt without a tokenizer, before any work."""
    if bos_only and system_prompt is not None:
        raise UsageError("--bos-only keeps no system prompt: give one of both")
    if not bos_only:
        prompt.Template(found.chat_template, "<s>", "</s>").conversation(system_prompt)


def _types(quant: str | Sequence[str], imatrix: object) -> list[str]:
    names = quant.split(",") if isinstance(quant, str) else quant
    types = list(dict.fromkeys(weights.type_name(name) for name in names))
    if not types:
        raise UsageError("no quantization type given: give one or more, for example Q4_K_M")
    starved = [name for name in types if name in weights.NEEDS_IMATRIX]
    if starved and imatrix is None:
        raise UsageError(f"{starved[0]} needs an importance matrix: give one with --imatrix, or a larger type")
    return types


def _base(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix in (".gguf", ".ikv"):
        path = path.with_suffix("")
    if str(out).endswith(os.sep) or path.is_dir() or not path.name:
        raise UsageError(f"{out} is a directory: give directory/name, from which name.gguf and name.ikv are made")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent} to write to: make it, or choose another")
    return path.absolute()


def _check_targets(targets: Sequence[Path], found: Reference) -> None:
    for target in targets:
        if target.is_dir():
            raise UsageError(f"{target} is a directory, so no file can be written there: choose another name")
        if target.exists() and any(target.samefile(file) for file in found.files):
            raise UsageError(f"{target} is the reference model itself: choose another name for the output")


def _check_space(directory: Path, found: Reference, types: Sequence[str], widen: bool) -> None:
    """Refuse what cannot fit, by a lower bound of what will lie on the disk at once."""
    if found.is_gguf:
        n_weights = sum(prod(t.shape) for file in found.files for t in gguf_file.read(file).tensors)
    else:
        n_weights = found.n_bytes // _WEIGHT_BYTES.get(found.dtype, 1)
    sizes = [int(n_weights * weights.least_bits(name) / 8) for name in types]
    converted = 0 if found.is_gguf else 2 * n_weights
    widened = 4 * n_weights if widen and found.dtype != "F32" else 0
    need = converted + sum(sizes) + max(widened, max(sizes, default=0))
    free = shutil.disk_usage(directory).free
    if need > free:
        raise IntactKVError(
            f"the conversion needs at least {need / 1e9:.1f} GB in {directory.parent} and {free / 1e9:.1f} GB are free:"
            " make room, or choose another directory"
        )


def _calibrate(
    reference: Path,
    model: Path,
    prefix: Path,
    out: Path,
    directory: Path,
    allow_requantize: bool,
    device: str,
    settings: dict[str, Any],
    progress: Callable[[int, int], None],
) -> None:
    from intactkv_export.calibrate import PHASES, calibrate

    def report(stage: str, done: int, total: int, note: str) -> None:
        if stage in PHASES:  # each of which gets a third of the bar
            progress(1000 * PHASES.index(stage) + 1000 * done // max(total, 1), 1000 * len(PHASES))

    calibrate(
        reference, model, prefix=prefix, out=out, directory=directory, allow_requantize=allow_requantize,
        progress=report, **{"device": device, **settings},
    )  # fmt: skip


def _embed(gguf: Path, ikv: Path, out: Path) -> None:
    prefix_file.embed(gguf, prefix_file.read(ikv), out)


def _keep(gguf: Path, found: Reference, identity: str, out: Path) -> float:
    """Copy the reference GGUF, noting which Hugging Face model it is; returns its bits per weight."""
    header = gguf_file.read(gguf)
    own = references.identity(Reference(gguf.name, gguf, True, [gguf], found.dtype, found.quantized, None))
    changes = {prefix_file.KEY_REFERENCE: identity, references.KEY_CONVERTED: own}
    prefix_file.rewrite(gguf, changes, out)
    return ggml_types.bits_per_weight(header)


def _result(
    outputs: list[Output],
    ikv: Path,
    prefix: prefix_file.Prefix,
    embedded: bool,
    curves: dict[str, Curve],
    calibrated: dict[str, dict[str, Any]],
    work: Stages,
) -> ConvertResult:
    manifest = prefix.manifest
    return ConvertResult(
        outputs, ikv, ikv.stat().st_size, len(prefix.tokens), manifest["text"], manifest["engine"]["name"],
        manifest["reference"]["sha256"], embedded, curves, calibrated, work.done,
    )  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
