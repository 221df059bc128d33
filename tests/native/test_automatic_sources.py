"""Where automatic prefixes come from, LLAMA_INTACTKV and the model's GGUF, and contexts that are not made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from tests.support import lowlevel, shorter
from tests.support.automatic import context, environment, n_cells
from tests.support.lowlevel import Context, L
from tests.support.smol import Smol


@pytest.fixture(scope="module")
def made(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its prefix embedded."""
    return ikv.embed(smol.gguf, ikv.read(smol.ikv), tmp_path_factory.mktemp("embedded") / "made.gguf")


@pytest.fixture(scope="module")
def loaded(made: Path) -> Any:
    return lowlevel.load_model(made)


def names(ctx: Context) -> list[str]:
    return bindings.prefix_names(ctx.ptr)


def why_not(loaded: Any, value: str | None, kv: str = "q8_0", **params: Any) -> str:
    """Why llama.cpp makes no context; "": it makes one."""
    p = L.llama_context_default_params()
    p.n_ctx = p.n_batch = p.n_ubatch = 512
    p.flash_attn_type, p.type_k, p.type_v = 1, lowlevel.TYPES[kv], lowlevel.TYPES[kv]
    for name, given in params.items():
        setattr(p, name, given)
    with environment(value):
        ctx = L.llama_init_from_model(loaded, p)
    if not ctx:
        return bindings.last_error()
    L.llama_free(ctx)
    return ""


def test_of_the_models_file(loaded: Any, made: Path, smol: Smol) -> None:
    with environment(None):
        ctx = Context(loaded, "q8_0")
    tokens = smol.tokens
    assert names(ctx) == [str(made)]
    assert ctx.batch([(token, pos, [0], False) for pos, token in enumerate(tokens)]) == 0
    assert (ctx.n_not_computed(), ctx.n_intact()) == (len(tokens), len(tokens))
    for value in ("off", None):
        with environment(value):
            plain = Context(lowlevel.load_model(smol.gguf), "q8_0")
        assert names(plain) == []
    with environment("off"):
        assert names(Context(loaded, "q8_0")) == []


def test_relative_paths_hold_when_a_program_goes_elsewhere(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    loaded = lowlevel.load_model(made.name)
    monkeypatch.chdir(tmp_path)
    with environment(None):
        assert names(Context(loaded, "q8_0")) == [str(made)]


def test_files_and_directories_that_are_named(loaded: Any, made: Path, smol: Smol, tmp_path: Path) -> None:
    for name in ("b.ikv", "a.ikv", "other.txt"):
        shutil.copy(smol.bos, tmp_path / name)
    wanted = [str(made), str(tmp_path / "a.ikv"), str(tmp_path / "b.ikv"), str(smol.ikv)]
    with environment(os.pathsep.join([str(tmp_path), "", str(smol.ikv)])):
        assert names(Context(loaded, "q8_0")) == wanted
    with environment(str(made)):
        assert names(Context(lowlevel.load_model(smol.gguf), "f16")) == [str(made)]


def test_a_thread_that_wants_none(loaded: Any) -> None:
    with environment(None):
        with bindings.no_automatic_prefixes():
            assert names(Context(loaded, "q8_0")) == []
        assert len(names(Context(loaded, "q8_0"))) == 1


def test_files_that_fail(loaded: Any, smol: Smol, tmp_path: Path) -> None:
    data = bytearray(smol.ikv.read_bytes())
    data[1000] ^= 1
    damaged = tmp_path / "damaged.ikv"
    damaged.write_bytes(data)
    foreign = tmp_path / "foreign.ikv"
    prefix = ikv.read(smol.ikv)
    rest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    rows = [{x.il: getattr(x, side) for x in prefix.layers} for side in "KV"]
    rest["reference"] = {**rest["reference"], "sha256": "0" * 64}
    foreign.write_bytes(ikv.build(prefix.manifest["model"], prefix.tokens, *rows, rest))
    for path, part in (
        (damaged, "the prefix file is damaged"),
        (foreign, "the reference model's SHA-256 is"),
        (tmp_path / "none.ikv", "No such file or directory"),
        (smol.gguf, "has no prefix embedded"),
    ):
        why = why_not(loaded, str(path))
        assert part in why and str(path) in why and "LLAMA_INTACTKV=off" in why, why
    tmp_path.joinpath("good").mkdir()
    assert why_not(loaded, str(tmp_path / "good")) == "", "a directory may be empty"


def test_an_embedded_prefix_that_fails(made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    data = bytearray(made.read_bytes())
    data[-2000] ^= 1  # of the manifest
    broken.write_bytes(data)
    loaded = lowlevel.load_model(broken)
    assert "damaged" in why_not(loaded, None)
    assert why_not(loaded, "off") == ""
    broken.unlink()


def test_rope_settings_that_the_prefix_does_not_have(loaded: Any) -> None:
    assert "rope" in why_not(loaded, None, rope_freq_base=5e5)


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({"n_ctx": 8, "n_batch": 8, "n_ubatch": 8}, ""),  # rounded up to 256
        ({"embeddings": True}, "for embeddings"),
        ({"flash_attn_type": 0, "kv": "f16"}, "flash attention is off"),
        ({"attention_type": 1}, "not causal"),
    ],
)
def test_contexts_that_can_use_none(loaded: Any, smol: Smol, params: dict[str, Any], part: str) -> None:
    """Those of the model's file are left out; one that the user named is an error."""
    assert why_not(loaded, None, **params) == ""
    assert part in why_not(loaded, str(smol.ikv), **params)


