"""A user's file as sequences behind the prefix: the shapes that data sets have, and what is said of the rest."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.prefix import ikv
from intactkv_export.texts import read_two_lengths, read_user_file

REPLY = "<|im_end|>\n<|im_start|>assistant\n"
USER = "<|im_end|>\n<|im_start|>user\n"
MESSAGES = [
    {"role": "system", "content": "Another one."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue, as the sea is on a clear day."},
]
SHARE_GPT = [
    {"from": "gpt", "value": "cut off"},
    {"from": "human", "value": "Name an animal."},
    {"from": "gpt", "value": "A snail, which carries its house."},
    {"from": "human", "value": "never answered"},
]
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_read_conversations(
    tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str, suffix: str
) -> None:
    file = tmp_path / f"data{suffix}"
    records = [{"messages": MESSAGES}, {"conversations": SHARE_GPT}, {"id": 3, "messages": MESSAGES}]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    file.write_text(json.dumps(records) if suffix == ".json" else lines)
    made = read_user_file(file, prefix, vocabulary, template, n_tokens=40)
    first = "Name a colour." + REPLY + "Blue, as the sea is on a clear day.<|im_end|>\n<|im_start|>user\n"
    second = "Name an animal." + REPLY + "A snail, which carries its house.<|im_end|>\n<|im_start|>user\n"
    joined = vocabulary.tokenize(first + second, special=True)
    assert 40 <= len(joined) < 80 and made == [joined[:40]], "short ones are joined, what is left over is left out"
    each = read_user_file(file, prefix, vocabulary, template, n_tokens=10)
    assert [vocabulary.text(s)[:6] for s in each].count("Name a") == 3, "each begins with a conversation's beginning"


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "A?", "completion": "B."}, ["A?", "B."]),
        ({"prompt": MESSAGES[:2], "completion": MESSAGES[2:]}, ["Name a colour.", MESSAGES[2]["content"]]),
        ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, ["Add.\n\n1 and 2", "3"]),
        ({"instruction": "Add.", "input": "", "output": "3"}, ["Add.", "3"]),
        ({"instruction": "Add.", "context": "1, 2", "response": "3", "category": "sums"}, ["Add.\n\n1, 2", "3"]),
        ({"question": "A?", "answer": "B."}, ["A?", "B."]),
        (MESSAGES, ["Name a colour.", MESSAGES[2]["content"]]),
        (
            {"messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]},
                {"role": "assistant", "content": "Yes?"},
            ]},
            ["Hi\nyou", "Yes?"],
        ),
        (
            {"messages": [
                {"role": "user", "content": "One."}, {"role": "user", "content": "Two."},
                {"role": "assistant", "content": "Three."}, {"role": "assistant", "content": "Four."},
            ]},
            ["One.\n\nTwo.", "Three.\n\nFour."],
        ),
        (
            {"messages": [
                {"role": "user", "content": "What time is it?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "12:00"},
                {"role": "assistant", "content": "Noon."},
            ]},
            ["What time is it?", '{"name": "now", "arguments": {"zone": "UTC"}}', "12:00", "Noon."],
        ),
    ],
)  # fmt: skip
def test_shapes_of_conversations(
    tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str, record: Any, turns: list[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record))
    text = "".join(turn + (USER if i % 2 else REPLY) for i, turn in enumerate(turns))
    expected = vocabulary.tokenize(text, special=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_user_file(file, prefix, vocabulary, template, n_tokens=len(expected)) == [expected]


def test_texts_in_records(tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str) -> None:
    file = tmp_path / "data.json"  # lines, whatever its name says
    file.write_text('{"text": "One <|im_end|> text."}\n"Another."\n')
    expected = [*vocabulary.tokenize("One <|im_end|> text.\n\n", False), *vocabulary.tokenize("Another.\n\n", False)]
    assert read_user_file(file, prefix, vocabulary, template, n_tokens=len(expected)) == [expected]


def test_what_cannot_be_used_is_counted_and_named(
    tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    image = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}, {"type": "text", "text": "What?"}]}
    records = [{"messages": MESSAGES}, {"score": 1}, {"messages": []}, {"score": 2}, {"messages": [image, MESSAGES[2]]}]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, records)) + "\n{broken\n")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = read_user_file(file, prefix, vocabulary, template, n_tokens=10)
    assert len(made) >= 3
    left_out, parts = (str(w.message) for w in said)
    assert left_out.startswith(f"4 of 6 records of {file} are left out: 2 in none of the shapes")
    assert "('score' are there) (the first is line 2)" in left_out and "1 without a reply to a user" in left_out
    assert "1 not JSON (the first is line 6, " in left_out and "image_url" in parts and "\n" not in left_out + parts


def test_read_plain_text(tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str) -> None:
    text = "The ferry left at noon, <|im_end|> and nobody waved. " * 20
    file = tmp_path / "story.txt"
    file.write_text(text)
    tokens = vocabulary.tokenize(text, special=False)
    made = read_user_file(file, prefix, vocabulary, template, n_tokens=50)
    assert made == [tokens[i : i + 50] for i in range(0, len(tokens) - 49, 50)] and vocabulary.eos not in made[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"messages": []}\n{"messages"\n', "of 2: 1 without a reply .*line 1.*1 not JSON .*line 2"),
        ("a.json", "{not", "a.json is not JSON"),
        ("a.jsonl", "[1]", "1 with a message that is a int .the first is line 1"),
        ("a.jsonl", '\n{"messages": [{"role": "critic", "content": "x"}]}', "of role 'critic' .the first is line 2"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "message that has no text"),
        ("a.jsonl", '{"text": " "}', "1 without text"),
        ("a.txt", "too short", "has 2 tokens and one sequence needs 64"),
        ("a.jsonl", "", "no record that can be used, of 0: it is empty"),
    ],
)
def test_files_that_cannot_be_used(
    tmp_path: Path,
    prefix: ikv.Prefix,
    vocabulary: Vocabulary,
    template: str,
    name: str,
    text: str,
    message: str,
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(IntactKVError, match=message) as raised:
        read_user_file(file, prefix, vocabulary, template, n_tokens=64)
    assert name in str(raised.value) and "\n" not in str(raised.value)


def test_unreadable_files(tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str) -> None:
    with pytest.raises(UsageError, match="nowhere.txt"):
        read_user_file(tmp_path / "nowhere.txt", prefix, vocabulary, template, n_tokens=8)
    file = tmp_path / "latin.txt"
    file.write_bytes("Zürich".encode("latin-1"))
    with pytest.raises(IntactKVError, match="UTF-8 at byte 1"):
        read_user_file(file, prefix, vocabulary, template, n_tokens=8)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_no_text_of_one_length_is_in_one_of_the_other(
    tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str, suffix: str
) -> None:
    """What is held out among the short texts would else be trained on in the long ones."""
    file = tmp_path / f"data{suffix}"
    numbers = [" ".join(str(10000 + 100 * i + j) for j in range(40)) for i in range(60)]
    record = json.dumps
    chats = (record({"prompt": f"Count from {i}.", "completion": text}) for i, text in enumerate(numbers))
    file.write_text(" ".join(numbers) if suffix == ".txt" else "\n".join(chats))
    shorts, longs = read_two_lengths(file, prefix, vocabulary, template, short=32, long=320, seed=1)
    assert {len(text) for text in shorts} == {32} and {len(text) for text in longs} == {320}
    assert len(shorts) > 40 and len(longs) > 4
    of_shorts, of_longs = (
        {number for text in texts for number in re.findall(r"\b[0-9]{5}\b", vocabulary.text(text[4:-4]))}
        for texts in (shorts, longs)
    )
    assert min(len(of_shorts), len(of_longs)) > 100 and not of_shorts & of_longs
    again = read_two_lengths(file, prefix, vocabulary, template, short=32, long=320, seed=1)
    other = read_two_lengths(file, prefix, vocabulary, template, short=32, long=320, seed=2)
    assert again == (shorts, longs) != other


def test_a_file_too_short_for_two_lengths_has_one(
    tmp_path: Path, prefix: ikv.Prefix, vocabulary: Vocabulary, template: str
) -> None:
    file = tmp_path / "data.txt"
    file.write_text(" ".join(f"{number}" for number in range(200)))
    n = len(vocabulary.tokenize(file.read_text(), special=False))
    shorts, longs = read_two_lengths(file, prefix, vocabulary, template, short=8, long=n // 2, seed=0)
    assert shorts == [] and len(longs) == 2
    with pytest.raises(IntactKVError, match=f"has {n} tokens and one sequence needs {2 * n}"):
        read_two_lengths(file, prefix, vocabulary, template, short=8, long=2 * n, seed=0)
