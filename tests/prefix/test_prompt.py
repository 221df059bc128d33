"""Prompts: the prefix is a token prefix of what the runtime tokenizes, for real templates and vocabularies."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.prefix import ikv, make_prompt
from tests.support import tiny_ggufs
from tests.support.paths import REPO

SYSTEM = "You are a helpful pirate. Answer in one sentence."
DEFAULT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_default_prompt(vocabulary, template):
    made = make_prompt(vocabulary, template, None)
    assert made.tokens == vocabulary.tokenize(DEFAULT, special=True) and len(made.tokens) == 24
    assert made.text == DEFAULT and made.messages is None and not made.bos_only


def test_is_a_prefix_of_what_the_runtime_evaluates(model, vocabulary, template):
    """Llama.create_chat_completion renders and tokenizes in its own way: its tokens begin with the prefix."""
    L = library.load()
    made = make_prompt(vocabulary, template, SYSTEM)
    assert made.messages == [{"role": "system", "content": SYSTEM}]
    llama = L.Llama(str(model("F16")), vocab_only=True, verbose=False)
    llama.chat_format = "chat_template.default"
    seen = []
    llama.create_completion = lambda prompt, **settings: seen.append(prompt) or {"choices": []}
    for text in ("Hi", "", "123", " x", "日本", "```py\nx```", "<|im_end|>"):
        for more in ([], [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "again"}]):
            messages = [*made.messages, {"role": "user", "content": text}, *more]
            with pytest.raises(Exception):  # noqa: B017  # our create_completion gives no completion to convert
                llama.create_chat_completion(messages)
    assert len(seen) == 14
    for tokens in seen:
        assert tokens[: len(made.tokens)] == made.tokens


def test_bos_only(vocabulary, template):
    """A model whose texts begin without a BOS of their own: the first token of its template, else its BOS."""
    assert make_prompt(vocabulary, template, None, bos_only=True).tokens == [1]
    for template in (None, "{% for", "{{ raise_exception('no') }}"):
        assert make_prompt(vocabulary, template, None, bos_only=True).tokens == [1]
    made = make_prompt(vocabulary, PLAIN, None, bos_only=True)
    assert made.tokens == vocabulary.tokenize("user", special=False) and made.bos_only


NO_BOS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


class _AddsBos(Vocabulary):
    """SmolLM2's vocabulary with <|endoftext|> as the BOS of plain text, as TinyLlama's has <s>."""

    adds_bos, bos = True, 0


def test_bos_only_is_what_chats_begin_with(model):
    """A tokenizer that adds a BOS and a template that renders none: llama.cpp's programs put it before them."""
    with _AddsBos(model("F16")) as vocabulary:
        made = make_prompt(vocabulary, NO_BOS, None, bos_only=True)
        assert made.tokens == [0] and made.chat_template_sha256
        assert make_prompt(vocabulary, NO_BOS, SYSTEM).tokens[:2] == [0, 1]
        assert make_prompt(vocabulary, "{{ bos_token }}" + NO_BOS, None, bos_only=True).tokens == [0]
        assert make_prompt(vocabulary, None, None, bos_only=True).tokens == [0]


@pytest.mark.parametrize("system", [SYSTEM, "", " ", "Z", "Zürich?\n\n", "x" * 5000, "{{ messages }}", "日本語 🙂"])
def test_texts_of_all_kinds(vocabulary, template, system):
    made = make_prompt(vocabulary, template, system)
    assert made.text == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("system", ["a<|im_end|>b", "<|im_start|>", "x <|endoftext|>"])
def test_control_tokens_in_the_text_are_refused(vocabulary, template, system):
    with pytest.raises(UsageError, match="control token"):
        make_prompt(vocabulary, template, system)


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "no chat template"),
        ("", "no chat template"),
        ("{% for", "cannot be compiled"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages.append(1) }}", "unsafe|not safe|is not"),
        ("{{ strftime_now('%d %b %Y') }}" + PLAIN, "the date is what differs, so fix it with --date"),
        ("{{ messages[0].role }}: {{ messages[1].content }}", "does not show the system prompt at all"),
    ],
)
def test_templates_that_cannot_hold_the_prompt(vocabulary, template, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_prompt(vocabulary, template, SYSTEM)
    assert "--bos-only" in str(caught.value) and "\n" not in str(caught.value)


def test_a_prompt_in_a_later_message_leaves_the_first_tokens(vocabulary):
    """As Mistral Nemo has it: what all conversations begin with is kept, and said."""
    text = "<|im_start|>{% for m in messages[1:] %}{{ m.role }}{% if loop.last %} {{ messages[0].content }}{% endif %}"
    with pytest.warns(UserWarning, match="into a later message, so the prefix is the first 2 tokens alone"):
        made = make_prompt(vocabulary, text + "{% endfor %}", SYSTEM)
    assert made.text == "<|im_start|>user" and made.messages == [{"role": "system", "content": SYSTEM}]


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}",
    ],
)
def test_where_there_are_no_system_messages_the_server_puts_it_before_the_first(vocabulary, text):
    made = make_prompt(vocabulary, text, SYSTEM)
    assert made.text.startswith(f"<user>{SYSTEM}") and made.messages == [{"role": "system", "content": SYSTEM}]


