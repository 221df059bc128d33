"""The text of replies: every token's text, streamed and whole the same, stop strings, logprobs, seeds, infill."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.prefix import ikv
from intactkv_export.runtime import IntactLlama, L
from tests.support.forced import Scripted, forced
from tests.support.paths import REPO
from tests.support.smol import SYSTEM_PROMPT, Smol

TEXTS = [
    "Great🙂",
    "A family: 👨‍👩‍👧‍👦, a flag: 🏴󠁧󠁢󠁥󠁮󠁧󠁿, 🇫🇷 and 👍🏽.",
    "日本語と𠮷野家、𠜎𠜱",
    "naïve café; Größe; प्रधानमंत्री",
    "def f():\n" + " " * 40 + "return 1  # " + "-" * 60,
]


def open_llama(smol: Smol, kind: type[IntactLlama] = IntactLlama, **settings: Any) -> Any:
    return kind(smol.gguf, **{"prefix": None, "kv_type": "f16", "n_ctx": 256, "n_threads": 2, **settings})


@pytest.fixture(scope="module")
def scripted(smol: Smol) -> Any:
    return open_llama(smol, Scripted)


def pieces(llama: Any, tokens: list[int]) -> list[bytes]:
    return [llama.detokenize([token]) for token in tokens]


def expected(bytes_of: list[bytes], stops: list[str]) -> str:
    """What a reply of these tokens says: up to the stop string that is complete first."""
    for n in range(1, len(bytes_of) + 1):
        text = b"".join(bytes_of[:n]).decode("utf-8", "replace").removesuffix("\ufffd" * (n < len(bytes_of)))
        if found := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(found)]
    return b"".join(bytes_of).decode("utf-8", "replace")


def spelled(llama: Any) -> dict[int, bytes]:
    """The bytes of every token as the vocabulary spells them: GPT-2's alphabet of 256 letters; control tokens as is."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    names = map(llama._model.token_get_text, range(llama.n_vocab()))
    control = [llama._model.token_get_attr(token) & L.LLAMA_TOKEN_ATTR_CONTROL for token in range(llama.n_vocab())]
    return {i: name.encode() if control[i] else bytes(map(letters.__getitem__, name)) for i, name in enumerate(names)}


def test_every_token_of_the_vocabulary_has_its_text(scripted: Any) -> None:
    spelling = spelled(scripted)
    assert len(spelling) == scripted.n_vocab() and sum(len(text) > 32 for text in spelling.values()) == 47
    assert {token: scripted.detokenize([token], special=True) for token in spelling} == spelling
    assert all(scripted.tokenizer().detokenize([token], special=True) == text for token, text in spelling.items())
    ends = {t for t in spelling if L.llama_vocab_is_eog(scripted._model.vocab, t)}
    tokens = [token for token in spelling if token not in ends]
    for first in range(0, len(tokens), 250):  # a context full
        script = tokens[first : first + 250]
        text = b"".join(pieces(scripted, script)).decode("utf-8", "replace")
        assert scripted.whole(script) == text == "".join(scripted.streamed(script))


def test_an_id_that_is_no_token_is_refused(scripted: Any) -> None:
    assert scripted.detokenize([-1]) == b"", "llama.cpp's word for the token that a model has not"
    for token in (-2, scripted.n_vocab()):
        with pytest.raises(IntactKVError, match=f"{token} is no token"):
            scripted.detokenize([token])


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_is_whole_at_every_cut(scripted: Any, text: str) -> None:
    script = scripted.tokenize(text.encode(), add_bos=False)
    stops: list[list[str]] = [[], ["🙂"], ["👧", "語と𠮷"], ["é;", "Great🙂!"], ["  return", "---#", ""], [text[3:6]]]
    for n in range(1, len(script) + 1):
        bytes_of = pieces(scripted, script[:n])
        for stop in stops:
            whole = scripted.whole(script, max_tokens=n, stop=stop)
            chunks = scripted.streamed(script, max_tokens=n, stop=stop)
            assert whole == "".join(chunks) == expected(bytes_of, [s for s in stop if s])
    assert scripted.whole(script, max_tokens=0) == text, "nothing is lost at the end"


