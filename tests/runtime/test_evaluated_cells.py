"""Sequences that go back, are shifted, or fill the context: what is kept in the cache is what would be computed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.runtime.evaluated_cells import Batches, held
from intactkv_export.runtime.intact_llama import IntactLlama, L
from tests.support import random_models, tiny_ggufs
from tests.support.smol import Smol

SUBJECTS = ("a dog who finds a key", "a cat and the moon", "a boat that is late", "an old clock")
TINY = {
    "gemma3": random_models.MODELS["gemma3"],  # a sliding window of 8 tokens
    "phi3-partial": random_models.MODELS["phi3-partial"],  # RoPE on 48 of 64 values of a head
    "head-96": ("llama", dict(hidden_size=384, head_dim=96, rope_parameters=random_models._rope())),
    "head-64": random_models.MODELS["llama-gqa"],
}


def make(smol: Smol, kv_type: str = "q4_0", **kwargs: Any) -> IntactLlama:
    settings = {"tail": 0, "n_ctx": 512, "n_batch": 256, "n_threads": 2, "n_threads_batch": 2, **kwargs}
    return IntactLlama(smol.gguf, smol.ikv, kv_type, **settings)


def logits(llama: Any) -> np.ndarray:
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUFs of TINY."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random_models, "MODELS", TINY)
        made = {name: random_models.build(name, root / name) for name in TINY}
    random_models.to_gguf(made.values())
    return {name: path.with_name(f"{name}.gguf") for name, path in made.items()}


def test_batches() -> None:
    batches = Batches()
    batches.add(0, 100, n_batch=64, n_ubatch=32)
    assert batches.ends == [32, 64, 96, 100] and batches.last == 100
    assert [batches.whole(n) for n in (0, 31, 32, 99, 100, 130)] == [0, 0, 32, 96, 100, 130]
    batches.add(70, 71, n_batch=64, n_ubatch=32)
    assert batches.ends == [32, 64, 70, 71], "of a batch that was cut, 64 to 69 count as one"
    batches.shift(n_keep=40, n_discard=26)
    assert batches.ends == [32, 40, 44, 45]


@pytest.mark.parametrize("kv_type", ["q4_0", "f16"])
def test_the_same_question_after_another_turn_gets_the_same_answer(smol: Smol, kv_type: str) -> None:
    llama = make(smol, kv_type)

    def ask(subject: str) -> tuple[np.ndarray, int]:
        text = f"Tell me a short story about {subject}.<|im_end|>\n<|im_start|>assistant\n"
        prompt = smol.tokens + llama.tokenize(text.encode(), add_bos=False, special=True)
        pieces = llama.generate(prompt, temp=0)
        token = next(pieces)
        after_prompt = logits(llama)
        for _ in range(4):  # a reply, token by token
            next(pieces)
        return after_prompt, token

    first = {subject: ask(subject) for subject in SUBJECTS}
    for subject in (*SUBJECTS, *SUBJECTS[::-1]):
        for _ in range(2):  # the second time its whole prompt is in the cache
            after_prompt, token = ask(subject)
            assert np.array_equal(after_prompt, first[subject][0]) and token == first[subject][1]


def test_going_back_gives_the_bits_of_an_empty_cache(smol: Smol) -> None:
    rng, llama, fresh = random.Random(3), make(smol, n_batch=64), make(smol, n_batch=64)
    text = smol.tokens + [rng.randrange(1000, 40000) for _ in range(160)]
    for _ in range(4):
        n, other = rng.randint(25, 150), [rng.randrange(1000, 40000) for _ in range(rng.randint(1, 90))]
        llama.reset()
        llama.eval(text)
        llama.n_tokens = n
        llama.eval(other)
        fresh.reset()
        fresh.eval(text[:n] + other)
        assert np.array_equal(logits(llama), logits(fresh)) and llama._input_ids.tolist() == text[:n] + other


@pytest.mark.parametrize("n_ctx", [300, 600])
def test_a_context_of_any_size_is_one_number_everywhere(smol: Smol, n_ctx: int) -> None:
    llama = make(smol, "q8_0", n_ctx=n_ctx)
    size = -(-n_ctx // 256) * 256
    assert llama.n_ctx() == llama._n_ctx == len(llama.input_ids) == size
    text = [504 + i % 200 for i in range(size)]
    llama.eval(text[: size - 2])
    done = llama.create_completion(text[: size - 2], max_tokens=0, temperature=0)["usage"]
    assert done["completion_tokens"] <= 2
    llama.n_tokens = size - 2
    llama.eval([30, 31])
    with pytest.raises(IntactKVError, match=f"1 tokens after {size} do not fit into the context of {size}"):
        llama.eval([30])
    assert llama.n_tokens == size and llama.shift_context() == size // 2
    llama.eval([30, 31])
    assert llama.n_tokens == size // 2 + 2
    every = make(smol, "q8_0", n_ctx=n_ctx, logits_all=True)
    assert every.scores.shape == (size, llama.n_vocab())


def test_a_window_that_has_forgotten_is_computed_again(tiny: dict[str, Path]) -> None:
    rng = random.Random(1)
    text = [rng.randrange(10, 500) for _ in range(700)]
    settings = {"n_ctx": 1024, "n_batch": 32, "n_ubatch": 32, "n_threads": 1, "n_threads_batch": 1}
    llama = IntactLlama(tiny["gemma3"], None, "q8_0", swa_full=False, **settings)
    fresh = IntactLlama(tiny["gemma3"], None, "q8_0", swa_full=False, **settings)
    for n in (640, 500, 100):
        llama.reset()
        llama.eval(text)
        assert held(L, llama.ctx, 700) and not held(L, llama.ctx, 100)
        llama.n_tokens = n
        llama.eval([30, 31])
        fresh.reset()
        fresh.eval(text[:n] + [30, 31])
        assert np.array_equal(logits(llama), logits(fresh)), n
        llama.eval(text[:200])
        fresh.eval(text[:200])
        assert next(llama.generate([*text[:n], 40], temp=0)) == next(fresh.generate([*text[:n], 40], temp=0))


SHIFT = """
import sys
import numpy as np
from intactkv_export.runtime.intact_llama import IntactLlama, L
gguf, kv_type = sys.argv[1:]
def opened():
    return IntactLlama(gguf, None, kv_type, n_ctx=256, n_batch=64, n_threads=1, n_threads_batch=1)
