"""How texts that the reference writes begin: one conversation behind the prefix's prompt, or all kinds of texts.

A prefix of a system prompt stands before conversations of that prompt, and every second of them begins with a document
that the user pastes. A prefix of the first token alone stands before everything, so its texts are of all kinds:

    a system prompt of ours (half of those with one), one that the model writes itself, or none
    behind it a question, or a document and a reply to it
    a document by itself, as programs feed it that know no chat template, from anywhere in its opening on
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

from intactkv_export.errors import UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import Prefix
from intactkv_export.texts.growing import Growing
from intactkv_export.texts.seeds import OPENINGS, QUESTIONS
from intactkv_export.texts.system_prompts import PROMPT_OPENINGS, SYSTEM_PROMPTS
from intactkv_export.texts.turns import Turns

# Of a first-token prefix's texts, in turn: (system prompt, what is behind it); "plain": a document by itself
_KINDS = (
    ("ours", "question"),
    ("none", "plain"),
    ("written", "question"),
    ("ours", "document"),
    ("none", "question"),
    ("ours", "question"),
    ("none", "plain"),
    ("written", "document"),
)


def begin(
    prefix: Prefix,
    vocabulary: Vocabulary,
    chat_template: str | None,
    *,
    n: int,
    seed: int,
    documents: bool = False,
) -> list[Growing]:
    """n texts that begin behind a prefix, each in its own way; the same for a seed.

    documents: every second one of a system prompt's conversations begins with a document. A prefix of the first token
    only, of a model with a chat template, has texts of all kinds; without one, or if it refuses even a plain
    conversation, questions and documents that begin anywhere. Raises UsageError if it refuses that of a system prompt.
    """
    choose = random.Random(seed)
    questions, openings = _spread(QUESTIONS, n, choose), _spread(OPENINGS, n, choose)
    try:
        own = Turns(prefix, vocabulary, chat_template)
    except UsageError:
        if not prefix.manifest["bos_only"]:
            raise
        chat_template = None
        own = Turns(prefix, vocabulary, None)
    every_kind = documents and prefix.manifest["bos_only"] and chat_template is not None
    kinds = _Kinds(prefix, vocabulary, chat_template, n, choose) if every_kind else None
    texts = []
    for i, (question, opening) in enumerate(zip(questions, openings, strict=True)):
        its_own = random.Random(choose.random())
        if kinds is not None:
            texts.append(kinds.begin(i, question, opening, its_own))
        elif documents and i % 2 and prefix.manifest["bos_only"]:
            texts.append(_from_anywhere(own, opening, its_own))
        elif documents and i % 2:
            texts.append(Growing(own, its_own, deque(own.opening(opening)), user=True))
        else:
            texts.append(Growing(own, its_own, deque(own.first(question))))
    return texts


class _Kinds:
    """The texts of a prefix that stands before everything."""

    def __init__(self, prefix: Prefix, vocabulary: Vocabulary, template: str | None, n: int, choose: random.Random):
        self._models = prefix, vocabulary
        self._template = template
        self._none, self._plain = Turns(prefix, vocabulary, template), Turns(prefix, vocabulary, None)
        self._prompts = _spread(SYSTEM_PROMPTS, n, choose)
        self._openings = _spread(PROMPT_OPENINGS, n, choose)
        self._with_prompts = self._behind("Be brief.") is not None

    def begin(self, i: int, question: str, opening: str, choose: random.Random) -> Growing:
        prompt, what = _KINDS[i % len(_KINDS)]
        if what == "plain":
            return _from_anywhere(self._plain, opening, choose)
        text, user = (question, False) if what == "question" else (opening, True)
        turns = self._none
        if prompt == "ours" and self._with_prompts:
            turns = self._behind(self._prompts[i]) or self._none
        if prompt == "written" and self._with_prompts:
            written = turns.written_prompt(self._openings[i], text, reply=not user)
            if written is not None:
                return Growing(turns, choose, deque(written[0]), user=user, after_prompt=written[1])
        return Growing(turns, choose, deque(turns.opening(text) if user else turns.first(text)), user=user)

    def _behind(self, system_prompt: str) -> Turns | None:
        """None: the template knows no system prompts."""
        try:
            return Turns(*self._models, self._template, system_prompt)
        except UsageError:
            return None


def _from_anywhere(plain: Turns, opening: str, choose: random.Random) -> Growing:
    """A document by itself, from any token of its opening on: what programs feed begins anywhere, and the first token's
    rows must serve that."""
    tokens = plain.opening(opening)
    return Growing(plain, choose, deque(tokens[choose.randrange(len(tokens)) :]), more=OPENINGS)


def _spread(texts: Sequence[str], n: int, choose: random.Random) -> list[str]:
    """n of the texts in a random order, each as often as the others, give or take one."""
    chosen: list[str] = []
    while len(chosen) < n:
        chosen += choose.sample(texts, len(texts))
    return chosen[:n]
