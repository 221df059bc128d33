"""The tail through IntactLlama and chat: what is asked for, what is said of it, states, and replies."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import KV_TYPES, default_tail, kv_pair
from intactkv_export.runtime import IntactLlama, L, Sampling, open_chat
from tests.support.smol import Smol

P = 24  # tokens of the prefix
TEXT = "The sea is everything. It covers seven tenths of the globe, and its breath is pure and healthy. " * 12


def make(smol: Smol, kv_type: Any = "q4_0", tail: int | None = None, **kwargs: Any) -> IntactLlama:
    settings = {"n_ctx": 512, "n_batch": 256, "n_ubatch": 16, "n_threads": 2, "n_threads_batch": 2, **kwargs}
    return IntactLlama(smol.gguf, smol.ikv, kv_type, tail, **settings)


def logits(llama: Any) -> np.ndarray:
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


def tokens_of(llama: IntactLlama, smol: Smol, n: int) -> list[int]:
    return smol.tokens + llama.tokenize(TEXT.encode(), add_bos=False)[:n]


@pytest.mark.parametrize(
    ("kv_type", "tail"), [("q4_0", 128), (("q8_0", "q4_0"), 128), ("q8_0", 0), ("bf16", 0), ("f16", 0)]
)
def test_default_by_type(smol: Smol, kv_type: Any, tail: int) -> None:
    assert make(smol, kv_type).tail == tail


@pytest.mark.parametrize("name", KV_TYPES)
def test_library_and_python_have_one_rule(smol: Smol, name: str) -> None:
    if "f32" not in (pair := kv_pair(name)):  # the kernel does not read it
        assert make(smol, name).tail == default_tail(pair)


def test_prefix_and_tail_together(smol: Smol) -> None:
    llama = make(smol, tail=32)
    llama.eval(tokens_of(llama, smol, 100))
    for token in llama.tokenize(b" What is the sea?", add_bos=False):
        llama.eval([token])
    stats = llama.prefix_stats
    assert (stats["tail"], stats["tail_cells"], stats["intact_cells"]) == (32, 33, P + 33)  # 32 and the one evaluated
    assert stats["arena_bytes"] == (P + 32 + 16) * 30 * 2 * 192 * 2  # with one ubatch
    # going back: what was dropped stays dropped, what is still there stays
    llama.n_tokens -= 20
    llama.eval(llama.tokenize(b" No", add_bos=False))
    assert 0 < llama.prefix_stats["tail_cells"] < 33
    llama.reset()
    llama.eval(smol.tokens)
    assert llama.prefix_stats["tail_cells"] == 0 and llama.intact_cells == P, "the last token's cell is the prefix's"


def test_nearer_to_f16_than_without(smol: Smol) -> None:
    """Logits of 40 tokens, one by one, 100 behind the prefix."""
    found = {}
    for name, kv_type, tail in (("f16", "f16", None), ("tail", "q4_0", 128), ("none", "q4_0", 0)):
        llama = make(smol, kv_type, tail)
        llama.eval(tokens_of(llama, smol, 100))
        rows = []
        for token in llama.tokenize(TEXT.encode(), add_bos=False)[100:140]:
            llama.eval([token])
            rows.append(logits(llama))
        found[name] = np.array(rows)
    error = {name: np.abs(found[name] - found["f16"]).mean() for name in ("tail", "none")}
    assert error["tail"] < 0.6 * error["none"], error


def test_a_state_goes_on_in_another_tail(smol: Smol) -> None:
    source = make(smol, tail=64)
    source.eval(tokens_of(source, smol, 90))
    state = pickle.loads(pickle.dumps(source.save_state()))
    before = source.prefix_stats["tail_cells"]
    same, none, longer = make(smol, tail=64), make(smol, tail=0), make(smol, tail=200)
    for llama in (same, none, longer):
        llama.load_state(state)
        assert llama.prefix_stats["tail_cells"] == before and llama.intact_cells == P + before
    source.eval([30])
    same.eval([30])
    np.testing.assert_array_equal(logits(source), logits(same))
    none.eval([30])
    assert none.intact_cells == P and none.prefix_stats["tail_cells"] == 0
    longer.eval([30])
    assert longer.prefix_stats["tail_cells"] == before + 1


def test_pickled_it_has_the_same_tail(smol: Smol) -> None:
    assert pickle.loads(pickle.dumps(make(smol, tail=7))).tail == 7


def test_what_cannot_be_had(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    for tail in (-1, 2**31, 2**32 + 5, "12", 1.5):  # the C API's int32_t would make 5 of the third
        with pytest.raises(UsageError, match=f"tail={tail!r}: give the number of newest cells"):
            make(smol, tail=tail)
    monkeypatch.setenv("INTACTKV_ATTN", "stock")
    with pytest.raises(IntactKVError, match="a tail of 9 intact cells .* INTACTKV_ATTN=stock reads no intact cell"):
        make(smol, tail=9)
    monkeypatch.setenv("INTACTKV_TAIL", "9")
    with pytest.raises(IntactKVError, match="a tail of 9 intact cells"):
        make(smol, tail=9)
    monkeypatch.delenv("INTACTKV_ATTN")
    assert IntactLlama(smol.gguf, None, "q4_0", n_ctx=256).tail == 9
    monkeypatch.setenv("INTACTKV_TAIL", "nine")
    with pytest.raises(IntactKVError, match="INTACTKV_TAIL is 'nine': give a number of cells"):
        make(smol)


def test_chat_reports_the_tail(smol: Smol) -> None:
    talk = open_chat(smol.gguf, notice=print, prefix=smol.ikv, kv_type="q4_0", tail=16, sampling=Sampling(4, 0.0))
    assert "".join(talk.say("Name a colour."))
    report = talk.report()
    assert "tail       16 cells" in report and "F16 rows" in report


def test_chat_has_the_option(smol: Smol, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "intactkv_export", "chat", str(smol.gguf), "--prefix", str(smol.ikv)]
    command += ["--kv-type", "q4_0", "--kv-tail", "64", "-p", "Hi", "-n", "4", "--temp", "0"]
    made = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert made.returncode == 0 and made.stdout.strip(), made.stderr
    wrong = subprocess.run([*command, "--kv-tail", "-3"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert wrong.returncode == 2 and "--kv-tail" in wrong.stderr
