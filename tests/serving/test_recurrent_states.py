"""A served model with recurrent layers: its states cannot step back, so the server keeps checkpoints of them. Answers
stay those of a conversation that nothing was done to, behind the prefix."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from intactkv_export import convert
from intactkv_export.prefix import ikv
from tests.serving.conftest import served
from tests.serving.test_states import Slots, close
from tests.support import tiny_ggufs

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
SYSTEM = "Answer as briefly as you can, and never with more than a sentence."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ikv.Prefix]:
    root = tmp_path_factory.mktemp("served")
    rope = {"rope.scaling.finetuned": True}
    path = tiny_ggufs.write(root / "m.gguf", "granitehybrid", n_head_kv=[0, 2, 0], chat_template=TEMPLATE, **rope)
    done = convert(path, root / "out", quant="Q8_0", system_prompt=SYSTEM, engine="llama")
    return Path(done.outputs[0].path), ikv.read(done.prefix)


@pytest.fixture(scope="module", params=[("f16", 512), ("q8_0", 512), ("q8_0", 32)], ids=str)
def server(programs: None, made: tuple[Path, ikv.Prefix], request: pytest.FixtureRequest) -> Iterator[Slots]:
    """n_ubatch 32: the server ends a batch so far before the prompt's end, for a checkpoint: within the prefix."""
    (kv, n_ubatch), (path, prefix) = request.param, made
    saved = path.parent / f"{kv}-{n_ubatch}"
    saved.mkdir(exist_ok=True)
    arguments = [path, "--prefix", prefix.source, "--parallel", 2, "--ctx-size", 512, "--kv-type", kv]
    with served(*arguments, "--", "--no-warmup", "--slot-save-path", saved, "--ubatch-size", n_ubatch) as facts:
        yield Slots(facts["url"])


def test_turns_go_on_and_back(server: Slots, made: tuple[Path, ikv.Prefix]) -> None:
    """Turn by turn, back into the middle of one (from a checkpoint), and all at once: the same answers."""
    begin = list(made[1].tokens)
    short = begin + server.tokens("Hi.\n<assistant>")
    assert close(server.complete(short), server.complete(short, slot=1, cache_prompt=False))
    first = begin + server.tokens("What is the capital of France, and how far is it from here?\n<assistant>")
    reply = server.complete(first)
    assert close(reply, server.complete(first, slot=1, cache_prompt=False))
    second = first + reply["tokens"] + server.tokens("\n<user>And of Italy, which is further down the same road?\n")
    more = server.complete(second)
    fresh = server.complete(second, slot=1, cache_prompt=False)
    assert close(more, fresh)
    other = second[:-20] + server.tokens("something else entirely that it is asked about now?\n<assistant>")
    for _ in range(2):  # there and back again
        assert close(server.complete(other), server.complete(other, slot=1, cache_prompt=False))
        assert close(server.complete(second), fresh)
    # another conversation with the same beginning, and one that leaves it within the prefix
    for tokens in (begin + server.tokens("Hello there.\n<assistant>"), [*begin[:30], *first[40:]]):
        assert close(server.complete(tokens), server.complete(tokens, slot=1, cache_prompt=False))


def test_slots_are_saved_and_restored(server: Slots, made: tuple[Path, ikv.Prefix]) -> None:
    tokens = list(made[1].tokens) + server.tokens("Tell me about the weather of tomorrow.\n<assistant>")
    tokens += server.complete(tokens)["tokens"]
    behind = tokens + server.tokens("\n<user>And of the day after?\n<assistant>")
    server.act(0, "save", "a.state")
    want = server.complete(behind)
    server.act(0, "erase")
    server.act(1, "restore", "a.state")
    got = server.complete(behind, slot=1)
    assert [x["logprob"] for x in got["completion_probabilities"]] == [
        x["logprob"] for x in want["completion_probabilities"]
    ]


def test_an_empty_slot_takes_the_place_of_a_full_one(server: Slots, made: tuple[Path, ikv.Prefix]) -> None:
    """llama.cpp's reader of states leaves a sequence's cells where the state has none; the server removes them."""
    tokens = list(made[1].tokens) + server.tokens("And what of the day before?\n<assistant>")
    fresh = server.complete(tokens, slot=1, cache_prompt=False)
    server.act(0, "erase")
    server.act(0, "save", "empty.state")
    server.complete([*tokens, *server.tokens("Something else that was said, at some length.\n")])
    server.act(0, "restore", "empty.state")
    assert close(server.complete(tokens), fresh)
