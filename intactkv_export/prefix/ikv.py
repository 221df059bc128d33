"""Prefix files (`.ikv`): build, read, find, and embed in a GGUF. docs/reference/format.md has the bytes.

    a llama.cpp sequence-state file with F16 rows    libllama/state.py; stock llama_state_seq_load_file loads it
    manifest, UTF-8 JSON                             manifest.py
    u64 manifest length, SHA-256 of all bytes before that length, 8 bytes "INTACTKV"

Of the state's freedoms a prefix file uses none: sequence 0, F16 rows, V not transposed, no intact cells marked. K rows
are after RoPE. In a GGUF the whole file lies behind the tensors: embedding.py.

Extra cells stand for no token (virtual tokens, as others call them): K and V that were trained, behind those of the
tokens. They are all at the first token's position, 0, so whoever loads the state goes on right behind the tokens.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import rope_of, state
from intactkv_export.models import KEY_REFERENCE, check_same_reference, gguf_file
from intactkv_export.prefix import embedding, outputs, structure
from intactkv_export.prefix import manifest as manifests
from intactkv_export.work import atomic

VARIABLE = "LLAMA_INTACTKV"  # the library reads it too: the prefixes that its contexts hold
KEY_FORMAT = "intactkv.format"
KEY_FILE_TYPE = "general.file_type"  # llama.cpp's own: how a GGUF is quantized, a number of its enum llama_ftype


@dataclass(frozen=True)
class Prefix:
    """A prefix file that was read and verified. `layers` are views into `data`, ascending by il."""

    tokens: list[int]
    manifest: dict[str, Any]
    layers: list[structure.Layer]
    states: state.States  # views too, of the recurrent layers
    sha256: str
    source: Path | None  # None: read from bytes
    embedded: bool  # source is a GGUF
    data: bytes = field(repr=False)
    name: str | None = None  # in that GGUF

    @property
    def n_extra(self) -> int:
        """Extra cells: those that stand for no token."""
        return manifests.n_extra(self.manifest)

    @property
    def n_cells(self) -> int:
        """Cells that it takes in a KV cache: a token each, and the extra ones."""
        return len(self.tokens) + self.n_extra

    @property
    def in_sight(self) -> bool:
        """Whether no sliding window hides its cells: it was trained so."""
        return manifests.in_sight(self.manifest)

    @property
    def kept(self) -> dict[str, Any] | None:
        """Of a prefix that a served model has made of its own: which one, and how many requests began so."""
        return self.manifest.get(manifests.KEPT)

    @property
    def behind(self) -> str | None:
        """Of one that a served model has made: the SHA-256 of the prefix whose rows it begins with."""
        return (self.kept or {}).get(manifests.BEHIND)

    @property
    def contents(self) -> str:
        """For messages: how many tokens, and extra cells if there are some."""
        n, n_extra = len(self.tokens), self.n_extra
        extra = f" and {n_extra} extra cell{'' if n_extra == 1 else 's'}" if n_extra else ""
        return f"{n} token{'' if n == 1 else 's'}{extra}"

    @property
    def messages(self) -> list[dict[str, str]]:
        """What a conversation begins with so that its tokens begin with the prefix.

        Empty for a prefix of the first token only, which every conversation begins with, and where the prefix is the
        system prompt that the model's chat template writes itself.
        """
        return [dict(message) for message in self.manifest["messages"] or []]

    @property
    def tools(self) -> list[dict[str, Any]]:
        """What a conversation is given with those messages, so that its tokens begin with the prefix; often none."""
        return [dict(tool) for tool in self.manifest.get("tools") or []]


def build(
    model: Mapping[str, Any],
    tokens: Sequence[int],
    K: Mapping[int, np.ndarray],
    V: Mapping[int, np.ndarray],
    manifest: Mapping[str, Any],
    states: state.States | None = None,
) -> bytes:
    """The bytes of a prefix file.

    model: the description of the model (bindings.describe). K, V: {layer: float16 [n_cells, n_head_kv, head_dim]},
    K after RoPE in llama.cpp's layout: of the tokens in order, and behind them of the extra cells, as at position 0;
    rows that a sliding window has left behind are not stored. manifest: its other fields, extra_cells among them if
    there are some; format, tokens and model are filled in. states: of the model's recurrent layers, after the last
    token. Raises IntactKVError if anything does not fit or is not finite.
    """
    head = {"format": manifests.format_of(model), "tokens": list(tokens), "model": dict(model)}
    text = manifests.encode({**head, **manifest})
    n_extra, ext = manifests.n_extra(manifest), state.has_cell_ext(model)
    caches = (state.f16_section(cache, tokens, n_extra, K, V, cell_ext=ext) for cache in state.shapes(model))
    behind = state.states_section(state.recurrent(model), len(tokens), states or {})
    body = b"".join([state.file_header(tokens), *caches, behind, text])
    data = body + structure.trailer(body, len(text))
    read(data)  # what is written can be read: finite, complete, and as the manifest says
    return data


def read(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Prefix:
    """Read and verify a prefix: an `.ikv` file, one embedded in a GGUF, or the bytes of an `.ikv`.

    name: of several in a GGUF; None: the first, its default. Checksum, manifest, structure and finite values are
    checked; nothing in the file is trusted before. Whether it fits a model is for bindings.verify. Raises
    IntactKVError, one sentence.
    """
    if isinstance(source, bytes):
        return _parse(source, None, False)
    path = gguf_file.first_part(source)
    if gguf_file.is_gguf(path):
        return _read_embedded(embedding.choose(path, name))
    data = _file_bytes(path)
    try:
        return _parse(data, path, False)
    except IntactKVError as error:
        raise IntactKVError(f"{path}: {error}") from error


def read_all(path: str | os.PathLike[str]) -> Iterator[Prefix]:
    """As load(), every one of several in a GGUF, the default first."""
    there = embedding.embedded(path) if gguf_file.is_gguf(gguf_file.first_part(path)) else []
    if there:
        yield from map(_read_embedded, there)
    else:
        yield load(path)


def _read_embedded(place: embedding.Embedded) -> Prefix:
    try:
        return _parse(place.read(), place.path, True, place.name)
    except IntactKVError as error:
        raise IntactKVError(f"{place.path}, prefix {place.name}: {error}") from error


def find(model_path: str | os.PathLike[str]) -> Path | None:
    """Where the prefix of a model is: embedded in the GGUF, or the file convert put beside it, or None.

    Beside NAME.gguf, or its parts NAME-00001-of-00003.gguf, that is NAME.ikv; beside NAME-TYPE.gguf also NAME.ikv, if
    made from the same reference. A GGUF whose embedded prefix was lost is the last to be named: read() says why.
    """
    path = gguf_file.first_part(model_path)
    header = gguf_file.read(path)
    embedded = embedding.has(header)
    if embedded and not embedding.lost(header):
        return path
    whole = gguf_file.whole_name(path)
    for own in dict.fromkeys((path.with_suffix(".ikv"), path.with_name(f"{whole}.ikv"))):
        if own.is_file():
            return own
    name, dash, _ = whole.rpartition("-")
    shared = path.with_name(f"{name}.ikv")
    if dash and shared.is_file():
        if read(shared).manifest["reference"]["sha256"] == header.values.get(KEY_REFERENCE):
            return shared
    return path if embedded else None


def own(model: str | os.PathLike[str]) -> Prefix | None:
    """The prefix of a model, where none is named: the first that LLAMA_INTACTKV names, else where find() finds it, the
    default of several; None: there is none, or the variable says `off`.

    Warns if the variable names more than one: it is one prefix that is asked for.
    """
    named = of_environment()
    if named is None:
        path = find(model)
        return None if path is None else read(path)
    if len(named) > 1:
        warnings.warn(
            f"{VARIABLE} names {len(named)} prefixes, and here one is used: the first, of {named[0].source}",
            stacklevel=3,
        )
    return named[0] if named else None


def of_environment() -> list[Prefix] | None:
    """Every prefix that LLAMA_INTACTKV names, verified, [] for `off`; None: it names none, and says nothing.

    Raises IntactKVError or UsageError, with the variable's name: who types a command may have forgotten it.
    """
    paths = in_environment()
    if paths is None:
        return None
    try:
        return [prefix for path in paths for file in files_of(path) for prefix in read_all(file)]
    except IntactKVError as error:
        raise type(error)(f"{VARIABLE} names a prefix that cannot be used: {error}") from error


def in_environment() -> list[Path] | None:
    """The files and directories that LLAMA_INTACTKV names, [] for `off`; None: it names none, and says nothing."""
    value = os.environ.get(VARIABLE, "")
    if value == "off":
        return []
    return [Path(name) for name in value.split(os.pathsep) if name] or None


def files_of(path: Path) -> list[Path]:
    """A file that is named, or the .ikv files of a directory, sorted. Raises UsageError if it has none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.ikv"))
    if not files:
        raise UsageError(f"there is no .ikv file in the directory {path}: make one with `intactkv-export prefix`")
    return files


