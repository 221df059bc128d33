"""The reference model: where it is, what it is, and which one it is.

A Hugging Face directory or hub id, or a GGUF in F32, F16 or BF16. A quantized one is no reference: its own pivot
tokens are distorted already. `allow_requantize` takes it all the same, and the manifest says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from intactkv_export import extras
from intactkv_export.errors import IntactKVError, UsageError, first_line
from intactkv_export.models import gguf_file, huggingface, tensor_types

KEY_REFERENCE = "intactkv.reference.sha256"  # of a GGUF: the identity of the reference it was quantized from
KEY_CONVERTED = "intactkv.converted.sha256"  # of a reference GGUF that was kept: the hash of its own tensors
_BLOCK = 1 << 24  # bytes hashed at a time
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True)
class Reference:
    """A model that was found. name: for people; files: its weights; n_bytes: their size on disk."""

    name: str
    path: Path  # the directory, or the (first) GGUF
    is_gguf: bool
    files: list[Path]
    dtype: str  # most of its weights': "F16", "BF16", "F32", or a quantized type
    quantized: bool
    chat_template: str | None

    @property
    def n_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class _Weights:
    """A tensor's entry in a file: where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


def locate(reference: str | os.PathLike[str], allow_requantize: bool = False) -> Reference:
    """Find a reference model and look at its headers; a hub id is downloaded.

    Raises UsageError if there is no such model or it is quantized and `allow_requantize` is not set, IntactKVError if
    it is incomplete, damaged, or cannot be downloaded.
    """
    path = Path(reference)
    if path.is_dir():
        found = _huggingface(path)
    elif path.exists():
        found = _gguf(path)
    elif _HUB_ID.fullmatch(str(reference)) and path.suffix != ".gguf":
        found = _huggingface(_download(str(reference)), str(reference))
    else:
        raise UsageError(
            f"there is no reference model at {reference}: give a Hugging Face directory, a hub id such as "
            "organization/model, or a GGUF file"
        )
    if found.quantized and not allow_requantize:
        raise UsageError(
            f"{reference} is quantized ({found.dtype}), so its pivot tokens are distorted already: give the "
            "full-precision model, or --allow-requantize to take it all the same"
        )
    return found


def check_convertible(reference: Reference) -> None:
    """Raises IntactKVError, before any work, if upstream's converter cannot make a GGUF of it; a GGUF is one."""
    if not reference.is_gguf:
        config = huggingface.read_json(reference.path / "config.json")
        huggingface.check(reference.path, config, reference.dtype if reference.quantized else "")


def tensor_names(directory: Path) -> list[str] | None:
    """Of a Hugging Face directory; None: they are in pickles, which are not opened. Raises IntactKVError."""
    files = _huggingface(directory).files
    if any(file.suffix != ".safetensors" for file in files):
        return None
    return [tensor.name for file in files for tensor in _tensors(file, False)]


def identity(reference: Reference) -> str:
    """Which model it is: SHA-256, hex, over the sorted lines "name dtype shape sha256-of-bytes\\n" of its tensors.

    A GGUF that convert has kept of a Hugging Face model (`--keep-reference`) names that model, and its own tensors'
    hash: if they still have it, it is that model.
    """
    lines = sorted(line for file in reference.files for line in _lines(file, reference.is_gguf))
    own = hashlib.sha256("".join(lines).encode()).hexdigest()
    if reference.is_gguf:
        values = gguf_file.read(reference.path).values
        original = values.get(KEY_REFERENCE)
        if values.get(KEY_CONVERTED) == own and isinstance(original, str):
            return original
    return own


def check_same_reference(first: str, first_sha256: str | None, second: str, second_sha256: str | None) -> None:
    """Raises IntactKVError if two things belong to different reference models; None: not known, and passes."""
    if first_sha256 is not None and second_sha256 is not None and first_sha256 != second_sha256:
        raise IntactKVError(
            f"{first} belongs to the reference model {first_sha256} and {second} to {second_sha256}: give files that "
            "belong together"
        )


