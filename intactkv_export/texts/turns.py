"""The turns of a conversation behind a prefix, as tokens: what the model's own chat template puts between messages."""

from __future__ import annotations

from collections.abc import Sequence

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import Prefix, Template, of_prefix

_MARKS = ("MARK-1-KRAM", "MARK-2-KRAM", "MARK-3-KRAM")  # stand for messages, to find what a template puts between


class Turns:
    """How the model marks turns, behind a prefix: what follows the prefix, what ends one turn and begins the next.

    chat_template: the model's; None: it has none. system_prompt: of a conversation behind a prefix of the first token;
    None: the prefix's. Raises UsageError if the template cannot render the conversation.
    """

    def __init__(
        self, prefix: Prefix, vocabulary: Vocabulary, chat_template: str | None, system_prompt: str | None = None
    ) -> None:
        self._prefix, self._vocabulary = prefix, vocabulary
        self._system = prefix.messages[0]["content"] if prefix.messages else system_prompt
        self._template: Template | None = None
        head, to_user, to_reply = "", "\n\n", "\n\n"
        if chat_template:
            self._template = of_prefix(chat_template, prefix.manifest, prefix.tokens, vocabulary)
            text = self._template.conversation(self._system, *_MARKS)
            head, rest = text.split(_MARKS[0], 1)
            to_user, to_reply = rest.split(_MARKS[1], 1)[1].split(_MARKS[2], 1)
        self._head, self._to_user, self._to_reply = head, to_user, to_reply
        self.to_user, self.to_reply = self._tokens(to_user), self._tokens(to_reply)

    def first(self, text: str) -> list[int]:
        """From the end of the prefix to the beginning of the reply to a first message."""
        return self._behind_prefix(self._head + text + self._to_reply)

    def opening(self, text: str) -> list[int]:
        """From the end of the prefix to the end of a text with which the first message begins."""
        return self._behind_prefix(self._head + text)

    def next(self, text: str) -> list[int]:
        """From the end of a reply to the beginning of the reply to the next message."""
        return self._tokens(self._to_user + text + self._to_reply)

    def written_prompt(self, opening: str, text: str, reply: bool) -> tuple[list[int], list[int]] | None:
        """Behind a prefix of the first token, a system prompt that the model goes on with, and a user's first message:
        (from the end of the prefix to the end of the opening, from the end of the system prompt to the end of the text,
        or to the beginning of the reply). None: the template has no place for a system prompt
        before that message."""
        assert self._template is not None  # the caller's part of the contract
        try:
            whole = self._template.conversation(_MARKS[0], _MARKS[1], _MARKS[2])
        except UsageError:
            return None
        head, found, rest = whole.partition(_MARKS[0])
        if not found or _MARKS[1] in head or _MARKS[1] not in rest:
            return None
        between = rest.split(_MARKS[1], 1)[0]
        after = self._tokens(between + text + (self._to_reply if reply else ""))
        return self._behind_prefix(head + opening), after

    def whole(self, messages: Sequence[str]) -> list[int]:
        """A conversation, user and assistant in turns, from the end of the prefix to where the next user begins."""
        if self._template is None:
            return self._behind_prefix("\n\n".join(messages) + self._to_user)
        text = self._template.conversation(self._system, *messages, _MARKS[0])
        return self._behind_prefix(text.rpartition(_MARKS[0])[0])

    def answer(self, question: str, reply: str, asked: bool) -> tuple[list[int], list[int]]:
        """A question behind the prefix, and a reply to it. asked: for a model without a template, "Question: ..."."""
        before, after = self._head + question + self._to_reply, reply
        if self._template is None:
            before, after = (f"Question: {question}\nAnswer:" if asked else question), f" {reply}"
        context = self._behind_prefix(before)
        return context, self._behind_prefix(before + after)[len(context) :]

    def _behind_prefix(self, text: str) -> list[int]:
        tokens, prefix = self._tokens(text), self._prefix.tokens
        if tokens[: len(prefix)] == prefix:
            return tokens[len(prefix) :]
        if self._prefix.manifest["bos_only"]:  # BOS that the tokenizer adds, not the template
            return tokens
        raise IntactKVError(
            f"the chat template renders {self._vocabulary.text(tokens[: len(prefix)])!r} where the prefix has "
            f"{self._vocabulary.text(prefix)!r}: use the model that the prefix was made for"
        )

    def _tokens(self, text: str) -> list[int]:
        return self._vocabulary.tokenize(text, special=True)
