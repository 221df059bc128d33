"""IntactLlama behind a prefix with extra cells, which stand for no token: they are there whenever the prefix is, and
take no position and no token's number."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from intactkv_export.runtime import intact_llama, open_chat
from intactkv_export.runtime.intact_llama import IntactLlama, L
from tests.support import extra_cells, random_models
from tests.support.own_process import run
from tests.support.smol import Smol

N = 16
REST = [504, 6354, 16438, 314, 260, 338, 5345, 30]


@pytest.fixture(scope="module")
def files(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("extra")
    pairs = (("prompt", smol.ikv), ("bos", smol.bos))
    return {kind: Path(str(extra_cells.write(path, smol.reference, root / kind, N).source)) for kind, path in pairs}


@pytest.fixture(params=[("bos", "q8_0"), ("prompt", "f16")], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The kind of prefix and the KV type."""
    return request.param


@pytest.fixture
def prefix(pair: tuple[str, str], files: dict[str, Path]) -> ikv.Prefix:
    return ikv.read(files[pair[0]])


@pytest.fixture
def kv_type(pair: tuple[str, str]) -> str:
    return pair[1]


def make(smol: Smol, prefix: ikv.Prefix | None, kv_type: str = "q8_0", **kwargs: Any) -> IntactLlama:
    settings = {"tail": 0, "n_ctx": 256, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2, **kwargs}
    return IntactLlama(smol.gguf, prefix and prefix.source, kv_type, **settings)


def logits(llama: Any) -> np.ndarray:
    """Of the last evaluated token."""
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


