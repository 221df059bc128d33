"""The manifest of a prefix file: what it must say, and which bytes follow from it.

The same rules as native/src/prefix_file/manifest.cpp, which checks again before anything reaches a cache.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from intactkv_export.errors import IntactKVError, UsageError, first_line
from intactkv_export.libllama import rope_of, state
from intactkv_export.prefix.chat_template import checked_date

FORMAT = 1
FORMAT_NEW_KINDS = 2  # of models that versions which read 1 alone refuse: the state has more, or other sections
_MAX_STATE = 1 << 30  # values
_MAX_BYTES = 16 << 20  # a million tokens with their text
_MAX_HEADS, _MAX_HEAD_DIM = 1 << 16, 1 << 16
EXTRA = "extra_cells"  # the field that counts cells which stand for no token; a prefix without such has none
MAX_EXTRA = 1 << 16
KEPT = "kept"  # the field of a prefix that a served model has made itself, without a reference
BEHIND = "behind"  # of the field kept: SHA-256 of the prefix whose rows it begins with
IN_SIGHT = "in_sight"  # of the field calibrated


def format_of(model: Mapping[str, Any]) -> int:
    """The format of a prefix of this model (bindings.describe)."""
    has_latents = any(layer.head_dim_v == 0 for cache in state.shapes(model) for layer in cache.layers)
    return FORMAT_NEW_KINDS if state.has_cell_ext(model) or "recurrent" in model or has_latents else FORMAT


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's bytes. Raises IntactKVError if a field is missing or wrong."""
    data = json.dumps(manifest, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    decode(data)
    return data


def decode(data: bytes) -> dict[str, Any]:
    """Parse and check the bytes of a manifest. Raises IntactKVError naming the first field that is wrong."""
    if len(data) > _MAX_BYTES:
        raise IntactKVError(f"the manifest has {len(data)} bytes and at most {_MAX_BYTES} are allowed: {state.REMAKE}")
    try:
        root = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise IntactKVError(f"the manifest is not JSON ({first_line(error)}): {state.REMAKE}") from error
    _check(_Field(root, "manifest"))
    return root


def caches(manifest: Mapping[str, Any]) -> list[state.CacheShape]:
    """The KV caches of a checked manifest's model, in the order of the state."""
    return state.shapes(manifest["model"])


def recurrent(manifest: Mapping[str, Any]) -> state.Recurrent:
    """The recurrent layers of a checked manifest's model."""
    return state.recurrent(manifest["model"])


def n_extra(manifest: Mapping[str, Any]) -> int:
    """How many of the prefix's cells stand for no token."""
    return manifest.get(EXTRA, 0)


def in_sight(manifest: Mapping[str, Any]) -> bool:
    """Whether the prefix's cells stay in sight of all tokens behind them, also in layers with a sliding window."""
    return bool((manifest["calibrated"] or {}).get(IN_SIGHT, False))


def has_windows(manifest: Mapping[str, Any]) -> bool:
    """Whether the prefix's model has layers with a sliding window."""
    return any(cache["swa_type"] for cache in manifest["model"]["caches"])


@dataclass(frozen=True)
class _Field:
    """A value with its name, so that every check can say where it failed."""

    value: Any
    name: str

    def expect(self, ok: bool, what: str) -> _Field:
        if not ok:
            shown = type(self.value).__name__ if isinstance(self.value, list | dict) else ascii(self.value)[:100]
            raise IntactKVError(f"the manifest's field {self.name} is {shown}, not {what}: {state.REMAKE}")
        return self

    def __getitem__(self, key: str) -> _Field:
        if key not in self.object():
            raise IntactKVError(f"the manifest has no field {self.name}.{key}: {state.REMAKE}")
        return _Field(self.value[key], f"{self.name}.{key}")

    def object(self) -> dict[str, Any]:
        self.expect(isinstance(self.value, dict), "an object")
        return self.value

    def items(self, low: int, high: int) -> list[_Field]:
        ok = isinstance(self.value, list) and low <= len(self.value) <= high
        self.expect(ok, f"an array of {low} to {high}")
        return [_Field(value, f"{self.name}[{i}]") for i, value in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        ok = type(self.value) is int and low <= self.value <= high
        self.expect(ok, f"an integer from {low} to {high}")
        return self.value

    def number(self) -> None:
        # an integer beyond float64 is none of the numbers meant here, and math.isfinite() cannot even be asked
        ok = type(self.value) in (int, float) and abs(self.value) <= sys.float_info.max
        self.expect(ok, "a finite number")

    def text(self) -> None:
        self.expect(isinstance(self.value, str), "a string")

    def truth(self) -> None:
        self.expect(isinstance(self.value, bool), "true or false")

    def day(self) -> None:
        try:
            ok = isinstance(self.value, str) and checked_date(self.value) is not None
        except UsageError:
            ok = False
        self.expect(ok, "a day as 2026-11-26")

    def sha256(self) -> None:
        ok = isinstance(self.value, str) and re.fullmatch("[0-9a-f]{64}", self.value) is not None
        self.expect(ok, "a SHA-256 of 64 hexadecimal digits")


def _check(root: _Field) -> None:
    number = root["format"].value
    if type(number) is not int or number not in (FORMAT, FORMAT_NEW_KINDS):  # true == 1 in Python
        raise IntactKVError(
            f"the manifest's format is {ascii(number)[:100]} and this version reads the formats {FORMAT} and "
            f"{FORMAT_NEW_KINDS}: use the version that made the prefix, or make it again"
        )
    model = root["model"]
    model["arch"].text()
    model["n_ctx_train"].integer(0, 2**32 - 1)
    model["vocab_sha256"].sha256()
    n_vocab = model["n_vocab"].integer(1, 2**31 - 1)
    if "recurrent" in model.object():
        _check_recurrent(model["recurrent"])
    _check_caches(model["caches"], number, alone="recurrent" not in model.value)
    _check_rope(model["rope"])
    for token in root["tokens"].items(1, 2**31 - 1):
        token.integer(0, n_vocab - 1)
    if EXTRA in root.value:
        root[EXTRA].integer(1, MAX_EXTRA)
    _check_origin(root)


def _check_recurrent(field: _Field) -> None:
    n_layer, last = field["n_layer"].integer(1, state.MAX_LAYERS), -1
    for layer in field["layers"].items(1, n_layer):
        il = layer["il"].integer(0, n_layer - 1)
        layer["il"].expect(il > last, f"above that of the layer before it, {last}")
        last = il
        for key in ("n_r", "n_s"):
            layer[key].integer(0, _MAX_STATE)


def _check_caches(field: _Field, number: int, alone: bool) -> None:
    """number: the file's format. alone: the model has no recurrent layers beside them."""
    n_layer = 0
    for cache in field.items(1 if alone else 0, 2):
        swa_type = cache["swa_type"].integer(0, 3)
        cache["n_swa"].integer(0 if swa_type == 0 else 1, 2**31 - 1)
        last = -1
        for layer in cache["layers"].items(0, state.MAX_LAYERS):
            il = layer["il"].integer(0, state.MAX_LAYERS - 1)
            layer["il"].expect(il > last, f"above that of the layer before it, {last}")
            last = il
            layer["n_head_kv"].integer(0, _MAX_HEADS)
            layer["head_dim_k"].integer(1, _MAX_HEAD_DIM)
            layer["head_dim_v"].integer(0 if number > FORMAT else 1, _MAX_HEAD_DIM)
            layer["rope_base"].number()
            n_layer += 1
    field.expect(n_layer > 0 or not alone, "caches with layers")


def _check_rope(rope: _Field) -> None:
    for key in ("type", "scaling", "factors"):
        rope[key].text()
    rope["n_rot"].integer(0, _MAX_HEAD_DIM)
    rope["n_ctx_orig"].integer(0, 2**32 - 1)
    for key in ("scale", "ext_factor", "attn_factor", "beta_fast", "beta_slow"):
        rope[key].number()
    has_sections = rope["type"].value in state.SEVERAL_POSITIONS
    for section in rope["sections"].items(state.ROPE_SECTIONS, state.ROPE_SECTIONS) if has_sections else ():
        section.integer(0, _MAX_HEAD_DIM)
    for key, value in rope.value.items():
        if not (has_sections and key == "sections"):
            rope[key].expect(not isinstance(value, list | dict), "a number or a string")


def _check_rendering(root: _Field) -> None:
    """What conversations are rendered with besides their messages; files of before have neither."""
    if "template_args" in root.value:
        args = root["template_args"]
        args.expect(isinstance(args.value, dict), "an object")
    if "date" in root.value:
        root["date"].day()
    for tool in root["tools"].items(1, 1 << 16) if "tools" in root.value else ():
        function = tool["function"]
        function["name"].text()
        function["description"].text()
        parameters = function["parameters"]
        parameters.expect(isinstance(parameters.value, dict), "an object")


def _check_origin(root: _Field) -> None:
    root["text"].text()
    if root["messages"].value is not None:
        for message in root["messages"].items(0, 1 << 16):
            message["role"].text()
            message["content"].text()
    _check_rendering(root)
    root["bos_only"].truth()
    if root["chat_template_sha256"].value is not None:
        root["chat_template_sha256"].sha256()
    reference = root["reference"]
    reference["sha256"].sha256()
    reference["dtype"].text()
    reference["name"].text()
    reference["quantized"].truth()
    engine = root["engine"]
    engine["name"].text()
    engine["dtype"].text()
    versions = engine["versions"]
    versions.expect(isinstance(versions.value, dict), "an object")
    for name in versions.value:
        versions[name].text()
    calibrated = root["calibrated"]
    calibrated.expect(calibrated.value is None or isinstance(calibrated.value, dict), "an object or null")
    if calibrated.value and IN_SIGHT in calibrated.value:
        calibrated[IN_SIGHT].truth()
        n = len(root["tokens"].value)
        alone = n == 1 or not calibrated[IN_SIGHT].value
        calibrated[IN_SIGHT].expect(alone, f"false for a prefix of {n} tokens, only the first one stays in sight")
    root["created_by"].text()
    if KEPT in root.value:
        kept = root[KEPT]
        kept["model"].text()
        kept["weights_sha256"].sha256()
        for key in ("n_bytes", "mtime_ns", "requests"):
            kept[key].integer(0, 2**63 - 1)
        if BEHIND in kept.value:
            kept[BEHIND].sha256()
    if "rope_options" in root.value:
        options = root["rope_options"]
        options.expect(isinstance(options.value, dict), "an object")
        try:
            rope_of(options.value)
        except UsageError as error:
            raise IntactKVError(f"the manifest's field rope_options is wrong ({error})") from error