def named(model: str | os.PathLike[str], given: str | os.PathLike[str]) -> Prefix:
    """The prefix that is meant for a model: a file of this path, or one embedded in the model that has this name.

    Raises IntactKVError if there is neither.
    """
    header = gguf_file.read(gguf_file.first_part(model)) if gguf_file.is_gguf(model) else None
    if Path(given).exists() or header is None or not embedding.has(header) or os.sep in str(given):
        return read(given)
    there = embedding.embedded(model)
    if str(given) in [one.name for one in there]:
        return read(model, str(given))
    raise IntactKVError(
        f"there is no prefix file {given}, and {model} has no prefix of this name but {embedding.listed(there)}: check "
        "the path, or give one of these names"
    )


def given(prefix: Prefix) -> Path | str | Prefix:
    """What names this prefix to whoever opens its model again: its file, or its name among several of a GGUF."""
    if prefix.source is None:
        return prefix
    if not prefix.embedded or embedding.embedded(prefix.source)[0].name == prefix.name:
        return prefix.source
    return str(prefix.name)


def first_token_of(model: str | os.PathLike[str]) -> Prefix | None:
    """A model's own prefix of the first token: embedded, among others it may be, or beside it."""
    path = find(model)
    if path is None or not gguf_file.is_gguf(path):
        prefix = None if path is None else read(path)
        return prefix if prefix is not None and len(prefix.tokens) == 1 else None
    return next((_read_embedded(one) for one in embedding.embedded(path) if len(one.tokens) == 1), None)


