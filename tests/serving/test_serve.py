"""serve, as its users have it: a process, a port, answers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.serving import choose_settings
from tests.serving.conftest import chat, choice, request, served
from tests.support.smol import SYSTEM_PROMPT, Smol

QUESTIONS = ["What is the capital of France?", "Count to five.", "Why is the sky blue?"]


def serve(*arguments: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "intactkv_export", "serve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **kwargs)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def is_open(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def test_it_says_what_it_is_and_is_ready(server: dict[str, Any], smol: Smol) -> None:
    assert server["url"].startswith("http://127.0.0.1:")
    assert [prefix["tokens"] for prefix in server["prefixes"]] == [len(smol.tokens)]
    assert (server["kv_type"], server["tail"], server["parallel"], server["ctx_size"]) == ("q8_0,q4_0", 128, 4, 512)
    with request(f"{server['url']}/health") as answer:
        assert answer.status == 200
    with request(f"{server['url']}/props") as answer:
        props = json.load(answer)
    assert props["total_slots"] == 4 and props["default_generation_settings"]["n_ctx"] == 512
    with request(f"{server['url']}/metrics") as answer:
        assert b"llamacpp:prompt_tokens_total" in answer.read()
    command = Path(f"/proc/{server['pid']}/cmdline").read_bytes().split(b"\0")
    assert command[command.index(b"--host") + 1] == b"127.0.0.1"


def test_concurrent_answers_are_those_of_one_sequence_alone(server: dict[str, Any]) -> None:
    """With the prefix's system prompt, another, and none; more requests at once than slots."""
    asked = [
        (text, system)
        for i, text in enumerate(QUESTIONS)
        for system in [(SYSTEM_PROMPT, "You are a pirate.", None)[i % 3], SYSTEM_PROMPT]
    ]
    # Alone: the slot's cache is not used, so nothing of one request is left for another
    ask = partial(choice, server["url"], cache_prompt=False, logprobs=True, top_logprobs=5)
    alone = [ask(*of) for of in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        at_once = list(pool.map(lambda of: ask(*of), asked))
    assert all(answer["message"]["content"] for answer in alone)
    # Products of one row and of several round otherwise: a reply may part where two tokens are nearly as likely.
    for one, other in zip(alone, at_once, strict=True):
        pairs = zip(one["logprobs"]["content"], other["logprobs"]["content"], strict=False)
        parting = next(((a, b) for a, b in pairs if a["id"] != b["id"]), None)
        if parting is not None:
            a, b = parting
            as_likely = {top["id"]: top["logprob"] for top in a["top_logprobs"]}
            assert a["logprob"] - as_likely.get(b["id"], -100.0) < 0.3, (asked, a, b)
        else:
            assert one["message"]["content"] == other["message"]["content"]


def test_a_streamed_answer_is_the_same(server: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "temperature": 0, "max_tokens": 24, "stream": True}
    body["cache_prompt"] = False  # a prompt computed again from its last token alone rounds otherwise
    pieces = []
    with request(f"{server['url']}/v1/chat/completions", body) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                pieces += [c["delta"].get("content") or "" for c in json.loads(line[6:])["choices"]]
    assert len(pieces) > 5
    assert "".join(pieces) == chat(server["url"], QUESTIONS[0], cache_prompt=False)


def test_a_port_in_use_is_one_sentence(server: dict[str, Any], smol: Smol) -> None:
    port = server["url"].rpartition(":")[2]
    done = serve(smol.gguf, "--port", port)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith(f"intactkv-export: port {port} of 127.0.0.1 is in use") and done.stderr.count("\n") == 1
    )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_signals_end_both_processes(programs: None, smol: Smol, number: int, code: int) -> None:
    """By kill -9 of the parent too. An answer that is being written does not keep them."""
    with served(smol.bos.parent / "smol.gguf", "--no-prefix", "--ctx-size", 1024) as facts:
        process = facts["process"]
        thread = threading.Thread(target=lambda: _ignored(facts["url"]), daemon=True)
        thread.start()
        time.sleep(0.5)
        os.kill(process.pid, number)
        assert process.wait(30) == code
        for _ in range(100):
            if is_gone(facts["pid"]) and not is_open(facts["url"]):
                break
            time.sleep(0.1)
        assert is_gone(facts["pid"]) and not is_open(facts["url"])
        assert not process.stderr.read()


def test_repeated_and_cancelled_requests_are_no_news(programs: None, smol: Smol) -> None:
    """llama-server warns of both."""
    with served(smol.gguf, "--prefix", smol.ikv, "--ctx-size", 512) as facts:
        for question in (QUESTIONS[0], QUESTIONS[0]):
            assert chat(facts["url"], question)
        body = {"messages": [{"role": "user", "content": "Tell a long story."}], "max_tokens": 300, "stream": True}
        with request(f"{facts['url']}/v1/chat/completions", body) as answer:
            assert answer.readline().startswith(b"data: ")
        assert chat(facts["url"], QUESTIONS[1])
        facts["process"].terminate()
        facts["process"].wait(30)
        assert facts["process"].stderr.read() == ""


