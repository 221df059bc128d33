"""Prefix files: what is written is read back, llama.cpp reads it the same way, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, state
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv

needs_patch = pytest.mark.skipif(not library.is_patched(), reason="the libraries have no intact cells")
ROPE = {
    "type": "norm", "n_rot": 64, "scale": 1.0, "scaling": "none", "n_ctx_orig": 8192, "ext_factor": 0.0,
    "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "factors": "none",
}  # fmt: skip
ORIGIN = {
    "text": "<s>Grüße", "messages": [{"role": "system", "content": "Grüße"}], "bos_only": False,
    "chat_template_sha256": "0" * 64,
    "reference": {"sha256": "ab" * 32, "dtype": "F16", "name": "x.gguf", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {"llama_cpp_python": "0"}}, "calibrated": None,
    "created_by": "intactkv-export 0",
}  # fmt: skip


def layer(il: int, heads: int = 2, k: int = 4, v: int = 6) -> dict:
    return {"il": il, "n_head_kv": heads, "head_dim_k": k, "head_dim_v": v, "rope_base": 1e4}


def describe(*caches: dict, **rope: Any) -> dict:
    model = {"arch": "llama", "n_ctx_train": 99, "n_vocab": 1000, "vocab_sha256": "cd" * 32}
    return {**model, "caches": list(caches), "rope": ROPE | rope}


def cache(layers: list[dict], n_swa: int = 0, swa_type: int = 0) -> dict:
    return {"n_swa": n_swa, "swa_type": swa_type, "layers": layers}


def rows(model: dict, n: int, seed: int = 0) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    K, V = {}, {}
    for one in model["caches"]:
        for x in one["layers"]:
            K[x["il"]] = rng.standard_normal((n, x["n_head_kv"], x["head_dim_k"])).astype(np.float16)
            V[x["il"]] = rng.standard_normal((n, x["n_head_kv"], x["head_dim_v"])).astype(np.float16)
    return K, V


def states(model: dict, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    sizes = ((x["il"], x["n_r"], x["n_s"]) for x in model.get("recurrent", {"layers": []})["layers"])
    return {il: tuple(rng.standard_normal(n).astype(np.float32) for n in (n_r, n_s)) for il, n_r, n_s in sizes}


RECURRENT = {"n_layer": 5, "layers": [{"il": 3, "n_r": 3, "n_s": 5}, {"il": 4, "n_r": 2, "n_s": 0}]}
SECTIONS = {"type": "imrope", "sections": [11, 11, 10, 0]}  # cells say where they are, and of which token


def sample(**rope: Any) -> bytes:
    model = describe(cache([layer(0), layer(2)]), cache([layer(1, v=4)], n_swa=3, swa_type=1), **rope)
    return ikv.build(model, [1, 5, 7, 9, 999], *rows(model, 5), ORIGIN)


def hybrid() -> bytes:
    model = describe(cache([layer(0), layer(2)])) | {"recurrent": RECURRENT}
    return ikv.build(model, [1, 5, 7], *rows(model, 3), ORIGIN, states(model))


def test_a_file_without_extra_cells_is_what_it_was_before_there_were_any():
    """The bytes of version 0.1.0; libraries of that version read them."""
    assert ikv.read(sample()).sha256 == "73b6cece4bc161f819ed574db2cd3c5af643313826a9e346c5b328254559a678"


@st.composite
def prefixes(draw: st.DrawFn) -> tuple[dict, list[int], int, int]:
    sizes = st.integers(1, 5)
    layers = [layer(il, draw(st.integers(0, 3)), draw(sizes), draw(sizes)) for il in range(draw(sizes))]
    caches = [cache(layers)]
    if draw(st.booleans()):
        inside = draw(st.sets(st.sampled_from(range(len(layers)))))
        swa = [x for x in layers if x["il"] in inside]
        caches = [cache([x for x in layers if x["il"] not in inside]), cache(swa, draw(sizes), draw(st.integers(0, 3)))]
    tokens = draw(st.lists(st.integers(0, 999), min_size=1, max_size=12))
    rope = draw(st.sampled_from([{}, SECTIONS, SECTIONS | {"type": "mrope"}]))
    model = describe(*caches, **rope)
    if draw(st.booleans()):
        ils = sorted(draw(st.sets(st.integers(0, 8), min_size=1)))
        recurrent = [{"il": il, "n_r": draw(st.integers(0, 5)), "n_s": draw(st.integers(0, 5))} for il in ils]
        model["recurrent"] = {"n_layer": 9, "layers": recurrent}
        model["caches"] = draw(st.sampled_from([model["caches"], []]))
    return model, tokens, draw(st.integers(0, 5)), draw(st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(prefixes())
def test_round_trip(made):
    """Every array comes back bit for bit, and the C++ parser accepts the same bytes."""
    model, tokens, n_extra, seed = made
    K, V = rows(model, len(tokens) + n_extra, seed)
    origin = ORIGIN | ({"extra_cells": n_extra} if n_extra else {})
    S = states(model, seed)
    data = ikv.build(model, tokens, K, V, origin, S)
    back = ikv.read(data)
    assert back.tokens == tokens
    assert (back.n_extra, back.n_cells) == (n_extra, len(tokens) + n_extra)
    assert back.manifest == {
        "format": 2 if "sections" in model["rope"] or "recurrent" in model else 1,
        "tokens": tokens,
        "model": model,
        **origin,
    }
    assert [x.il for x in back.layers] == sorted(K)
    assert {il: [x.tobytes() for x in both] for il, both in back.states.items()} == {
        il: [x.tobytes() for x in both] for il, both in S.items()
    }
    for x in back.layers:
        np.testing.assert_array_equal(x.K, K[x.il][x.cells])
        np.testing.assert_array_equal(x.V, V[x.il][x.cells])
        of_tokens = x.cells < len(tokens)
        np.testing.assert_array_equal(x.positions[of_tokens], x.cells[of_tokens])
        assert (x.positions[~of_tokens] == 0).all()
        assert (~of_tokens).sum() == (n_extra if 0 in x.cells else 0)  # they leave a window with the first token
    assert back.sha256 == hashlib.sha256(data).hexdigest()
    if library.is_patched():
        assert bindings.verify(data) == len(tokens)


@pytest.mark.parametrize(
    "swa_type, n_swa, kept",
    [(0, 3, range(10)), (1, 3, range(7, 10)), (1, 100, range(10)), (2, 4, range(8, 10)), (3, 4, range(7, 10))],
)
def test_sliding_window_keeps_what_llama_cpp_keeps(swa_type, n_swa, kept):
    assert state.CacheShape(n_swa, swa_type, ()).positions(10) == list(kept)


@pytest.mark.parametrize("made", [sample, hybrid])
def test_damage_is_noticed_wherever_it_is(made):
    """One flipped bit in any byte, and every length shorter than the whole."""
    data = made()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << at % 8
        with pytest.raises(IntactKVError):
            ikv.read(bytes(broken))
    for end in range(len(data)):
        with pytest.raises(IntactKVError):
            ikv.read(data[:end])
    with pytest.raises(IntactKVError, match="INTACTKV"):
        ikv.read(data + b"\0")


def sealed(body: bytes, text: bytes) -> bytes:
    """A file whose checksum is right whatever is in it."""
    return body + text + struct.pack("<Q32s8s", len(text), hashlib.sha256(body + text).digest(), b"INTACTKV")


def split(data: bytes) -> tuple[bytes, bytes]:
    (length,) = struct.unpack_from("<Q", data, len(data) - 48)
    return data[: len(data) - 48 - length], data[len(data) - 48 - length : len(data) - 48]


@pytest.mark.parametrize(
    "data, n_tokens, n_values",
    # Both bytes of each value of K and V may change: signs, and the lowest byte's highest bit; all four of a state's.
    [(sample(**rope), 5, 2 * (2 * (5 * 2 * 4 + 5 * 2 * 6) + (3 * 2 * 4 + 3 * 2 * 4))) for rope in ({}, SECTIONS)]
    + [(hybrid(), 3, 2 * (2 * 3 * 2 * (4 + 6)) + 4 * (3 + 5 + 2))],
    ids=["norm", "imrope", "hybrid"],
)
def test_a_right_checksum_is_not_enough(data, n_tokens, n_values):
    """Each byte of the state changed under a right checksum: refused, or another value of K and V, or of a state."""
    body, text = split(data)
    accepted = 0
    for at in range(len(body)):
        broken = bytearray(body)
        broken[at] ^= 0x80
        data = sealed(bytes(broken), text)
        try:
            ikv.read(data)
        except IntactKVError as error:
            assert "\n" not in str(error)
            if library.is_patched():
                with pytest.raises(IntactKVError):
                    bindings.verify(data)
        else:
            accepted += 1
            if library.is_patched():
                assert bindings.verify(data) == n_tokens
    assert accepted == n_values


NOT_FINITE = [np.float32(np.inf), np.float32(-np.inf), np.float32(np.nan)]


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("il, side, name", [(3, 0, "convolution's state of layer 3"), (3, 1, "recurrent state of")])
def test_states_are_finite(il, side, name, value):
    """Where they are built, and in a file of another make, by both readers."""
    model = describe(cache([layer(0)])) | {"recurrent": RECURRENT}
    S = states(model)
    good = ikv.build(model, [1, 5, 7], *rows(model, 3), ORIGIN, S)
    at = good.index(S[il][side].tobytes())
    body, text = split(good)
    bad = sealed(body[:at] + value.tobytes() + body[at + 4 :], text)
    with pytest.raises(IntactKVError, match=f"NaN or infinity in the {name}"):
        ikv.read(bad)
    if library.is_patched():
        with pytest.raises(IntactKVError, match=f"NaN or infinity in the {name}"):
            bindings.verify(bad)
    S[il][side][0] = value
    with pytest.raises(IntactKVError, match=f"NaN or infinity in the {name}"):
        ikv.build(model, [1, 5, 7], *rows(model, 3), ORIGIN, S)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"state n_r of layer 3 is missing and must be float32 \(3,\)"),
        ({3: (np.zeros(4, np.float32), np.zeros(5, np.float32))}, r"n_r of layer 3 is float32 \(4,\) and must be"),
        ({3: (np.zeros(3, np.float32), np.zeros(5, np.float64))}, r"n_s of layer 3 is float64 \(5,\) and must be"),
    ],
)
def test_states_are_those_of_the_model(changes, message):
    model = describe(cache([layer(0)])) | {"recurrent": RECURRENT}
    with pytest.raises(IntactKVError, match=message):
        ikv.build(model, [1, 5, 7], *rows(model, 3), ORIGIN, (states(model) | changes) if changes else {})


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("n_layer", 0, "n_layer is 0, not an integer from 1 to 4096"),
        ("n_layer", 4, r"layers\[1\].il is 4, not an integer from 0 to 3"),
        ("n_layer", 9, "number of layers of the model is 5 at byte"),
        ("layers", [], "layers is list, not an array of 1 to 5"),
        ("layers", RECURRENT["layers"][::-1], r"layers\[1\].il is 3, not above that of the layer before it, 4"),
        ("layers", RECURRENT["layers"][:1], "type of a layer's state is|size of a layer's state is"),
        ("layers", [{"il": 3, "n_r": 5, "n_s": 3}], "size of a layer's state is 12 at byte"),
        ("layers", [{"il": 3, "n_r": 2**31, "n_s": 3}], "n_r is 2147483648, not an integer from 0 to 1073741824"),
    ],
)
def test_recurrent_layers_of_a_manifest_are_checked(path, value, message):
    body, text = split(hybrid())
    manifest = json.loads(text)
    manifest["model"]["recurrent"][path] = value
    bad = sealed(body, json.dumps(manifest).encode())
    with pytest.raises(IntactKVError, match=message):
        ikv.read(bad)
    if library.is_patched():
        with pytest.raises(IntactKVError):
            bindings.verify(bad)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("format", 3, "is 3 and this version reads the formats 1 and 2"),
        ("tokens", [], "tokens is list"),
        ("tokens", [1, 5, 7, 9, 1000], r"tokens\[4\] is 1000"),
        ("tokens", [1, 5, 7, 9, True], r"tokens\[4\] is True"),
        ("model.n_vocab", 0, "n_vocab"),
        ("model.vocab_sha256", "xyz", "SHA-256"),
        ("model.caches", [], "caches"),
        ("model.rope.scale", "1", "scale"),
        ("model.rope.scale", 10**400, "not a finite number"),
        ("format", 1.0, "reads the formats 1 and 2"),
        ("model.rope.sections", [1, 2, 3, 4], "sections is list, not a number or a string"),
        ("model.rope.type", "mrope", "no field manifest.model.rope.sections"),
        ("model.rope", ROPE | SECTIONS | {"sections": [1, 2, 3]}, "sections is list, not an array of 4 to 4"),
        ("model.rope", ROPE | SECTIONS | {"sections": [1, 2, 3, -1]}, r"sections\[3\] is -1, not an integer from 0 to"),
        (
            "model.rope",
            ROPE | SECTIONS,
            "number of sequences|x of a cell|token of a cell|sequence of a cell|state ends",
        ),
        ("model.rope.more", [1], "more"),
        ("reference", None, "reference"),
        ("reference.sha256", "AB" * 32, "SHA-256"),
        ("engine.versions", {"a": 1}, "versions.a"),
        ("messages", [{"role": "system"}], r"messages\[0\].content"),
        ("bos_only", 1, "bos_only"),
        ("extra_cells", 0, "extra_cells is 0, not an integer from 1 to 65536"),
        ("extra_cells", 65537, "extra_cells is 65537"),
        ("extra_cells", 2.0, "extra_cells is 2.0"),
        ("extra_cells", 2, "number of cells is 5 at byte 36 and must be 7"),
        ("calibrated", {"in_sight": 1}, "calibrated.in_sight is 1, not true or false"),
        ("calibrated", {"in_sight": True}, "calibrated.in_sight is True, not false for a prefix of 5 tokens, only the"),
    ],
)
def test_manifest_is_checked(path, value, message):
    body, text = split(sample())
    root = json.loads(text)
    *parents, last = path.split(".")
    node = root
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(IntactKVError, match=message):
        ikv.read(sealed(body, json.dumps(root).encode()))


@pytest.mark.parametrize(
    "positions", [[0, 0, 1, 2, 0], [2, 0, 1, 0, 0], [0, 1, 0, 2, 0], [0, 1, 2, 0, 1], [0, 1, 2, 2, 0]]
)
def test_cells_in_any_order(positions):
    """Of the cells at position 0 the first is the first token's. C++ and Python agree on what is too many of one."""
    model = describe(cache([layer(0)]))
    K, V = rows(model, 5)
    body, text = split(ikv.build(model, [1, 5, 7], K, V, {**ORIGIN, "extra_cells": 2}))
    moved = bytearray(body)
    for i, pos in enumerate(positions):
        struct.pack_into("<i", moved, 12 + 3 * 4 + 8 + 12 * i, pos)
    data = sealed(bytes(moved), text)
    if positions.count(0) != 3:
        with pytest.raises(
            IntactKVError, match="given too often or not among the 5 that a prefix of 3 tokens and 2 ext"
        ):
            ikv.read(data)
    else:
        extra = iter((3, 4))
        cells = [next(extra) if pos == 0 and 0 in positions[:i] else pos for i, pos in enumerate(positions)]
        assert ikv.read(data).layers[0].cells.tolist() == cells
    if library.is_patched():
        if positions.count(0) != 3:
            with pytest.raises(IntactKVError, match="too often"):
                bindings.verify(data)
        else:
            assert bindings.verify(data) == 3


