"""The sequences that a calibration trains on: sampled or read once, kept, and found again after an interruption."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import gguf_file
from intactkv_export.texts import read_user_file, sample
from intactkv_export.work import Steps, atomic

if TYPE_CHECKING:
    from collections.abc import Callable

    from intactkv_export.calibration.targets import Targets
    from intactkv_export.prefix import Prefix
    from intactkv_export.torch_model import TorchModel


@dataclass(frozen=True)
class Source:
    """Where sequences come from. data: "self" or a file; at most `sequences` of seq_len tokens each."""

    data: str
    sequences: int
    seq_len: int
    seed: int


@dataclass(frozen=True)
class Data:
    """Token sequences, integers [n, n_tokens], that follow the prefix; the first n_held_out are not trained on.

    targets: of all of them; for objective mse those of the held-out ones are enough.
    """

    sequences: np.ndarray
    targets: Targets
    n_held_out: int


def same_source(directory: Path, source: Source, prefix: Prefix, dtype: str) -> None:
    """Note in a directory what its sequences are of. Raises UsageError if they are there already, of other settings."""
    path = directory / "data.json"
    about = {
        **asdict(source),
        "dtype": dtype,
        "reference": prefix.manifest["reference"]["sha256"],
        "prefix": prefix.sha256,
    }
    if path.is_file():
        check_same(directory, json.loads(path.read_text()), about)
        return
    with atomic.output(path) as file:
        file.write(json.dumps(about).encode())


def write_sequences(
    path: Path, source: Source, prefix: Prefix, model: Path, reference: Callable[[], TorchModel], steps: Steps
) -> None:
    """Sample or read the sequences. model: the GGUF whose tokenizer and template are used. reference: gives the model
    that writes the texts. steps counts tokens."""
    with atomic.output(path) as file:
        np.save(file, np.asarray(_texts(source, prefix, model, reference, steps), np.int32))


def read_sequences(path: Path, source: Source) -> np.ndarray:
    """int32 [at most source.sequences, seq_len]. Raises IntactKVError if there are too few to hold one out."""
    found = np.load(path)
    if len(found) < 2:
        raise IntactKVError(
            f"{source.data} gives one sequence of {source.seq_len} tokens, and one is held out: give more text, or a "
            "smaller --seq-len"
        )
    return found


def _texts(
    source: Source, prefix: Prefix, model: Path, reference: Callable[[], TorchModel], steps: Steps
) -> list[list[int]]:
    template = gguf_file.read(model).values.get("tokenizer.chat_template")
    with Vocabulary(model) as vocabulary:
        if source.data == "self":
            return sample(
                reference(),
                prefix,
                vocabulary,
                template,
                n=source.sequences,
                n_tokens=source.seq_len,
                seed=source.seed,
                documents=True,
                progress=steps,
            )
        texts = read_user_file(source.data, prefix, vocabulary, template, n_tokens=source.seq_len)
    order = np.random.default_rng(source.seed).permutation(len(texts))[: source.sequences]
    return [texts[i] for i in order]


def check_same(directory: Path, kept: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises UsageError if what a directory keeps was made with other settings."""
    other = next((name for name, value in about.items() if kept.get(name) != value), None)
    if other is not None:
        raise UsageError(
            f"{directory} holds a calibration with other settings ({other} is {kept.get(other)!r} there and "
            f"{about[other]!r} here): give the same ones to go on with it, or remove the directory"
        )
