"""A user's texts as sequences of tokens behind the prefix: conversations in JSON, or plain text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import Vocabulary
from intactkv_export.models import read_text
from intactkv_export.prefix import Prefix
from intactkv_export.texts.turns import Turns

_ROLES = {"system": "system", "user": "user", "human": "user"} | dict.fromkeys(("assistant", "gpt", "model"), "reply")


def read_user_file(
    path: str | Path, prefix: Prefix, vocabulary: Vocabulary, chat_template: str | None, *, n_tokens: int
) -> list[list[int]]:
    """The texts of a file as sequences of n_tokens tokens behind the prefix.

    NAME.jsonl: a conversation a line, {"messages": [{"role": "user", "content": ...}, ...]} or ShareGPT's
    {"conversations": [{"from": "human", "value": ...}, ...]}. NAME.json: an array of those. Else plain text. Their
    own system messages are left out: the prefix has one. A long conversation gives several sequences, short ones are
    joined as further turns; what is left at an end and fills no sequence is left out.

    Raises UsageError if there is no such file, IntactKVError that names the line if it is not as above, or if the file
    is too short for one sequence.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix in (".json", ".jsonl"):
        turns = Turns(prefix, vocabulary, chat_template)
        parts = [turns.whole(messages) for messages in _conversations(path, text) if messages]
    else:
        parts = [vocabulary.tokenize(text, special=False)]
    sequences, pending = [], []  # type: ignore[var-annotated]
    for part in parts:
        pending = pending + part
        n_whole = len(pending) // n_tokens
        sequences += [pending[i * n_tokens : (i + 1) * n_tokens] for i in range(n_whole)]
        pending = [] if n_whole else pending  # the next sequence begins where a conversation begins
    if not sequences:
        raise IntactKVError(
            f"{path} has {sum(map(len, parts))} tokens and one sequence needs {n_tokens}: give more text, or shorter "
            "sequences"
        )
    return sequences


def _conversations(path: Path, text: str) -> Iterator[list[str]]:
    """Messages of each conversation, user and assistant in turns, complete pairs only."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield _messages(_json(line, where), where)
        return
    records = _json(text, str(path))
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield _messages(record, f"{path}, entry {number}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise IntactKVError(f"{where} is not JSON ({error}): correct it") from error


def _messages(record: Any, where: str) -> list[str]:
    found = record.get("messages", record.get("conversations")) if isinstance(record, dict) else None
    if not isinstance(found, list):
        raise IntactKVError(f'{where} has neither "messages" nor "conversations" with a list: see --data in the help')
    texts: list[str] = []
    for i, message in enumerate(found):
        get = message.get if isinstance(message, dict) else {}.get
        role, content = get("role", get("from")), get("content", get("value"))
        if role not in _ROLES or not isinstance(content, str):
            raise IntactKVError(
                f"{where}: message {i + 1} needs a role of {', '.join(_ROLES)} and a text, and has {role!r} and "
                f"{type(content).__name__}: correct it or leave it out"
            )
        if _ROLES[role] == "system" or (not texts and _ROLES[role] == "reply"):
            continue  # conversations that were cut out of longer ones begin with a reply
        expected = ("user", "reply")[len(texts) % 2]
        if _ROLES[role] != expected:
            raise IntactKVError(f"{where}: message {i + 1} is the second of {role!r} in a row: join the two")
        texts.append(content)
    return texts[: len(texts) // 2 * 2]