def logits(llama):
    return np.ctypeslib.as_array(L.llama_get_logits_ith(llama.ctx, -1), shape=(llama.n_vocab(),)).copy()
llama, text = opened(), list(range(20, 270))
llama.eval(text)
assert llama.shift_context(100) == 100 and llama._input_ids.tolist() == text[100:]
llama.eval([30])
fresh = opened()
fresh.eval(text[100:] + [30])
print(np.corrcoef(logits(llama), logits(fresh))[0, 1])
"""


@pytest.mark.parametrize(
    ("name", "kv_type"), [("phi3-partial", "q8_0"), ("head-96", "q8_0"), ("head-96", "f16"), ("head-64", "q8_0")]
)
@pytest.mark.parametrize("stock", [False, True])
def test_shift_context_in_a_cache_that_stock_cannot_shift(
    tiny: dict[str, Path], stock_lib: Path, name: str, kv_type: str, stock: bool
) -> None:
    """A process of its own: what is not prevented is a crash. On stock libraries the text is computed again."""
    env = {**os.environ, **({"LLAMA_CPP_LIB_PATH": str(stock_lib)} if stock else {})}
    command = [sys.executable, "-c", SHIFT, str(tiny[name]), kv_type]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    again = stock and kv_type == "q8_0" and name != "head-64"
    assert float(done.stdout) > (0.9999 if again else 0.1)


@pytest.mark.parametrize("arch, n_layer, shifted", [("smollm3", 4, False), ("llama", 2, True)])
def test_layers_without_rope_are_not_turned(tmp_path: Path, arch: str, n_layer: int, shifted: bool) -> None:
    """llama.cpp would turn K of every layer: the tokens are evaluated again instead."""
    gguf = tiny_ggufs.write(tmp_path / "x.gguf", arch, n_layer=n_layer)
    text = [int(t) for t in np.random.default_rng(1).integers(3, tiny_ggufs.N_VOCAB, 60)]
    moved, fresh = (IntactLlama(gguf, None, "f16", n_ctx=256, n_threads=2, n_threads_batch=2) for _ in range(2))
    moved.eval(text[:50])
    assert moved.shift_context(20) == 20
    fresh.eval(text[20:50])
    for llama in (moved, fresh):
        llama.eval(text[50:])
    a, b = logits(moved), logits(fresh)
    assert (np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)) == (not shifted)  # shifted K has seen what is gone
