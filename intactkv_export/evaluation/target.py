"""What the reference makes of texts and questions, and how far from it a model is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import UsageError
from intactkv_export.evaluation import multiple_choice
from intactkv_export.evaluation.depths import REFERENCE_UBATCH, Depths, Way, Windows
from intactkv_export.evaluation.metrics import Figures
from intactkv_export.evaluation.model import Evaluated
from intactkv_export.evaluation.modes import REFERENCE, Given
from intactkv_export.libllama import bindings, errors_logged
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prefix, run_settings
from intactkv_export.work import Progress, check_space


@dataclass
class Target:
    """What the reference makes of everything that models are asked behind one prefix.

    chunks: int32 [n_chunks, n_tokens]. windows: what is measured of each. log_probs: float32 [n_chunks, n_measured,
    n_vocab], in a file. settings: of every model that is compared. figures: the reference's own, its mode REFERENCE, by
    depth.
    """

    given: Given
    chunks: np.ndarray
    windows: Windows
    items: list[multiple_choice.Item]
    log_probs: np.ndarray
    settings: dict[str, Any]
    figures: list[Figures]

    def settings_of(self, way: Way, given: Given) -> dict[str, Any]:
        """Of a model that is compared in a certain way, with room for the extra cells of what it is given."""
        n_ctx = self.settings["n_ctx"] + given.n_cells - self.given.n_cells
        ubatch = {} if way.ubatch is None else {"n_batch": way.ubatch, "n_ubatch": way.ubatch}
        return {**self.settings, **ubatch, "n_ctx": n_ctx, "tail": way.tail}

    def compare(
        self,
        model: Evaluated,
        name: str,
        kv_type: str,
        mode: str,
        way: Way,
        begin: Callable[[], None],
        report: Progress,
    ) -> Iterator[Figures]:
        """The figures of a model, by depth. begin: gives it the prefix."""
        measured = self.windows.measured
        shape = len(self.chunks), int(measured.sum())
        kld, nll, same_top = np.empty(shape, np.float32), np.empty(shape, np.float32), np.empty(shape, bool)
        stage, total = " ".join([name, kv_type, mode, *way.words]), len(self.chunks) + len(self.items)
        begin()
        for i, chunk in enumerate(self.chunks):
            report(stage, i, total)
            if i and self.windows.behind_text:
                begin()
            following = np.append(chunk[1:], 0)[measured]  # what follows the last token is not known
            for at, got in model.log_probs(chunk.tolist(), measured):
                target = self.log_probs[i, at]
                kld[i, at] = np.einsum("ij,ij->i", np.exp(target), target - got)
                same_top[i, at] = target.argmax(-1) == got.argmax(-1)
                nll[i, at] = -np.take_along_axis(got, following[at, None], 1)[:, 0]
        answers = _answers(model, self.items, lambda done: report(stage, len(self.chunks) + done, total))
        report(stage, total, total)
        for depth, at in self.windows.each():
            found = kld[:, at], same_top[:, at], nll[:, at][:, :-1], answers
            yield Figures(name, kv_type, mode, *found, depth, way, self.given.system_prompt)


def measure_target(
    gguf: Path,
    name: str,
    given: Given,
    chunks: Sequence[Sequence[int]],
    depths: Depths,
    items: list[multiple_choice.Item],
    n_threads: int | None,
    folder: Path,
    report: Progress,
) -> Target:
    """Ask the reference, its cache at F16. gguf, name: of the reference. chunks: of equal length, what is before the
    measured tokens included. folder: for the file of log probabilities.

    Raises IntactKVError if the prefix does not fit the reference, or the disk is too small.
    """
    tokens = np.array(chunks, np.int32)
    windows = Windows(depths.behind, tokens.shape[1] - depths.deepest)
    measured = windows.measured
    longest = max([tokens.shape[1], *(item.n_tokens for item in items)])
    check_context(gguf, given.prefix, longest, len(given.tokens))
    n_batch = REFERENCE_UBATCH if windows.behind_text else longest
    settings = {
        "n_ctx": given.n_cells + longest,
        "n_batch": n_batch,
        "n_ubatch": n_batch,
        "n_threads": n_threads,
        "n_threads_batch": n_threads,
        **run_settings(given.prefix, gguf),
    }
    model = Evaluated(gguf, "f16", given.tokens, settings)
    with errors_logged():
        bindings.verify(given.prefix.data, model.llama.ctx)
    model.begin(None)
    log_probs = _room(folder / "targets", (len(tokens), int(measured.sum()), model.llama.n_vocab()))
    total = len(tokens) + len(items)
    for i, chunk in enumerate(tokens.tolist()):
        report(f"{name} reference", i, total)
        if i and windows.behind_text:
            model.begin(None)
        for at, got in model.log_probs(chunk, measured):
            log_probs[i, at] = got
    answers = _answers(model, items, lambda done: report(f"{name} reference", len(tokens) + done, total))
    figures, none = [], np.zeros((len(tokens), windows.n_tokens), np.float32)
    for depth, at in windows.each():
        following = tokens[:, depth + 1 : depth + windows.n_tokens, None]
        nll = -np.take_along_axis(log_probs[:, at][:, :-1], following, 2)[..., 0]
        found = none, none == 0, nll, answers
        figures.append(Figures(name, "f16", REFERENCE, *found, depth, system_prompt=given.system_prompt))
    model.close()
    return Target(given, tokens, windows, items, log_probs, settings, figures)


def check_context(gguf: str | Path, prefix: Prefix, n_tokens: int, n_before: int | None = None) -> None:
    """Raises UsageError if a text of n_tokens tokens is longer than the model was trained for. n_before: tokens that
    stand before it, those of a system prompt; None: those of the prefix.

    A prefix with RoPE settings of its own is for another context than the header's: it passes.
    """
    values = gguf_file.read(gguf).values
    limit = values.get(f"{values.get('general.architecture')}.context_length")
    n_before = len(prefix.tokens) if n_before is None else n_before
    wanted = n_before + n_tokens
    if isinstance(limit, int) and wanted > limit and "rope_options" not in prefix.manifest:
        raise UsageError(
            f"a text of {n_tokens} tokens behind the prefix of {n_before} makes {wanted}, and {gguf} was "
            f"trained for {limit}: give fewer --tokens, smaller --depths, or shorter questions"
        )


def _room(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 array in a file. Raises IntactKVError if the disk is too small for it, now instead of by a crash."""
    what = f"what the reference says of {shape[0]} texts of {shape[1]} tokens needs"
    check_space(path.parent, 4 * prod(shape), what, "give fewer or shorter texts, or fewer depths, or set TMPDIR")
    return np.memmap(path, np.float32, "w+", shape=shape)


def _answers(
    model: Evaluated, items: list[multiple_choice.Item], report: Callable[[int], None]
) -> multiple_choice.Answers | None:
    return multiple_choice.score(items, model.likelihoods, report) if items else None
