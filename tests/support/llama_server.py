"""llama.cpp's own server, asked what it renders."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import intactkv_export

_PATIENCE = 60.0  # seconds


def program() -> str:
    """llama-server of our build, else one on PATH. Skips if there is none."""
    ours = os.pathsep.join(str(Path(path) / "bin") for path in intactkv_export.__path__)
    found = shutil.which("llama-server", path=ours) or shutil.which("llama-server")
    if found is None:
        pytest.skip("llama-server is not built: make tools")
    return found


def _free_port() -> int:
    """Below those that the system gives to whoever connects: nobody gets it before the server has it."""
    while True:
        port = random.randrange(20000, 30000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """A server of a model, with a chat template of its own if a file is given. A context manager.

    options: more of the command line. prefixes: its LLAMA_INTACTKV.
    """

    def __init__(
        self, model: Path, template: Path | None = None, options: Sequence[str] = (), prefixes: str = "off"
    ) -> None:
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        command = [program(), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-np", "1"]
        command += ["--no-warmup", "-t", "1", "-b", "32", "-ub", "32", "--fit", "off", "--cache-ram", "0"]
        command += ["--chat-template-file", str(template)] if template else []
        command += options
        environment = {**os.environ, "LLAMA_INTACTKV": prefixes}
        self._child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        )  # fmt: skip

    def __enter__(self) -> Server:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"{self._address}/health", timeout=5).close()
                return self
            except OSError:
                if self._child.poll() is not None or time.monotonic() > end:
                    self.__exit__()
                    raise
                time.sleep(0.05)

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Its answer; of a refusal {"error": ...}."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def rendered(self, messages: list[dict[str, Any]], tools: Any = None, args: Any = None) -> str:
        """The text of a chat request. Raises ValueError if the template refuses it."""
        body = {"messages": messages, "chat_template_kwargs": args or {}, **({"tools": tools} if tools else {})}
        answer = self.ask("/apply-template", body)
        if "prompt" not in answer:
            raise ValueError(str(answer))
        return str(answer["prompt"])

    def tokens(self, text: str) -> list[int]:
        """Of a rendered text, as it tokenizes chat requests."""
        return list(self.ask("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"])
