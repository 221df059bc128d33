"""How far a quantized model is from its reference, through the real runtime: divergence, perplexity, questions.

Protocol: the prefix, then independent chunks of a text, each evaluated right behind the prefix; or, at depths, behind
more tokens of text, as a reply is (evaluation/depths.py). The reference keeps its cache at F16. After each token that
is measured the model's next-token distribution is compared with the reference's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluation.depths import Depths
from intactkv_export.evaluation.metrics import Figures, Impossible
from intactkv_export.evaluation.model import Evaluated
from intactkv_export.evaluation.modes import MODES, REFERENCE, Given, find_given
from intactkv_export.evaluation.target import Target, check_context, measure_target
from intactkv_export.evaluation.texts import Texts
from intactkv_export.libllama import EXACT, kv_pair
from intactkv_export.models import check_convertible, gguf_file, locate, weights
from intactkv_export.prefix import of_model
from intactkv_export.work import Progress, Stages, silent


def evaluate(
    reference: str | Path,
    models: Sequence[str | Path],
    prefix: str | Path | None = None,
    *,
    calibrated: str | Path | None = None,
    kv_types: Sequence[str] = ("q8_0",),
    modes: Sequence[str] | None = None,
    texts: Texts | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    depths: Sequence[int] = (),
    decode_batch: int | None = None,
    ubatch: int | None = None,
    kv_tails: Sequence[int] = (),
    progress: Progress | None = None,
    impossible: Callable[[Impossible], None] | None = None,
) -> Iterator[Figures]:
    """Compare models with the reference; yields the figures of each configuration as they are measured.

    First those of the reference itself (mode "reference"), again whenever a model's prefix has other tokens; then of
    each model, KV type and mode. Mode "rounded" of an f16 cache is "prompt" itself and is left out.

    reference: a Hugging Face directory or hub id, or a GGUF. models: GGUFs. prefix, calibrated: `.ikv` files, or GGUFs
    with one embedded (modes.find_given: what None means). modes: of MODES, and "reference"; None: all that there are.
    texts: what is evaluated behind the prefix; None: Texts().

    depths: how many tokens of text are before those measured, one pass over a text for all; 0: right behind the prefix.
    Then a text is evaluated as a reply is, at most decode_batch tokens at a time (None: DECODE_BATCH), and once more
    with ubatch at a time, as a prompt is, if that is given. kv_tails: tails of intact cells, each evaluated; (): the
    library's default. Without depths a text is evaluated at once, in one ubatch, and there is no tail: it would hold
    all of it.

    impossible: told of a quantized KV type that a model cannot have (its head size is no multiple of the type's block,
    for instance), and the others are measured; None: that is an error.

    Raises IntactKVError if a prefix does not fit, or the text is too short; UsageError for a mode that does not exist,
    a model without a prefix, or a quantized reference without allow_requantize.
    """
    unknown = set(modes or ()) - {REFERENCE, *MODES}
    if unknown:
        raise UsageError(f"no mode {sorted(unknown)[0]!r}: the modes are {REFERENCE}, {', '.join(MODES)}")
    for kv_type in kv_types:
        kv_pair(kv_type)
    texts, report = texts or Texts(), progress or silent
    measured = Depths.of(depths, decode_batch, ubatch, kv_tails)
    if depths and texts.questions:
        raise UsageError("questions stand right behind the prefix, at no depth: evaluate them without --depths")
    found = locate(reference, allow_requantize)
    check_convertible(found)
    for model in models:
        if Path(model).is_file():
            check_context(model, of_model(model, prefix), texts.longest(measured.deepest))
    with tempfile.TemporaryDirectory() as folder:
        work = Stages(Path(folder), progress)
        gguf = weights.reference_gguf(work, found)
        # Whatever is wrong with one of the models is said before the long work.
        each = [
            (gguf_file.first_part(model), find_given(model, prefix, calibrated, work, found, gguf)) for model in models
        ]
        for model, given in each:
            if missing := set(modes or ()) - {REFERENCE, *given.data}:
                raise UsageError(f"{model} cannot be evaluated in mode {missing.pop()!r}: there is no such prefix")
        target: Target | None = None
        for model, given in each:
            if target is None or not target.given.like(given):
                chunks = texts.chunks(work, found, gguf, given.prefix, measured.deepest)
                items = texts.items(gguf, given.prefix)
                name = found.path.stem
                target = measure_target(gguf, name, given, chunks, measured, items, n_threads, work.directory, report)
                if modes is None or REFERENCE in modes:
                    yield from target.figures
            yield from _compare(target, model, given, kv_types, measured, modes, report, impossible)


def _compare(
    target: Target,
    model: Path,
    given: Given,
    kv_types: Sequence[str],
    depths: Depths,
    modes: Sequence[str] | None,
    report: Progress,
    impossible: Callable[[Impossible], None] | None,
) -> Iterator[Figures]:
    """The figures of one model, by KV type, way, mode and depth."""
    told: set[Impossible] = set()
    for kv_type, way in [(name, way) for name in kv_types for way in depths.ways(name)]:
        try:
            evaluated = Evaluated(model, kv_type, given.tokens, target.settings_of(way, given))
        except IntactKVError as error:
            if impossible is None or set(kv_pair(kv_type)) <= EXACT:  # another cause than the type
                raise
            said = Impossible(model.stem, kv_type, str(error))
            if said not in told:  # of another ubatch or tail
                impossible(said)
            told.add(said)
            continue
        way = replace(way, tail=evaluated.llama.tail)  # as many as it is, if it was left to the library
        for mode in (mode for mode in MODES if mode in given.data and (modes is None or mode in modes)):
            if mode == "rounded" and set(kv_pair(kv_type)) <= EXACT:
                continue
            begin = partial(evaluated.begin, given.data[mode], rounded=mode == "rounded")
            yield from target.compare(evaluated, model.stem, kv_type, mode, way, begin, report)
        evaluated.llama.close()