def _gguf(path: Path) -> Reference:
    files = gguf_file.shards(path)
    kinds: Counter[str] = Counter()
    for file in files:
        header = gguf_file.read(file)
        tensor_types.check_complete(header)
        for tensor in header.tensors:
            kinds[tensor_types.type_name(tensor.type)] += tensor_types.tensor_bytes(tensor)
    if not kinds:
        raise IntactKVError(f"{path} has no tensors, only a vocabulary: give the whole model")
    quantized = {kind: n for kind, n in kinds.items() if kind not in tensor_types.PLAIN}
    dtype = max(quantized or kinds, key=lambda kind: kinds[kind])
    template = gguf_file.read(files[0]).values.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return Reference(files[0].name, files[0], True, files, dtype, bool(quantized), template)


def _huggingface(path: Path, name: str | None = None) -> Reference:
    config = huggingface.read_json(path / "config.json")
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = [path / name for name in sorted(set(huggingface.read_json(index).get("weight_map", {}).values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise IntactKVError(f"{path} lacks {missing[0]}, which its index names: get the complete model")
    if not files:
        raise IntactKVError(f"{path} has no weights (model*.safetensors): get the complete model")
    kinds: Counter[str] = Counter()
    for file in files:
        for tensor in _tensors(file, False):
            kinds[tensor.dtype] += tensor.n_bytes
    method = huggingface.quantized_by(config, kinds)
    dtype = method or kinds.most_common(1)[0][0]
    template = huggingface.chat_template(path)
    return Reference(name or path.resolve().name, path, False, files, dtype, bool(method), template)


def _download(hub_id: str) -> Path:
    extras.require("huggingface_hub", for_=f"there is no directory {hub_id}, and downloading the model of that name")
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = [file.rfilename for file in HfApi().model_info(hub_id).siblings or []]
        weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"
        return Path(snapshot_download(hub_id, allow_patterns=[*_HUB_FILES, weights]))
    except Exception as error:  # errors of the hub, of HTTP and of the network have no common base
        try:
            return Path(snapshot_download(hub_id, local_files_only=True))  # it may have been downloaded before
        except Exception:
            pass
        reason = first_line(error)
        raise IntactKVError(
            f"there is no directory {hub_id}, and the model of that name cannot be downloaded ({reason}): check the "
            "name and the network, or give a local model"
        ) from error


def _lines(file: Path, is_gguf: bool) -> Iterator[str]:
    with open(file, "rb") as data:
        for t in _tensors(file, is_gguf):
            digest = hashlib.sha256()
            data.seek(t.start)
            for start in range(0, t.n_bytes, _BLOCK):
                digest.update(data.read(min(_BLOCK, t.n_bytes - start)))
            yield f"{t.name} {t.dtype} {'x'.join(map(str, t.shape))} {digest.hexdigest()}\n"


def _tensors(file: Path, is_gguf: bool) -> list[_Weights]:
    if is_gguf:
        return [
            _Weights(t.name, tensor_types.type_name(t.type), t.shape, t.offset, tensor_types.tensor_bytes(t))
            for t in gguf_file.read(file).tensors
        ]
    if file.suffix != ".safetensors":  # a pickle: not opened for its tensors' names, its bytes are one
        return [_Weights(file.name, "pickle", (), 0, file.stat().st_size)]
    return _safetensors(file)


def _safetensors(file: Path) -> list[_Weights]:
    """The header of a safetensors file: u64 length, JSON {name: {dtype, shape, data_offsets}}."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > size:
                raise ValueError(f"its header should have {length} bytes, the file has {size}")
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        tensors = [
            _Weights(name, t["dtype"], tuple(t["shape"]), 8 + length + t["data_offsets"][0], _n_bytes(t))
            for name, t in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise IntactKVError(f"{file} is not a whole safetensors file ({error}): get the model again") from error
    end = max((t.start + t.n_bytes for t in tensors), default=0)
    if end > size:
        raise IntactKVError(f"{file} is cut off: its tensors end at byte {end} and it has {size}: get the model again")
    return tensors


def _n_bytes(tensor: dict[str, Any]) -> int:
    start, end = tensor["data_offsets"]
    if not 0 <= start <= end or prod(tensor["shape"]) < 0:
        raise ValueError(f"a tensor lies at bytes {start} to {end}")
    return end - start