def of_model(model: str | os.PathLike[str], given: str | os.PathLike[str] | None = None) -> Prefix:
    """The prefix of a model: the one given (named()), or else its own. Raises UsageError if there is none."""
    prefix = own(model) if given is None else named(model, given)
    if prefix is None and in_environment() == []:
        raise UsageError(f"{VARIABLE} is off, and a prefix of {model} is needed: unset it, or name one with --prefix")
    if prefix is None:
        raise UsageError(
            f"{model} has no prefix, neither embedded nor beside it: make one with `intactkv-export prefix`, or name "
            "one with --prefix"
        )
    return prefix


def load(path: str | os.PathLike[str]) -> Prefix:
    """A prefix from an `.ikv`, a GGUF with one embedded, or a GGUF beside its `.ikv`. Raises IntactKVError."""
    return read((find(path) if gguf_file.is_gguf(path) else None) or path)


def check_reference(prefix: Prefix, sha256: str | None, name: str) -> None:
    """Raises IntactKVError if what `name` says belongs to another reference model than the prefix; None passes."""
    own = f"the prefix {prefix.source}" if prefix.source else "the prefix"
    check_same_reference(own, prefix.manifest["reference"]["sha256"], name, sha256)


def calibrated_for_another(prefix: Prefix, file_type: int | str | None) -> str | None:
    """The model that a prefix was calibrated for, if its file type (general.file_type) is not this one."""
    about = (prefix.manifest["calibrated"] or {}).get("model")
    if not isinstance(about, dict):
        return None
    wanted = about.get("file_type")
    return str(about.get("name")) if None not in (wanted, file_type) and str(wanted) != str(file_type) else None


