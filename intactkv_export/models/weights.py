"""Weights: Hugging Face -> GGUF with upstream's converter, GGUF -> quantized GGUF with upstream's quantizer.

The first two do their work in the calling process; conversion runs them as stages of their own, since either may take
all memory or abort.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import runpy
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from intactkv_export import extras, library
from intactkv_export.errors import IntactKVError, UsageError, first_line
from intactkv_export.libllama import ERROR, reason
from intactkv_export.models import gguf_file, huggingface, tensor_types
from intactkv_export.models.imatrix import Imatrix
from intactkv_export.models.reference import Reference, check_convertible, tensor_names
from intactkv_export.work import Stages, Steps, full, is_full, usable_cores

# Name -> llama_ftype: QUANT_OPTIONS of upstream's tools/quantize/quantize.cpp.
TYPES: dict[str, int] = {
    "Q1_0": 40, "Q2_0": 41, "Q4_0": 2, "Q4_1": 3, "MXFP4_MOE": 38, "Q5_0": 8, "Q5_1": 9, "IQ2_XXS": 19, "IQ2_XS": 20,
    "IQ2_S": 28, "IQ2_M": 29, "IQ1_S": 24, "IQ1_M": 31, "TQ1_0": 36, "TQ2_0": 37, "Q2_K": 10, "Q2_K_S": 21,
    "IQ3_XXS": 23, "IQ3_S": 26, "IQ3_M": 27, "IQ3_XS": 22, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "IQ4_NL": 25,
    "IQ4_XS": 30, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7, "F16": 1, "BF16": 32,
    "F32": 0,
}  # fmt: skip
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Without an importance matrix upstream refuses these.
NEEDS_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "Q2_K_S"}
_CONVERTED = ("F32", "F16", "BF16")  # types that upstream's converter writes
# Kinds of Nemotron-H's layers, and their letters in its hybrid_override_pattern
_NEMOTRON_H = {
    "mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
_OTHER_TOWER = re.compile(r"vision|visual|audio")
CONVERTER_VARIABLE = "INTACTKV_CONVERTER"  # another convert_hf_to_gguf.py than the one installed


def type_name(name: str) -> str:
    """Upstream's name of a quantization type, whatever the case; aliases resolved. Raises UsageError if unknown."""
    upper = name.strip().upper()
    upper = ALIASES.get(upper, upper)
    if upper not in TYPES:
        raise UsageError(f"unknown quantization type {name!r}: give one of {', '.join(sorted(TYPES))}")
    return upper


def least_bits(name: str) -> float:
    """A lower bound of the bits a weight of this type takes, from its name: for an estimate before the work."""
    return float(re.findall(r"\d+", name)[0])


def huggingface_to_gguf(
    directory: Path, out: Path, dtype: str = "F16", *, name: str | None = None, vocab_only: bool = False
) -> None:
    """Convert a Hugging Face directory to a GGUF of type F32, F16 or BF16; vocab_only: its header without tensors.

    name: of the model, in the GGUF; None: upstream finds one. Its chat template is the one that transformers uses.

    Upstream's convert_hf_to_gguf.py, with the gguf package it brings. Takes over this process: its modules shadow
    others of the same names. Raises IntactKVError with the converter's own reason.
    """
    script = Path(os.environ.get(CONVERTER_VARIABLE) or library.converter_path())
    options = ["--outfile", str(out), "--outtype", dtype.lower()]
    options += (["--model-name", name] if name else []) + (["--vocab-only"] if vocab_only else [])
    sys.path.insert(0, str(script.parent))
    said = _Said()
    logging.getLogger().addHandler(said)
    try:
        with huggingface.with_template(directory, out.with_name(f"{out.name}.source")) as source:
            sys.argv = [str(script), str(source), *options]
            settings_of_the_file(script)
            runpy.run_path(str(script), run_name="__main__")
    except IntactKVError:
        raise
    except SystemExit as error:
        if error.code:
            raise IntactKVError(_conversion_failed(directory, said.last or "no reason given")) from error
    except OSError as error:
        _check_disk(out, error.strerror or str(error))
        raise IntactKVError(_conversion_failed(directory, str(error))) from error
    except ImportError as error:
        if error.name is None:
            raise UsageError(_conversion_failed(directory, first_line(error))) from error
        raise UsageError(extras.sentence(error.name, f"converting {directory}")) from error
    except Exception as error:
        raise IntactKVError(_conversion_failed(directory, _cause(error, directory))) from error
    if not out.is_file():
        raise IntactKVError(_conversion_failed(directory, said.last or f"it wrote no {out.name}"))
    tensor_types.check_complete(gguf_file.read(out))