def test_any_tokens_and_any_stop_strings(scripted: Any) -> None:
    rng = random.Random(0)
    ends = {t for t in range(64) if L.llama_vocab_is_eog(scripted._model.vocab, t)}
    parts = [t for t in range(scripted.n_vocab()) if not scripted.detokenize([t]).isascii()]
    for _ in range(600):
        tokens = rng.choices(parts, k=4) + rng.choices(range(scripted.n_vocab()), k=4)
        script = [token for token in rng.sample(tokens, len(tokens)) if token not in ends]
        text = b"".join(pieces(scripted, script)).decode("utf-8", "replace")
        stops = []
        for _ in range(rng.randrange(3)):
            at = rng.randrange(max(len(text), 1))
            stops.append(text[at : at + rng.randint(1, 6)] + rng.choice(["", "", "x"]))
        stops = [stop for stop in stops if "\ufffd" not in stop]
        n = rng.randint(1, len(script))
        chunks = scripted.streamed(script, stop=stops, max_tokens=n)
        assert "".join(chunks) == scripted.whole(script, stop=stops, max_tokens=n)
        assert "".join(chunks) == expected(pieces(scripted, script[:n]), stops)


def test_text_comes_as_soon_as_it_is_certain(scripted: Any) -> None:
    script = scripted.tokenize(b"One two three four", add_bos=False)
    assert scripted.streamed(script) == ["One", " two", " three", " four", ""]
    assert scripted.streamed(script, stop=["o thx"]) == ["One", " tw", "o three", " four", ""]
    assert scripted.streamed(script, stop="three") == ["One", " two", " ", ""]


def test_what_python_does_for_a_token_does_not_grow(smol: Smol) -> None:
    llama = open_llama(smol, Scripted, n_ctx=4096)
    script = (llama.tokenize(b"The sea is wide and blue. ", add_bos=False) * 1000)[:3500]

    def seconds(n: int, stream: bool) -> float:
        """Of this process, for a token."""
        start = time.process_time()
        (llama.streamed if stream else llama.whole)(script[:n], stop=["nowhere"])
        return (time.process_time() - start) / n

    for stream in (False, True):
        short, long = min(seconds(250, stream) for _ in range(5)), min(seconds(3500, stream) for _ in range(2))
        assert long < 3 * short, f"{short * 1e3:.3f} ms at 250 tokens, {long * 1e3:.3f} ms at 3500"


def test_a_model_forced_to_say_it(smol: Smol) -> None:
    """All the way through the sampler: chat, streamed and whole, the last character and a long token too."""
    llama = open_llama(smol, prefix=smol.ikv)
    messages = [*llama.prefix_messages, {"role": "user", "content": "Hi"}]
    script = llama.tokenize(("x" + " " * 40 + "👨‍👩‍👧 Great🙂").encode(), add_bos=False)
    n_prompt = llama.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"]
    settings = {"logits_processor": forced(n_prompt, script, llama.token_eos()), "temperature": 0, "max_tokens": 40}
    whole = llama.create_chat_completion(messages, **settings)
    assert whole["choices"][0]["message"]["content"] == "x" + " " * 40 + "👨‍👩‍👧 Great🙂"
    assert whole["choices"][0]["finish_reason"] == "stop" and whole["usage"]["completion_tokens"] == len(script)
    chunks = llama.create_chat_completion(messages, stream=True, **settings)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]


def test_another_tokenizer(smol: Smol, hf_dir: Path, scripted: Any) -> None:
    """A tokenizer of transformers, which knows only whole texts."""
    llama = open_llama(smol, Scripted, tokenizer=L.llama_tokenizer.LlamaHFTokenizer.from_pretrained(str(hf_dir)))
    for text in TEXTS:
        script = scripted.tokenize(text.encode(), add_bos=False)
        for stop in ([], ["🙂"], ["ré"]):
            whole = llama.whole(script, stop=stop)
            assert whole == "".join(llama.streamed(script, stop=stop)) == scripted.whole(script, stop=stop)
    assert pickle.loads(pickle.dumps(llama)).tokenizer_.__class__ is L.llama_tokenizer.LlamaHFTokenizer


# Logprobs


@pytest.fixture(scope="module")
def with_logits(smol: Smol) -> Any:
    return open_llama(smol, n_ctx=64, n_batch=64, logits_all=True)


PROMPT = "Say <|im_end|>"  # a control token has no text


