"""Saved sequences: refused where they do not belong, small, and shared through llama_cpp's caches."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import IntactLlama, L
from tests.support.smol import SYSTEM_PROMPT, Smol

REST = [504, 6354, 16438, 314, 260, 338, 5345, 30]


def make(smol: Smol, kv_type: str = "q4_0", **kwargs: Any) -> IntactLlama:
    settings = {"prefix": smol.ikv, "n_ctx": 256, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2, **kwargs}
    return IntactLlama(kwargs.pop("gguf", smol.gguf), kv_type=kv_type, **{"tail": 0, **settings})


def logits(llama: Any) -> np.ndarray:
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


@pytest.fixture(scope="module")
def fine_tuned(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model but for some weights of one tensor."""
    data = bytearray(smol.gguf.read_bytes())
    at = gguf_file.read(smol.gguf).tensors[100].offset
    data[at + 200 : at + 300] = bytes(100)
    path = tmp_path_factory.mktemp("tuned") / "tuned.gguf"
    path.write_bytes(data)
    return path


def make_other(smol: Smol, fine_tuned: Path, other: str) -> IntactLlama:
    if other == "kv_type":
        return make(smol, "q8_0")
    if other == "n_ctx":
        return make(smol, n_ctx=512)
    if other == "prefix":
        return make(smol, prefix=smol.bos)
    if other == "no prefix":
        return make(smol, prefix=None)
    return IntactLlama(fine_tuned, smol.ikv, "q4_0", 0, n_ctx=256, n_batch=128, n_threads=2, n_threads_batch=2)


@pytest.mark.parametrize("other", ["kv_type", "n_ctx", "prefix", "no prefix", "model"])
def test_a_state_of_another_is_refused_and_the_next_result_is_right(smol: Smol, fine_tuned: Path, other: str) -> None:
    source = make(smol)
    source.eval(smol.tokens + REST)
    state = pickle.loads(pickle.dumps(source.save_state()))
    llama = make_other(smol, fine_tuned, other)
    llama.eval(smol.tokens + REST)
    expected, cells = logits(llama), llama.intact_cells
    name = "prefix" if other == "no prefix" else other
    with pytest.raises(IntactKVError, match=f"this state was saved with {name} .*, and here {name} is") as caught:
        llama.load_state(state)
    assert "\n" not in str(caught.value)
    assert next(llama.generate(smol.tokens + REST, temp=0)) == expected.argmax() and llama.intact_cells == cells
    llama.reset()
    llama.eval(smol.tokens + REST)
    assert np.array_equal(logits(llama), expected)


def damaged(state: Any, how: str) -> Any:
    if how == "a bit":
        state.llama_state = state.llama_state[:5000] + bytes([state.llama_state[5000] ^ 1]) + state.llama_state[5001:]
    elif how == "cut off":
        state.llama_state = state.llama_state[:-1000]
    elif how == "tokens":
        state.input_ids[3] += 1
    elif how == "number":
        state.n_tokens += 1
    elif how == "attribute":
        del state.batches
    return state


@pytest.mark.parametrize("how", ["a bit", "cut off", "tokens", "number", "attribute"])
def test_a_damaged_state_is_refused_and_the_next_result_is_right(smol: Smol, how: str) -> None:
    llama = make(smol)
    llama.eval(smol.tokens + REST)
    expected = logits(llama)
    with pytest.raises(IntactKVError, match="this state is damaged"):
        llama.load_state(damaged(llama.save_state(), how))
    llama.n_tokens = len(smol.tokens) + 3
    llama.eval(REST[3:])
    assert np.array_equal(logits(llama), expected)


def test_what_llama_cpp_refuses_leaves_an_empty_sequence(smol: Smol) -> None:
    llama = make(smol)
    llama.eval(smol.tokens + REST)
    expected, state = logits(llama), llama.save_state()
    state.llama_state = state.llama_state[:-1000]
    state.checksum = state._checksum()  # forged: only llama.cpp can see it
    with pytest.raises(IntactKVError, match="llama.cpp refused this state"):
        llama.load_state(state)
    assert llama.n_tokens == 0 and llama.intact_cells == 0
    llama.eval(smol.tokens + REST)
    assert np.array_equal(logits(llama), expected)


def test_a_state_of_plain_llama_is_refused(smol: Smol) -> None:
    llama = make(smol)
    state = L.LlamaState(np.zeros(256, np.intc), np.zeros((1, 1), np.single), 1, b"x", 1, 0)
    with pytest.raises(IntactKVError, match="does not say which model"):
        llama.load_state(state)


@pytest.mark.parametrize("logits_all", [False, True])
def test_a_state_counts_what_it_holds(smol: Smol, logits_all: bool) -> None:
    llama = make(smol, logits_all=logits_all, n_batch=64)
    llama.eval(smol.tokens + REST)
    state = llama.save_state()
    held = len(pickle.dumps(state))
    assert state.llama_state_size <= held <= 1.02 * state.llama_state_size + 4000
    assert (held > 4 * llama.n_tokens * llama.n_vocab()) == logits_all
    before = llama._scores[: len(state.scores)].copy()
    llama.eval([30])
    llama.scores[:] = 0
    llama.load_state(state)
    assert np.array_equal(llama._scores[: len(state.scores)], before)


def test_a_ram_cache_stays_within_its_capacity(smol: Smol) -> None:
    llama, cache = make(smol), L.LlamaRAMCache(capacity_bytes=3_000_000)
    llama.set_cache(cache)
    for question in ("one", "two", "three", "four"):
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        llama.create_chat_completion(messages, max_tokens=20, temperature=0)
        held = sum(len(pickle.dumps(state)) for state in cache.cache_state.values())
        assert held < 1.05 * cache.capacity_bytes and held < 1.05 * cache.cache_size + 10_000
    assert cache.cache_state and llama.cache.cache_size == cache.cache_size


def test_models_share_a_disk_cache(
    smol: Smol, fine_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "Name a colour."}]

    def ask(llama: IntactLlama) -> tuple[str, int]:
        reply = llama.create_chat_completion(messages, max_tokens=8, temperature=0)
        return reply["choices"][0]["message"]["content"], llama.intact_cells

    others = ["kv_type", "n_ctx", "prefix", "no prefix", "model"]
    alone = {other: ask(make_other(smol, fine_tuned, other)) for other in others}
    cache = L.llama_cache.LlamaDiskCache(str(tmp_path / "cache"))
    first = make(smol)
    first.set_cache(cache)
    ask(first)
    for other in others:
        llama = make_other(smol, fine_tuned, other)
        llama.set_cache(cache)
        assert ask(llama) == alone[other], other
    again, loaded = make(smol), []
    monkeypatch.setattr(IntactLlama, "load_state", lambda self, state: loaded.append(state.n_tokens))
    again.set_cache(cache)
    ask(again)
    assert loaded and loaded[0] > len(ikv.read(smol.ikv).tokens), "its own state is still there"