def settings_of_the_file(script: Path) -> None:
    """Give upstream's converter, a script whose directory is on sys.path, the settings that config.json has.

    It asks transformers for them, whose newer versions leave out or rename some that it reads: the kinds of layers
    ("attention" of Granite 4 H becomes "full_attention"), patterns of layers (Nemotron-H), rotary_pct. They add experts
    to a Nemotron-H that has none. And models that transformers has written lack the drafting heads (MTP) that their
    settings go on to name.
    """
    if not (script.parent / "conversion" / "base.py").is_file():
        return  # another converter, which INTACTKV_CONVERTER names
    if "NO_LOCAL_GGUF" not in os.environ:  # as the script does it, before transformers imports the published one
        sys.path.insert(1, str(script.parent / "gguf-py"))
    base = import_module("conversion.base").ModelBase
    load = base.load_hparams

    def load_hparams(directory: Path, is_mistral_format: bool) -> dict[str, Any]:
        found: dict[str, Any] = load(directory, is_mistral_format)
        config = Path(directory, "config.json")
        if is_mistral_format or not config.is_file():
            return found
        found = _nemotron_h(_with_own(found, huggingface.read_json(config)))
        base.no_mtp = not _drafts(Path(directory), found)  # as its option --no-mtp, which not every architecture has
        return _without_heads(found) if base.no_mtp else found

    base.load_hparams = staticmethod(load_hparams)


def _nemotron_h(settings: dict[str, Any]) -> dict[str, Any]:
    """A Nemotron-H without layers of experts: the converter takes one for a mixture that names an expert's number."""
    if settings.get("model_type") != "nemotron_h":
        return settings
    kinds = settings.get("layers_block_type") or []
    pattern = settings.get("hybrid_override_pattern") or "".join(_NEMOTRON_H.get(kind, "?") for kind in kinds)
    if not pattern or "E" in pattern or "?" in pattern:
        return settings
    dense = {key: value for key, value in settings.items() if key != "num_experts_per_tok"}
    return dense | {"hybrid_override_pattern": pattern}


def _drafts(directory: Path, settings: dict[str, Any]) -> bool:
    """Whether a directory has tensors of drafting heads, which lie beyond the model's layers; True: not known."""
    n_layer = {**settings, **(settings.get("text_config") or {})}.get("num_hidden_layers")
    try:
        names = tensor_names(directory)
    except IntactKVError:  # the converter's to say
        return True
    if not isinstance(n_layer, int) or names is None:
        return True
    layers = (re.search(r"\blayers\.(\d+)\.", name) for name in names if not _OTHER_TOWER.search(name))
    return any("mtp" in name for name in names) or any(found and int(found[1]) >= n_layer for found in layers)


def _without_heads(settings: dict[str, Any]) -> dict[str, Any]:
    found = {key: 0 if key == "num_nextn_predict_layers" else value for key, value in settings.items()}
    text = found.get("text_config")
    return found | {"text_config": _without_heads(text)} if isinstance(text, dict) else found


