"""A prefix of the same tokens once more, by a reference: what a served model has kept of its own, at full precision."""

from __future__ import annotations

import os
from pathlib import Path

from intactkv_export.conversion.checks import check_space, check_targets
from intactkv_export.conversion.result import ConvertResult, result
from intactkv_export.engines import Engine, compute, llama_engine
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Rope, rope_of
from intactkv_export.models import (
    KEY_REFERENCE,
    check_convertible,
    check_same_reference,
    gguf_file,
    identity,
    locate,
    weights,
)
from intactkv_export.prefix import Prefix, Prompt, Rendering, ikv, outputs
from intactkv_export.work import Progress, Stages, atomic

# Of the description of a model: what it takes to be the same one, whatever its weights' type
_SAME = {
    "arch": "its architecture",
    "n_vocab": "the size of its vocabulary",
    "vocab_sha256": "the SHA-256 of its vocabulary",
    "caches": "its layers",
}


def remake(
    reference: str | os.PathLike[str],
    like: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
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
    """Compute the prefix of the tokens of another one, `like`, which stays as it is.

    model: a GGUF quantized from the reference, which then need not be converted where torch computes. rope: None: as
    `like` was made. Otherwise as prefix(). Raises UsageError if the rows of `like` were trained, IntactKVError if it is
    of another model than the reference.
    """
    old = ikv.read(like)
    _check_computed(old)
    settings = Engine(
        engine, dtype, device, offload_dir, n_threads, n_ctx, rope or rope_of(old.manifest.get("rope_options"))
    )
    target = outputs.named(out, ".ikv").absolute()
    reader = None if model is None else gguf_file.first_part(model)
    found = locate(reference, allow_requantize)
    check_targets([target], found, [Path(like), *([reader] if reader else [])])
    computed_by = settings.chosen(found)
    needs_gguf = computed_by == "llama" or reader is None
    if needs_gguf:
        check_convertible(found)
    with atomic.work_directory(target) as directory:
        work = Stages(directory, progress)
        check_space(directory, found, [], widen=computed_by == "llama" and settings.widens(found))
        sha256 = work.run("hash reference", identity, found)
        _check_origin(old, str(found.path), sha256)
        if reader is not None:
            of_reader = gguf_file.read(reader).values.get(KEY_REFERENCE)
            check_same_reference(str(reader), of_reader, str(found.path), sha256)
        gguf = weights.reference_gguf(work, found) if needs_gguf else None
        described = work.run(
            "describe model", llama_engine.describe, gguf or reader, max(n_ctx, len(old.tokens) + 1), settings.rope
        )
        _check_same(old, described, found.path)
        new = compute(work, settings, found, gguf, _prompt(old), sha256, reader=reader)
        ikv.write(directory / target.name, new.data)
        atomic.publish(directory / target.name, target)
    return result([], target, new, False, {}, {}, work.done)


def _check_computed(old: Prefix) -> None:
    """Raises UsageError for a prefix whose rows are not what a model computes of its tokens."""
    if old.manifest["calibrated"] is not None or old.n_extra:
        raise UsageError(
            f"the rows of {old.source} were trained, and a reference computes others for its tokens: make that of "
            "its prompt with `prefix`, and train it with `calibrate`"
        )


def _check_origin(old: Prefix, path: str, sha256: str) -> None:
    """Raises IntactKVError if it was kept by a model that says which reference it is of, and that is another one."""
    origin = old.manifest["reference"]["sha256"]
    if old.kept is not None and origin != old.kept["weights_sha256"]:
        check_same_reference(str(old.source), origin, path, sha256)


def _check_same(old: Prefix, described: dict[str, object], reference: Path) -> None:
    there = old.manifest["model"]
    for key, what in _SAME.items():
        if there[key] != described[key]:
            values = (
                ""
                if key == "caches"
                else f" ({str(there[key])[:16]} in the one, {str(described[key])[:16]} in the other)"
            )
            raise IntactKVError(
                f"{old.source} is of another model than {reference}: {what} differs{values}: give the reference of the "
                "model that it is for"
            )


def _prompt(old: Prefix) -> Prompt:
    m = old.manifest
    rendering = Rendering.of(m)
    return Prompt(old.tokens, m["text"], m["messages"], m["bos_only"], m["chat_template_sha256"], rendering)