def test_not_a_number_in_an_extra_cell():
    model = describe(cache([layer(0)]))
    K, V = rows(model, 5)
    V[0][4, 1, 2] = np.nan
    with pytest.raises(IntactKVError, match="V of layer 0, extra cell 1, where"):
        ikv.build(model, [1, 5, 7], K, V, {**ORIGIN, "extra_cells": 2})


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"1e999", b"[" * 100_000, b'{"format":NaN}'])
def test_manifest_that_is_none(text):
    body, _ = split(sample())
    with pytest.raises(IntactKVError):
        ikv.read(sealed(body, text))


@pytest.mark.parametrize(
    "name, change",
    [
        ("missing", lambda k: None),
        ("float32", lambda k: k.astype(np.float32)),
        (r"\(5, 2, 3\)", lambda k: k[..., :3]),
        ("NaN", lambda k: np.where(k == k[3, 1, 2], np.float16("nan"), k)),
        ("infinity", lambda k: np.where(k == k[0, 0, 0], np.float16("inf"), k)),
    ],
)
def test_build_refuses_rows_that_do_not_fit(name, change):
    model = describe(cache([layer(0)]))
    K, V = rows(model, 5)
    K = {il: changed for il, k in K.items() if (changed := change(k)) is not None}
    with pytest.raises(IntactKVError, match=name):
        ikv.build(model, [1, 2, 3, 4, 5], K, V, ORIGIN)


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), (b"", "empty"), (b"hello", "neither a prefix file nor a GGUF"), (b"GGUF", "not a whole")],
)
def test_files_that_are_none(tmp_path, content, message):
    path = tmp_path / "x.ikv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IntactKVError, match=message) as caught:
        ikv.read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_embed_changes_nothing_else(tmp_path, model):
    """Real quantized model: metadata and tensor data stay, an embedded prefix is replaced, extract gives it back."""
    gguf = pytest.importorskip("gguf")
    source, out = model("Q4_K_M"), tmp_path / "out.gguf"
    first, data = sample(), sample()
    ikv.embed(source, ikv.read(first), out)
    ikv.embed(out, ikv.read(data))

    ours, theirs = gguf.GGUFReader(out), gguf.GGUFReader(source)
    added = {"intactkv.format", "intactkv.reference.sha256", "intactkv.state.offset", "intactkv.state.size"}
    assert set(ours.fields) - added - {"GGUF.kv_count"} == set(theirs.fields) - {"GGUF.kv_count"}
    for name in set(theirs.fields) - {"GGUF.kv_count"}:
        for a, b in zip(ours.fields[name].parts, theirs.fields[name].parts, strict=True):
            assert a.tobytes() == b.tobytes()
    types = set()
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.name, a.tensor_type, a.shape.tolist()) == (b.name, b.tensor_type, b.shape.tolist())
        assert a.data.tobytes() == b.data.tobytes()
        assert a.data_offset % 32 == 0
        types.add(a.tensor_type.name)
    assert len(types) > 2

    assert ikv.find(out) == out
    back = ikv.read(out)
    assert back.data == data and back.embedded and back.source == out
    ikv.extract(out, tmp_path / "back.ikv")
    assert (tmp_path / "back.ikv").read_bytes() == data

    ikv.stamp(out, "ef" * 32)
    values = gguf_file.read(out).values
    assert values["intactkv.reference.sha256"] == "ef" * 32 and "intactkv.state.offset" not in values
    with pytest.raises(IntactKVError, match="no prefix embedded"):
        ikv.read(out)
    with pytest.raises(IntactKVError, match="ef" * 32):
        ikv.embed(out, back)