def after(llama: IntactLlama, tokens: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return logits(llama)


def by_hand(smol: Smol, prefix: ikv.Prefix, tokens: list[int], kv_type: str) -> np.ndarray:
    """Logits after tokens that begin with the prefix, which is loaded by the C API; the rest in one batch."""
    llama = make(smol, None, kv_type)
    n = bindings.load(llama.ctx, prefix.data)
    llama._batch.set_batch(batch=tokens[n:], n_past=n, logits_all=False)
    llama._ctx.decode(llama._batch)
    return logits(llama)


def n_intact(prefix: ikv.Prefix, kv_type: str) -> int:
    return 0 if kv_type == "f16" else prefix.n_cells


def test_loaded_left_and_loaded_again(smol: Smol, prefix: ikv.Prefix, kv_type: str) -> None:
    llama, tokens = make(smol, prefix, kv_type), prefix.tokens + REST
    first = after(llama, tokens)
    assert np.array_equal(first, by_hand(smol, prefix, tokens, kv_type))
    stats = llama.prefix_stats
    assert (stats["tokens"], stats["extra_cells"], stats["loads"]) == (len(prefix.tokens), N, 1)
    assert stats["intact_cells"] == n_intact(prefix, kv_type) and llama.n_tokens == len(tokens)
    assert llama._input_ids.tolist() == tokens

    n = len(prefix.tokens)
    llama.n_tokens = n  # back to the end of the prefix, as generate() does
    llama.eval(REST)
    assert np.array_equal(logits(llama), first) and llama.prefix_stats["loads"] == 1

    other = [*prefix.tokens[:-1], 30, *REST]  # leaves the prefix: an ordinary sequence, without the extra cells
    llama.n_tokens = n - 1
    llama.eval(other[n - 1 :])
    ordinary = make(smol, None, kv_type)
    assert np.array_equal(logits(llama), after(ordinary, other)) and llama.intact_cells == 0
    assert np.array_equal(after(llama, tokens), first) and llama.intact_cells == n_intact(prefix, kv_type)


def test_a_sequence_that_ends_with_the_prefix(smol: Smol, prefix: ikv.Prefix, kv_type: str) -> None:
    """Its last token is evaluated, for the logits; then the whole prefix is there again. A prefix of one token has its
    own logits: its cell cannot be taken away and the others left."""
    llama, n = make(smol, prefix, kv_type), len(prefix.tokens)
    got = after(llama, prefix.tokens)
    if n == 1:
        assert np.array_equal(got, after(make(smol, None, kv_type), prefix.tokens))
    else:
        assert not np.array_equal(got, after(make(smol, ikv.read(smol.ikv), kv_type), prefix.tokens))
    assert llama.n_tokens == n and llama.intact_cells == n_intact(prefix, kv_type)
    llama.eval(REST)
    assert np.array_equal(logits(llama), by_hand(smol, prefix, prefix.tokens + REST, kv_type))


def test_states(smol: Smol, prefix: ikv.Prefix, kv_type: str) -> None:
    llama, tokens = make(smol, prefix, kv_type), prefix.tokens + REST
    llama.eval(tokens)
    state = pickle.loads(pickle.dumps(llama.save_state()))
    llama.eval([30])
    want = logits(llama)
    after(llama, REST)
    for target in (llama, make(smol, prefix, kv_type)):
        target.load_state(state)
        assert target.n_tokens == len(tokens) and target.intact_cells == n_intact(prefix, kv_type)
        target.eval([30])
        assert np.array_equal(logits(target), want)
        target.n_tokens = len(prefix.tokens)
        target.eval(REST)
        assert np.array_equal(logits(target), by_hand(smol, prefix, tokens, kv_type))
    with pytest.raises(IntactKVError, match="saved with prefix"):
        make(smol, ikv.read(smol.ikv), kv_type).load_state(state)


def test_the_context_is_as_many_tokens_shorter(smol: Smol, prefix: ikv.Prefix, kv_type: str) -> None:
    llama, n = make(smol, prefix, kv_type), len(prefix.tokens)
    assert llama.n_ctx() == llama._n_ctx == len(llama.input_ids) == 256 - N
    text = (REST * 40)[: 256 - N - n]
    llama.eval(prefix.tokens + text)
    with pytest.raises(IntactKVError, match=f"1 tokens after {256 - N} do not fit into the context of {256 - N}"):
        llama.eval([30])
    reply = llama.create_completion(prefix.tokens + text[:-20], max_tokens=-1, temperature=0, logit_bias={2: -100.0})
    assert reply["usage"]["completion_tokens"] == 20 and reply["choices"][0]["finish_reason"] == "length"
    with pytest.raises(ValueError, match=f"exceed context window of {256 - N}"):
        llama.create_completion(prefix.tokens + text, max_tokens=1)
    assert len(pickle.loads(pickle.dumps(llama)).input_ids) == 256 - N


def test_a_text_goes_on_and_on_behind_them(smol: Smol, prefix: ikv.Prefix, kv_type: str) -> None:
    """A context shift with generation going on: what is kept is the prefix's tokens, and the extra cells with them."""
    llama, n = make(smol, prefix, kv_type), len(prefix.tokens)
    llama.eval(prefix.tokens + REST + REST[:4])
    assert llama.shift_context() == 6
    assert llama._input_ids.tolist() == prefix.tokens + REST[6:] + REST[:4]
    llama.eval([30])
    fresh = after(make(smol, prefix, kv_type), prefix.tokens + REST[6:] + REST[:4] + [30])
    assert np.corrcoef(logits(llama), fresh)[0, 1] > 0.8
    assert llama.shift_context(100) == 7 and llama.n_tokens == n
    llama.eval(REST)
    assert np.array_equal(logits(llama), by_hand(smol, prefix, prefix.tokens + REST, kv_type)), "as right behind them"
    for _ in range(2):
        llama.eval(REST * ((llama.n_ctx() - llama.n_tokens) // len(REST)))
        assert llama.shift_context() > 80
        assert next(llama.generate([*llama._input_ids.tolist(), 30], temp=0.0)) >= 0
        assert llama.intact_cells == n_intact(prefix, kv_type) and llama._input_ids[:n].tolist() == prefix.tokens


def test_a_chat(smol: Smol, files: dict[str, Path]) -> None:
    """Behind a prefix of the first token any system prompt begins with it; the default cache has a tail."""
    talk = open_chat(smol.gguf, notice=pytest.fail, prefix=files["bos"], n_ctx=512, n_threads=2)
    talk.sampling.max_tokens, talk.sampling.seed = 6, 1
    assert "".join(talk.say("Name a colour.")) and "".join(talk.say("And another."))
    stats = talk.llama.prefix_stats
    assert (stats["loads"], stats["tokens"], stats["extra_cells"]) == (1, 1, N)
    assert stats["intact_cells"] == 1 + N + stats["tail_cells"] and talk.llama.n_ctx() == 512 - N
    assert (
        f"1 token and 16 extra cells from {files['bos']}" in talk.report() and f"of {512 - N} tokens" in talk.report()
    )
    with pytest.raises(UsageError, match="has 24 tokens and 16 extra cells, and --ctx-size is 40"):
        open_chat(smol.gguf, notice=pytest.fail, prefix=files["prompt"], n_ctx=40)


def test_a_context_too_small(smol: Smol, files: dict[str, Path], tmp_path: Path) -> None:
    _, K, V = extra_cells.text_rows(smol.reference, n=N)
    many = {il: np.repeat(x, 16, 0) for il, x in K.items()}, {il: np.repeat(x, 16, 0) for il, x in V.items()}
    (tmp_path / "many.ikv").write_bytes(extra_cells.with_extra(ikv.read(smol.bos), *many))
    with pytest.raises(IntactKVError, match="has 1 token and 256 extra cells, the context only n_ctx = 256"):
        IntactLlama(smol.gguf, tmp_path / "many.ikv", "q8_0", n_ctx=256)


PLAIN_LLAMA = """
import ctypes, json
import numpy as np
from intactkv_export import library
L = library.load()
llama = L.Llama({gguf!r}, n_ctx=256, n_threads=2, n_threads_batch=2, flash_attn=True, verbose=False)
tokens, n = (L.llama_token * 256)(), ctypes.c_size_t()
assert L.llama_state_seq_load_file(llama.ctx, {path!r}.encode(), 0, tokens, 256, ctypes.byref(n)) > 0
llama.n_tokens = n.value
llama.input_ids[: n.value] = tokens[: n.value]
prompt = [*tokens[: n.value], *{rest}]
made = []
for token in llama.generate(prompt, temp=0.0):
    made.append(token)
    if len(made) == 12:
        break
print(json.dumps(made))
"""


def test_llama_cpp_pythons_own_llama_on_stock_libraries(
    smol: Smol, prefix: ikv.Prefix, stock_lib: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = PLAIN_LLAMA.format(gguf=str(smol.gguf), path=str(prefix.source), rest=REST)
    stock = run(code, lib=stock_lib)
    assert stock.returncode == 0, stock.stderr
    monkeypatch.setenv("INTACTKV_ATTN", "stock")
    llama = make(smol, prefix, "f16", n_ubatch=512, n_batch=512)
    pieces = llama.generate(prefix.tokens + REST, temp=0.0)
    assert json.loads(stock.stdout) == [next(pieces) for _ in range(12)]


INTACT_ON_STOCK = """
import json
from intactkv_export.runtime import IntactLlama
llama = IntactLlama({gguf!r}, {path!r}, "f16", n_ctx=256, n_threads=2, n_threads_batch=2)
pieces = llama.generate({tokens}, temp=0.0)
made = [next(pieces) for _ in range(6)]
llama.shift_context(4)
print(json.dumps([made, next(llama.generate([*llama._input_ids.tolist(), 30], temp=0.0)), llama.n_ctx()]))
"""


def test_intact_llama_on_stock_libraries(smol: Smol, prefix: ikv.Prefix, stock_lib: Path) -> None:
    code = INTACT_ON_STOCK.format(gguf=str(smol.gguf), path=str(prefix.source), tokens=prefix.tokens + REST)
    ours, stock = run(code, INTACTKV_ATTN="stock"), run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert ours.stdout == stock.stdout and json.loads(stock.stdout)[2] == 256 - N


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF with windows of 8 tokens in some layers, random weights; a prefix of one token with 5 extra cells."""
    pytest.importorskip("torch")
    from intactkv_export.engines import llama_engine

    root = tmp_path_factory.mktemp("gemma3")
    made = random_models.build("gemma3", root / "gemma3")
    random_models.to_gguf([made])
    gguf, rng = root / "gemma3.gguf", np.random.default_rng(0)
    model, K, V, _ = llama_engine.compute(gguf, [1], n_threads=1)
    for rows in (K, V):
        for il in rows:
            noise = rng.standard_normal((5, *rows[il].shape[1:]))
            rows[il] = np.concatenate([rows[il], noise]).astype(np.float16)
    origin = {
        "text": "", "messages": None, "bos_only": True, "chat_template_sha256": None, "calibrated": None,
        "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
        "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
    }  # fmt: skip
    (root / "x.ikv").write_bytes(ikv.build(model, [1], K, V, {**origin, "extra_cells": 5}))
    return gguf, root / "x.ikv"


def sliding(gemma3: tuple[Path, Path], **settings: Any) -> IntactLlama:
    settings = {"tail": 0, "n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "n_batch": 512, **settings}
    with pytest.warns(UserWarning, match="does not say which reference"):
        return IntactLlama(*gemma3, "q8_0", **settings)


def test_a_window_leaves_them_with_the_first_token(gemma3: tuple[Path, Path]) -> None:
    """With a cache of the window's size as with one of all tokens; what was dropped is loaded again to go back."""
    tokens = [1, *(int(t) for t in np.random.default_rng(1).integers(6, 400, 300))]
    full, small = sliding(gemma3, swa_full=True, n_ubatch=64), sliding(gemma3, swa_full=False, n_ubatch=64)
    for llama in (full, small):
        llama.eval(tokens[:6])
    assert np.allclose(logits(full), logits(small), atol=0.02)
    for llama in (full, small):
        llama.eval(tokens[6:])
    a, b = logits(full), logits(small)
    assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(a)
    small.n_tokens = 6  # the window's cache has lost its beginning
    small.eval(tokens[6:20])
    again = after(small, tokens[:20])
    assert np.linalg.norm(logits(small) - again) < 0.02 * np.linalg.norm(again) and small.prefix_stats["loads"] == 3


@pytest.mark.parametrize("n", [5, 20], ids=["in sight", "out of sight"])
def test_states_of_windows(gemma3: tuple[Path, Path], n: int) -> None:
    """Bit for bit, while the window's cache has the extra cells and when it has dropped them."""
    tokens = [1, *(int(t) for t in np.random.default_rng(1).integers(6, 400, 40))]
    llama, other = (sliding(gemma3, swa_full=False, n_ubatch=64, tail=4) for _ in range(2))
    llama.eval(tokens[:n])
    state = llama.save_state()
    llama.eval(tokens[n:])
    other.load_state(state)
    other.eval(tokens[n:])
    assert np.array_equal(logits(other), logits(llama)) and other.intact_cells == llama.intact_cells
    assert other.save_state().llama_state == llama.save_state().llama_state


def test_no_room_in_a_windows_cache(gemma3: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when the model is opened, not in the middle of some text."""
    with pytest.raises(IntactKVError, match="has 5 extra cells, for which .* beside n_ubatch = 248: use swa_full=True"):
        IntactLlama(*gemma3, "q8_0", n_ctx=512, swa_full=False, n_ubatch=248)
    tokens = [1, *(int(t) for t in np.random.default_rng(1).integers(6, 400, 300))]
    for settings in ({"swa_full": True, "n_ubatch": 248}, {"swa_full": False, "n_ubatch": 244}):
        llama = sliding(gemma3, **settings)
        llama.eval(tokens[:7])
        llama.eval(tokens[7:])
        assert llama.n_tokens == 301
    monkeypatch.setattr(intact_llama, "has_room", lambda *_: True)
    llama = sliding(gemma3, swa_full=False, n_ubatch=248)
    llama.eval(tokens[:7])
    with pytest.raises(RuntimeError, match="llama_decode returned 1"):
        llama.eval(tokens[7:])
