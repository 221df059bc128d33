"""IntactLlama: the prefix behind every method of Llama, against the C API driven by hand and against plain Llama."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
from intactkv_export.runtime.intact_llama import KV_TYPES, IntactLlama, L
from tests.support.smol import SYSTEM_PROMPT, Smol

P = 24  # tokens of the prefix
CHAT = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "Name a colour."}]
OTHER = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Name a colour."}]


def make(smol: Smol, kv_type: Any = "q4_0", prefix: Any = None, **kwargs: Any) -> IntactLlama:
    """Without a tail: what is intact is of the prefix."""
    settings = {"tail": 0, "n_ctx": 256, "n_batch": 128, "n_threads": 2, "n_threads_batch": 2, **kwargs}
    return IntactLlama(smol.gguf, smol.ikv if prefix is None else prefix, kv_type, **settings)


def plain(smol: Smol, kv_type: str = "q4_0") -> Any:
    kv = KV_TYPES[kv_type]
    llama = L.Llama(
        str(smol.gguf), n_ctx=256, n_batch=128, n_threads=2, n_threads_batch=2, type_k=kv, type_v=kv, flash_attn=True,
        verbose=False,
    )  # fmt: skip
    bindings.set_tail(llama.ctx, 0)
    return llama


def logits(llama: Any) -> np.ndarray:
    """Of the last evaluated token."""
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


def by_hand(smol: Smol, tokens: list[int], kv_type: str = "q4_0") -> np.ndarray:
    """Logits after tokens that begin with the prefix: loaded through the C API, the rest evaluated by plain Llama."""
    return _by_hand(smol, tuple(tokens), kv_type)


@functools.cache
def _by_hand(smol: Smol, tokens: tuple[int, ...], kv_type: str) -> np.ndarray:
    llama = plain(smol, kv_type)
    assert bindings.load(llama.ctx, smol.ikv.read_bytes()) == P
    rest = tokens[P:] or tokens[P - 1 :]
    llama.n_tokens = len(tokens) - len(rest)
    llama.eval(rest)
    return logits(llama)


def ordinary(smol: Smol, tokens: list[int], kv_type: str = "q4_0") -> np.ndarray:
    """Logits after tokens, by plain Llama."""
    return _ordinary(smol, tuple(tokens), kv_type)


@functools.cache
def _ordinary(smol: Smol, tokens: tuple[int, ...], kv_type: str) -> np.ndarray:
    llama = plain(smol, kv_type)
    llama.eval(tokens)
    return logits(llama)


def evaluated(llama: IntactLlama, tokens: list[int]) -> np.ndarray:
    llama.reset()
    llama.eval(tokens)
    return logits(llama)


@pytest.fixture(scope="module")
def rest() -> list[int]:
    return [504, 6354, 16438, 314, 260, 338, 5345, 30]


@pytest.fixture(params=["q4_0", "f16"])
def kv_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def llama(smol: Smol, kv_type: str) -> IntactLlama:
    return make(smol, kv_type)


def n_intact(kv_type: str) -> int:
    return 0 if kv_type == "f16" else P


def test_prefix_is_loaded_and_evaluation_goes_on_behind_it(
    smol: Smol, llama: IntactLlama, kv_type: str, rest: list[int]
) -> None:
    tokens = smol.tokens + rest
    got = evaluated(llama, tokens)
    assert np.array_equal(got, by_hand(smol, tokens, kv_type))
    assert not np.array_equal(got, ordinary(smol, tokens, kv_type)), "the prefix changes something"
    assert llama.intact_cells == n_intact(kv_type) and llama._input_ids.tolist() == tokens
    stats = llama.prefix_stats
    assert stats["loads"] == 1 and stats["tokens"] == P and stats["path"] == str(smol.ikv)


@pytest.mark.parametrize("n_shared", [1, 10, P - 1])
def test_other_tokens_give_the_ordinary_result_and_the_prefix_comes_back(
    smol: Smol, llama: IntactLlama, kv_type: str, rest: list[int], n_shared: int
) -> None:
    with_prefix, other = smol.tokens + rest, smol.tokens[:n_shared] + rest
    first = evaluated(llama, with_prefix)
    llama.n_tokens = n_shared  # what generate() does: keep what the two have in common
    llama.eval(other[n_shared:])
    assert np.array_equal(logits(llama), ordinary(smol, other, kv_type))
    assert llama.intact_cells == 0 and llama._input_ids.tolist() == other
    assert np.array_equal(evaluated(llama, with_prefix), first)
    assert llama.intact_cells == n_intact(kv_type) and llama.prefix_stats["loads"] == 2


def test_a_prompt_that_is_the_prefix(smol: Smol, llama: IntactLlama, kv_type: str, rest: list[int]) -> None:
    assert np.array_equal(evaluated(llama, smol.tokens), by_hand(smol, smol.tokens, kv_type))
    assert llama.n_tokens == P and llama.intact_cells == n_intact(kv_type), "its last cell is intact too"
    llama.eval(rest)
    assert np.array_equal(logits(llama), by_hand(smol, smol.tokens + rest, kv_type))


def test_a_prompt_shorter_than_the_prefix(smol: Smol, llama: IntactLlama, kv_type: str, rest: list[int]) -> None:
    start, middle = smol.tokens[:5], smol.tokens[5:7]
    assert np.array_equal(evaluated(llama, start), ordinary(smol, start, kv_type))
    llama.eval(middle)
    assert llama.intact_cells == 0 and llama.n_tokens == 7
    llama.eval(smol.tokens[7:] + rest)  # now it begins with the prefix
    assert np.array_equal(logits(llama), by_hand(smol, smol.tokens + rest, kv_type))
    assert llama.intact_cells == n_intact(kv_type)


def test_generate_takes_the_same_tokens_as_the_c_api(smol: Smol, llama: IntactLlama, kv_type: str) -> None:
    prompt = smol.tokens + [504, 6354]
    expected = by_hand(smol, prompt, kv_type)
    for _ in range(2):  # the second time from the cache
        assert next(llama.generate(prompt, temp=0.0)) == expected.argmax()
    assert next(llama.generate(smol.tokens, temp=0.0)) == by_hand(smol, smol.tokens, kv_type).argmax()
    assert next(llama.generate(smol.tokens[:9], temp=0.0)) == ordinary(smol, smol.tokens[:9], kv_type).argmax()


def test_several_chats_in_a_row(smol: Smol, kv_type: str) -> None:
    llama = make(smol, kv_type)

    def ask(messages: list[dict[str, str]], stream: bool) -> str:
        answer = llama.create_chat_completion(messages, max_tokens=8, temperature=0, stream=stream)
        if not stream:
            return answer["choices"][0]["message"]["content"]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in answer)

    first = ask(CHAT, stream=False)
    for question in ("And a fruit?", "And a town?"):
        assert ask([CHAT[0], {"role": "user", "content": question}], stream=True)
    assert llama.prefix_stats["loads"] == 1 and llama.intact_cells == n_intact(kv_type), "it stayed in the cache"
    llama.reset()  # the same batches as the first time, so the same bits
    assert ask(CHAT, stream=True) == first
    other = ask(OTHER, stream=False)
    assert llama.intact_cells == 0
    without = L.Llama.create_chat_completion(plain(smol, kv_type), OTHER, max_tokens=8, temperature=0)
    assert other == without["choices"][0]["message"]["content"]
    assert ask(CHAT, stream=True) == first
    assert llama.prefix_stats["loads"] == 3 and llama.intact_cells == n_intact(kv_type)
    text = llama.create_completion(ikv.read(smol.ikv).manifest["text"] + "Hi", max_tokens=2, temperature=0)
    assert text["usage"]["completion_tokens"] == 2 and llama.intact_cells == n_intact(kv_type)


def test_state_is_saved_with_the_prefix(smol: Smol, kv_type: str, rest: list[int]) -> None:
    llama = make(smol, kv_type)
    llama.eval(smol.tokens + rest)
    state = pickle.loads(pickle.dumps(llama.save_state()))  # as LlamaDiskCache does
    llama.eval([30])
    expected = logits(llama)
    evaluated(llama, rest)
    for target in (llama, make(smol, kv_type)):
        target.load_state(state)
        assert target.intact_cells == n_intact(kv_type) and target._input_ids.tolist() == smol.tokens + rest
        target.eval([30])
        assert np.array_equal(logits(target), expected)
        other = smol.tokens[:10] + rest
        target.n_tokens = 10
        target.eval(rest)
        assert np.array_equal(logits(target), ordinary(smol, other, kv_type)), "it knows that cells are the prefix's"
    ordinary_state = llama.save_state()
    evaluated(llama, smol.tokens + rest)
    llama.load_state(ordinary_state)
    assert llama.intact_cells == 0
    assert np.array_equal(evaluated(llama, smol.tokens + rest), by_hand(smol, smol.tokens + rest, kv_type))


def test_llama_cache_restores_the_prefix(smol: Smol) -> None:
    llama = make(smol)
    llama.set_cache(L.LlamaRAMCache())
    for messages, n in ((CHAT, P), (OTHER, 0), (CHAT, P)):
        llama.create_chat_completion(messages, max_tokens=4, temperature=0)
        assert llama.intact_cells == n
    assert llama.prefix_stats["loads"] == 1, "the second time it came from the cache's state"


def test_context_shift_keeps_the_prefix(smol: Smol, llama: IntactLlama, kv_type: str, rest: list[int]) -> None:
    llama.eval(smol.tokens + rest + rest[:4])
    assert llama.shift_context() == 6
    assert llama._input_ids.tolist() == smol.tokens + rest[6:] + rest[:4]
    llama.eval([30])
    assert llama.intact_cells == n_intact(kv_type) and llama.n_tokens == P + 7
    again = evaluated(make(smol, kv_type), smol.tokens + rest[6:] + rest[:4] + [30])
    assert np.corrcoef(logits(llama), again)[0, 1] > 0.8, "the moved cells fit their new places"
    assert llama.shift_context(100) == 7 and llama.n_tokens == P and llama.shift_context() == 0
    for _ in range(2):  # a long text goes on and on behind the same prefix
        llama.eval(rest * ((llama.n_ctx() - llama.n_tokens) // len(rest)))
        assert llama.shift_context() > 80
        assert next(llama.generate([*llama._input_ids.tolist(), 30], temp=0.0)) >= 0
        assert llama.intact_cells == n_intact(kv_type) and llama._input_ids[:P].tolist() == smol.tokens


def test_logits_of_every_token(smol: Smol, kv_type: str, rest: list[int]) -> None:
    llama = make(smol, kv_type, n_ctx=64, logits_all=True)
    llama.eval(smol.tokens + rest)
    assert llama.intact_cells == n_intact(kv_type)
    np.testing.assert_allclose(llama._scores[-1], by_hand(smol, smol.tokens + rest, kv_type), atol=0.1)
    np.testing.assert_array_equal(llama._scores[P - 1], by_hand(smol, smol.tokens, kv_type))
    without = L.Llama(
        str(smol.gguf), n_ctx=64, n_threads=2, n_threads_batch=2, type_k=KV_TYPES[kv_type], type_v=KV_TYPES[kv_type],
        flash_attn=True, logits_all=True, verbose=False,
    )  # fmt: skip
    bindings.set_tail(without.ctx, 0)
    without.eval(smol.tokens[:-1])
    np.testing.assert_array_equal(llama._scores[: P - 1], without._scores, "those of the prefix are filled in")


def test_any_order_of_operations(smol: Smol, rest: list[int]) -> None:
    """Random work: after every step the cells are intact exactly if the sequence begins with the prefix."""
    llama, rng = make(smol), random.Random(1)
    for _ in range(60):
        if rng.random() < 0.4:
            llama.reset()
        elif rng.random() < 0.5:
            llama.n_tokens = rng.randint(0, llama.n_tokens)
        done = llama.n_tokens
        if rng.random() < 0.6 and llama._input_ids.tolist() == smol.tokens[:done]:
            tokens = (smol.tokens + rest)[done : rng.randint(done + 1, P + 8)]
        else:
            tokens = rng.choices(rest, k=rng.randint(1, 5))
        if llama.n_tokens + len(tokens) > 200 or not tokens:
            continue
        expected = llama._input_ids.tolist() + tokens
        llama.eval(tokens)
        assert llama._input_ids.tolist() == expected
        assert llama.intact_cells == (P if expected[:P] == smol.tokens else 0)


@pytest.mark.parametrize(
    "kv", ["q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "bf16", "f32", ("q8_0", "q4_0"), ("f16", "q8_0")]
)
def test_kv_types(smol: Smol, kv: Any, rest: list[int]) -> None:
    llama = make(smol, kv)
    f16 = by_hand(smol, smol.tokens + rest, "f16")
    got = evaluated(llama, smol.tokens + rest)
    assert np.isfinite(got).all() and np.corrcoef(got, f16)[0, 1] > 0.97
    assert llama.intact_cells == (0 if kv == "f32" else P)


def test_prefix_of_bos_only_fits_every_text(smol: Smol) -> None:
    llama = make(smol, prefix=smol.bos)
    for messages in (CHAT, OTHER):
        llama.create_chat_completion(messages, max_tokens=2, temperature=0)
        assert llama.intact_cells == 1


def test_auto_finds_the_prefix(smol: Smol, tmp_path: Path) -> None:
    gguf = tmp_path / "name-Q4_0.gguf"
    shutil.copyfile(smol.gguf, gguf)
    assert make(replace(smol, gguf=gguf), prefix="auto").prefix is None
    shutil.copyfile(smol.ikv, tmp_path / "name.ikv")
    assert make(replace(smol, gguf=gguf), prefix="auto").prefix_path == tmp_path / "name.ikv"
    shutil.copyfile(smol.bos, tmp_path / "name-Q4_0.ikv")
    assert make(replace(smol, gguf=gguf), prefix="auto").prefix_path == tmp_path / "name-Q4_0.ikv"
    ikv.embed(gguf, ikv.read(smol.ikv))
    llama = make(replace(smol, gguf=gguf), prefix="auto")
    assert llama.prefix_path == gguf and llama.prefix is not None and llama.prefix.tokens == smol.tokens
    again = pickle.loads(pickle.dumps(llama))
    assert again.kv_type == ("q4_0", "q4_0") and again.prefix.tokens == smol.tokens and again.n_ctx() == 256
    llama.eval(smol.tokens + [30])
    again.eval(smol.tokens + [30])
    assert np.array_equal(logits(llama), logits(again))


def test_unstamped_model_is_compared_by_structure_with_a_warning(smol: Smol, model: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="does not say which reference") as seen:
        make(replace(smol, gguf=model("Q4_0")))
    lines, first = inspect.getsourcelines(make)
    assert seen[0].filename == __file__ and first <= seen[0].lineno < first + len(lines), "names who opened it"


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ({"kv_type": "q3_k"}, UsageError, "q3_k"),
        ({"kv_type": ("q8_0",)}, UsageError, "pair"),
        ({"type_k": 8}, UsageError, "kv_type"),
        ({"flash_attn": False}, UsageError, "flash"),
        ({"prefix": "/nonexistent.ikv"}, IntactKVError, "/nonexistent.ikv"),
        ({"n_ctx": 25, "n_batch": 25}, None, None),  # llama.cpp makes it 256
        ({"n_ctx": 24, "n_batch": 24}, None, None),
    ],
)
def test_settings_that_cannot_be(smol: Smol, arguments: dict[str, Any], error: Any, reason: str) -> None:
    if error is None:
        assert make(smol, **arguments).n_ctx() == 256
        return
    with pytest.raises(error, match=reason) as caught:
        make(smol, **arguments)
    assert "\n" not in str(caught.value)


def test_models_that_cannot_be(smol: Smol, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(smol.gguf.read_bytes()[:100_000])
    for path, reason in ((tmp_path / "none.gguf", "no model at"), (broken, "broken.gguf"), (smol.ikv, "smol-prompt")):
        with pytest.raises(IntactKVError, match=reason) as caught:
            make(replace(smol, gguf=path))
        assert "\n" not in str(caught.value)


@pytest.fixture
def foreign(smol: Smol, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Prefix files that differ from the model in one thing."""

    def make_one(**changes: Any) -> Path:
        prefix = ikv.read(smol.ikv)
        manifest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
        model = {**prefix.manifest["model"], **changes.pop("model", {})}
        K, V = ({x.il: getattr(x, name) for x in prefix.layers} for name in "KV")
        path = tmp_path / "foreign.ikv"
        path.write_bytes(ikv.build(model, prefix.tokens, K, V, {**manifest, **changes}))
        return path

    yield make_one


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"arch": "qwen2"}}, "qwen2"),
        ({"model": {"vocab_sha256": "0" * 64}}, "vocab"),
        ({"reference": {"sha256": "1" * 64, "dtype": "F16", "name": "x", "quantized": False}}, "1111"),
    ],
)
def test_prefix_of_another_model_is_refused(
    smol: Smol, foreign: Callable[..., Path], changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(IntactKVError, match=reason) as caught:
        make(smol, prefix=foreign(**changes))
    assert "\n" not in str(caught.value)


def test_stock_llama_cpp_loads_the_prefix_into_an_f16_cache(
    smol: Smol, stock_lib: Path, rest: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import sys
import numpy as np
from pathlib import Path
from intactkv_export.errors import IntactKVError
from intactkv_export.runtime.intact_llama import IntactLlama, L
settings = dict(n_ctx=256, n_batch=128, n_threads=2, n_threads_batch=2)
llama = IntactLlama({str(smol.gguf)!r}, {str(smol.ikv)!r}, "f16", **settings)
llama.eval({smol.tokens + rest})
np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).tofile(sys.argv[1])
assert llama.prefix_stats["loads"] == 1 and llama.intact_cells == 0
try:
    IntactLlama({str(smol.gguf)!r}, {str(smol.ikv)!r}, "q8_0", n_ctx=256)
except IntactKVError as error:
    print(error)
"""
    out = smol.ikv.with_name(f"logits-{os.getpid()}")
    try:
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(stock_lib)}
        done = subprocess.run([sys.executable, "-c", code, str(out)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        got = np.fromfile(out, np.float32)
    finally:
        out.unlink(missing_ok=True)
    assert "stock" in done.stdout and "q8_0" in done.stdout and "f16" in done.stdout
    monkeypatch.setenv("INTACTKV_ATTN", "stock")  # upstream's graph here too
    assert np.array_equal(got, _by_hand.__wrapped__(smol, tuple(smol.tokens + rest), "f16"))


def test_pooled_embeddings(smol: Smol) -> None:
    """llama.cpp ends the process where embeddings are pooled and n_ubatch is less than n_batch."""
    code = "import sys; from intactkv_export.runtime import IntactLlama, L; "
    code += (
        "llama = IntactLlama(sys.argv[1], None, n_ctx=256, embedding=True, pooling_type=L.LLAMA_POOLING_TYPE_MEAN); "
    )
    code += "print(len(llama.embed('The sea is everything.')) == llama.n_embd())"
    result = subprocess.run([sys.executable, "-c", code, str(smol.gguf)], capture_output=True, text=True, timeout=300)
    assert result.stdout.split() == ["True"], result.stderr


def test_what_is_closed_or_does_not_exist_is_refused(smol: Smol) -> None:
    """Neither may reach llama.cpp: it would read freed memory, or answer with a number."""
    llama = make(smol)
    for call in (
        lambda: llama.create_completion([49152], max_tokens=2),
        lambda: llama.create_completion("Hi", max_tokens=2, logit_bias={49152: 1.0}),
        lambda: llama.eval([-1]),
    ):
        with pytest.raises(UsageError, match="49152: give others"):
            call()
    llama.close()
    llama.close()
    for call in (
        lambda: llama.create_chat_completion([{"role": "user", "content": "Hi"}]),
        lambda: llama.tokenize(b"Hi"),
        lambda: llama.detokenize([5]),
        llama.n_ctx,
        llama.token_bos,
        lambda: llama.eval([1]),
        lambda: llama.intact_cells,
    ):
        with pytest.raises(IntactKVError, match="was closed: open the model again"):
            call()
