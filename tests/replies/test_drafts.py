"""Drafts (draft_model): the same text as without, in every context, with fewer evaluations."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from llama_cpp.llama_speculative import LlamaDraftModel, LlamaPromptLookupDecoding

from intactkv_export.runtime import IntactLlama, L
from tests.support.forced import forced
from tests.support.smol import Smol

LINE = "The sea is blue. The land is green. "


class Counted(IntactLlama):
    """Counts its evaluations."""

    n_evals = 0

    def eval(self, tokens: Any) -> None:
        self.n_evals += 1
        super().eval(tokens)


class Guesses(LlamaDraftModel):
    """What a sequence is guessed to be, right or wrong."""

    def __init__(self, sequence: list[int], n: int = 10) -> None:
        self.sequence, self.n = sequence, n

    def __call__(self, input_ids: np.ndarray, /, **kwargs: Any) -> np.ndarray:
        return np.array(self.sequence[len(input_ids) :][: self.n], dtype=np.intc)


@pytest.fixture(scope="module")
def llama(smol: Smol) -> Iterator[Counted]:
    llama = Counted(smol.gguf, smol.ikv, "f16", n_ctx=1024, n_threads=2, n_threads_batch=2)
    yield llama
    llama.close()


def reply(llama: Counted, prompt: Any, draft: Any, **settings: Any) -> tuple[str, int]:
    """(text, number of evaluations)."""
    llama.draft_model, llama.n_evals = draft, 0
    settings = {"max_tokens": 40, "temperature": 0, **settings}
    return llama.create_completion(prompt, **settings)["choices"][0]["text"], llama.n_evals


def test_prompt_lookup_beyond_a_batch(llama: Counted) -> None:
    prompt = LINE * 60
    assert len(llama.tokenize(prompt.encode())) > llama.n_batch == 512
    plain, n_plain = reply(llama, prompt, None)
    assert n_plain == 40
    text, n_evals = reply(llama, prompt, LlamaPromptLookupDecoding(num_pred_tokens=10))
    assert text == plain and n_evals < 12, "most guesses are right here"
    assert llama.scores.shape[0] == llama.n_batch, "no logits of the whole context are kept"
    assert reply(llama, prompt, LlamaPromptLookupDecoding(num_pred_tokens=2))[0] == plain


def test_wrong_guesses_leave_nothing(llama: Counted) -> None:
    prompt = llama.tokenize(LINE.encode() * 2)
    plain, _ = reply(llama, prompt, None, max_tokens=16)
    said = llama.input_ids[: llama.n_tokens].tolist()
    for wrong in (range(0), range(2, 400, 3), range(400)):
        guesses = [5 if i in wrong else token for i, token in enumerate([*said, *[7] * 40])]
        text, _ = reply(llama, prompt, Guesses(guesses), max_tokens=16)
        assert text == plain and llama.input_ids[: llama.n_tokens].tolist() == said
        assert reply(llama, [*said, 30], None, max_tokens=4) == reply(llama, [*said, 30], None, max_tokens=4)


def test_processors_and_penalties_see_the_reply_only(llama: Counted) -> None:
    prompt = llama.tokenize(b"Say it: ")
    script = llama.tokenize(("One two three four, five 🙂 six seven. " * 2).encode(), add_bos=False)
    settings = {"logits_processor": forced(len(prompt), script, llama.token_eos()), "max_tokens": 0}
    guesses = [*prompt, *script[:9], 5, 5, *script[11:], 5, 5, 5]
    text, n_evals = reply(llama, prompt, Guesses(guesses), **settings)
    assert text.encode() == llama.detokenize(script) and n_evals < len(script) / 2
    plain, _ = reply(llama, LINE * 3, None, repeat_penalty=1.3, seed=3, temperature=0.8)
    text, _ = reply(llama, LINE * 3, LlamaPromptLookupDecoding(), repeat_penalty=1.3, seed=3, temperature=0.8)
    assert text == plain


def test_guesses_before_the_end_of_a_prefix(llama: Counted, smol: Smol) -> None:
    """A text that the model itself makes into the prefix: loaded as without guesses."""
    start = smol.tokens.index(llama.token_eos()) + 1  # inside, behind the token that ends a message
    prompt, rest = smol.tokens[:start], smol.tokens[start:] + llama.tokenize(b"One", add_bos=False)
    assert len(rest) > 3
    settings = {"logits_processor": forced(len(prompt), rest, llama.token_eos()), "max_tokens": 0}
    llama.reset()
    loads = llama.prefix_stats["loads"]
    plain, _ = reply(llama, prompt, None, **settings)
    n_loads = llama.prefix_stats["loads"] - loads
    assert n_loads > 0
    llama.reset()
    assert reply(llama, prompt, Guesses(prompt + rest), **settings)[0] == plain
    assert llama.prefix_stats["loads"] == loads + 2 * n_loads


def test_with_logits_of_all(smol: Smol) -> None:
    draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
    settings: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "n_threads": 2, "logits_all": True}
    llama = IntactLlama(smol.gguf, None, "f16", draft_model=draft, **settings)
    plain = IntactLlama(smol.gguf, None, "f16", **settings)
    got, expected = (
        one.create_completion(LINE, max_tokens=12, temperature=0, logprobs=2)["choices"][0] for one in (llama, plain)
    )
    assert got["text"] == expected["text"]
    np.testing.assert_allclose(got["logprobs"]["token_logprobs"], expected["logprobs"]["token_logprobs"], atol=0.05)
    again = pickle.loads(pickle.dumps(llama))
    assert again.draft_model is not None and isinstance(again.draft_model.model, LlamaPromptLookupDecoding)
    assert isinstance(llama.draft_model, L.llama_speculative.LlamaDraftModel)
