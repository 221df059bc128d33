"""Which beginnings of prompts are noted (LLAMA_INTACTKV_KEEP), and what becomes of a kept file that is wrong."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.prefix import ikv
from tests.support import automatic
from tests.support.lowlevel import Context, L, tokenize
from tests.support.smol import Smol

SYSTEM = (
    "<|im_start|>system\nYou are the night porter of a hotel in Trieste. You know every guest by name, never give a "
    "room number away, and you answer in one sentence, politely, whatever is asked of you.<|im_end|>\n"
)
LEAST = 32


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLAMA_INTACTKV_KEEP", str(tmp_path))
    return tmp_path


Prompt = Callable[..., list[int]]


@pytest.fixture
def prompt(f16: Any) -> Prompt:
    """prompt(message, ...): the tokens of a conversation behind the system prompt, its messages in turn."""

    def make(*messages: str, system: str = SYSTEM) -> list[int]:
        text = system
        for i, message in enumerate(messages):
            text += f"<|im_start|>{'assistant' if i % 2 else 'user'}\n{message}<|im_end|>\n"
        return tokenize(f16, f"{text}<|im_start|>assistant\n")

    return make


@pytest.fixture
def ctx(f16: Any, directory: Path) -> Context:
    with automatic.environment(None):
        return Context(f16, "q8_0", n_seq_max=4, n_ctx=2048, kv_unified=False)


def ask(ctx: Context, tokens: Sequence[int], seq: int = 0, size: int = 1024, n_reply: int = 2) -> None:
    """As a server: what the sequence has of these tokens stays, the rest is evaluated, and some of a reply."""
    there = getattr(ctx, "there", {})
    ctx.there = there  # type: ignore[attr-defined]
    old = there.get(seq, [])
    same = next((i for i, (a, b) in enumerate(zip(old, tokens, strict=False)) if a != b), min(len(old), len(tokens)))
    same = min(same, len(tokens) - 1)
    L.llama_memory_seq_rm(ctx.memory, seq, same, -1)
    for start in range(same, len(tokens), size):
        part = range(start, min(start + size, len(tokens)))
        assert ctx.batch([(tokens[i], i, [seq], i == len(tokens) - 1) for i in part]) == 0
    reply = [i + 400 for i in range(n_reply)]
    for i, token in enumerate(reply):
        assert ctx.batch([(token, len(tokens) + i, [seq], True)]) == 0
    there[seq] = [*tokens, *reply]


def noted(directory: Path) -> Iterator[list[int]]:
    for path in sorted(directory.glob("*.tokens")):
        yield json.loads(path.read_text())["tokens"]


def test_what_three_requests_begin_with_is_noted_once(ctx: Context, prompt: Prompt, directory: Path, f16: Any) -> None:
    """Up to the mark behind the system prompt: not the words that all three messages begin with."""
    asked = [prompt(f"What is {thing}?") for thing in ("a lift", "the time", "this noise", "breakfast", "a key")]
    for seq, tokens in enumerate(asked[:2]):
        ask(ctx, tokens, seq)
    assert list(noted(directory)) == []
    ask(ctx, asked[2], 2, size=16)  # in pieces
    expected = tokenize(f16, SYSTEM + "<|im_start|>")
    assert list(noted(directory)) == [expected]
    (path,) = directory.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    note = json.loads(path.read_text())
    assert (note["format"], note["requests"]) == (1, 3) and Path(note["model"]).name == "F16.gguf"
    path.unlink()
    for tokens in asked[3:]:
        ask(ctx, tokens, 0)  # behind what the slot has
    assert list(noted(directory)) == []


def test_one_slot_that_goes_on_behind_the_prompt_counts_too(ctx: Context, prompt: Prompt, directory: Path) -> None:
    """Only the first computes the system prompt. From the cells it is known what the others begin with."""
    for message in ("Good evening", "Is there a lift?", "My key does not work"):
        ask(ctx, prompt(message))
    assert len(list(noted(directory))) == 1


def test_a_conversation_counts_once(ctx: Context, prompt: Prompt, directory: Path) -> None:
    """However long it gets, in one slot or another, with another end of its prompt, or asked again."""
    said = [
        "Good evening",
        "Welcome back",
        "Is there a lift?",
        "On your left",
        "And breakfast?",
        "From seven",
        "Thanks",
    ]
    for turn in range(0, 7, 2):
        ask(ctx, prompt(*said[: turn + 1]), turn % 4)
        thinks = [*prompt(*said[: turn + 1]), 28, 99, 31]  # what later turns do not have
        ask(ctx, thinks, 3)
    for _ in range(3):
        L.llama_memory_seq_rm(ctx.memory, 1, -1, -1)
        ctx.there[1] = []  # type: ignore[attr-defined]
        ask(ctx, prompt(*said), 1)
    assert list(noted(directory)) == []
    ask(ctx, prompt("My key does not work"), 0)
    ask(ctx, prompt("Who are you?"), 1)
    assert len(list(noted(directory))) == 1


def test_short_ones_and_those_asked_about_everywhere_are_not_noted(
    ctx: Context, prompt: Prompt, directory: Path
) -> None:
    for i in range(4):
        ask(ctx, prompt(f"{i} nights", system="<|im_start|>system\nBe brief.<|im_end|>\n"))
    for i in range(4):  # as llama-perplexity
        L.llama_memory_seq_rm(ctx.memory, 0, -1, -1)
        ctx.decode(prompt(f"{i} nights"), 0)
    assert list(noted(directory)) == []


def test_without_marks_all_that_is_common_is_noted(ctx: Context, directory: Path, f16: Any) -> None:
    text = tokenize(f16, "A base model sees the same examples in front of each question, again and again. " * 4)
    for i in range(3):
        ask(ctx, [*text, 1000 + i, 2000 + i])
    assert list(noted(directory)) == [text]


def test_the_number_of_requests(f16: Any, prompt: Prompt, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_INTACTKV_KEEP_AFTER", "2")
    with automatic.environment(None):
        ctx = Context(f16, "f16", n_seq_max=2)
    for seq in range(2):
        ask(ctx, prompt(f"{seq} nights"), seq)
    assert len(list(noted(directory))) == 1
    monkeypatch.setenv("LLAMA_INTACTKV_KEEP_AFTER", "1")
    assert why_not(f16, None).endswith("LLAMA_INTACTKV_KEEP_AFTER is '1': give a number of requests, 2 to 256 "
                                       "(LLAMA_INTACTKV=off: no prefix)")  # fmt: skip


def test_a_full_disk_or_no_directory_stops_no_answer(
    f16: Any, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_INTACTKV_KEEP", str(tmp_path / "gone"))
    with automatic.environment(None):
        ctx = Context(f16, "f16", n_seq_max=2)
    for i in range(4):
        ask(ctx, prompt(f"{i} nights"))
    assert not (tmp_path / "gone").exists()


def why_not(model: Any, value: str | None) -> str:
    from intactkv_export.libllama import bindings

    p = L.llama_context_default_params()
    p.n_ctx, p.flash_attn_type = 512, 1
    with automatic.environment(value):
        made = L.llama_init_from_model(model, p)
    if made:
        L.llama_free(made)
        return ""
    return bindings.last_error()


def test_what_is_held_is_used_and_not_noted(f16: Any, prompt: Prompt, directory: Path, smol: Smol) -> None:
    from intactkv_export.engines import llama_engine as engine
    from intactkv_export.libllama import bindings

    tokens = tokenize(f16, SYSTEM + "<|im_start|>")
    description, K, V, _ = engine.compute(smol.reference, tokens, n_threads=2)
    rest = {k: v for k, v in ikv.read(smol.ikv).manifest.items() if k not in ("format", "tokens", "model")}
    path = directory / "porter.ikv"
    path.write_bytes(ikv.build(description, tokens, K, V, rest))
    os.utime(path, (1e9, 1e9))
    with automatic.environment(str(path)):
        ctx = Context(f16, "q8_0", n_seq_max=4)
    assert path.stat().st_mtime == 1e9
    for i in range(4):
        ask(ctx, prompt(f"{i} nights"), i)
    assert ctx.n_not_computed() == 4 * len(tokens)
    assert list(noted(directory)) == []
    assert path.stat().st_mtime > 1e9  # it was used

    os.utime(path, (1e9, 1e9))
    with automatic.environment(str(path)):
        ctx = Context(f16, "q8_0", n_seq_max=4)
    assert bindings.load_held(ctx.ptr, 0) == len(tokens)
    ctx.there = {0: tokens}  # type: ignore[attr-defined]
    ask(ctx, prompt("4 nights"))
    assert ctx.n_not_computed() == 0
    assert path.stat().st_mtime > 1e9  # by a sequence that has its rows since long ago


@pytest.mark.parametrize("kind", ["torn", "empty", "other", "version"])
def test_a_kept_file_that_is_wrong_is_left_out(f16: Any, smol: Smol, directory: Path, kind: str) -> None:
    """In another place it is a reason to make no context."""
    good = smol.ikv.read_bytes()
    wrong = {
        "torn": good[:-100],
        "empty": b"",
        "other": good.replace(b'"n_vocab":49152', b'"n_vocab":49153'),
        "version": good.replace(b'"format":1', b'"format":3'),
    }[kind]
    if kind in ("other", "version"):
        import hashlib

        body = wrong[:-48]
        wrong = body + wrong[-48:-40] + hashlib.sha256(body).digest() + wrong[-8:]
    assert wrong != good
    (directory / "wrong.ikv").write_bytes(wrong)
    (directory / "right.ikv").write_bytes(good)
    both = os.pathsep.join(str(directory / f"{name}.ikv") for name in ("wrong", "right"))
    with automatic.environment(both):
        assert Context(f16, "q8_0").n_prefixes() == 1
    elsewhere = directory / "elsewhere"
    elsewhere.mkdir()
    (directory / "wrong.ikv").rename(elsewhere / "wrong.ikv")
    assert "wrong.ikv" in why_not(f16, str(elsewhere / "wrong.ikv"))


def test_nothing_is_kept_unless_it_is_asked_for(
    f16: Any, prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_INTACTKV_KEEP", raising=False)
    monkeypatch.chdir(tmp_path)
    for value, keep in ((None, None), (None, ""), ("off", str(tmp_path))):
        if keep is not None:
            monkeypatch.setenv("LLAMA_INTACTKV_KEEP", keep)
        with automatic.environment(value):
            ctx = Context(f16, "f16", n_seq_max=2)
        for i in range(3):
            ask(ctx, prompt(f"{i} nights"))
        assert list(tmp_path.iterdir()) == []


def test_several_in_one_batch_and_a_restored_state(ctx: Context, prompt: Prompt, directory: Path, f16: Any) -> None:
    """As a server batches them. What a slot had before and is brought back has no tokens: llama.cpp saves none of
    them. It counts for nothing then, also not as something else."""
    first, second, third, fourth = (prompt(message) for message in ("Good evening", "A lift?", "Who are you?", "Bye"))
    batch = [
        (token, pos, [seq], pos == len(tokens) - 1)
        for seq, tokens in enumerate((first, second))
        for pos, token in enumerate(tokens)
    ]
    assert ctx.batch(batch) == 0
    state = ctx.save(0)
    L.llama_memory_clear(ctx.memory, True)
    n = len(tokenize(f16, SYSTEM))
    for seq in (2, 3):
        assert ctx.restore(state, seq)
        L.llama_memory_seq_rm(ctx.memory, seq, n, -1)
        rest = third[n:]
        assert ctx.batch([(token, n + i, [seq], i == len(rest) - 1) for i, token in enumerate(rest)]) == 0
    assert list(noted(directory)) == []
    ask(ctx, fourth, 0)
    assert list(noted(directory)) == [tokenize(f16, SYSTEM + "<|im_start|>")]
