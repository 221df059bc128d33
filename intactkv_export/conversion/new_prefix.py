"""Another prefix for a model that is quantized already."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from intactkv_export.conversion.checks import check_space, check_targets
from intactkv_export.conversion.intact_tokens import Curve, shortest
from intactkv_export.conversion.result import ConvertResult, result
from intactkv_export.engines import Engine, check_in_torch, compute
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Rope
from intactkv_export.models import (
    KEY_REFERENCE,
    check_convertible,
    check_same_reference,
    gguf_file,
    identity,
    locate,
    weights,
)
from intactkv_export.prefix import Rendering, check_prefix_tokens, check_prompt, embedding, ikv, outputs, prompt_for
from intactkv_export.work import Progress, Stages, atomic


def prefix(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    system_prompt: str | None = None,
    bos_only: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_args: Mapping[str, Any] | None = None,
    date: str | datetime.date | None = None,
    prefix_tokens: int | str | None = None,
    embed: bool | None = None,
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
    """Compute a prefix for a GGUF that was made from this reference.

    out: the `.ikv` to write; None: MODEL.ikv beside the model, without the number of a part. embed: also store it in
    the model; None: if the model has one embedded, which would hide the new file, and `out` is not given. Without `out`
    it is the model's own: it becomes the default, in place of the embedded one of the usual name, beside the others;
    with `out` it has the file's name there (ikv.add). Otherwise as convert(). Raises UsageError if a calibrated prefix
    would be replaced and `out` is not given, IntactKVError if the model was quantized from another reference, by
    identity or by structure.
    """
    settings = Engine(engine, dtype, device, offload_dir, n_threads, n_ctx, rope or Rope())
    model = gguf_file.first_part(model)
    header = gguf_file.read(model)
    beside = model.with_name(f"{gguf_file.whole_name(model)}.ikv")
    target = outputs.named(beside if out is None else out, ".ikv").absolute()
    name = None if out is not None else embedding.FIRST_TOKEN if bos_only else embedding.PROMPT
    if name is not None:
        _check_not_calibrated(model, target, name)
    if embed is None:
        embed = out is None and embedding.has(header)
    found = locate(reference, allow_requantize)
    computed_by = settings.chosen(found)
    check_targets([target], found, [model])
    check_prefix_tokens(prefix_tokens, bos_only)
    rendering = Rendering.checked(tools, template_args, date)
    check_prompt(header.values.get("tokenizer.chat_template"), system_prompt, bos_only, rendering)
    if prefix_tokens == "auto":
        check_in_torch(found, model, device, "--prefix-tokens auto", states=False)
    prompt = prompt_for(model, system_prompt, bos_only, prefix_tokens, settings.rope, rendering)
    if computed_by == "llama":
        check_convertible(found)
    with atomic.work_directory(target) as directory:
        work = Stages(directory, progress)
        check_space(directory, found, [], widen=computed_by == "llama" and settings.widens(found))
        sha256 = work.run("hash reference", identity, found)
        check_same_reference(str(model), header.values.get(KEY_REFERENCE), str(found.path), sha256)
        curves: dict[str, Curve] = {}
        if prefix_tokens == "auto":
            prompt, curves = shortest(work, settings, found, {model.name: model}, prompt)
        gguf = weights.reference_gguf(work, found) if computed_by == "llama" else None
        new = compute(work, settings, found, gguf, prompt, sha256, reader=model)
        ikv.write(directory / target.name, new.data)
        if embed:
            work.run("embed", ikv.add_file, model, directory / target.name, name, out is None)
        atomic.publish(directory / target.name, target)
    return result([], target, new, embed, curves, {}, work.done)


def _check_not_calibrated(model: Path, target: Path, name: str) -> None:
    """Raises UsageError if the model's own prefix, the file or the one embedded under this name, took a training that
    nobody asked to throw away."""
    try:
        there = embedding.embedded(model)
        own = [ikv.read(model, one.name) for one in there if one.name == name]
        own += [ikv.read(target)] if target.is_file() else []
    except IntactKVError:
        return  # damaged: a new one is what it needs
    for prefix in own:
        if prefix.manifest["calibrated"] is not None:
            raise UsageError(
                f"{prefix.source} holds a calibrated prefix, which this one would replace: give this one another name "
                "with --out"
            )