def _with_own(found: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """transformers' settings, with those that only the file has, and the file's own names in lists of names."""

    def chosen(key: str, value: Any) -> Any:
        if key not in found:
            return value
        there = found[key]
        if isinstance(value, dict) and isinstance(there, dict) and key.endswith("_config"):
            return _with_own(there, value)
        names = isinstance(value, list) and isinstance(there, list) and all(isinstance(x, str) for x in value)
        return value if names and len(value) == len(there) else there

    return {**found, **{key: chosen(key, value) for key, value in own.items()}}


def quantize(
    source: Path,
    out: Path,
    quant: str,
    *,
    imatrix: Imatrix | None = None,
    allow_requantize: bool = False,
    n_threads: int | None = None,
    progress: Steps | None = None,
) -> float:
    """Quantize a GGUF to a type of TYPES (llama_model_quantize); returns the bits per weight of the result.

    The first of several parts stands for all; the result is one file. n_threads: None: the cores that this process may
    use. progress counts tensors. Raises IntactKVError with upstream's own reason.
    """
    L = library.load()
    params = L.llama_model_quantize_default_params()
    params.ftype = TYPES[quant]
    params.allow_requantize = allow_requantize
    params.nthread = n_threads or usable_cores()
    keep = imatrix.attach(params) if imatrix else None
    with _log(progress) as errors:
        failed = L.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    del keep
    if failed:
        why = reason(errors)
        _check_disk(out, why)
        raise IntactKVError(f"{source} cannot be quantized to {quant}: {why}")
    result = gguf_file.read(out)
    try:
        tensor_types.check_complete(result)  # upstream does not notice when the disk is full
    except IntactKVError as error:
        _check_disk(out, "it was cut off")
        raise IntactKVError(f"{source} could not be quantized to {quant}: the output was cut off") from error
    return tensor_types.bits_per_weight(result)


def reference_gguf(work: Stages, reference: Reference) -> Path:
    """The reference as a GGUF, in its own precision."""
    if reference.is_gguf:
        return reference.path
    check_convertible(reference)
    gguf = work.directory / "reference.gguf"
    dtype = reference.dtype if reference.dtype in _CONVERTED else "BF16"
    # A directory of the hub's cache is named by a commit.
    name = None if reference.name == reference.path.resolve().name else reference.name
    work.run("convert to GGUF", huggingface_to_gguf, reference.path, gguf, dtype, name=name)
    return gguf


@contextlib.contextmanager
def _log(progress: Steps | None) -> Iterator[list[str]]:
    """Collect upstream's error lines, and turn "[  12/ 272] blk.0..." into progress."""
    L = library.load()
    errors: list[str] = []

    @L.llama_log_callback
    def listen(level: int, text: bytes, user_data: Any) -> None:
        line = text.decode("utf-8", "replace")
        if level == ERROR and line.strip(" \n="):
            errors.append(line.strip())
        counted = re.match(r"\[ *(\d+)/ *(\d+)\]", line)
        if counted and progress is not None:
            progress(int(counted[1]), int(counted[2]))

    L.llama_log_set(listen, None)
    try:
        yield errors
    finally:
        L.llama_log_set(L._logger.llama_log_callback, None)


class _Said(logging.Handler):
    """Remembers the last thing that was logged as an error."""

    last = ""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        self.last = record.getMessage()


def _conversion_failed(directory: Path, reason: str) -> str:
    return f"upstream's converter cannot convert {directory}: {reason.rstrip('.')}"


def _cause(error: Exception, directory: Path) -> str:
    """What an exception of the converter's own says, in words: a key or an assertion alone says nothing."""
    config = huggingface.read_json(directory / "config.json")
    if isinstance(error, AssertionError) and (why := huggingface.too_many_tokens(directory, config)):
        return why
    if isinstance(error, KeyError) and error.args:
        version = config.get("transformers_version", "?")
        return (
            f"config.json, written by transformers {version}, has no {error.args[0]!r}, which it reads: add it to "
            "config.json, or save the model with an older transformers"
        )
    if not str(error).strip():
        at = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{type(error).__name__} at {Path(at.filename).name}, line {at.lineno}, `{at.line}`: the model's "
            "config.json or tokenizer is not as it expects; get the original files, or save them with an older "
            "transformers"
        )
    return f"{type(error).__name__}: {first_line(error)}"


def _check_disk(out: Path, reason: str) -> None:
    """Raise IntactKVError if it is for lack of space that `out` could not be written."""
    if is_full(out) or "space" in reason.lower():
        raise full(out)
    if "iostream" in reason or "large" in reason or "cut off" in reason:
        written = out.stat().st_size if out.exists() else 0
        raise IntactKVError(
            f"cannot write more than {written} bytes of {out.name} to {out.parent} though the disk is not full: raise "
            "the limit of file sizes (ulimit -f) or the quota"
        )