@pytest.mark.parametrize("alignment", [8, 32, 256])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0", "Q2_K", "IQ4_XS", "I8"])
def test_copy_keeps_alignment_and_types(tmp_path, alignment, kind):
    gguf = pytest.importorskip("gguf")
    dtype = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[dtype]
    rng = np.random.default_rng(1)
    data = {f"t{i}": rng.integers(0, 255, (i + 1, 512 // block * size), np.uint8) for i in range(3)}
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_array("a.strings", ["x", "", "grüß"])
    writer.add_array("a.numbers", [1.5, 2.5])
    writer.add_bool("a.bool", True)
    for name, values in data.items():
        writer.add_tensor(name, values, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    changes = {"new.number": gguf_file.Uint64(1 << 40), "new.text": "grün", "a.bool": None}
    ikv.rewrite(tmp_path / "in.gguf", changes, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert "a.bool" not in reader.fields
    assert reader.fields["new.number"].contents() == 1 << 40 and reader.fields["new.text"].contents() == "grün"
    assert reader.fields["a.strings"].contents() == ["x", "", "grüß"]
    header = gguf_file.read(tmp_path / "out.gguf", arrays=True)
    assert header.values["a.numbers"] == [1.5, 2.5] and header.alignment == alignment
    for tensor, ours in zip(reader.tensors, header.tensors, strict=True):
        assert tensor.data.tobytes() == data[tensor.name].tobytes()
        assert tensor.data_offset == ours.offset and ours.offset % alignment == 0


def test_find_beside_the_model(tmp_path, model):
    path = ikv.stamp(model("Q4_K_M"), "ab" * 32, tmp_path / "smol-Q4_K_M.gguf")
    assert ikv.find(path) is None
    ikv.write(tmp_path / "smol.ikv", sample())
    assert ikv.find(path) == tmp_path / "smol.ikv"
    ikv.stamp(path, "99" * 32)  # the same name, another model
    assert ikv.find(path) is None
    ikv.write(tmp_path / "smol-Q4_K_M.ikv", sample())
    assert ikv.find(path) == tmp_path / "smol-Q4_K_M.ikv"


@needs_patch
def test_every_cut_of_a_gguf_header_is_one_sentence(tmp_path, model):
    """A GGUF cut off anywhere in its header, and with each of its first bytes changed."""
    whole = model("Q4_K_M").read_bytes()[:3000]
    path = tmp_path / "cut.gguf"
    for n in [*range(64), *range(64, 3000, 97)]:
        path.write_bytes(whole[:n])
        with pytest.raises(IntactKVError) as caught:
            gguf_file.read(path)
        assert "\n" not in str(caught.value)
    for at in range(64):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        path.write_bytes(broken)
        with pytest.raises(IntactKVError):
            gguf_file.read(path)