def run_settings(prefix: Prefix, model: str | os.PathLike[str]) -> dict[str, Any]:
    """How a model must be run for a prefix to fit: arguments of llama_cpp.Llama for the RoPE settings and LongRoPE
    factors that it was made with, whatever n_ctx is: a short context takes the long factors too.

    model: the GGUF that is run. Raises IntactKVError if it cannot be read.
    """
    settings = rope_of(prefix.manifest.get("rope_options")).llama_kwargs
    long = gguf_file.longrope(model)
    if long is not None and prefix.manifest["model"]["rope"]["factors"] == long.sha256:
        settings["kv_overrides"] = {long.key: 1}
        settings["yarn_orig_ctx"] = settings["yarn_orig_ctx"] or long.n_ctx_orig
    return settings


def write(path: str | os.PathLike[str], data: bytes) -> None:
    """Write the bytes of a prefix file: whole, or not at all. Raises UsageError if another kind of file is there,
    IntactKVError if it cannot be written."""
    outputs.check_prefix_file(path)
    with atomic.output(path) as file:
        file.write(data)


@dataclass(frozen=True)
class Added:
    """What add() did. path: of the file that has the prefix; replaced: names of those that it took the place of; names:
    of all that are there now, the default first."""

    path: Path
    name: str
    replaced: list[str]
    names: list[str]


def embed(gguf: str | os.PathLike[str], prefix: Prefix, out: str | os.PathLike[str] | None = None) -> Path:
    """Store a prefix in a GGUF, replacing all that are there; everything else of the GGUF stays byte for byte.

    out: where to write; None: the GGUF itself. Of a model in parts the first gets it; with `out`, NAME or the name of a
    part, the others are copied to NAME-0000i-of-0000n.gguf too. It has the usual name (embedding.default_name). Returns
    the file that has it. Raises UsageError if another model is there, IntactKVError if the GGUF was made from another
    reference, is damaged, or cannot be written.
    """
    return _write(gguf, out, [(embedding.default_name(len(prefix.tokens)), prefix.data)], prefix)


def add(
    gguf: str | os.PathLike[str],
    prefix: Prefix,
    out: str | os.PathLike[str] | None = None,
    name: str | None = None,
    default: bool = False,
) -> Added:
    """As embed(), beside those that are there.

    It takes the place of the one of its name, and of one of its tokens, which would never be used beside it. name:
    None: that of the one of its tokens; or, as the only one, the usual name; else the stem of its file. default: it
    becomes the first, which is used where none is named. What is embedded and cannot be read is left out, with a
    warning.
    """
    there = _readable(gguf)
    same = next((one.name for one in there if one.tokens == prefix.tokens), None)
    if name is None:
        stem = prefix.source.stem if prefix.source is not None and there else ""
        usual = embedding.default_name(len(prefix.tokens), [one.name for one in there])
        name = same or (stem if embedding.is_name(stem) else usual)
    embedding.check_name(name)
    before = [one.name for one in there]
    replaced = [old for old in before if old in (name, same)]
    kept: list[tuple[str, bytes | embedding.Embedded]] = [(x.name, x) for x in there if x.name not in replaced]
    kept.insert(0 if default or replaced and before[0] in replaced else len(kept), (name, prefix.data))
    return Added(_write(gguf, out, kept, prefix), name, replaced, [name for name, _ in kept])


def remove(gguf: str | os.PathLike[str], name: str, out: str | os.PathLike[str] | None = None) -> Added:
    """Write a GGUF without the prefix of this name. Raises IntactKVError if it has none."""
    gone = embedding.choose(gguf, name)
    kept = [(x.name, x) for x in embedding.embedded(gguf) if x != gone]
    return Added(_write(gguf, out, kept, None), name, [name], [name for name, _ in kept])


def _readable(gguf: str | os.PathLike[str]) -> list[embedding.Embedded]:
    """What is embedded, or none of it, with a warning."""
    try:
        return embedding.embedded(gguf)
    except IntactKVError as error:
        warnings.warn(f"what was embedded before is left out ({error})", stacklevel=3)
        return []


