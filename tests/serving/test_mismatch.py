"""A request that begins with no prefix of the server's is told of: once, in a sentence, and without a word of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import Any

from intactkv_export import cli
from intactkv_export.prefix import ikv
from tests.serving.conftest import chat, request, served
from tests.serving.test_states import BEGIN, REPLY, Slots
from tests.support import hybrids, shorter
from tests.support.smol import Smol

PIRATE = "You are a pirate who answers in rhymes."


@contextmanager
def said(*arguments: Any) -> Iterator[tuple[str, list[str]]]:
    """A server of these arguments: its URL, and the lines that its start and all requests have brought at its end."""
    lines: list[str] = []
    with served(*arguments) as facts:
        yield facts["url"], lines
        time.sleep(0.2)  # what it logs comes through a pipe
        facts["process"].terminate()
        facts["process"].wait(30)
        lines += facts["process"].stderr.read().splitlines()


def prompt_of(server: Slots, system: str) -> list[int]:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hi"}]
    return server.tokens(server.ask("/apply-template", {"messages": messages})["prompt"])


def test_another_system_prompt_is_told_of_once(programs: None, smol: Smol) -> None:
    with said(smol.gguf, "--prefix", smol.ikv, "--ctx-size", 512) as (url, lines):
        for text in ("Hello", "Why is the sky blue?"):  # the template's own is the prefix's
            chat(url, text, n=2)
        same = len(commonprefix([prompt_of(Slots(url), PIRATE), smol.tokens]))
        with ThreadPoolExecutor(4) as pool:  # at once, in slots of their own
            list(pool.map(lambda text: chat(url, text, PIRATE, n=2), ["Ahoy"] * 4))
        chat(url, "Hello", "You are a porter.", n=2)
    (line,) = lines
    assert line == (
        f"llama-server: intactkv: a prompt does not begin with the prefix {smol.ikv}: {same} of its "
        f"{len(smol.tokens)} tokens are the same, and the prompt is computed as usual; a request needs the "
        "system prompt, the tools and the template's arguments that it was made with (this is said once)"
    )
    assert 0 < same < len(smol.tokens)


def test_told_of_where_it_begins_in_the_slot_of_another(programs: None, smol: Smol) -> None:
    """The server computes what its slot has not: not from the first token on."""
    with said(smol.gguf, "--prefix", smol.ikv, "--parallel", 1, "--ctx-size", 512) as (url, lines):
        chat(url, "Hello", n=2)
        chat(url, "Hello", PIRATE, n=2)
    assert len(lines) == 1 and "does not begin with the prefix" in lines[0]


def other_prefix(smol: Smol, out: Path) -> Path:
    command = ["prefix", smol.reference, "-m", smol.gguf, "-o", out, "-s", PIRATE, "-t", "2", "--dtype", "auto"]
    assert cli.main([str(word) for word in command]) == 0
    return out


def test_of_several_the_nearest_is_named(programs: None, smol: Smol, tmp_path: Path) -> None:
    """Where one of them begins the prompt nothing is."""
    other = other_prefix(smol, tmp_path / "other.ikv")
    prefixes = ["--prefix", smol.ikv, "--prefix", other, "--prefix", smol.bos]
    with said(smol.gguf, *prefixes, "--ctx-size", 512) as (url, lines):
        chat(url, "Ahoy", PIRATE, n=2)
        chat(url, "Hello", n=2)
    assert lines == []
    with said(smol.gguf, *prefixes, "--ctx-size", 512) as (url, lines):
        chat(url, "Ahoy", PIRATE.replace("rhymes", "verses"), n=2)
    assert len(lines) == 1 and f"begins with none of the 2 prefixes, the nearest is {other}: " in lines[0]


def test_what_is_no_request_for_a_prefix_says_nothing(programs: None, smol: Smol, tmp_path: Path) -> None:
    """The first token's serves everyone; kept ones are of what was asked before; a prompt may end within it. Slots are
    saved, restored and gone on with; a draft model holds a prefix of its own."""
    with said(smol.gguf, "--prefix", smol.bos, "--ctx-size", 512) as (url, lines):
        chat(url, "Ahoy", PIRATE, n=2)
    assert lines == []
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o700)
    other_prefix(smol, kept / "seen.ikv")
    with said(smol.gguf, "--keep", kept, "--ctx-size", 512) as (url, lines):
        chat(url, "Hello", "You are a porter.", n=2)
    assert lines == []
    draft = shorter.write(smol.gguf, tmp_path / "draft.gguf", 8)
    ikv.embed(draft, ikv.read(hybrids.prefix_of(draft, ikv.read(kept / "seen.ikv").tokens)))
    more = ["--", "--slot-save-path", tmp_path, "--spec-type", "draft-simple", "-md", draft]
    arguments = [smol.gguf, "--prefix", smol.ikv, "--parallel", 2, "--ctx-size", 512, "--kv-type", "f16", *more]
    with said(*arguments) as (url, lines):
        server = Slots(url)
        server.complete(smol.tokens[:12])
        tokens = server.tokens(f"{BEGIN}What is the capital of France?{REPLY}")
        tokens += server.complete(tokens)["tokens"]
        server.act(0, "save", "a.state")
        server.act(0, "erase")
        server.act(1, "restore", "a.state")
        server.complete([*tokens, *server.tokens("And of Italy?")], slot=1)
        with request(f"{url}/tokenize", {"content": PIRATE}):
            pass
    assert unlike(lines) == []


def unlike(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if "intactkv: a prompt" in line]


def test_embeddings_are_of_no_prompt(programs: None, smol: Smol, tmp_path: Path) -> None:
    embedded = ikv.embed(smol.gguf, ikv.read(smol.ikv), tmp_path / "embedded.gguf")
    with said(embedded, "--ctx-size", 512, "--", "--embeddings", "--pooling", "last") as (url, lines):
        with request(f"{url}/embedding", {"content": PIRATE}) as answer:
            assert answer.status == 200
    assert unlike(lines) == []
