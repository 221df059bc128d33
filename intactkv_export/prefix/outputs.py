"""What outputs are called, and what they may take the place of: never an input, never a file of another kind.

One rule for names. A model is written to NAME.gguf and a prefix to NAME.ikv; NAME may be given with its ending, in
either case, or without. The ending of the other kind is refused where one file is written.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import state
from intactkv_export.models import KEY_CONVERTED, KEY_REFERENCE, gguf_file
from intactkv_export.work import atomic

_KINDS = {".gguf": "a model", ".ikv": "a prefix file"}


def named(out: str | os.PathLike[str], ending: str) -> Path:
    """The one file to write for OUT, with its ending, ".gguf" or ".ikv". Raises UsageError if nothing can be written
    under that name."""
    path = Path(out)
    _check_name(path)
    if str(out).endswith(os.sep) or path.is_dir() or not path.name:
        raise UsageError(f"{out} is a directory: give a name in it, such as {path / f'name{ending}'}")
    other = path.suffix.lower()
    if other in _KINDS and other != ending:
        raise UsageError(
            f"{out} is the name of {_KINDS[other]} and {_KINDS[ending]} is written: give {path.with_suffix(ending)} or "
            "another name"
        )
    atomic.destination(path)  # a device is not meant as the beginning of a name
    path = path if other == ending else path.with_name(path.name + ending)
    check_directory(path)
    return path


def without_ending(out: str | os.PathLike[str]) -> Path:
    """DIR/NAME of several files, NAME.gguf and NAME.ikv, for OUT with one of these endings or without. Raises
    UsageError if nothing can be written there."""
    path = Path(out)
    _check_name(path)
    bare = path.with_suffix("") if path.suffix.lower() in _KINDS else path
    if str(out).endswith(os.sep) or not path.name or (bare == path and path.is_dir()):
        raise UsageError(
            f"{out} is a directory: give a name in it, or {path.name or 'name'}.gguf for the files beside it"
        )
    if bare == path:
        atomic.destination(path)
    check_directory(bare)
    return bare.absolute()


def check_directory(path: Path) -> None:
    """Raises UsageError if there is no directory to write `path` to."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory {path.parent} to write to: make it, or choose another")


def check_not_input(target: Path, inputs: Iterable[Path]) -> None:
    """Raises UsageError if an output is one of the files that are read."""
    for path in inputs:
        if same_file(target, path):
            raise UsageError(f"{target} is read here, so it cannot be written too: choose another name for the output")


def check_prefix_file(target: str | os.PathLike[str]) -> None:
    """Raises UsageError if a prefix file would take the place of a GGUF."""
    if gguf_file.is_gguf(target):
        raise UsageError(f"{target} is a GGUF and a prefix file would take its place: choose another name")


def check_gguf(target: Path, model: Path) -> None:
    """Raises UsageError if a copy of `model` with a prefix would take the place of another model, or a prefix file.

    It may take that of the model itself, and that of such a copy made before.
    """
    _check_no_prefix(target)
    if same_file(target, model) or not gguf_file.is_gguf(target):
        return
    there, ours = gguf_file.read(target), gguf_file.read(model)
    lists = [[(t.name, t.shape, t.type) for t in x.tensors] for x in (there, ours)]
    first = gguf_file.read(gguf_file.first_part(target))  # only it says what the parts are
    if not _is_output(first) or lists[0] != lists[1]:
        raise UsageError(
            f"{target} is another model than {model}, which would take its place: choose another name, or remove it"
        )


def check_converted(target: Path, kept_reference: bool = False) -> None:
    """Raises UsageError if a GGUF that convert makes would take the place of one that it has not made, or of a
    reference that it has kept (kept_reference: such a one may be replaced, and nothing else), or of a prefix file."""
    _check_no_prefix(target)
    if not gguf_file.is_gguf(target):
        return
    try:
        there = gguf_file.read(target)
    except IntactKVError:
        return  # half of one: nobody's model
    if not (KEY_CONVERTED in there.values if kept_reference else _is_output(there)):
        raise UsageError(
            f"{target} is there, was not made by a conversion like this one, and would be lost: choose another name, "
            "or remove it"
        )


def of_parts(model: Path, out: str | os.PathLike[str]) -> dict[Path, Path]:
    """Where the files of a model go when it is written to OUT: each file, in order, and its new name.

    A model in parts keeps its parts: llama.cpp loads them by their numbers. Raises UsageError for a name of another
    number of parts.
    """
    target, parts = named(out, ".gguf"), gguf_file.shards(model)
    number, n = gguf_file.part_of(target)
    if n and (n != len(parts) or not 1 <= number <= n or len(parts) == 1):
        raise UsageError(
            f"{target} is the name of part {number} of {n} and {model} has {len(parts)}: llama.cpp would not load it: "
            f"give {gguf_file.whole_name(target)}.gguf"
        )
    if len(parts) == 1:
        return {model: target}
    return {part: gguf_file.part(target, i, len(parts)) for i, part in enumerate(parts, 1)}


def _check_name(path: Path) -> None:
    if path.name.lower() in _KINDS:
        raise UsageError(f"{path} is an ending without a name: give one, such as {path.with_name('model' + path.name)}")


def same_file(a: Path, b: Path) -> bool:
    """Whether two names are of one file that is there."""
    return a.exists() and b.exists() and a.samefile(b)


def _is_output(gguf: gguf_file.Gguf) -> bool:
    return KEY_REFERENCE in gguf.values and KEY_CONVERTED not in gguf.values


def _check_no_prefix(target: Path) -> None:
    try:
        with open(target, "rb") as file:
            if file.read(4) != struct.pack("<I", state.MAGIC):
                return
    except OSError:
        return  # not there; or whoever writes says why it cannot be
    raise UsageError(f"{target} is a prefix file and a model would take its place: choose another name")