def _write(
    gguf: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    prefixes: Sequence[tuple[str, bytes | embedding.Embedded]],
    new: Prefix | None,
) -> Path:
    """Write a GGUF with these prefixes and no others, of which the new one is checked against its reference."""
    source = gguf_file.first_part(gguf)
    changes: dict[str, gguf_file.Value | None] = {}
    if new is not None:
        check_reference(new, gguf_file.read(source).values.get(KEY_REFERENCE), str(gguf))
        changes = {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: new.manifest["reference"]["sha256"]}
    targets = {source: source} if out is None else outputs.of_parts(source, out)
    for part, target in targets.items():
        outputs.check_gguf(target, part)
    for part, target in reversed(targets.items()):
        if part == source:
            embedding.write(source, target, changes, prefixes)
        elif not outputs.same_file(part, target):
            with atomic.output(target) as file:
                gguf_file.copy(part, file, {})
    return targets[source]


def embed_file(gguf: Path, prefix: Path, out: Path) -> None:
    """As embed(), of a prefix file: a stage of its own."""
    embed(gguf, read(prefix), out)


def add_file(gguf: Path, prefix: Path, name: str | None, default: bool) -> None:
    """As add(), of a prefix file: a stage of its own."""
    add(gguf, read(prefix), name=name, default=default)


def extract(gguf: str | os.PathLike[str], out: str | os.PathLike[str], name: str | None = None) -> Prefix:
    """Write a prefix embedded in a GGUF to a file of its own, verified. name: None: the default. Raises
    IntactKVError."""
    prefix = _read_embedded(embedding.choose(gguf, name))
    write(out, prefix.data)
    return prefix


def stamp(gguf: str | os.PathLike[str], reference_sha256: str, out: str | os.PathLike[str] | None = None) -> Path:
    """Note in a GGUF which reference it was quantized from; a prefix embedded before is removed."""
    path = Path(gguf if out is None else out)
    embedding.write(gguf, path, {KEY_FORMAT: manifests.FORMAT, KEY_REFERENCE: reference_sha256}, [])
    return path


def rewrite(
    gguf: str | os.PathLike[str],
    changes: Mapping[str, gguf_file.Value | None],
    out: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a GGUF again with some keys set or removed (None): to `out`, or in its own place. A prefix stays in it."""
    path = Path(gguf if out is None else out)
    with atomic.output(path) as file:
        gguf_file.copy(gguf, file, changes)
    return path


def _file_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IntactKVError(f"cannot read {path}: {os.strerror(error.errno or 0)}: check the path") from error
    if not data:
        raise IntactKVError(f"{path} is empty: {structure.DOWNLOAD}")
    if data[:4] != struct.pack("<I", state.MAGIC):
        raise IntactKVError(
            f"{path} is neither a prefix file nor a GGUF: it begins with the bytes {data[:4].hex()}: check the path"
        )
    return data


def _parse(data: bytes, source: Path | None, embedded: bool, name: str | None = None) -> Prefix:
    body, text, sha256 = structure.check_trailer(data)
    manifest = manifests.decode(text)
    tokens: list[int] = manifest["tokens"]
    start = structure.check_header(data, len(body), tokens)
    layers: list[structure.Layer] = []
    end = start
    found = state.sections(data, start, len(body), manifest["model"])
    for cache in manifests.caches(manifest):
        section = next(found, None)
        if section is None:
            raise IntactKVError(f"its state ends at byte {end}, before its last KV cache: {state.REMAKE}")
        layers += structure.checked_layers(section, cache, tokens, manifests.n_extra(manifest))
        end = section.end
    states: state.States = {}
    if (recurrent := manifests.recurrent(manifest)).layers:
        states, end = state.read_states(data, end, len(body), recurrent, len(tokens) - 1)
    if end != len(body):
        raise IntactKVError(f"its state ends at byte {end} and its manifest begins at {len(body)}: {state.REMAKE}")
    layers.sort(key=lambda layer: layer.il)
    return Prefix(tokens, manifest, layers, states, sha256, source, embedded, data, name)