@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8, 1.6])
def test_ctrl_c_while_it_starts_says_nothing(programs: None, smol: Smol, delay: float) -> None:
    """While Python imports, too: ended by the signal, or with its exit code, and no traceback."""
    command = [Path(sys.executable).with_name("intactkv-export"), "serve", smol.gguf, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == ""
        assert process.returncode in (-signal.SIGINT, 130)


def _ignored(url: str) -> None:
    try:
        chat(url, "Tell a long story.", n=800)
    except (OSError, ValueError):
        pass


def test_an_api_key_is_asked_for_and_not_seen(programs: None, smol: Smol, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-secret\nsecond-secret\n")
    with served(smol.gguf, "--ctx-size", 512, "--api-key", f"@{tmp_path / 'keys'}") as facts:
        assert facts["api_key"] is True
        with pytest.raises(urllib.error.HTTPError) as refused:
            chat(facts["url"], "Hello")
        assert refused.value.code == 401
        for key in ("first-secret", "second-secret"):
            with request(f"{facts['url']}/v1/models", Authorization=f"Bearer {key}") as answer:
                assert answer.status == 200
        for pid in (facts["pid"], facts["process"].pid):
            assert b"secret" not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_what_fails_is_one_sentence(programs: None, smol: Smol, tmp_path: Path) -> None:
    text = tmp_path / "text.gguf"
    text.write_text("no model")
    torn = tmp_path / "torn.ikv"
    torn.write_bytes(smol.ikv.read_bytes()[:-100])
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(smol.gguf.read_bytes()[: 40 << 20])
    for arguments, code, said in [
        ([text], 1, "text.gguf"),
        ([tmp_path / "none.gguf"], 1, "none.gguf"),
        ([cut], 1, "cut.gguf"),
        ([smol.gguf, "--prefix", torn], 1, "torn.ikv"),
        ([smol.gguf, "--prefix", tmp_path], 1, "torn.ikv"),
        ([smol.gguf, "--ctx-size", "20", "--prefix", smol.ikv], 2, "takes 24 tokens"),
        ([smol.gguf, "--prefix", smol.ikv, "--no-prefix"], 2, "exclude each other"),
        ([smol.gguf, "--", "--no-such-option"], 1, "invalid argument: --no-such-option"),
        ([smol.gguf, "--", "--port", "80"], 2, "give --port"),
        ([smol.gguf, "--host", "no.such.host.example"], 2, "no address of this machine"),
        ([smol.gguf, "--host", "192.0.2.1"], 1, "cannot listen on port"),
        ([smol.gguf, "--kv-type", "q3"], 2, "kv_type='q3'"),
        ([smol.gguf, "--api-key", ","], 2, "the API key is empty"),
    ]:
        done = serve(*arguments, *(["--port", "0"] if "--" not in arguments else []))
        assert (done.returncode, done.stdout) == (code, ""), (arguments, done)
        assert done.stderr.startswith("intactkv-export: ") and said in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1, (arguments, done.stderr)


def test_settings(smol: Smol, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the library is told, and who may ask."""
    for name in ("LLAMA_INTACTKV", "INTACTKV_TAIL", "INTACTKV_ATTN", "LLAMA_API_KEY", "LLAMA_ARG_CORS_ORIGINS"):
        monkeypatch.delenv(name, raising=False)

    def settings(**kwargs: Any) -> Any:
        return choose_settings(smol.gguf, port=0, **kwargs)

    plain = settings()
    assert plain.host == "127.0.0.1" and "LLAMA_INTACTKV" not in plain.environment
    assert plain.environment["LLAMA_ARG_CORS_ORIGINS"] == "localhost"  # no page of another site asks
    assert settings(prefixes=[]).environment["LLAMA_INTACTKV"] == "off"
    both = settings(prefixes=[smol.ikv, smol.bos])
    assert both.environment["LLAMA_INTACTKV"] == os.pathsep.join([str(smol.ikv), str(smol.bos)])
    assert [len(prefix.tokens) for prefix in both.prefixes] == [len(smol.tokens), 1]
    monkeypatch.setenv("LLAMA_INTACTKV", str(smol.bos))
    assert [len(prefix.tokens) for prefix in settings().prefixes] == [1]
    monkeypatch.setenv("LLAMA_INTACTKV", str(tmp_path / "none.ikv"))
    with pytest.raises(IntactKVError, match="LLAMA_INTACTKV names a prefix that cannot be used: .*none.ikv"):
        settings()
    assert [len(prefix.tokens) for prefix in settings(prefixes=[smol.bos]).prefixes] == [1]
    monkeypatch.setenv("LLAMA_INTACTKV", "off")
    assert settings().prefixes == [] and settings().environment["LLAMA_INTACTKV"] == "off"
    for kwargs, types, tail in [
        ({}, ("q8_0", "q4_0"), 128),
        ({"tail": 0}, ("q8_0", "q8_0"), 0),
        ({"tail": 256}, ("q8_0", "q4_0"), 256),
        ({"kv_type": "q4_0"}, ("q4_0", "q4_0"), None),
        ({"kv_type": "f16"}, ("f16", "f16"), None),
    ]:
        chosen = settings(**kwargs)
        assert (chosen.kv_types, chosen.tail) == (types, tail), kwargs
        assert chosen.environment.get("INTACTKV_TAIL") == (None if tail is None else str(tail))
    open_to_all = settings(host="0.0.0.0")
    assert "can use this server" in open_to_all.notes[0] and open_to_all.url.startswith("http://127.0.0.1:")
    keyed = settings(host="0.0.0.0", api_key="a, b\nc")
    assert keyed.notes == [] and keyed.environment["LLAMA_API_KEY"] == "a,b,c" and not {"a", "b"} & {*keyed.arguments}
    with pytest.raises(UsageError, match="has a ':' in it"):
        settings(prefixes=[tmp_path / "a:b.ikv"])
    with pytest.raises(UsageError, match="there is no .ikv file in the directory"):
        settings(prefixes=[tmp_path])
    with pytest.raises(IntactKVError, match="no.ikv"):
        settings(prefixes=[tmp_path / "no.ikv"])
