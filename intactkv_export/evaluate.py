"""How far a quantized model is from its reference, through the real runtime: divergence, perplexity, questions.

Protocol: the prefix, then independent chunks of a text, each evaluated right behind the prefix. The reference keeps
its cache at F16. After each token of a chunk the model's next-token distribution is compared with the reference's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import Any

import numpy as np

from intactkv_export import bindings, compute, conversations, gguf_file, given, runtime, tasks
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.evaluated import Evaluated
from intactkv_export.figures import Estimate, Figures, difference, summary
from intactkv_export.given import MODES, Given
from intactkv_export.llama_log import errors_logged
from intactkv_export.prefix_file import Prefix
from intactkv_export.reference import Reference, locate
from intactkv_export.stages import Stages
from intactkv_export.turns import Turns
from intactkv_export.vocabulary import Vocabulary

__all__ = ["MODES", "Estimate", "Figures", "default_text", "difference", "evaluate", "summary"]

SELF = "self"
_SEED = 20_240_304  # nobody calibrates with it by chance
Progress = Callable[[str, int, int], None]  # configuration, done, total


def default_text() -> str:
    """Prose that every Python has: the language reference's topics (pydoc_data.topics), keys in order."""
    from pydoc_data import topics

    return "\n".join(topics.topics[key] for key in sorted(topics.topics))[:60000]


def evaluate(
    reference: str | Path,
    models: Sequence[str | Path],
    prefix: str | Path | None = None,
    *,
    calibrated: str | Path | None = None,
    kv_types: Sequence[str] = ("q8_0",),
    modes: Sequence[str] | None = None,
    text: str | None = None,
    chunks: Callable[[Prefix], Sequence[Sequence[int]]] | None = None,
    questions: Sequence[tasks.Question] = (),
    n_chunks: int = 12,
    n_tokens: int = 256,
    n_threads: int | None = None,
    allow_requantize: bool = False,
    progress: Progress | None = None,
) -> Iterator[Figures]:
    """Compare models with the reference; yields the figures of each configuration as they are measured.

    First those of the reference itself (mode "reference"), again whenever a model's prefix has other tokens; then of
    each model, KV type and mode. Mode "rounded" of an f16 cache is "prompt" itself and is left out.

    reference: a Hugging Face directory or hub id, or a GGUF. models: GGUFs. prefix, calibrated: `.ikv` files, or GGUFs
    with one embedded (given.find: what None means). modes: of MODES, and "reference"; None: all that there are.
    text: cut into n_chunks chunks of n_tokens tokens, tokenized without special tokens; None: default_text(); SELF:
    conversations that the reference writes, with a seed of their own: not those that calibration is given. chunks:
    instead of a text, what gives the chunks of tokens that follow a prefix, all of one length.

    Raises IntactKVError if a prefix is missing or does not fit, or the text is too short; UsageError for a mode that
    does not exist, or a quantized reference without allow_requantize.
    """
    unknown = set(modes or ()) - {"reference", *MODES}
    if unknown:
        raise UsageError(f"no mode {sorted(unknown)[0]!r}: the modes are reference, {', '.join(MODES)}")
    if n_chunks < 1 or n_tokens < 2:
        raise UsageError(f"{n_chunks} chunks of {n_tokens} tokens measure nothing: give one or more, of two or more")
    report = progress or (lambda name, done, total: None)
    for kv_type in kv_types:
        runtime.kv_types(kv_type)
    located = locate(reference, allow_requantize)
    with tempfile.TemporaryDirectory() as folder:
        work = Stages(Path(folder), progress)
        gguf = compute.reference_gguf(work, located)
        # Whatever is wrong with one of the models is said before the long work.
        each = [(model, given.find(model, prefix, calibrated, work, located, gguf)) for model in models]
        for model, found in each:
            if missing := set(modes or ()) - {"reference", *found.data}:
                raise IntactKVError(f"{model} cannot be evaluated in mode {missing.pop()!r}: there is no such prefix")
        target: _Target | None = None
        for model, found in each:
            if target is None or target.found.tokens != found.tokens:
                if chunks is not None:
                    ids = chunks(found.prefix)
                elif text == SELF:
                    ids = _conversations(work, located, gguf, found.prefix, n_chunks, n_tokens)
                else:
                    ids = _cut(gguf, default_text() if text is None else text, n_chunks, n_tokens)
                items = _items(gguf, found.prefix, questions)
                target = _Target.of(gguf, located.path.stem, found, ids, items, n_threads, work.directory, report)
                if modes is None or "reference" in modes:
                    yield target.figures
            for kv_type in kv_types:
                student = Evaluated(model, kv_type, found.tokens, target.settings)
                for mode in (mode for mode in MODES if mode in found.data and (modes is None or mode in modes)):
                    if mode == "rounded" and kv_type in runtime.EXACT:
                        continue
                    student.begin(found.data[mode], rounded=mode == "rounded")
                    yield target.compare(student, Path(model).stem, kv_type, mode, report)
                student.llama.close()


