"""Conversations: when the context is full, stopped replies, system prompts, seeds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.runtime.conversation import Conversation, Sampling, opening_messages
from intactkv_export.runtime.intact_llama import IntactLlama
from tests.support.smol import SYSTEM_PROMPT, Smol

SEA = "Write one sentence about the sea."


@pytest.fixture
def notices() -> list[str]:
    return []


def talk(
    smol: Smol, notices: list[str], n_ctx: int = 256, sampling: Sampling | None = None, prefix: Any = "ikv"
) -> Conversation:
    path = smol.ikv if prefix == "ikv" else prefix
    llama = IntactLlama(smol.gguf, path, "q4_0", 0, n_ctx=n_ctx, n_threads=2, n_threads_batch=2)
    return Conversation(llama, opening_messages(llama, None), sampling or Sampling(8, 0.0), notices.append)


def test_full_context_drops_the_oldest_turns_and_keeps_the_prefix(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, sampling=Sampling(2, 0.0))
    for i in range(4):
        assert "".join(conversation.say(f"Number {i}: " + "word " * 60))
    assert notices and all("dropped" in notice for notice in notices)
    assert [user[:9] for user, _ in conversation.turns][-1] == "Number 3:" and len(conversation.turns) < 4
    assert conversation.llama.intact_cells == 24 and conversation.llama.n_tokens <= 256
    assert conversation.llama.prefix_stats["loads"] == 1, "it never left the cache"


def test_a_message_too_long_is_refused_and_the_conversation_stays(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices)
    for message in ("My name is Ada.", "I like the sea."):
        "".join(conversation.say(message))
    turns = list(conversation.turns)
    with pytest.raises(IntactKVError, match="larger --ctx-size, and the conversation stays as it is"):
        "".join(conversation.say("word " * 400))
    assert conversation.turns == turns and len(turns) == 2 and not notices
    assert "".join(conversation.say("Hi")), "the conversation goes on"
    assert conversation.turns[:2] == turns


def test_a_reply_that_fills_the_context_ends_with_a_notice(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, sampling=Sampling(0, 0.0))
    list(conversation.say("word " * 180 + "Repeat all of this, word by word, three times."))
    if conversation.llama.n_tokens >= 255:  # the model might have stopped earlier of its own accord
        assert any("full" in notice for notice in notices)
    assert conversation.llama.n_tokens <= 256


def test_an_interrupted_reply_stays_in_the_conversation(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, sampling=Sampling(16, 0.0))
    reply = conversation.say(SEA)
    begun = next(reply) + next(reply)
    reply.close()
    assert conversation.turns == [(SEA, begun)]
    assert "".join(conversation.say("Go on.")) and conversation.llama.intact_cells == 24
    conversation.reset()
    assert conversation.turns == [] and "".join(conversation.say(SEA)).startswith(begun)


def replies(conversation: Conversation, n: int) -> list[str]:
    """To the same question from the same start."""
    made = []
    for _ in range(n):
        conversation.reset()
        made.append("".join(conversation.say(SEA)))
    return made


def test_each_reply_has_a_seed_of_its_own_and_seed_fixes_them_all(smol: Smol, notices: list[str]) -> None:
    conversation = talk(smol, notices, sampling=Sampling(8, 1.5, seed=1))
    first = replies(conversation, 3)
    assert len(set(first)) == 3, "the same question does not have to have the same reply"
    again = Conversation(conversation.llama, conversation.opening, Sampling(8, 1.5, seed=1), notices.append)
    assert replies(again, 3) == first and "seed 1," in again.report()
    random.seed(0)  # what a program does with its own random numbers is its own affair
    one, other = (Conversation(again.llama, [], Sampling(8, 1.5), notices.append) for _ in range(2))
    assert one.seed != other.seed and f"seed {one.seed}," in one.report()
    repeated = Conversation(again.llama, [], Sampling(8, 1.5, seed=one.seed), notices.append)
    assert replies(one, 1) == replies(repeated, 1), "the seed that /stats names gives the same replies"


def test_system_prompts(smol: Smol, notices: list[str]) -> None:
    llama = talk(smol, notices).llama
    own = [{"role": "system", "content": SYSTEM_PROMPT}]
    assert opening_messages(llama, None) == opening_messages(llama, SYSTEM_PROMPT) == own
    with pytest.raises(UsageError, match="pirate"):
        opening_messages(llama, "You are a pirate.")
    with pytest.warns(UserWarning, match="by white space only: the prefix's own is used"):
        assert opening_messages(llama, f"{SYSTEM_PROMPT} \n") == own
    for other in (smol.bos, None):
        llama = talk(smol, notices, prefix=other).llama
        assert opening_messages(llama, None) == []
        assert opening_messages(llama, "Arr.") == [{"role": "system", "content": "Arr."}]


def test_a_model_without_a_template_is_refused(smol: Smol, notices: list[str]) -> None:
    llama = talk(smol, notices).llama
    del llama.metadata["tokenizer.chat_template"]
    with pytest.raises(IntactKVError, match="no chat template"):
        Conversation(llama, [], Sampling(), notices.append)


def test_a_template_that_raises_is_one_sentence(smol: Smol, notices: list[str], tmp_path: Path) -> None:
    llama = talk(smol, notices).llama
    llama.metadata["tokenizer.chat_template"] = "{{ raise_exception('System role not supported') }}"
    conversation = Conversation(llama, [], Sampling(), notices.append)
    with pytest.raises(IntactKVError, match="System role not supported"):
        next(conversation.say("Hi"))