@pytest.mark.parametrize("stop", [[], ["ily 👩"], ["k", "Hi"]])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("cut", [5, 40])
def test_logprobs(with_logits: Any, stop: list[str], echo: bool, cut: int) -> None:
    llama = with_logits
    prompt = llama.tokenize(PROMPT.encode(), special=True)
    script = llama.tokenize("A family 👩‍👧 ok".encode(), add_bos=False)
    settings = {
        "logits_processor": forced(len(prompt), script, llama.token_eos()), "temperature": 0, "max_tokens": cut,
        "stop": stop, "logprobs": 3, "echo": echo,
    }  # fmt: skip
    whole = llama.create_completion(PROMPT, **settings)["choices"][0]
    json.dumps(whole)
    rows = [np.array(llama.scores[i], np.float64) for i in range(llama.n_tokens)]
    chunks = [chunk["choices"][0] for chunk in llama.create_completion(PROMPT, stream=True, **settings)]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert whole["text"] == PROMPT * echo + expected(pieces(llama, script[:cut]), stop)
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    got = whole["logprobs"]
    for key, values in got.items():
        assert [x for part in parts for x in part[key]] == values
    n_echoed = len(prompt) - (prompt[0] == llama.token_bos()) if echo else 0
    reply = "".join(got["tokens"][n_echoed:])
    assert PROMPT * echo + reply == whole["text"]
    tokens = prompt[len(prompt) - n_echoed :] + script
    places = range(len(prompt) - n_echoed, len(prompt) + len(script))
    for i, (logprob, best) in enumerate(zip(got["token_logprobs"], got["top_logprobs"], strict=True)):
        if places[i] == 0:
            assert logprob is None and best is None
            continue
        row = rows[places[i] - 1]
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
        assert logprob == pytest.approx(logprobs[tokens[i]], abs=1e-4) and best[got["tokens"][i]] == logprob
        assert max(best.values()) == pytest.approx(logprobs.max(), abs=1e-4) and 1 <= len(best) <= 4
    offsets = got["text_offset"][n_echoed:]
    for i, token in enumerate(got["tokens"][n_echoed:]):
        assert token == reply[offsets[i] - len(PROMPT) :][: len(token)]


def test_logprobs_need_the_logits(scripted: Any) -> None:
    with pytest.raises(ValueError, match="logits_all"):
        scripted.create_completion("x", logprobs=1)


# What else a completion can be asked for


def test_echo_suffix_and_usage(scripted: Any) -> None:
    script = scripted.tokenize(b"One two", add_bos=False)
    prompt = scripted.tokenize(b"So: ", add_bos=False)
    assert scripted.whole(script, echo=True) == scripted.detokenize([1]).decode() + "One two"
    scripted.script = script
    done = scripted.create_completion(prompt, echo=True, suffix=" end", max_tokens=0)
    assert done["choices"][0]["text"] == "So: One two end", "the model has no tokens to fill in a middle"
    assert done["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": 2, "total_tokens": len(prompt) + 2}
    chunks = scripted.create_completion("So: ", echo=True, suffix=" end", max_tokens=0, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "So: One two end"
    assert scripted.create_completion("", max_tokens=1)["usage"]["prompt_tokens"] == 1
    with pytest.raises(ValueError, match=r"Requested tokens \(256\) exceed context window of 256"):
        scripted.create_completion([1] * 256)
    assert scripted.create_completion([1] * 254, max_tokens=9)["usage"]["completion_tokens"] == 2


def test_a_model_that_fills_in_a_middle(smol: Smol, scripted: Any, tmp_path: Path) -> None:
    gguf = tmp_path / "fim.gguf"
    keys = ("prefix", "suffix", "middle")
    ikv.rewrite(smol.gguf, {f"tokenizer.ggml.{key}_token_id": 4 + i for i, key in enumerate(keys)}, gguf)
    asked: list[list[int]] = []

    class Asked(Scripted):
        def generate(self, tokens: Any, **settings: Any) -> Any:
            asked.append(tokens)
            return super().generate(tokens, **settings)

    llama = open_llama(replace(smol, gguf=gguf), Asked)
    llama.script = llama.tokenize(b"One", add_bos=False)
    before, after = (scripted.tokenize(text, add_bos=False) for text in (b"def f(", b"): pass"))
    assert llama.create_completion("def f(", suffix="): pass")["choices"][0]["text"] == "One"
    llama.spm_infill = True
    assert llama.create_completion("def f(", suffix="): pass")["choices"][0]["text"] == "One"
    assert asked == [[4, *before, 5, *after, 6], [5, *after, 4, *before, 6]]


def test_bias_and_processors_together(smol: Smol) -> None:
    llama = open_llama(smol)
    prompt = llama.tokenize(b"The sea is")
    blue, red = (llama.tokenize(text, add_bos=False)[0] for text in (b" blue", b" red"))
    only_blue = forced(len(prompt), [blue], blue)
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 1, "logits_processor": only_blue}
    for bias, text in ({red: 100.0}, " blue"), ({str(blue): 1.0}, " blue"):
        assert llama.create_completion(prompt, logit_bias=bias, **settings)["choices"][0]["text"] == text
    assert len(only_blue) == 1, "the caller's list stays as it is"
    assert llama.create_completion(prompt, logit_bias={red: 100.0}, max_tokens=1)["choices"][0]["text"] == " red"
    stop = L.StoppingCriteriaList([lambda ids, logits: len(ids) >= len(prompt) + 2])
    done = llama.create_completion(prompt, max_tokens=9, stopping_criteria=stop, logits_processor=only_blue)
    assert done["choices"][0] | {"logprobs": None} == {
        "text": " blue blue", "index": 0, "logprobs": None, "finish_reason": "stop"
    }  # fmt: skip