@dataclass
class _Target:
    """What the reference makes of everything that models are asked. log_probs: float32 [n_chunks, n_tokens, n_vocab],
    in a file."""

    found: Given
    chunks: np.ndarray  # int32 [n_chunks, n_tokens]
    items: list[tasks.Item]
    log_probs: np.ndarray
    settings: dict[str, Any]
    figures: Figures

    @classmethod
    def of(
        cls,
        gguf: Path,
        name: str,
        found: Given,
        chunks: Sequence[Sequence[int]],
        items: list[tasks.Item],
        n_threads: int | None,
        folder: Path,
        report: Progress,
    ) -> _Target:
        tokens = np.array(chunks, np.int32)
        longest = max([tokens.shape[1], *(item.n_tokens for item in items)])
        settings = {
            "n_ctx": len(found.tokens) + longest,
            "n_batch": longest,
            "n_ubatch": longest,
            "n_threads": n_threads,
            "n_threads_batch": n_threads,
        }
        model = Evaluated(gguf, "f16", found.tokens, settings)
        with errors_logged():
            bindings.verify(found.prefix.data, model.llama.ctx)
        model.begin(None)
        log_probs = _room(folder / "targets", (*tokens.shape, model.llama.n_vocab()))
        total = len(tokens) + len(items)
        for i, chunk in enumerate(tokens.tolist()):
            report(f"{name} reference", i, total)
            for at, got in model.log_probs(chunk):
                log_probs[i, at] = got
        answers = _answers(model, items, lambda done: report(f"{name} reference", len(tokens) + done, total))
        nll = -np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], 2)[..., 0]
        none = np.zeros(tokens.shape, np.float32)
        figures = Figures(name, "f16", "reference", none, none == 0, nll, answers)
        model.llama.close()
        return cls(found, tokens, items, log_probs, settings, figures)

    def compare(self, model: Evaluated, name: str, kv_type: str, mode: str, report: Progress) -> Figures:
        """The figures of a model that has begun (Evaluated.begin)."""
        kld = np.empty(self.chunks.shape, np.float32)
        same_top = np.empty(self.chunks.shape, bool)
        nll = np.empty(self.chunks.shape, np.float32)
        stage, total = f"{name} {kv_type} {mode}", len(self.chunks) + len(self.items)
        for i, chunk in enumerate(self.chunks):
            report(stage, i, total)
            following = np.append(chunk[1:], 0)  # what follows the last token is not known
            for at, got in model.log_probs(chunk.tolist()):
                target = self.log_probs[i, at]
                kld[i, at] = np.einsum("ij,ij->i", np.exp(target), target - got)
                same_top[i, at] = target.argmax(-1) == got.argmax(-1)
                nll[i, at] = -np.take_along_axis(got, following[at, None], 1)[:, 0]
        answers = _answers(model, self.items, lambda done: report(stage, len(self.chunks) + done, total))
        report(stage, total, total)
        return Figures(name, kv_type, mode, kld, same_top, nll[:, :-1], answers)


def _room(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a file. Raises IntactKVError if the disk is too small for it, now instead of by a crash."""
    wanted, free = 4 * prod(shape), disk_usage(path.parent).free
    if wanted > free:
        raise IntactKVError(
            f"what the reference says of {shape[0]} texts of {shape[1]} tokens needs {wanted / 1e9:.1f} GB in "
            f"{path.parent} and {free / 1e9:.1f} GB are free: give fewer or shorter texts, or set TMPDIR"
        )
    return np.memmap(path, np.float32, "w+", shape=shape)


def _conversations(
    work: Stages, reference: Reference, gguf: Path, prefix: Prefix, n_chunks: int, n_tokens: int
) -> list[list[int]]:
    if not all(map(find_spec, ("torch", "transformers"))):
        raise UsageError(
            "text of the reference's own is sampled with torch and transformers: pip install "
            "'intactkv-export[convert]', or give a text file"
        )
    settings = {"n": n_chunks, "n_tokens": n_tokens, "seed": _SEED}
    return work.run(
        "sample conversations", conversations.sample_from, reference.path, gguf, prefix.data, counted=True, **settings
    )


def _cut(gguf: str | Path, text: str, n_chunks: int, n_tokens: int) -> list[list[int]]:
    with Vocabulary(gguf) as vocabulary:
        tokens = vocabulary.tokenize(text, special=False)
    if len(tokens) < n_chunks * n_tokens:
        raise IntactKVError(
            f"the text has {len(tokens)} tokens, {n_chunks} chunks of {n_tokens} need {n_chunks * n_tokens}: "
            "give a longer text, or fewer or shorter chunks"
        )
    return [tokens[i * n_tokens : (i + 1) * n_tokens] for i in range(n_chunks)]


def _items(gguf: str | Path, prefix: Prefix, questions: Sequence[tasks.Question]) -> list[tasks.Item]:
    if not questions:
        return []
    with Vocabulary(gguf) as vocabulary:
        template = gguf_file.read(gguf).values.get("tokenizer.chat_template")
        return tasks.encode(questions, Turns(prefix, vocabulary, template))


def _answers(model: Evaluated, items: list[tasks.Item], report: Callable[[int], None]) -> tasks.Answers | None:
    return tasks.score(items, model.likelihoods, report) if items else None
