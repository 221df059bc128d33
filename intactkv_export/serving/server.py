"""llama-server as a child process: started, asked until it is ready, its words passed on, stopped with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import reason
from intactkv_export.prefix import Prefix
from intactkv_export.serving.programs import program_path
from intactkv_export.serving.rendering import never_used
from intactkv_export.serving.settings import KEY, Settings

PROGRAM = "llama-server"
_ASK_EVERY = 0.1  # seconds, while the model is loaded
_GRACE = 3.0  # seconds: with requests at work it does not end by itself, and computes nothing more
_REMEMBERED = 200  # lines of the log, to say why it ended
_PR_SET_PDEATHSIG = 1
_LOG_LINE = re.compile(r"^[\d.]+ (?P<level>[A-Z]) (?:(?P<part>\w+)\s+(?=\w+: ))?(?P<text>.*)$")
# What says that it failed, not why; and which is no news for who started it like this
_OUTER = re.compile(r"common_fit_params: |llama_server: exiting due to|load_model: failed to load model")
_NO_NEWS = re.compile(
    r"server default port will be changed|stop: cancel task|need to evaluate at least 1 token for|n_past was set to \d"
)


class Server:
    """A running server; the end of the `with` block stops it.

    say: is told each warning and error that it logs. Raises as program_path(), IntactKVError if it cannot be started.
    """

    def __init__(self, settings: Settings, say: Callable[[str], None]) -> None:
        self.settings = settings
        self._say = say
        self._log: deque[str] = deque(maxlen=_REMEMBERED)
        self._ready = False
        path = program_path(PROGRAM)
        try:
            # A session of its own: Ctrl-C is for us, and the second signal of a pair would cut its answers off.
            self.process = subprocess.Popen(
                [path, *settings.arguments],
                env=dict(settings.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_ends_with_parent(),
            )
        except OSError as error:
            raise IntactKVError(f"cannot run {path} ({error.strerror}): install intactkv-export again") from error
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self) -> None:
        """Until the model and its prefixes are loaded. Raises IntactKVError if it ends before."""
        while self.process.poll() is None:
            if self._ask("/health")[0] == 200:
                self._ready = True
                for line in self._log:
                    self._tell(line)
                return
            time.sleep(_ASK_EVERY)
        raise IntactKVError(f"{self.settings.model} cannot be served: {self._why()}")

    def never_used(self) -> list[str]:
        """Of a server that is ready: its prefixes that no request begins with, a sentence each."""
        return never_used(self.settings.prefixes, self._answer)

    def wait(self) -> None:
        """Until it ends. Raises IntactKVError unless somebody asked it to."""
        if code := self.process.wait():
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise IntactKVError(f"{PROGRAM} ended ({how}): {self._why()}")

    def stop(self) -> None:
        """It finishes, or is killed after some seconds. Nothing happens if it has ended."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(_GRACE)
        finally:
            self.process.kill()
            self.process.wait()

    def facts(self) -> dict[str, Any]:
        """What it is, for programs: the fields of `serve --json`."""
        s = self.settings
        return {
            "url": s.url,
            "page": self.has_page,
            "pid": self.process.pid,
            "model": s.model,
            "prefixes": [
                {
                    "file": prefix.source,
                    "name": prefix.name,
                    "tokens": len(prefix.tokens),
                    "extra_cells": prefix.n_extra,
                }
                for prefix in s.prefixes
            ],
            "kv_type": ",".join(s.kv_types),
            "tail": s.tail,
            "parallel": s.parallel,
            "ctx_size": s.ctx_size,
            "keep": s.keep,
            "api_key": s.has_key,
            "memory": self.memory,
        }

    def report(self) -> list[str]:
        """The same in lines for people; the last says where it listens."""
        s = self.settings
        k, v = s.kv_types
        tail = "" if s.tail is None else f", the newest {s.tail} tokens at F16" if s.tail else ", no tail"
        lines = [
            f"{s.model}: {k if k == v else f'{k},{v}'} cache{tail}; {s.parallel} at once, {s.ctx_size} tokens each",
            *(f"prefix {_called(prefix)}: {prefix.contents}, loaded" for prefix in s.prefixes),
        ]
        lines += [] if s.prefixes else ["no prefix"]
        lines += [f"prompts that come again and again are kept in {s.keep}"] if s.keep else []
        if memory := self.memory:
            own, files = (f"{memory[name] / 1e6:,.0f} MB" for name in ("own", "files"))
            lines.append(f"memory: {own}, and {files} of files that are mapped")
        no_page = "no web page, the API alone: `make tools` builds it where npm is installed"
        lines.append(f"web page: {s.url}" if self.has_page else no_page)
        key = "with the API key" if s.has_key else "no API key"
        return [*lines, f"listening on {s.url} ({key}; OpenAI's API: {s.url}/v1)"]

    @property
    def has_page(self) -> bool:
        """Whether it has the web page: that needs npm when the programs are built."""
        code, kind = self._ask("/")
        return code == 200 and "html" in kind

    @property
    def memory(self) -> dict[str, int] | None:
        """Resident bytes: of files (the model, which others share), and its own. None where /proc does not say."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        found = {line.split(":")[0]: line.split() for line in lines}
        names = {"own": "RssAnon", "files": "RssFile"}
        return {name: int(found[key][1]) * 1024 for name, key in names.items()} if "RssAnon" in found else None

    def _ask(self, path: str) -> tuple[int, str]:
        """Status and content type of a GET; (0, "") if nobody answers."""
        return self._request("GET", path, None, {"Accept-Encoding": "gzip"})[:2]  # as the page is kept

    def _answer(self, path: str, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """What it answers to a POST; an empty object if it does not, or refuses."""
        key = self.settings.environment.get(KEY, "").partition(",")[0]
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        status, _, data = self._request("POST", path, json.dumps(body).encode(), headers)
        found = json.loads(data) if status == 200 else {}
        return found if isinstance(found, dict) else {}

    def _request(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, str, bytes]:
        """Status, content type and content; 0 and nothing if nobody answers."""
        url = urlsplit(self.settings.url)
        kinds: dict[str, Any] = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        extra = {"context": ssl._create_unverified_context()} if url.scheme == "https" else {}  # our own child
        connection = kinds[url.scheme](url.hostname, url.port, timeout=5, **extra)
        with contextlib.closing(connection):
            try:
                connection.request(method, f"{url.path}{path}", body, headers)
                answer = connection.getresponse()
                return answer.status, answer.headers.get("Content-Type", ""), answer.read()
            except (OSError, http.client.HTTPException):
                return 0, "", b""

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for data in self.process.stdout:
            line = data.decode("utf-8", "replace").rstrip()
            self._log.append(line)
            if self._ready:
                self._tell(line)

    def _tell(self, line: str) -> None:
        if line and not _NO_NEWS.search(line):
            self._say(f"{PROGRAM}: {_text(line)}")

    def _why(self) -> str:
        """The reason among the last lines that it logged."""
        self._listener.join(_ASK_EVERY * 10)
        lines = [line for line in self._log if not _is_remark(line)]
        asserted = [line for line in lines if "GGML_ASSERT" in line]
        return reason(
            [text for line in asserted or lines if not _OUTER.search(text := _text(line))], "it gave no reason"
        )


def _called(prefix: Prefix) -> str:
    return f"{prefix.name} of {prefix.source}" if prefix.name else str(prefix.source)


def _text(line: str) -> str:
    """A line of its log without time and level."""
    match = _LOG_LINE.match(line)
    return match["text"] if match else line


def _is_remark(line: str) -> bool:
    match = _LOG_LINE.match(line)
    return match is not None and match["level"] != "E"


def _ends_with_parent() -> Callable[[], None] | None:
    """What a child does first, so that the system ends it when this process is killed. None where there is no way."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
