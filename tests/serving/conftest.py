"""A served model for the tests of this room. They skip where upstream's programs were not built."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest

from intactkv_export import library
from intactkv_export.errors import IntactKVError
from tests.support.smol import Smol

Serve = Callable[..., AbstractContextManager[dict[str, Any]]]


@pytest.fixture(scope="session")
def programs() -> None:
    """Skips unless upstream's programs are there."""
    try:
        library.programs_path()
    except IntactKVError as error:
        pytest.skip(f"{error} (`make tools`)")


@contextlib.contextmanager
def served(*arguments: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
    """`serve --json` with these arguments: what it says when it is ready, and its process as "process"."""
    command = [sys.executable, "-m", "intactkv_export", "serve", *map(str, arguments)]
    front = [command.index("--")] if "--" in command else [len(command)]
    command[front[0] : front[0]] = ["--json", "--port", "0", "--threads", "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, **kwargs
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield {**json.loads(line), "process": process}
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(programs: None, smol: Smol) -> Iterator[dict[str, Any]]:
    """smol behind its system prompt, four slots, with what is chosen where nothing is said."""
    with served(smol.gguf, "--prefix", smol.ikv, "--ctx-size", 512) as facts:
        yield facts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def request(url: str, body: Any = None, **headers: str) -> Any:
    """An open answer; body: JSON to post."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120)


def chat(url: str, text: str, system: str | None = None, n: int = 24, **more: Any) -> str:
    """The reply to one message at temperature 0."""
    return str(choice(url, text, system, n, **more)["message"]["content"])


def choice(url: str, text: str, system: str | None = None, n: int = 24, **more: Any) -> dict[str, Any]:
    """The same as the server says it."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    body = {"messages": [*messages, {"role": "user", "content": text}], "temperature": 0, "max_tokens": n, **more}
    with request(f"{url}/v1/chat/completions", body) as answer:
        return dict(json.load(answer)["choices"][0])
