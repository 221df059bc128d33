"""What a server does with the state of conversations: kept in files and in memory, shifted, guessed ahead. Answers stay
those of a conversation that nothing was done to, behind the prefix as it was."""

from __future__ import annotations

import contextlib
import json
import struct
import subprocess
import time
import urllib.error
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from intactkv_export import library
from intactkv_export.serving import program_path
from tests.serving.conftest import free_port, request, served
from tests.support import shorter
from tests.support.smol import SYSTEM_PROMPT, Smol

BEGIN = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>user\n"
REPLY = "<|im_end|>\n<|im_start|>assistant\n"
INTACT = 0x494B0000


class Slots:
    """llama-server's own interface: tokens in, tokens out."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, body: Any) -> dict[str, Any]:
        with request(self.url + path, body) as answer:
            return dict(json.load(answer))

    def tokens(self, text: str) -> list[int]:
        return list(self.ask("/tokenize", {"content": text, "parse_special": True})["tokens"])

    def complete(self, tokens: Sequence[int], n: int = 16, slot: int = 0, **more: Any) -> dict[str, Any]:
        """The greedy continuation, with the likelihood of 20 tokens at each place."""
        body = {"prompt": list(tokens), "n_predict": n, "temperature": 0, "n_probs": 20, "return_tokens": True}
        return self.ask("/completion", {**body, "id_slot": slot, "cache_prompt": True, **more})

    def act(self, slot: int, action: str, filename: str = "") -> dict[str, Any]:
        return self.ask(f"/slots/{slot}?action={action}", {"filename": filename})


@contextlib.contextmanager
def slots(smol: Smol, kv: str, tail: int, *options: Any, ctx_size: int = 256, parallel: int = 2) -> Iterator[Slots]:
    """A server with the prefix."""
    arguments = [smol.gguf, "--prefix", smol.ikv, "--parallel", parallel, "--ctx-size", ctx_size, "--kv-type", kv]
    arguments += ["--kv-tail", tail] if kv != "f16" else []
    with served(*arguments, "--", "--no-warmup", *options) as facts:
        yield Slots(facts["url"])


def close(one: dict[str, Any], other: dict[str, Any], nats: float = 0.3) -> bool:
    """Whether two answers are equal, or part where both tokens are nearly as likely: rounding."""
    for a, b in zip(one["completion_probabilities"], other["completion_probabilities"], strict=False):
        if a["id"] != b["id"]:
            as_likely = {top["id"]: top["logprob"] for top in a["top_logprobs"]}
            return bool(a["logprob"] - as_likely.get(b["id"], -100.0) < nats)
    return len(one["tokens"]) == len(other["tokens"])


def conversation(server: Slots, text: str = "What is the capital of France?") -> tuple[list[int], list[int]]:
    """Tokens of a first turn with its reply, and of a second turn behind it; slot 0 has the first."""
    first = server.tokens(BEGIN + text + REPLY)
    first += server.complete(first)["tokens"]
    return first, first + server.tokens(TURN + "And of Italy?" + REPLY)


ONE, EACH = "--kv-unified", "--no-kv-unified"


@pytest.mark.parametrize(
    ("kv", "tail", "pool"), [("f16", 0, ONE), ("q4_0", 0, ONE), ("q8_0,q4_0", 128, ONE), ("q8_0,q4_0", 128, EACH)]
)
def test_a_saved_slot(programs: None, smol: Smol, tmp_path: Path, kv: str, tail: int, pool: str) -> None:
    """Restored into another slot, into its own, and by the next server: it goes on as if nothing had been."""
    # With memory for them, idle slots of one pool are moved there and are empty: upstream's --cache-idle-slots
    options = (pool, "--slot-save-path", tmp_path, "--cache-ram", 0)
    with slots(smol, kv, tail, *options) as server:
        first, second = conversation(server)
        n = server.act(0, "save", "one")["n_saved"]
        assert len(first) - 1 <= n <= len(first)
        unbroken = server.complete(second)
        assert unbroken["timings"]["cache_n"] == n
        assert server.act(1, "restore", "one")["n_restored"] == n
        beside = server.complete(second, slot=1)
        assert server.act(0, "erase")["n_erased"] > n
        assert server.act(0, "restore", "one")["n_restored"] == n
        again = server.complete(second)
    with slots(smol, kv, tail, *options) as server:
        assert server.act(1, "restore", "one")["n_restored"] == n
        later = server.complete(second, slot=1)
        server.act(1, "save", "two")
    for answer in (beside, again, later):
        assert answer["timings"]["cache_n"] == n
        assert close(unbroken, answer)
    for name in ("one", "two"):  # stock llama.cpp refuses what it cannot represent
        version = struct.unpack_from("<I", (tmp_path / name).read_bytes(), 4)[0]
        assert bool(version & INTACT) == (kv != "f16")


def test_a_saved_slot_elsewhere(programs: None, smol: Smol, tmp_path: Path, stock_lib: Path) -> None:
    """By a server without the prefix its cells stay intact; another cache type refuses it, stock llama.cpp too."""
    option = ("--slot-save-path", tmp_path)
    with slots(smol, "q8_0", 0, *option) as server:
        _, second = conversation(server)
        n = server.act(0, "save", "one")["n_saved"]
        unbroken = server.complete(second)
    with served(smol.gguf, "--no-prefix", "--kv-type", "q8_0", "--ctx-size", 256, "--", *option) as facts:
        server = Slots(facts["url"])
        assert server.act(0, "restore", "one")["n_restored"] == n
        assert close(unbroken, server.complete(second))
        server.act(0, "save", "two")
    version = struct.unpack_from("<I", (tmp_path / "two").read_bytes(), 4)[0]
    assert version & INTACT
    with slots(smol, "q4_0", 0, *option) as server:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            server.act(0, "restore", "one")
        assert server.complete(second)["tokens"]  # and goes on
    port = free_port()
    command = [
        program_path("llama-server"),
        "-m",
        smol.gguf,
        "--port",
        port,
        "-c",
        512,
        "-np",
        2,
        "-t",
        2,
        "-ctk",
        "q8_0",
    ]
    command += ["-ctv", "q8_0", "-fa", "on", *option]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_CPP_LIB_PATH", str(stock_lib))
        environment = library.environment()
    with subprocess.Popen(
        [*map(str, command)], env=environment, stdout=-3, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _wait(f"http://127.0.0.1:{port}")
            with pytest.raises(urllib.error.HTTPError, match="400"):
                Slots(f"http://127.0.0.1:{port}").act(0, "restore", "one")
        finally:
            process.terminate()
            said = process.communicate(timeout=60)[1]
    assert "unknown (magic, version)" in said and "494b0003" in said


def _wait(url: str) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), request(f"{url}/health"):
            return
        time.sleep(0.1)
    raise TimeoutError(url)


@pytest.mark.parametrize(("kv", "tail"), [("f16", 0), ("q8_0,q4_0", 128)])
def test_conversations_in_the_servers_memory(programs: None, smol: Smol, kv: str, tail: int) -> None:
    """--cache-ram: one slot, three conversations in turn; each comes back as it was left."""
    with slots(smol, kv, tail, "--cache-ram", 256, parallel=1) as server:
        others = [
            server.tokens(f"<|im_start|>system\nYou are {who}.{TURN}Who are you?{REPLY}") for who in ("X", "a cook")
        ]
        _, second = conversation(server)
        unbroken = server.complete(second)
        for other in others:
            server.complete(other)
        again = server.complete(second)
        assert again["timings"]["cache_n"] >= len(second) - 1
        assert close(unbroken, again)


@pytest.mark.parametrize(("kv", "tail", "pool"), [("q4_0", 0, EACH), ("q8_0,q4_0", 128, ONE)])
def test_a_shifted_slot(programs: None, smol: Smol, tmp_path: Path, kv: str, tail: int, pool: str) -> None:
    """--context-shift: the other slot, behind the same prefix, keeps its state to the bit."""
    n = len(smol.tokens)
    with slots(
        smol,
        kv,
        tail,
        pool,
        "--kv-unified-per-slot",
        256,
        "--context-shift",
        "--slot-save-path",
        tmp_path,
        "--cache-ram",
        0,
    ) as server:
        story = server.tokens(f"{BEGIN}Tell a story.{REPLY}")
        server.complete(server.tokens(f"{BEGIN}Name three rivers.{REPLY}"), slot=1)
        server.act(1, "save", "before")
        long = server.complete(story, n=256, n_keep=n, ignore_eos=True)
        assert long["truncated"]
        server.act(1, "save", "after")
        assert server.complete(story)["timings"]["cache_n"] == n  # kept, where it was
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


@pytest.mark.parametrize(("drafts", "n"), [("model", 12), ("n-grams", 48)])
def test_drafts(programs: None, smol: Smol, tmp_path: Path, drafts: str, n: int) -> None:
    """A draft model of another kind is not refused for the prefix of the model that is served."""
    options: tuple[Any, ...] = ("--spec-type", "ngram-simple")
    if drafts == "model":
        draft = shorter.write(smol.gguf, tmp_path / "draft.gguf", 8)
        options = ("--spec-type", "draft-simple", "-md", draft)
    with slots(smol, "q8_0,q4_0", 128, ctx_size=512) as server:
        first = server.tokens(f"{BEGIN}Count from one to ten. Then again, in words.{REPLY}")
        alone = server.complete(first, n=n)
        second = first + alone["tokens"] + server.tokens(f"{TURN}Count again.{REPLY}")
        alone_too = server.complete(second, n=n)
    with slots(smol, "q8_0,q4_0", 128, *options, ctx_size=512) as server:
        for tokens, wanted in ((first, alone), (second, alone_too)):
            got = server.complete(tokens, n=n)
            assert close(wanted, got)
        assert got["timings"]["draft_n"] > 0
