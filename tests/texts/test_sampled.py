"""Conversations behind a prefix that the reference writes itself."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.prefix import ikv, make_prompt
from intactkv_export.texts import begin, sampled, token_hash
from intactkv_export.texts.growing import PROMPT_TOKENS, Growing
from intactkv_export.texts.seeds import FOLLOW_UPS, OPENINGS, QUESTIONS
from intactkv_export.texts.system_prompts import PROMPT_OPENINGS, SYSTEM_PROMPTS
from intactkv_export.texts.turns import Turns
from tests.support.smol import SYSTEM_PROMPT, Smol

REPLY = "<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def net(smol: Smol) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from intactkv_export import torch_model

    return torch_model.load(smol.reference)


def test_questions_are_many_and_differ() -> None:
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 96 and len(set(FOLLOW_UPS)) == len(FOLLOW_UPS) >= 8
    assert sum(not question.isascii() for question in QUESTIONS) >= 8, "other languages"
    assert max(map(len, QUESTIONS)) > 300 and min(map(len, QUESTIONS)) < 5


def test_sampled_conversations_continue_the_prefix(
    net: Any, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    counted: list[tuple[int, int]] = []
    settings = {"n": 3, "n_tokens": 60, "progress": lambda *counts: counted.append(counts)}
    made = sampled.sample(net, prefix, vocabulary, template, seed=3, **settings)
    assert [len(sequence) for sequence in made] == [60] * 3 and counted[-1] == (180, 180)
    begun = 0
    for sequence in made:
        question, _, reply = vocabulary.text(sequence).partition(REPLY)
        begun += question in QUESTIONS and len(reply) > 0
        assert any(known.startswith(question) for known in QUESTIONS), "a long one may be cut off"
    assert begun
    assert sampled.sample(net, prefix, vocabulary, template, seed=3, **settings) == made
    other = sampled.sample(net, prefix, vocabulary, template, n=3, n_tokens=4, seed=4)
    assert other != [sequence[:4] for sequence in made]


def test_every_second_one_begins_with_a_document_if_asked(
    net: Any, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(set(OPENINGS)) == len(OPENINGS) >= 64
    monkeypatch.setattr(sampled, "_CACHE", 1)  # one at a time
    made = sampled.sample(net, prefix, vocabulary, template, n=4, n_tokens=50, seed=1, documents=True)
    texts = [vocabulary.text(sequence) for sequence in made]
    assert [any(text.startswith(opening) for opening in OPENINGS) for text in texts] == [False, True] * 2
    assert len({*texts}) == 4 and not any(text in OPENINGS for text in texts), "the model goes on"
    assert [text.partition(REPLY)[0] in QUESTIONS for text in texts[::2]] == [True] * 2


def test_a_document_that_ends_is_replied_to(prefix: ikv.Prefix, vocabulary: Vocabulary, template: str) -> None:
    turns = Turns(prefix, vocabulary, template)
    row = Growing(turns, Random(0), deque(turns.opening("Dear Ann,")), user=True)
    word, end = vocabulary.tokenize("word", special=False)[0], vocabulary.eos
    for i in range(40):
        row.take(end if i % 10 == 9 else word, i % 10 == 9)
    document, reply = vocabulary.text(row.tokens).split(REPLY)[:2]
    assert document.startswith("Dear Ann,word") and reply.partition("<|im_end|>\n<|im_start|>user\n")[2] in FOLLOW_UPS


def test_the_model_writes_what_is_likely_behind_the_prefix(
    net: Any, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    import torch

    question = Turns(prefix, vocabulary, template).first("What is the capital of France?")
    batch = sampled._Logits(net, prefix.tokens, 2, len(question))
    for token in question:
        batch.advance([[token], [token]])
    with torch.inference_mode():
        whole = net.forward([[*prefix.tokens, *question]])[0, -1]
    torch.testing.assert_close(batch.last[0], whole, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(batch.last[1], whole, atol=2e-3, rtol=2e-3)
    assert vocabulary.text([int(whole.argmax())]) == "The"


def test_draws_come_from_the_nucleus_in_proportion() -> None:
    torch = pytest.importorskip("torch")
    p = torch.tensor([0.5, 0.3, 0.13, 0.04, 0.02, 0.01])  # 0.93 before the fourth, 0.97 before the fifth
    logits = p.log().expand(20000, -1)
    drawn = sampled._draw(logits, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=6) / 20000
    torch.testing.assert_close(share[:4], p[:4] / 0.97, atol=0.012, rtol=0)
    assert share[4:].sum() == 0


def test_turns_alternate_and_an_end_is_never_the_models_own(
    prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    turns = Turns(prefix, vocabulary, template)
    row = Growing(turns, Random(0), deque(turns.first("Hi")))
    word, end = vocabulary.tokenize("word", special=False)[0], vocabulary.eos
    for i in range(150):
        row.take(end if i % 4 == 3 else word, i % 4 == 3)
    parts = vocabulary.text(row.tokens).split("<|im_end|>\n<|im_start|>")
    assert [part.split("\n")[0] for part in parts[1:9]] == ["assistant", "user"] * 4
    assert any(f"user\n{text}" == parts[2] for text in FOLLOW_UPS), "the first follow-up is ours"
    assert set(parts[4].removeprefix("user\n")) == set("word"), "the second one the model's"


def grown(text: Growing, vocabulary: Vocabulary, n: int = 40) -> str:
    """What a text becomes where the model says the same word again and again, and ends every tenth time."""
    word = vocabulary.tokenize("word", special=False)[0]
    for i in range(n):
        text.take(vocabulary.eos if i % 10 == 9 else word, i % 10 == 9)
    return vocabulary.text(text.tokens)


def test_a_first_token_stands_before_texts_of_all_kinds(smol: Smol, vocabulary: Vocabulary, template: str) -> None:
    first = ikv.read(smol.bos)
    texts = [grown(x, vocabulary, 400) for x in begin(first, vocabulary, template, n=48, seed=5, documents=True)]
    systems, kinds, whole = set(), dict.fromkeys(("ours", "written", "own", "plain"), 0), 0
    for text in texts:
        prompt, between, rest = text.partition("<|im_end|>\n<|im_start|>user\n")
        prompt = prompt.removeprefix("system\n")
        if not text.startswith("system\n"):
            kinds["plain"] += 1
            opening = next(x for x in OPENINGS for i in range(len(x)) if text.startswith(f"{x[i:]}word"))
            whole += text.startswith(opening)
            assert "<|im_start|>" not in text
        elif prompt in SYSTEM_PROMPTS:
            kinds["ours"] += 1
            systems.add(prompt)
        elif prompt.endswith("word"):
            kinds["written"] += 1
            assert any(prompt.removeprefix("system\n").startswith(opening) for opening in PROMPT_OPENINGS)
        else:
            kinds["own"] += 1
            assert "SmolLM" in prompt, "the template's own, where none is given"
        if between:
            assert any(rest.startswith(known) for known in [*QUESTIONS, *OPENINGS])
    assert kinds == {"ours": 18, "written": 12, "own": 6, "plain": 12} and len(systems) == 18
    assert whole < 6, "documents begin anywhere"
    again = [grown(x, vocabulary, 400) for x in begin(first, vocabulary, template, n=48, seed=5, documents=True)]
    assert again == texts


def test_a_system_prompt_of_the_models_own_ends(smol: Smol, vocabulary: Vocabulary, template: str) -> None:
    """By its end of turn, or where it has become too long."""
    turns = Turns(ikv.read(smol.bos), vocabulary, template)
    for ends_at in (4, 10**6):
        head, after = turns.written_prompt("You are a", "Why?", reply=True) or ([], [])
        text = Growing(turns, Random(0), deque(head), after_prompt=after)
        word = vocabulary.tokenize("word", special=False)[0]
        for i in range(200):
            text.take(word, len(head) + ends_at == i)
        prompt, _, reply = vocabulary.text(text.tokens).partition(f"<|im_end|>\n<|im_start|>user\nWhy?{REPLY}")
        assert set(prompt.removeprefix("system\nYou are a")) == set("word") and set(reply) == set("word")
        assert prompt.count("word") == min(ends_at, PROMPT_TOKENS - len(head))


def test_a_template_without_system_prompts_has_none(smol: Smol, vocabulary: Vocabulary) -> None:
    refuses = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    first = ikv.read(smol.bos)
    texts = [grown(x, vocabulary) for x in begin(first, vocabulary, refuses, n=16, seed=1, documents=True)]
    assert sum(text.startswith("user\n") for text in texts) == 12 and not any("system" in text for text in texts)
    base = [grown(x, vocabulary) for x in begin(first, vocabulary, None, n=16, seed=1, documents=True)]
    assert not any("<|im_start|>" in text for text in base)
    heads = [text.partition("word")[0] for text in base[1::2]]
    assert all(any(opening.endswith(head) for opening in OPENINGS) for head in heads)
    assert sum(head not in OPENINGS for head in heads) >= 5, "they begin anywhere in it"


def test_marks_stand_in_no_text_whatever_the_template_does(smol: Smol, vocabulary: Vocabulary) -> None:
    """One that puts the system prompt behind the user's message has no place for one that the model writes."""
    behind = (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages "
        "if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ system if m.role == 'user' }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    for text in begin(ikv.read(smol.bos), vocabulary, behind, n=16, seed=1, documents=True):
        assert "KRAM" not in vocabulary.text([*text.forced, *(text.after_prompt or [])])


def test_templates_that_say_little_or_nothing(smol: Smol, vocabulary: Vocabulary) -> None:
    """One without anything between messages; one that refuses all: the first token stands before plain texts."""
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for text in begin(ikv.read(smol.bos), vocabulary, bare, n=16, seed=1, documents=True):
        drawn = [text.take(vocabulary.eos if i % 9 == 8 else 100 + i, i % 9 == 8) for i in range(60)]
        assert len(drawn) == len(text.tokens) == 60
    refuses = "{{ raise_exception('no chat') }}"
    texts = begin(ikv.read(smol.bos), vocabulary, refuses, n=4, seed=1, documents=True)
    assert [text.more is OPENINGS for text in texts] == [False, True] * 2
    with pytest.raises(UsageError, match="no chat"):
        begin(ikv.read(smol.ikv), vocabulary, refuses, n=4, seed=1)


def test_turns_are_those_of_the_rendered_conversation(
    prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    turns = Turns(prefix, vocabulary, template)
    whole = turns.whole(["Hello!", "Hi.", "2 + 2?", "4"])
    text = f"Hello!{REPLY}Hi.<|im_end|>\n<|im_start|>user\n2 + 2?{REPLY}4<|im_end|>\n<|im_start|>user\n"
    assert vocabulary.text(whole) == text
    pieces = turns.first("Hello!") + vocabulary.tokenize("Hi.", special=False) + turns.next("2 + 2?")
    assert pieces == whole[: len(pieces)]
    assert SYSTEM_PROMPT in vocabulary.text([*prefix.tokens, *pieces])


@pytest.mark.parametrize(
    ("text", "first", "to_user"),
    [
        (  # no system role, the reply's role has another name
            "{{ bos_token }}{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end>\n{% endfor %}<turn>model{{ '\n' }}",
            "Hi<end>\n<turn>model\n",
            "<end>\n<turn>user\n",
        ),
        (  # what ends a reply is not what ends a question
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
            "Hi [/INST]",
            "<|im_end|>[INST] ",
        ),
    ],
)
def test_other_templates(vocabulary: Vocabulary, text: str, first: str, to_user: str) -> None:
    prompt = make_prompt(vocabulary, text, None)
    manifest = {"messages": prompt.messages, "bos_only": False}
    turns = Turns(ikv.Prefix(prompt.tokens, manifest, [], {}, "", None, False, b""), vocabulary, text)
    assert (prompt.text + vocabulary.text(turns.first("Hi"))).endswith(first)
    assert vocabulary.text(turns.to_user) == to_user
    assert vocabulary.text(turns.next("Why?")) == to_user + first.replace("Hi", "Why?")


def test_a_base_model_gets_paragraphs(smol: Smol, vocabulary: Vocabulary) -> None:
    turns = Turns(ikv.read(smol.bos), vocabulary, None)
    assert vocabulary.text(turns.first("Why?")) == "Why?\n\n"
    assert vocabulary.text(turns.whole(["Why?", "So."])) == "Why?\n\nSo.\n\n"


def test_the_prefix_of_another_prompt_is_refused(prefix: ikv.Prefix, vocabulary: Vocabulary, template: str) -> None:
    with pytest.raises(IntactKVError, match="where the prefix has"):
        Turns(prefix, vocabulary, template.replace("system", "preface", 1).replace("'<|im_start|>'", "'*'")).first("Hi")


def test_the_hash_tells_sequences_apart() -> None:
    same, cut = token_hash([[1, 2], [3]]), token_hash([[1], [2, 3]])
    assert same == token_hash([(1, 2), (3,)]) and same != cut and len(same) == 64