def test_attention_that_reads_no_intact_cell(loaded: Any, smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ATTN", "stock")
    assert why_not(loaded, None) == "" and why_not(loaded, str(smol.ikv), "f16") == ""
    assert "INTACTKV_ATTN=stock" in why_not(loaded, str(smol.ikv))


def test_rows_are_counted_once(loaded: Any, smol: Smol) -> None:
    row = 30 * 2 * 192 * 2  # bytes: layers, K and V, values, F16
    with environment(None):
        for kv in ("q8_0", "f16"):
            for n_seq in (1, 8):
                ctx = Context(loaded, kv, n_seq_max=n_seq)
                assert ctx.arena_bytes() == len(smol.tokens) * row
        tail = Context(loaded, "q4_0", tail=None, n_ubatch=64)
        assert tail.arena_bytes() == (len(smol.tokens) + 128 + 64) * row
        tail.set_tail(0)
        assert tail.arena_bytes() == len(smol.tokens) * row


@pytest.mark.parametrize("tail", [0, 128])
def test_of_several_no_row_is_left_over(f16: Any, smol: Smol, tail: int) -> None:
    """While they are loaded there is room for more than each needs: rows are not copied for every one."""
    row = 30 * 2 * 192 * 2
    ctx = context(f16, "q4_0", smol.ikv, smol.bos, n_ubatch=64, tail=None if tail else 0)
    assert ctx.n_prefixes() == 2
    assert ctx.arena_bytes() == (len(smol.tokens) + 1 + (tail + 64 if tail else 0)) * row


def test_added_later(smol: Smol) -> None:
    with environment("off"):
        ctx = Context(lowlevel.load_model(smol.gguf), "q8_0")
    text = [504, 476, 31616]
    ctx.decode(text, 0)
    assert bindings.add_prefix(ctx.ptr, smol.ikv.read_bytes(), "by hand") == 0
    assert bindings.add_prefix(ctx.ptr, smol.bos.read_bytes(), "first") == 1
    assert names(ctx) == ["by hand", "first"]
    L.llama_memory_clear(ctx.memory, True)
    ctx.batch([(token, pos, [0], False) for pos, token in enumerate(smol.tokens + text)])
    assert ctx.n_not_computed() == len(smol.tokens) and n_cells(ctx) == len(smol.tokens) + 3
    with pytest.raises(IntactKVError, match="cut off"):
        bindings.add_prefix(ctx.ptr, smol.ikv.read_bytes()[:-1], "")
    assert len(names(ctx)) == 2


def test_only_when_asked(smol: Smol) -> None:
    """A program that says itself when a sequence gets one: from the rows that are held."""
    with environment(str(smol.ikv)):
        ctx = Context(lowlevel.load_model(smol.gguf), "q8_0", n_seq_max=2, kv_unified=True)
    n = len(smol.tokens)
    assert bindings.set_automatic(ctx.ptr, False)
    entries = [(token, pos, [0], False) for pos, token in enumerate([*smol.tokens, 504])]
    assert ctx.batch(entries) == 0 and ctx.n_not_computed() == 0 and ctx.n_intact() == 0
    for seq in (0, 1):
        assert bindings.load_held(ctx.ptr, 0, seq) == n
    assert ctx.n_intact(0) == ctx.n_intact(1) == n and n_cells(ctx) == n
    for i, seq, part in ((1, 0, "this context has 1"), (-1, 0, "does not exist"), (0, 2, "n_seq_max = 2")):
        with pytest.raises(IntactKVError, match=part):
            bindings.load_held(ctx.ptr, i, seq)
    assert not bindings.set_automatic(ctx.ptr, True)
    L.llama_memory_clear(ctx.memory, True)
    assert ctx.batch(entries) == 0 and ctx.n_not_computed() == n
    plain = Context(lowlevel.load_model(smol.gguf), "q8_0")
    assert not bindings.set_automatic(plain.ptr, True)
    with pytest.raises(IntactKVError, match="this context has none"):
        bindings.load_held(plain.ptr, 0)


def test_several_in_one_gguf(made: Path, smol: Smol, tmp_path: Path) -> None:
    """As Python writes them; the longest that matches is used."""
    several = tmp_path / "several.gguf"
    ikv.add(made, ikv.read(smol.bos), several, "first")
    with environment(None):
        ctx = Context(lowlevel.load_model(several), "q8_0", n_seq_max=2)
    assert names(ctx) == [f"prompt of {several}", f"first of {several}"]
    for seq, n in ((0, 1), (1, len(smol.tokens))):
        assert ctx.batch([(token, pos, [seq], False) for pos, token in enumerate([*smol.tokens[:n], 504])]) == 0
        assert ctx.n_intact(seq) == n
    assert ctx.n_not_computed() == 1 + len(smol.tokens)
    several.unlink()


def test_a_file_for_the_model_beside_a_draft_model(smol: Smol, tmp_path: Path) -> None:
    """No context has it: an error. One has it: others that cannot use it are made without."""
    draft = lowlevel.load_model(shorter.write(smol.gguf, tmp_path / "draft.gguf", 2))
    (tmp_path / "draft.gguf").unlink()
    served = lowlevel.load_model(smol.gguf)
    for other, params, part in ((draft, {}, "the number of layers"), (served, {"embeddings": True}, "for embeddings")):
        assert part in why_not(other, str(smol.ikv), **params)
        with environment(str(smol.ikv)):
            target = Context(served, "q8_0")
            assert names(target) == [str(smol.ikv)]
        assert why_not(other, str(smol.ikv), **params) == ""
        with environment(str(smol.ikv)):
            assert names(Context(other, "q8_0", **params)) == []
        assert why_not(other, str(tmp_path / "none.ikv")) != ""
        del target
        assert part in why_not(other, str(smol.ikv), **params)
