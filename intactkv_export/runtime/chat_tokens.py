"""Messages as tokens, by the model's own chat template: its control tokens are the template's, never the messages'.

llama.cpp takes the name of a control token, as <|im_end|>, for that token wherever it stands. Whoever types it, or has
it in a file that is pasted, would end his turn and could speak as the assistant or the system.
"""

from __future__ import annotations

import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from os.path import commonprefix
from typing import Any

from intactkv_export.errors import IntactKVError, first_line
from intactkv_export.prefix import Rendering, Template, chat_template_of, checked_tools
from intactkv_export.runtime.intact_llama import IntactLlama, L

Messages = Sequence[Mapping[str, str]]

_BEYOND = 256  # characters behind a prefix's own, so that its last tokens are those of the whole text


class _Names:
    """The names of a model's control tokens in texts: hidden while a template is rendered, then back as text."""

    def __init__(self, llama: IntactLlama) -> None:
        self._llama = llama
        self._vocab = L.llama_model_get_vocab(llama.model)
        self._control_names_of: dict[str, tuple[str, ...]] = {}  # turns come again with every message

    def hide(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The messages with words that cannot be guessed in place of names of control tokens; these words' names.

        A content that is a list of texts becomes one; what is no text stays as it is.
        """
        hidden: dict[str, str] = {}
        safe = []
        for message in messages:
            content = _joined(message.get("content"))
            safe.append({**message, "content": self._hide(content, hidden) if isinstance(content, str) else content})
        return safe, hidden

    def _hide(self, content: str, hidden: dict[str, str]) -> str:
        if content not in self._control_names_of:
            self._control_names_of[content] = self._control_names(content)
        names = self._control_names_of[content]
        while names:
            for name in names:
                stand_in = f"\ue000{secrets.token_hex(8)}\ue001"
                hidden[stand_in] = name
                content = content.replace(name, stand_in)
            names = self._control_names(content)  # without one, two halves of another may have met
        return content

    def _control_names(self, text: str) -> tuple[str, ...]:
        """Names of the control tokens that llama.cpp reads in a text, the longest first."""
        names = {self._name(token) for token in set(self._tokenize(text, special=True)) if self._is_control(token)}
        return tuple(sorted((name for name in names if name and name in text), key=len, reverse=True))

    def tokenize_parts(self, text: str, hidden: Mapping[str, str]) -> list[int]:
        """Between the template's control tokens are parts; one that has a name to bring back is plain text.

        All else is tokenized together with the control tokens around it. llama.cpp too tokenizes the parts one by one.
        """
        back = re.compile("|".join(map(re.escape, hidden)))
        control = "|".join(map(re.escape, self._control_names(text)))
        pieces = re.split(f"({control})", text) if control else [text]
        tokens: list[int] = []
        others = ""
        for i, piece in enumerate(pieces):
            if not back.search(piece):
                others += piece
                continue
            tokens += self._tokenize(others, special=True)
            others = ""
            plain = back.sub(lambda match: hidden[match[0]], piece)
            tokens += self._tokenize(self._stripped(plain, pieces, i), special=False)
        return tokens + self._tokenize(others, special=True)

    def _stripped(self, plain: str, pieces: Sequence[str], i: int) -> str:
        """Without the white space that the control tokens on both sides swallow, as <|end|> of Phi-3 does."""
        if i > 0 and self._attributes(pieces[i - 1]) & L.LLAMA_TOKEN_ATTR_RSTRIP:
            plain = plain.lstrip()
        if i + 1 < len(pieces) and self._attributes(pieces[i + 1]) & L.LLAMA_TOKEN_ATTR_LSTRIP:
            plain = plain.rstrip()
        return plain

    def _tokenize(self, text: str, special: bool) -> list[int]:
        return self._llama.tokenize(text.encode(), add_bos=False, special=special) if text else []

    def _attributes(self, name: str) -> int:
        (token,) = self._tokenize(name, special=True)
        return int(L.llama_vocab_get_attr(self._vocab, token))

    def _is_control(self, token: int) -> bool:
        """Whether only `special` makes llama.cpp read this token in a text: user-defined ones are text in any case."""
        attributes = L.llama_vocab_get_attr(self._vocab, token)
        return bool(attributes & (L.LLAMA_TOKEN_ATTR_CONTROL | L.LLAMA_TOKEN_ATTR_UNKNOWN))

    def _name(self, token: int) -> str:
        return L.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace")


class ChatTokens(_Names):
    """Renders conversations, as the prefix was rendered, and tokenizes them. Raises IntactKVError if the model has no
    template."""

    def __init__(self, llama: IntactLlama) -> None:
        super().__init__(llama)
        if llama.metadata.get("tokenizer.chat_template") is None:
            raise IntactKVError(
                f"{llama.model_path} has no chat template, so nothing says how it marks turns: "
                "use IntactLlama.create_completion() for a base model"
            )
        self._template = _template(llama)

    def __call__(self, messages: Messages) -> list[int]:
        """The tokens of a conversation that goes on with the assistant's reply.

        Those of the rendered text as a whole, as IntactLlama.create_chat_completion() has them, unless a message
        contains the name of a control token: then this message's part is tokenized as plain text. Raises IntactKVError
        if the template refuses the conversation.
        """
        safe, hidden = self.hide(messages)
        try:
            text = self._template.render(safe)
        except Exception as error:  # a template is a program: anything can happen
            raise IntactKVError(
                f"the chat template of {self._llama.model_path} refuses this conversation ({first_line(error)}): "
                "leave out --system-prompt, or use /reset"
            ) from error
        return self.tokenize_parts(text, hidden) if hidden else self._tokenize(text, special=True)


class PrefixFormatter:
    """A chat formatter of llama_cpp that renders as the prefix was rendered: with its tools, template arguments, date.

    The tools are those of a request if it names some ([]: none), else the prefix's, where the conversation begins as
    the prefix does. Warns once of a date that is not today's, and of a conversation that begins otherwise.
    """

    def __init__(self, llama: IntactLlama) -> None:
        assert llama.prefix is not None  # the caller's part of the contract
        self._template, self._prefix = _template(llama), llama.prefix
        self._eos = _token_name(llama, llama.token_eos())
        self.differs = self._template.differs
        self._llama = llama
        self._said: set[str] = set()

    def __call__(
        self,
        *,
        messages: Sequence[Mapping[str, Any]],
        functions: Sequence[Mapping[str, Any]] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **_: Any,
    ) -> Any:
        if functions and tools is None:
            tools = [{"type": "function", "function": function} for function in functions]
        given = checked_tools(list(tools)) if tools else []
        if tools is None and list(messages[: len(self._prefix.messages)]) == self._prefix.messages:
            given = self._prefix.tools
        text = self._template.render(messages, given)
        self._say_what_differs(text, bool(given))
        return L.llama_chat_format.ChatFormatterResponse(prompt=text, stop=[self._eos], added_special=True)

    def _say_what_differs(self, text: str, has_tools: bool) -> None:
        day = None if self._template.rendering is None else self._template.rendering.date
        if day is not None and day != date.today():
            self._say("date", f"conversations are rendered with {day} as the day, as their prefix was: it is another")
        if "prefix" in self._said:
            return
        tokens, begins = self._prefix.tokens, text[: len(self._prefix.manifest["text"]) + _BEYOND]
        same = len(commonprefix([self._llama.tokenize(begins.encode(), add_bos=False, special=True), tokens]))
        if same < len(tokens):
            why = ", it has tools" if has_tools and not self._prefix.tools else ""
            self._say(
                "prefix",
                f"a conversation does not begin with the prefix {self._prefix.source}{why}: {same} of {len(tokens)} "
                "tokens are the same, and all of it is computed as usual",
            )

    def _say(self, what: str, sentence: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(sentence, stacklevel=2)


def formatter_of_prefix(llama: IntactLlama) -> PrefixFormatter | None:
    """None: there is no prefix, or llama_cpp's own formatter renders as the prefix was rendered."""
    if llama.prefix is None or "tokenizer.chat_template" not in llama.metadata:
        return None
    made = PrefixFormatter(llama)
    return made if made.differs else None


def _template(llama: IntactLlama) -> Template:
    """The model's chat template, to be rendered as its prefix was; without one as llama_cpp does."""
    prefix = llama.prefix
    rendering = None if prefix is None else Rendering.of(prefix.manifest)
    bos, eos = (_token_name(llama, token) for token in (llama.token_bos(), llama.token_eos()))
    adds = bool(L.llama_vocab_get_add_bos(L.llama_model_get_vocab(llama.model)))
    begins = prefix is not None and prefix.tokens[0] == llama.token_bos()
    return Template(chat_template_of(llama.metadata, rendering), bos, eos, rendering, adds and begins)


def _token_name(llama: IntactLlama, token: int) -> str:
    """As the vocabulary writes it; "" for -1, where the model has none."""
    if token == -1:
        return ""
    return L.llama_vocab_get_text(L.llama_model_get_vocab(llama.model), token).decode("utf-8", "replace")


def text_stays_text(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A chat handler of llama_cpp (chat_formatter_to_chat_completion_handler) for which messages are text.

    It renders messages in which names of control tokens are hidden, and the model that it is given tokenizes what it
    rendered with the names back as text.
    """

    def handle(*, llama: IntactLlama, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        names = _Names(llama)
        safe, hidden = names.hide(messages)
        return handler(llama=_Texts(llama, names, hidden) if hidden else llama, messages=safe, **settings)

    return handle


def _joined(content: Any) -> Any:
    """The text of [{"type": "text", "text": ...}, ...]; anything else as it is."""
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        return "".join(str(part.get("text", "")) for part in content)
    return content


class _Texts:
    """A model, but for its tokenizer: hidden names come back as text."""

    def __init__(self, llama: IntactLlama, names: _Names, hidden: Mapping[str, str]) -> None:
        self._llama, self._names, self._hidden = llama, names, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        first = self._llama.tokenize(b"", add_bos=add_bos, special=False)
        return first + self._names.tokenize_parts(text.decode(), self._hidden)