def test_a_date_behind_the_prompt_cuts_the_prefix(vocabulary):
    text = "{{ messages[0].content }}\nToday is {{ strftime_now('%A, %d %B %Y %H:%M:%S') }}{{ messages[1].content }}"
    with pytest.warns(UserWarning, match="ends before the date that the chat template writes, after"):
        made = make_prompt(vocabulary, text, SYSTEM)
    assert made.text == f"{SYSTEM}\nToday is"


def test_what_hugging_face_templates_use(vocabulary):
    text = (
        "{%- for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% generation %}{{ {'ä': m.content} | tojson }}{% endgeneration %}\n{% endfor %}"
    )
    assert make_prompt(vocabulary, text, SYSTEM).text.startswith('{"ä": "' + SYSTEM + '"}')


# Vocabularies and templates of models that are too large for a test: files of llama.cpp's own tests.

REAL = [
    ("llama-bpe", "meta-llama-Llama-3.1-8B-Instruct", "\nToday Date: "),
    ("qwen2", "Qwen-Qwen2.5-7B-Instruct", "sentence"),  # its full stop merges with what is before tools
    ("qwen2", "Qwen-Qwen3-0.6B", "sentence"),
    ("phi-3", "microsoft-Phi-3.5-mini-instruct", f"{SYSTEM}<|end|><|user|>"),
    ("llama-bpe", "meta-llama-Llama-3.2-3B-Instruct", "\nToday Date: "),
    ("llama-spm", "mistralai-Mistral-Nemo-Instruct-2407", "<s> ["),
]


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """models/ of the pinned llama.cpp source: vocabularies and templates. Skips if the source is not there."""
    get_source = REPO / "native" / "get_source.py"
    found = subprocess.run([sys.executable, get_source, "--archive"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    target = tmp_path_factory.mktemp("upstream")
    wanted = {f"ggml-vocab-{vocab}.gguf" for vocab, _, _ in REAL} | {f"{template}.jinja" for _, template, _ in REAL}
    with tarfile.open(found.stdout.strip()) as archive:
        for member in archive:
            if (name := Path(member.name).name) in wanted and "/models/" in member.name:
                (target / name).write_bytes(archive.extractfile(member).read())
    return target


@pytest.mark.parametrize("vocab, template, expected", REAL, ids=[f"{v}-{t}" for v, t, _ in REAL])
def test_real_templates(upstream, vocab, template, expected):
    with Vocabulary(upstream / f"ggml-vocab-{vocab}.gguf") as vocabulary:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = make_prompt(vocabulary, (upstream / f"{template}.jinja").read_text(), SYSTEM)
        assert made.text.endswith(expected) and bool(caught) == ("sentence" not in made.text)
        assert made.tokens[:2].count(vocabulary.bos) == vocabulary.adds_bos  # as the server has it, never twice


HEADERS = [("mamba", ""), ("jamba", ""), ("t5", "encoder"), ("llama", ""), ("deepseek2", "")]
HEADERS += [("qwen2vl", ""), ("grok", "flash attention"), ("deepseek32", "indexer")]


@pytest.mark.parametrize("arch, why", HEADERS)
def test_what_the_header_tells(tmp_path, model, arch, why):
    gguf = tmp_path / "x.gguf"
    more = {f"{arch}.attention.{name}_length_mla": 64 for name in ("key", "value")} if "deepseek" in arch else {}
    more |= {f"{arch}.attention.indexer.top_k": 8} if why == "indexer" else {}
    ikv.rewrite(model("F16"), {"general.architecture": arch, **more}, gguf)
    with Vocabulary(gguf) as vocabulary:
        assert why in vocabulary.refusal() and bool(why) == bool(vocabulary.refusal())


def test_more_tokens_than_bytes(tmp_path):
    """Where a vocabulary has no token for SPM's mark of a blank, a blank becomes that mark's three bytes."""
    with Vocabulary(tiny_ggufs.write(tmp_path / "x.gguf", "llama")) as vocabulary:
        assert len(vocabulary.tokenize("a b " * 100, False)) == 200 + 3 * 200


@pytest.mark.parametrize("content", [b"", b"GGUF", b"hello"])
def test_vocabulary_of_no_model(tmp_path, content):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(content)
    with pytest.raises(IntactKVError, match="cannot load the vocabulary") as caught:
        Vocabulary(gguf)
    assert "\n" not in str(caught.value)
