"""A prefix made for a day: served, in a chat and by IntactLlama conversations are rendered with that day, and it is
said; so is what a server renders otherwise."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import cli
from intactkv_export.prefix import ikv
from intactkv_export.runtime import IntactLlama, open_chat
from intactkv_export.serving import choose_settings
from tests.serving.conftest import request, served
from tests.support.smol import Smol

SYSTEM = "You are terse."
TEMPLATE = (
    "<|im_start|>system\nIt is {{ strftime_now('%Y-%m-%d') }}, {{ date_string }}.<|im_end|>\n"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DAY, LATER = "2026-02-01", "2026-02-02"
BEGINNING = (
    "<|im_start|>system\nIt is 2026-02-01, 01 Feb 2026.<|im_end|>\n<|im_start|>system\nYou are terse.<|im_end|>\n"
)


@dataclass(frozen=True)
class Dated:
    """A model whose template writes the day, and prefixes for two days and for none."""

    model: Path
    ikv: Path
    later: Path
    undated: Path


@pytest.fixture(scope="module")
def dated(smol: Smol, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dated]:
    folder = tmp_path_factory.mktemp("dated")
    made = Dated(*(folder / name for name in ("model.gguf", "day.ikv", "later.ikv", "undated.ikv")))
    reference = ikv.rewrite(smol.reference, {"tokenizer.chat_template": TEMPLATE}, folder / "reference.gguf")
    ikv.rewrite(smol.gguf, {"tokenizer.chat_template": TEMPLATE}, made.model)
    for path, day in ((made.ikv, ["--date", DAY]), (made.later, ["--date", LATER]), (made.undated, [])):
        command = ["prefix", reference, "-m", made.model, "-o", path, "-s", SYSTEM]
        assert cli.main([*map(str, command), "-t", "2", "--dtype", "auto", *day]) == 0
    yield made
    for path in folder.iterdir():
        os.unlink(path)


def ask(url: str, path: str, **body: Any) -> dict[str, Any]:
    with request(f"{url}{path}", body) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Hi"}]


def test_a_file_says_its_day(dated: Dated, capsys: pytest.CaptureFixture[str]) -> None:
    assert ikv.read(dated.ikv).manifest["date"] == DAY and ikv.read(dated.ikv).manifest["text"].startswith(BEGINNING)
    undated = ikv.read(dated.undated).manifest
    assert "date" not in undated and undated["text"] == "<|im_start|>system\nIt is "
    assert cli.main(["inspect", str(dated.ikv)]) == 0
    assert f"date        {DAY}, in every conversation behind it" in capsys.readouterr().out


def test_a_server_renders_the_day(programs: None, dated: Dated) -> None:
    with served(dated.model, "--prefix", dated.ikv, "--ctx-size", 512, "--parallel", 1) as facts:
        prompt = ask(facts["url"], "/apply-template", messages=MESSAGES)["prompt"]
        assert prompt.startswith(BEGINNING)
        tokens = ask(facts["url"], "/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        prefix = ikv.read(dated.ikv).tokens
        assert tokens[: len(prefix)] == prefix
        answer = ask(facts["url"], "/v1/chat/completions", messages=MESSAGES, max_tokens=1)
        assert answer["usage"]["prompt_tokens"] == len(tokens)
        facts["process"].terminate()
        said = facts["process"].stderr.read()
    assert said.strip() == f"conversations are rendered with {DAY} as the day, as their prefix was"


def test_what_a_server_renders_otherwise_is_said(programs: None, dated: Dated, tmp_path: Path) -> None:
    """Another template; variables of the user's, which hold beside those of the day."""
    own = tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with served(dated.model, "--prefix", dated.ikv, "--", "--chat-template-file", own) as facts:
        facts["process"].terminate()
        said = facts["process"].stderr.read().splitlines()
    assert len(said) == 2 and "--chat-template-file gives the template" in said[0]
    assert "rendered otherwise, 0 of its" in said[1] and str(dated.ikv) in said[1]
    variables = '{"date_string": "Sunday", "x": 1}'
    with served(dated.model, "--prefix", dated.ikv, "--", "--chat-template-kwargs", variables) as facts:
        prompt = ask(facts["url"], "/apply-template", messages=MESSAGES)["prompt"]
        facts["process"].terminate()
        said = facts["process"].stderr.read().splitlines()
    assert "It is 2026-02-01, Sunday." in prompt and len(said) == 2 and "rendered otherwise" in said[1]


def test_settings_of_several_days(dated: Dated, smol: Smol) -> None:
    """The latest is served, and what cannot be used then is named."""
    settings = choose_settings(dated.model, prefixes=[dated.ikv, dated.later, dated.undated], port=0)
    assert settings.notes == [
        f"the prefix of {dated.ikv} is for conversations of {DAY}, and they are rendered with {LATER}: it is not used",
        f"conversations are rendered with {LATER} as the day, as their prefix was",
    ]
    assert f"It is {{{{ '{LATER}' }}}}" in settings.environment["LLAMA_ARG_CHAT_TEMPLATE"]
    given = settings.arguments[settings.arguments.index("--chat-template-kwargs") + 1]
    assert json.loads(given) == {"datetime": "Feb 02 2026", "date_string": "02 Feb 2026"}
    for prefixes in ([dated.undated], [smol.bos]):
        settings = choose_settings(dated.model, prefixes=prefixes, port=0)
        assert "--chat-template-kwargs" not in settings.arguments and not settings.notes
        assert "LLAMA_ARG_CHAT_TEMPLATE" not in settings.environment


def test_chat_and_intact_llama_render_the_day(dated: Dated) -> None:
    said: list[str] = []
    talk = open_chat(dated.model, prefix=dated.ikv, notice=said.append, n_ctx=256, n_threads=2)
    assert said == [f"conversations are rendered with {DAY} as the day, as their prefix was"]
    assert talk.begins_with_prefix()
    talk.llama.close()
    llama = IntactLlama(dated.model, dated.ikv, n_ctx=256, n_threads=2)
    for times in (1, 0):  # once
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            llama.reset()
            llama.create_chat_completion(MESSAGES, max_tokens=1)
        assert [str(w.message) for w in caught if w.category is UserWarning] == times * [
            f"conversations are rendered with {DAY} as the day, as their prefix was: it is another"
        ]
    assert llama.prefix_stats["loads"] == 2 and date.fromisoformat(DAY) < date.today()
    other = [{"role": "system", "content": "Rhyme."}, MESSAGES[1]]
    for times in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            llama.create_chat_completion(other, max_tokens=1)
        assert sum("does not begin with the prefix" in str(w.message) for w in caught) == times
    llama.close()
