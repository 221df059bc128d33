"""What quantization does to a model behind a prefix, and what the intact prefix undoes: data, figures, a report.

    the reference in torch      activations, attention, its K and V, its layers' outputs     magnitudes, attention
    the quantized one in torch  the same text behind 0, 1, 2, ... intact tokens              curve, kv_error
    llama.cpp                   KL divergence at every token of a text (evaluation)          divergence

Each line is a process of its own, so one model is in memory at a time, at float32 4 bytes a weight: 28 GB for 7B.
Beside it, for 4 texts of 64 tokens, each behind its prefix: K and V, 8 bytes x n_layer x n_embd_kv a token, and the
outputs of the layers, 4 bytes x n_layer x n_embd a token of text. Llama 2 7B, a prefix of 100 tokens: 0.7 + 0.13 GB.
Attention is held of one layer and 256 tokens: 4 bytes x n_head x 256 x tokens, 5 MB. SmolLM2: 1.1 GB in all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import intactkv_export
from intactkv_export import extras
from intactkv_export.analysis import measurements, plots, report
from intactkv_export.analysis.measurements import TOKENS
from intactkv_export.conversion import intact_tokens
from intactkv_export.engines import check_device
from intactkv_export.errors import UsageError
from intactkv_export.libllama import Vocabulary, kv_pair
from intactkv_export.models import Reference, gguf_file, identity, locate, read_text, weights
from intactkv_export.prefix import Prefix, check_reference, of_model
from intactkv_export.texts import default_text
from intactkv_export.work import Progress, Stages, atomic, peak_bytes

_CHUNKS = 12  # texts for the divergence; the layers see the beginnings of the first few
_VERSIONS = ("torch", "transformers", "llama-cpp-python", "gguf", "numpy", "matplotlib")


@dataclass(frozen=True)
class Analysis:
    """What was written, and what the report says: facts (how it was measured), data by figure (as the JSON files)."""

    directory: Path
    files: list[Path]
    facts: dict[str, Any]
    data: dict[str, dict[str, Any]]


def analyze(
    reference: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    prefix: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    kv_type: str = "q8_0",
    device: str = "cpu",
    html: bool = True,
    progress: Progress | None = None,
) -> Analysis:
    """Draw the figures of a model behind its prefix into the directory `out`, each as PNG and SVG with its data.

    reference: what the model was quantized from, a Hugging Face directory, hub id, or GGUF. prefix: an `.ikv` or a
    GGUF with one embedded, None: the model's own (ikv.find). text: a file in UTF-8; None: Python's language
    reference. device: of torch. html: write report.html too. progress: told of each stage.

    Raises UsageError before any work if the request makes no sense or a package is missing, IntactKVError if the
    prefix is of another reference, or the work fails. Then nothing is left behind.
    """
    extras.require("torch", "matplotlib", for_="an analysis")
    kv_pair(kv_type)
    directory = Path(out).absolute()
    if (directory.exists() and not directory.is_dir()) or not directory.parent.is_dir():
        raise UsageError(f"{out} cannot be a directory for the figures: give one that exists or can be made")
    found, model = locate(reference), gguf_file.first_part(model)
    check_device(device)
    given = of_model(model, prefix)
    words = default_text() if text is None else read_text(text)
    with Vocabulary(model) as vocabulary:
        chunks = _chunks(vocabulary, words)
        pieces = [vocabulary.text([token]) for token in [*given.tokens, *chunks[0][: intact_tokens.N_TOKENS]]]

    with atomic.work_directory(directory) as work_directory:
        work = Stages(work_directory, progress)
        check_reference(given, work.run("hash reference", identity, found), str(found.path))
        data = _measure(work, found, model, given, chunks, pieces, kv_type, device)
        facts = _facts(work, found, model, given, text, words, len(chunks), kv_type)
        facts["command"] = shlex.join(
            ["intactkv-export", "analyze", str(reference), "-m", str(model), "-o", str(out), "--kv-type", kv_type]
            + (["--prefix", str(prefix)] if prefix is not None else [])
            + (["--text", str(text)] if text is not None else [])
        )
        made: list[Path] = []
        for name, values in data.items():
            path = work_directory / f"{name}.json"
            path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
            made += [path, *plots.save(name, values, work_directory)]
        if html:
            svgs = {name: (work_directory / f"{name}.svg").read_text(encoding="utf-8") for name in data}
            made.append(work_directory / "report.html")
            made[-1].write_text(report.render(facts, data, svgs), encoding="utf-8")
        directory.mkdir(exist_ok=True)
        for path in made:
            atomic.publish(path, directory / path.name)
    return Analysis(directory, [directory / path.name for path in made], facts, data)


def _measure(
    work: Stages,
    found: Reference,
    model: Path,
    given: Prefix,
    chunks: list[list[int]],
    pieces: list[str],
    kv_type: str,
    device: str,
) -> dict[str, dict[str, Any]]:
    short_chunks = [chunk[: intact_tokens.N_TOKENS] for chunk in chunks[: intact_tokens.N_CHUNKS]]
    expected = work.directory / "reference.pt"
    data = work.run(
        "reference in torch",
        measurements.of_reference,
        found.path,
        given.source,
        short_chunks,
        pieces,
        device,
        expected,
        counted=True,
    )
    data |= work.run(
        "quantized model in torch",
        measurements.of_quantized,
        model,
        given.source,
        short_chunks,
        kv_type,
        device,
        expected,
        counted=True,
    )
    gguf = weights.reference_gguf(work, found)
    data["divergence"] = work.run(
        "KL divergence", measurements.of_text, gguf, model, given.source, chunks, kv_type, counted=True
    )
    return data


def _chunks(vocabulary: Vocabulary, words: str) -> list[list[int]]:
    tokens = vocabulary.tokenize(words, special=False)
    n = min(len(tokens) // TOKENS, _CHUNKS)
    if n < intact_tokens.N_CHUNKS:
        raise UsageError(
            f"the text has {len(tokens)} tokens and at least {intact_tokens.N_CHUNKS * TOKENS} "
            "are needed: give a longer one"
        )
    return [tokens[i * TOKENS : (i + 1) * TOKENS] for i in range(n)]


def _facts(
    work: Stages,
    found: Reference,
    model: Path,
    given: Prefix,
    text: str | os.PathLike[str] | None,
    words: str,
    n_chunks: int,
    kv_type: str,
) -> dict[str, Any]:
    """How it was measured, for the report and for --json."""
    assert given.source is not None  # read from a file
    manifest = given.manifest
    return {
        "reference": {"name": found.name, "dtype": found.dtype, "sha256": manifest["reference"]["sha256"]},
        "model": {"name": model.name, "bytes": model.stat().st_size, "arch": manifest["model"]["arch"]},
        "prefix": {
            "name": given.source.name,
            "sha256": given.sha256,
            "tokens": len(given.tokens),
            "text": manifest["text"],
            "calibrated": manifest["calibrated"],
        },
        "text": {
            "name": "Python's language reference (pydoc_data.topics)" if text is None else Path(text).name,
            "sha256": hashlib.sha256(words.encode()).hexdigest(),
            "n_chunks": n_chunks,
            "n_tokens": TOKENS,
        },
        "kv_type": kv_type,
        "versions": {
            "intactkv-export": intactkv_export.__version__,
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
        "stages": [asdict(stage) for stage in work.done],
        "peak_bytes": max(peak_bytes(), *(stage.peak_bytes for stage in work.done)),
    }