def test_a_cached_state_that_is_refused_is_a_miss(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = open_llama(smol)
    llama.set_cache(L.LlamaRAMCache())
    first = llama.create_completion("The sea is", max_tokens=4, temperature=0)
    llama.reset()

    def refuse(state: Any) -> None:
        raise IntactKVError("the state is of another model")

    monkeypatch.setattr(llama, "load_state", refuse)
    with pytest.warns(UserWarning, match="the state is of another model"):
        again = llama.create_completion("The sea is", max_tokens=4, temperature=0)
    assert again["choices"] == first["choices"]


# Seeds


def replies(llama: Any, n: int = 2, **settings: Any) -> list[str]:
    return [
        llama.create_completion("Once", max_tokens=6, temperature=2.0, **settings)["choices"][0]["text"]
        for _ in range(n)
    ]


def test_seeds(smol: Smol) -> None:
    one, other = open_llama(smol), open_llama(smol)
    for llama in (one, other):
        assert len(set(replies(llama, 3))) == 3
    seeds = {llama.last_seed for llama in (one, other)}
    assert len(seeds) == 2 and all(0 <= seed < 2**32 for seed in seeds if seed is not None)
    text = replies(one, 1, seed=-1)
    assert text == replies(other, 1, seed=one.last_seed), "a reply can be had again by its seed"
    assert one.last_seed != -1 and len(set(replies(one, 2))) == 2, "and a seed holds for one call"
    for seed in (0, 7):
        assert len(set(replies(one, 2, seed=seed))) == 1 and one.last_seed == seed
        one.set_seed(seed)
        fixed = pickle.loads(pickle.dumps(open_llama(smol, seed=seed)))
        assert replies(one) == replies(fixed) and one.last_seed == fixed.last_seed
    plain = L.Llama(str(smol.gguf), n_ctx=256, n_threads=2, seed=7, verbose=False, flash_attn=True)
    assert replies(plain) == replies(open_llama(smol, seed=7)), "the same as llama_cpp's own"
    assert len(set(replies(pickle.loads(pickle.dumps(open_llama(smol))), 2))) == 2


# The messages of a prefix


@pytest.mark.parametrize("kind", ["prompt", "bos", "template", "none"])
def test_messages_of_every_kind_of_prefix(smol: Smol, tmp_path: Path, kind: str) -> None:
    gguf = tmp_path / "model.gguf"
    gguf.symlink_to(smol.gguf)
    if kind != "none":
        prefix = ikv.read(smol.bos if kind == "bos" else smol.ikv)
        manifest = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
        if kind == "template":  # converted without a system prompt: the template writes its own
            manifest["messages"] = None
        K, V = ({x.il: getattr(x, name) for x in prefix.layers} for name in "KV")
        data = ikv.build(prefix.manifest["model"], prefix.tokens, K, V, manifest)
        gguf.with_suffix(".ikv").write_bytes(data)
    llama = open_llama(replace(smol, gguf=gguf), prefix="auto")
    system = [{"role": "system", "content": SYSTEM_PROMPT}] if kind == "prompt" else []
    assert llama.prefix_messages == system and (llama.prefix is None) == (kind == "none")
    assert llama.prefix is None or llama.prefix.messages == system
    llama.create_chat_completion([*llama.prefix_messages, {"role": "user", "content": "Hi"}], max_tokens=1)
    assert llama.prefix_stats["loads"] == (kind != "none")
    if kind in ("bos", "none"):
        example = [sys.executable, str(REPO / "examples" / "python_usage.py"), str(gguf), "8"]
        done = subprocess.run(example, capture_output=True, text=True)
        assert done.returncode == 0 and "intact cells" in done.stdout, done.stderr


def test_what_was_opened_is_freed(smol: Smol, model: Callable[[str], Path]) -> None:
    """No reference back to the model keeps it alive: memory comes back when the last user drops it."""
    import weakref

    llama = open_llama(smol, draft_model=L.llama_speculative.LlamaPromptLookupDecoding())
    llama.create_completion("One two one two", max_tokens=4)
    gone = weakref.ref(llama)
    del llama
    assert gone() is None
