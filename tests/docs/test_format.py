"""docs/reference/format.md and manifest.schema.json say what the files are.

`read_by_the_page` is a reader that follows the page alone; it shares no code with ours. The schema refuses a manifest
where ours does, but for what the page names as beyond a schema.
"""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from intactkv_export.prefix import manifest as manifests
from tests.support.paths import REPO

SCHEMA = json.loads((REPO / "docs" / "reference" / "manifest.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
TOKENS = [1, 5, 7, 9, 999]
ORIGIN = {
    "text": "<s>Grüße",
    "messages": [{"role": "system", "content": "Grüße"}],
    "bos_only": False,
    "chat_template_sha256": "0" * 64,
    "reference": {"sha256": "ab" * 32, "dtype": "F16", "name": "x.gguf", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {"llama_cpp_python": "0"}},
    "calibrated": {"objective": "kl"},
    "created_by": "the tests",
}


def model_of(*caches: tuple[int, int, list[tuple[int, int, int, int]]], **more: Any) -> dict[str, Any]:
    """caches: (n_swa, swa_type, layers of (il, n_head_kv, head_dim_k, head_dim_v)). more: of rope."""
    names = ("il", "n_head_kv", "head_dim_k", "head_dim_v")
    rope = {"type": "norm", "n_rot": 64, "scale": 1.0, "scale_swa": 1.0, "scaling": "none", "n_ctx_orig": 8192}
    rope |= {"ext_factor": 0.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "factors": "none"}
    rope |= more
    return {
        "arch": "llama",
        "n_ctx_train": 99,
        "n_vocab": 1000,
        "vocab_sha256": "cd" * 32,
        "caches": [
            {
                "n_swa": n_swa,
                "swa_type": swa_type,
                "layers": [{**dict(zip(names, layer, strict=True)), "rope_base": 1e4} for layer in layers],
            }
            for n_swa, swa_type, layers in caches
        ],
        "rope": rope,
    }


MODELS = {
    "one cache": model_of((0, 0, [(0, 2, 4, 6), (1, 0, 4, 4), (3, 1, 2, 2)])),
    "standard window": model_of((0, 0, [(0, 2, 4, 6)]), (3, 1, [(1, 2, 4, 4), (2, 1, 8, 4)])),
    "chunked window": model_of((0, 0, [(0, 2, 4, 6)]), (3, 2, [(1, 2, 4, 4)])),
    "symmetric window": model_of((0, 0, [(0, 2, 4, 6)]), (3, 3, [(1, 2, 4, 4)])),
    "several positions": model_of((0, 0, [(0, 2, 4, 6)]), type="mrope", sections=[16, 24, 24, 0]),
    "several positions, a window": model_of(
        (0, 0, [(0, 2, 4, 6)]), (3, 1, [(1, 2, 4, 4)]), type="imrope", sections=[24, 20, 20, 0]
    ),
    "hybrid": model_of((0, 0, [(1, 2, 4, 6)]))
    | {"recurrent": {"n_layer": 4, "layers": [{"il": 0, "n_r": 6, "n_s": 4}, {"il": 3, "n_r": 2, "n_s": 0}]}},
    "recurrent": model_of() | {"recurrent": {"n_layer": 1, "layers": [{"il": 0, "n_r": 3, "n_s": 5}]}},
    "no layer without a window": model_of((0, 0, []), (2, 1, [(0, 2, 4, 4)])),
    "latents": model_of((0, 0, [(0, 1, 6, 0), (1, 1, 6, 0)])),
    "latents of some layers": model_of((0, 0, [(0, 1, 6, 0), (1, 1, 6, 4), (2, 1, 6, 0)])),
}


def made(model: dict[str, Any], n_extra: int = 0) -> bytes:
    rng, n = np.random.default_rng(0), len(TOKENS) + n_extra
    K, V = {}, {}
    for x in (layer for cache in model["caches"] for layer in cache["layers"]):
        K[x["il"]] = rng.standard_normal((n, x["n_head_kv"], x["head_dim_k"])).astype(np.float16)
        V[x["il"]] = rng.standard_normal((n, x["n_head_kv"], x["head_dim_v"])).astype(np.float16)
    S = {
        x["il"]: (rng.standard_normal(x["n_r"]).astype(np.float32), rng.standard_normal(x["n_s"]).astype(np.float32))
        for x in model.get("recurrent", {"layers": []})["layers"]
    }
    return ikv.build(model, TOKENS, K, V, ORIGIN | ({"extra_cells": n_extra} if n_extra else {}), S)


# --- a reader by the page ---


def read_by_the_page(
    data: bytes,
) -> tuple[dict[str, Any], list[tuple[int, list[int], np.ndarray, np.ndarray]], dict[int, list[np.ndarray]]]:
    """Manifest, in the order of the state (il, positions, K, V) of each layer, and the states of recurrent ones. Raises
    ValueError."""
    if len(data) < 48 or data[-8:] != b"INTACTKV":
        raise ValueError("trailer")
    length, checksum = struct.unpack("<Q32s", data[-48:-8])
    if length > len(data) - 48:
        raise ValueError("length of the manifest")
    if hashlib.sha256(data[:-48]).digest() != checksum:
        raise ValueError("checksum")
    begin = len(data) - 48 - length
    manifest = json.loads(data[begin:-48].decode())
    VALIDATOR.validate(manifest)
    state, at = memoryview(data)[:begin], 0

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        size = struct.calcsize("<" + layout)
        if size > len(state) - at:
            raise ValueError("the state ends")
        at += size
        return struct.unpack("<" + layout, state[at - size : at])

    def expect(layout: str, *values: int) -> None:
        if take(layout) != values:
            raise ValueError(f"{values} before byte {at}")

    tokens = manifest["tokens"]
    expect("3I", 0x67677371, 3, len(tokens))
    expect(f"{len(tokens)}i", *tokens)
    layers = []
    for cache in manifest["model"]["caches"]:
        expect("I", 1)
        expected = {p for p in range(len(tokens)) if not dropped(cache["swa_type"], cache["n_swa"], p, len(tokens) - 1)}
        n_extra = manifest.get("extra_cells", 0) if 0 in expected else 0
        expect("I", len(expected) + n_extra)
        positions: list[int] = []
        for _ in range(len(expected) + n_extra):
            (position,) = take("i")
            expect("I", 1)
            if "sections" in manifest["model"]["rope"]:
                extra = position == 0 and 0 in positions
                if not 0 <= position < len(tokens):
                    raise ValueError("cells")
                expect("3i", position, position, -1 if extra else tokens[position])
            expect("i", 0)
            positions.append(position)
        if sorted(positions) != sorted([*expected, *[0] * n_extra]):
            raise ValueError("cells")
        expect("II", 0, len(cache["layers"]))
        sides = []
        for dim in ("head_dim_k", "head_dim_v"):
            sides.append(
                [
                    rows(layer["n_head_kv"], layer[dim], len(positions), take)
                    if layer[dim]
                    else np.empty((len(positions), layer["n_head_kv"], 0), np.float16)
                    for layer in cache["layers"]
                ]
            )
        layers += [(x["il"], positions, k, v) for x, k, v in zip(cache["layers"], *sides, strict=True)]
    recurrent: dict[int, list[np.ndarray]] = {}
    if "recurrent" in manifest["model"]:
        about = manifest["model"]["recurrent"]
        expect("IiIII", 1, len(tokens) - 1, 0, 0, about["n_layer"])
        for side in ("n_r", "n_s"):
            for layer in about["layers"]:
                expect("iQ", 0, 4 * layer[side])
                values = np.array(take(f"{layer[side]}f"), np.float32)
                if not np.isfinite(values).all():
                    raise ValueError("not finite")
                recurrent.setdefault(layer["il"], []).append(values)
    if at != len(state):
        raise ValueError("something behind the state")
    return manifest, layers, recurrent


def dropped(swa_type: int, n_swa: int, position: int, last: int) -> bool:
    return {
        0: False,
        1: last - position >= n_swa,
        2: bool(n_swa) and position < last // n_swa * n_swa,
        3: last - position > n_swa // 2,
    }[swa_type]


def rows(n_head_kv: int, head_dim: int, n_cells: int, take: Any) -> np.ndarray:
    size = 2 * n_head_kv * head_dim
    if take("iQ") != (1, size):
        raise ValueError("type or size of rows")
    values = np.frombuffer(struct.pack(f"<{n_cells * size}B", *take(f"{n_cells * size}B")), "<f2")
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    return values.reshape(n_cells, n_head_kv, head_dim)


@pytest.mark.parametrize("n_extra", [0, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_reader_by_the_page_reads_the_same(name: str, n_extra: int) -> None:
    data = made(MODELS[name], n_extra)
    ours = ikv.read(data)
    manifest, layers, recurrent = read_by_the_page(data)
    assert manifest == ours.manifest and manifest["tokens"] == ours.tokens
    assert sorted(il for il, *_ in layers) == [layer.il for layer in ours.layers]
    for il, positions, K, V in layers:
        layer = next(layer for layer in ours.layers if layer.il == il)
        assert positions == layer.positions.tolist()
        np.testing.assert_array_equal(K, layer.K)
        np.testing.assert_array_equal(V, layer.V)
    assert recurrent.keys() == ours.states.keys()
    for il, both in recurrent.items():
        for x, y in zip(both, ours.states[il], strict=True):
            np.testing.assert_array_equal(x, y)
    if library.is_patched():
        assert bindings.verify(data) == len(TOKENS)


@pytest.mark.parametrize("n_extra", [0, 3])
@pytest.mark.parametrize("name", ["standard window", "several positions, a window", "hybrid", "recurrent", "latents"])
def test_a_reader_by_the_page_refuses_the_same(name: str, n_extra: int) -> None:
    """Each byte of the state changed under a right checksum, and each length of it."""
    data = made(MODELS[name], n_extra)
    (length,) = struct.unpack("<Q", data[-48:-40])
    begin = len(data) - 48 - length

    def sealed(state: bytes) -> bytes:
        body = state + data[begin:-48]
        return body + struct.pack("<Q32s8s", length, hashlib.sha256(body).digest(), b"INTACTKV")

    def verdicts(state: bytes) -> list[bool]:
        verdict = []
        for read in (ikv.read, read_by_the_page):
            try:
                read(sealed(state))
                verdict.append(True)
            except (IntactKVError, ValueError):
                verdict.append(False)
        return verdict

    accepted = 0
    for at in range(begin):
        changed = bytearray(data[:begin])
        changed[at] ^= 0x7C
        ours, theirs = verdicts(bytes(changed))
        assert ours == theirs, at
        accepted += ours
    assert 0 < accepted < begin  # values of K and V are free, but for NaN and infinity
    for end in range(begin):
        assert verdicts(data[:end]) == [False, False], end
    assert verdicts(data[:begin] + b"\0") == [False, False]


def test_a_prefix_in_a_gguf_is_where_the_page_says(tmp_path: Path) -> None:
    data, gguf = made(MODELS["one cache"]), tmp_path / "model.gguf"
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<IqiQ", 1, 5, 0, 0)  # 5 values of F32
    header = struct.pack("<4sIqq", b"GGUF", 3, 1, 0) + tensor
    gguf.write_bytes(header + bytes(-len(header) % 32) + b"\x55" * 20)
    ikv.embed(gguf, ikv.read(data))
    raw, values, at = gguf.read_bytes(), {}, 24
    (n_keys,) = struct.unpack_from("<q", raw, 16)
    for _ in range(n_keys):
        (n,) = struct.unpack_from("<Q", raw, at)
        key = raw[at + 8 : at + 8 + n].decode()
        (kind,) = struct.unpack_from("<i", raw, at + 8 + n)
        at += 12 + n
        if kind in (4, 10):  # uint32, uint64
            layout = "<I" if kind == 4 else "<Q"
            (values[key],) = struct.unpack_from(layout, raw, at)
            at += struct.calcsize(layout)
        else:
            assert kind == 8  # string
            (n,) = struct.unpack_from("<Q", raw, at)
            values[key] = raw[at + 8 : at + 8 + n]
            at += 8 + n
    assert values == {
        "intactkv.format": 1,
        "intactkv.reference.sha256": ORIGIN["reference"]["sha256"].encode(),  # type: ignore[index]
        "intactkv.state.offset": 32,
        "intactkv.state.size": len(data),
    }
    assert raw[at : at + len(tensor)] == tensor
    tensor_data = at + len(tensor)
    tensor_data += -tensor_data % 32
    assert raw[tensor_data:] == b"\x55" * 20 + bytes(12) + data


# --- the schema ---


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Paths of everything within a manifest."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


def changed(manifest: dict[str, Any], path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    """A copy with another value at a path, or without it (Ellipsis)."""
    result = copy.deepcopy(manifest)
    within: Any = result
    for key in path[:-1]:
        within = within[key]
    if value is ...:
        del within[path[-1]]
    else:
        within[path[-1]] = value
    return result


def refused_by_ours(manifest: Any) -> bool:
    try:
        manifests.decode(json.dumps(manifest).encode())
        return False
    except IntactKVError:
        return True


def refused_by_the_schema(manifest: Any) -> bool:
    return not VALIDATOR.is_valid(manifest)


OTHERS = (..., None, True, False, -1, 0, 1, 2, 3, 4, 4096, 65537, 2**31 - 1, 2**32, 0.5, "", "f", "0" * 64, "0" * 65)
OTHERS += ("A" * 64, [], [0], {}, {"x": 1}, {"x": "1"})  # type: ignore[assignment]


def beyond_a_schema(manifest: dict[str, Any]) -> bool:
    """What the page says a schema cannot say: tokens outside of the vocabulary, layers that do not ascend, or are
    beyond the model's."""
    try:
        caches = [[layer["il"] for layer in cache["layers"]] for cache in manifest["model"]["caches"]]
        recurrent = manifest["model"].get("recurrent", {"n_layer": 1, "layers": []})
        states = [layer["il"] for layer in recurrent["layers"]]
        if any(list(layers) != sorted(set(layers)) for layers in [*caches, states]):
            return True
        if len(states) > recurrent["n_layer"] or max(states, default=0) >= recurrent["n_layer"]:
            return True
        return any(token >= manifest["model"]["n_vocab"] for token in manifest["tokens"])
    except (KeyError, TypeError):
        return False


def test_the_schema_is_one_and_real_manifests_fit() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for model in MODELS.values():
        VALIDATOR.validate(ikv.read(made(model)).manifest)
        VALIDATOR.validate(ikv.read(made(model, 3)).manifest)


@pytest.mark.parametrize("name", ["standard window", "several positions", "hybrid", "recurrent", "latents"])
def test_the_schema_refuses_what_we_refuse(name: str) -> None:
    """One value after the other, everywhere in a manifest."""
    manifest = ikv.read(made(MODELS[name], 3)).manifest
    seen = {True: 0, False: 0}
    for path in places(manifest):
        for value in OTHERS:
            other = changed(manifest, path, value)
            ours = refused_by_ours(other)
            if not beyond_a_schema(other):
                assert ours == refused_by_the_schema(other), (path, value)
            seen[ours] += 1
    assert min(seen.values()) > 100
    for value in (None, [], 1, "x"):
        assert refused_by_ours(value) and refused_by_the_schema(value)


def test_more_fields_are_no_fault_except_where_they_are_compared() -> None:
    manifest = ikv.read(made(MODELS["one cache"])).manifest
    layer = ("model", "caches", 0, "layers", 0)
    for path, value, refused in [
        (("new",), {"x": [1]}, False),
        (("model", "new"), [1], False),
        ((*layer, "new"), [1], False),
        (("model", "rope", "new"), 1.5, False),
        (("model", "rope", "new"), [1], True),
    ]:
        other = changed(manifest, path, value)
        assert (refused_by_ours(other), refused_by_the_schema(other)) == (refused, refused), path
