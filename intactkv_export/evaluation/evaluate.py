"""How far a quantized model is from its reference, through the real runtime: divergence, perplexity, questions.

Protocol: the prefix, or a system prompt that begins with it, then independent chunks of a text, each evaluated right
behind; or, at depths, behind more tokens of text, as a reply is (evaluation/depths.py). The reference keeps its cache
at F16. After each token that is measured the model's next-token distribution is compared with the reference's.
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
from intactkv_export.evaluation.modes import MODES, REFERENCE, Given, behind_prompt, find_given, whole_prefix
from intactkv_export.evaluation.target import Target, check_context, measure_target
from intactkv_export.evaluation.texts import Texts
from intactkv_export.libllama import EXACT, kv_pair
from intactkv_export.models import check_convertible, gguf_file, locate, weights
from intactkv_export.prefix import Prefix, of_model
from intactkv_export.work import Progress, Stages, silent

WINDOW_BATCH = 512  # tokens that llama-perplexity evaluates at a time, unless told otherwise


def evaluate(
    reference: str | Path,
    models: Sequence[str | Path],
    prefix: str | Path | Sequence[str | Path | None] | None = None,
    *,
    calibrated: str | Path | None = None,
    kv_types: Sequence[str] = ("q8_0",),
    modes: Sequence[str] | None = None,
    texts: Texts | None = None,
    system_prompt: str | Sequence[str] | None = None,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    depths: Sequence[int] = (),
    decode_batch: int | None = None,
    ubatch: int | None = None,
    kv_tails: Sequence[int] = (),
    window: int | None = None,
    progress: Progress | None = None,
    impossible: Callable[[Impossible], None] | None = None,
) -> Iterator[Figures]:
    """Compare models with the reference; yields the figures of each configuration as they are measured.

    First those of the reference itself (mode "reference"), again whenever other tokens stand before the texts; then of
    each system prompt, model, KV type and mode. Mode "rounded" of an f16 cache is "prompt" itself and is left out.

    reference: a Hugging Face directory or hub id, or a GGUF. models: GGUFs. prefix, calibrated: `.ikv` files, or GGUFs
    with one embedded (modes.find_given: what None means); several prefixes: one for each model. modes: of MODES, and
    "reference"; None: all that there are.
    texts: what is evaluated behind the prefix; None: Texts().

    system_prompt: stands before each text, whole, by the model's own chat template, or as a paragraph if the model has
    none; several: one after the other. The prefix, of the first token for instance, is the beginning of its tokens, and
    each model computes the others itself.
    None: texts stand right behind the prefix.

    depths: how many tokens of text are before those measured, one pass over a text for all; 0: right behind the prefix.
    Then a text is evaluated as a reply is, at most decode_batch tokens at a time (None: DECODE_BATCH), and once more
    with ubatch at a time, as a prompt is, if that is given. kv_tails: tails of intact cells, each evaluated; (): the
    library's default. Without depths a text is evaluated at once, in one ubatch, and there is no tail: it would hold
    all of it.

    window: the text is cut as upstream's llama-perplexity cuts it in a context of that many tokens, and what that
    measures is measured: the second half of each window, its first token the vocabulary's. So it is for prefixes of one
    token, and instead of depths; at most 512 tokens are evaluated at a time then (decode_batch), as there.

    impossible: told of a quantized KV type that a model cannot have (its head size is no multiple of the type's block,
    for instance), and the others are measured; None: that is an error.

    Raises IntactKVError if a prefix does not fit, or the text is too short; UsageError for a mode that does not exist,
    a model without a prefix, a system prompt that does not begin with it, or a quantized reference without
    allow_requantize.
    """
    unknown = set(modes or ()) - {REFERENCE, *MODES}
    if unknown:
        raise UsageError(f"no mode {sorted(unknown)[0]!r}: the modes are {REFERENCE}, {', '.join(MODES)}")
    for kv_type in kv_types:
        kv_pair(kv_type)
    texts, report = texts or Texts(), progress or silent
    if window is not None:
        if depths:
            raise UsageError(
                "the second half of a window is measured, at no other depth: leave out --depths or --window"
            )
        texts, depth = texts.in_windows(window)
        depths, decode_batch = [depth], decode_batch or min(window, WINDOW_BATCH)
    measured = Depths.of(depths, decode_batch, ubatch, kv_tails)
    if depths and texts.questions:
        raise UsageError("questions stand right behind the prefix, at no depth: evaluate them without --depths")
    prefixes = [prefix] * len(models) if prefix is None or isinstance(prefix, str | Path) else list(prefix)
    if len(prefixes) != len(models):
        raise UsageError(
            f"{len(prefixes)} prefixes are given for {len(models)} models: give one for each, or one for all"
        )
    found = locate(reference, allow_requantize)
    check_convertible(found)
    for model, own in zip(models, prefixes, strict=True):
        if Path(model).is_file():
            found_prefix = of_model(model, own)
            if window is not None:
                _check_one_token(found_prefix, system_prompt)
            check_context(model, found_prefix, texts.longest(measured.deepest))
    with tempfile.TemporaryDirectory() as folder:
        work = Stages(Path(folder), progress)
        gguf = weights.reference_gguf(work, found)
        # Whatever is wrong with one of the models is said before the long work.
        each = [
            (gguf_file.first_part(model), find_given(model, own, calibrated, work, found, gguf))
            for model, own in zip(models, prefixes, strict=True)
        ]
        if system_prompt is not None:
            prompts = [system_prompt] if isinstance(system_prompt, str) else system_prompt
            each = [(model, behind_prompt(given, gguf, text)) for text in prompts for model, given in each]
        longest = texts.longest(measured.deepest)
        for model, given in each:
            if missing := set(modes or ()) - {REFERENCE, *given.data}:
                raise UsageError(_no_such_mode(model, missing.pop(), given))
            check_context(model, given.prefix, longest, len(given.tokens))
        tell = None if impossible is None else _once(impossible)
        target: Target | None = None
        for model, given in each:
            if target is None or not target.given.like(given):
                front = whole_prefix(given, work, found, gguf) if texts.as_conversation else given.prefix
                chunks = texts.chunks(work, found, gguf, front, measured.deepest)
                items = texts.items(gguf, front)
                name = found.path.stem
                target = measure_target(gguf, name, given, chunks, measured, items, n_threads, work.directory, report)
                if modes is None or REFERENCE in modes:
                    yield from target.figures
            yield from _compare(target, model, given, kv_types, measured, modes, report, tell)


def _check_one_token(prefix: Prefix, system_prompt: str | Sequence[str] | None) -> None:
    """Before a window. Raises UsageError."""
    if system_prompt is not None or len(prefix.tokens) != 1:
        what = (
            f"the prefix {prefix.source} has {len(prefix.tokens)}" if system_prompt is None else "a system prompt more"
        )
        raise UsageError(
            f"a window begins with the first token alone, as llama-perplexity's, and {what}: give a prefix of the "
            "first token, made with `intactkv-export prefix --bos-only`, or leave out --window"
        )


def _no_such_mode(model: str | Path, mode: str, given: Given) -> str:
    why = "there is no such prefix"
    if mode == "bos" and given.prefix.states:
        why = (
            "its prefix has states of recurrent layers and cannot be cut: make one with --bos-only for its first token"
        )
    return f"{model} cannot be evaluated in mode {mode!r}: {why}, only {', '.join(given.data)}"


def _once(impossible: Callable[[Impossible], None]) -> Callable[[Impossible], None]:
    """The same is said again for another ubatch, tail or system prompt: it is told once."""
    told: set[Impossible] = set()

    def tell(said: Impossible) -> None:
        if said not in told:
            impossible(said)
        told.add(said)

    return tell


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
    for kv_type, way in [(name, way) for name in kv_types for way in depths.ways(name)]:
        try:
            evaluated = Evaluated(model, kv_type, given.tokens, target.settings_of(way, given))
        except IntactKVError as error:
            if impossible is None or set(kv_pair(kv_type)) <= EXACT:  # another cause than the type
                raise
            impossible(Impossible(model.stem, kv_type, str(error)))
            continue
        way = replace(way, tail=evaluated.llama.tail)  # as many as it is, if it was left to the library
        for mode in (mode for mode in MODES if mode in given.data and (modes is None or mode in modes)):
            if mode == "rounded" and set(kv_pair(kv_type)) <= EXACT:
                continue
            begin = partial(evaluated.begin, given.data[mode], rounded=mode == "rounded")
            yield from target.compare(evaluated, model.stem, kv_type, mode, way, begin, report)
        evaluated.close()
