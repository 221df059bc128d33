"""What a server is started with: the arguments and the environment of llama-server, from what a user asks for."""

from __future__ import annotations

import ipaddress
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from intactkv_export import library
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import default_tail, kv_pair
from intactkv_export.models import KEY_REFERENCE, gguf_file
from intactkv_export.prefix import Prefix, check_reference, ikv
from intactkv_export.serving.rendering import keep_to_date

TAIL = "INTACTKV_TAIL"
KEEP, KEEP_AFTER = "LLAMA_INTACTKV_KEEP", "LLAMA_INTACTKV_KEEP_AFTER"  # where tokens that come again are noted
KEY = "LLAMA_API_KEY"

_BATCH, _BEHIND = 2048, 512  # tokens that llama-server evaluates at once; room for a question behind a prefix

# What has an option here, and must not be said to llama-server twice. Its name there -> ours
_OURS = {
    "-m": "MODEL", "--model": "MODEL", "--host": "--host", "--port": "--port",
    "-c": "--ctx-size", "--ctx-size": "--ctx-size", "-np": "--parallel", "--parallel": "--parallel",
    "-ctk": "--kv-type", "--cache-type-k": "--kv-type", "-ctv": "--kv-type", "--cache-type-v": "--kv-type",
    "-t": "--threads", "--threads": "--threads", "--api-key": "--api-key", "--api-key-file": "--api-key @FILE",
}  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """What a server is to keep. directory: where the library notes the tokens that `after` requests begin with;
    prefixes(others, n_ctx): those that are there and can be served beside others, in a context of n_ctx tokens."""

    directory: Path
    prefixes: Callable[[Sequence[Prefix], int], Sequence[Prefix]]
    after: int


@dataclass(frozen=True)
class Settings:
    """A server that can be started. ctx_size: tokens of one conversation; tail: None: as the library chooses."""

    model: Path
    prefixes: list[Prefix]
    kv_types: tuple[str, str]
    tail: int | None
    parallel: int
    ctx_size: int
    host: str
    port: int
    has_key: bool
    arguments: list[str] = field(repr=False)
    environment: Mapping[str, str] = field(repr=False)
    notes: list[str] = field(default_factory=list)  # what had to be chosen, for whoever starts it

    @property
    def keep(self) -> Path | None:
        """Where prompts that come again and again are kept."""
        return Path(self.environment[KEEP]) if self.environment.get(KEEP) else None

    @property
    def url(self) -> str:
        """Where it answers on this machine."""
        return f"{self._scheme}://{_in_url(self.reached_at)}:{self.port}{self._value('--api-prefix')}"

    @property
    def reached_at(self) -> str:
        """The address to connect to: that of a server which listens everywhere is the loopback."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)

    @property
    def _scheme(self) -> str:
        return "https" if self._value("--ssl-cert-file") else "http"

    def _value(self, option: str) -> str:
        """Of an option of llama-server's, as it reads them: the last one given, else its environment variable."""
        variable = {"--ssl-cert-file": "LLAMA_ARG_SSL_CERT_FILE", "--api-prefix": "LLAMA_ARG_API_PREFIX"}[option]
        given = [value for name, value in zip(self.arguments, self.arguments[1:], strict=False) if name == option]
        return given[-1] if given else self.environment.get(variable, "")


def choose_settings(
    model: Path,
    *,
    prefixes: Sequence[Path] | None = None,
    kv_type: str | None = None,
    tail: int | None = None,
    parallel: int = 4,
    ctx_size: int | None = None,
    threads: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    kept: Kept | None = None,
    more: Sequence[str] = (),
) -> Settings:
    """Checks all of it, the prefixes' bytes too, and chooses what is not said. Starts nothing.

    prefixes: `.ikv` files, GGUFs, or directories of `.ikv` files, beside those that are embedded in the model; None:
    those that LLAMA_INTACTKV names, or the file beside the model; empty: none at all, not the embedded ones either.
    kv_type, tail: as of IntactLlama. ctx_size: None: what the model was trained for, at most 4096, or the longest
    prefix and 2048 more; 0: all that it was trained for. port: 0: a free one. api_key: several with commas between.
    kept: its prefixes are beside all others, those that the context has no room for left out. more: further arguments
    of llama-server. Raises UsageError, IntactKVError.
    """
    from intactkv_export.runtime import choose_n_ctx

    asked = None if kv_type is None else kv_pair(kv_type)
    if given := next((name for name in map(_name, more) if name in _OURS), None):
        raise UsageError(
            f"{given} behind -- is for llama-server alone, and would not be known here: give {_OURS[given]}"
        )
    first = gguf_file.first_part(model)
    header = gguf_file.read(first)
    environment = library.environment(patient=True)
    found, files = _prefixes(first, prefixes)
    for prefix in found:
        check_reference(prefix, header.values.get(KEY_REFERENCE), str(model))
    types, tail, notes = _cache(asked, tail, header.values, environment)
    if tail is not None:
        environment[TAIL] = str(tail)
    longest = max((prefix.n_cells for prefix in found), default=0)
    ctx_size = choose_n_ctx(ctx_size, longest, f"the longest prefix takes {longest} tokens", header.values)
    if kept is not None:
        more_found, more_files = _kept(kept, found, ctx_size, notes, environment)
        found, files = [*found, *more_found], [*files, *more_files]
    if prefixes is not None and not prefixes:
        environment[ikv.VARIABLE] = "off"
    elif files:
        environment[ikv.VARIABLE] = os.pathsep.join(map(str, files))
    if api_key is not None:
        if not api_key.strip(" ,\n"):
            raise UsageError("the API key is empty: give one with --api-key, or leave it out")
        environment[KEY] = ",".join(key.strip() for key in api_key.replace("\n", ",").split(",") if key.strip())
    has_key = bool(environment.get(KEY) or environment.get("LLAMA_ARG_API_KEY_FILE"))
    if not has_key:
        # Upstream's default lets the page of any web site that is open in a browser here talk to the model.
        environment.setdefault("LLAMA_ARG_CORS_ORIGINS", "localhost")
        if not _is_loopback(host):
            notes.append(f"whoever can reach {host} can use this server: give it an --api-key")
    port = _free_port(host, port)
    arguments = ["--model", str(first), "--host", host, "--port", str(port), "--parallel", str(parallel)]
    # Each conversation has cells of its own. In one pool (--kv-unified) they share those of a prefix, but attention
    # looks through all of it: half the speed of 8 conversations, and answers that depend on the others' places.
    arguments += ["--ctx-size", str(ctx_size * parallel), "--no-kv-unified"]
    arguments += ["--cache-type-k", types[0], "--cache-type-v", types[1], "--flash-attn", "on", "--metrics"]
    arguments += ["--threads", str(threads)] if threads else []
    arguments += _prompts_whole(found, notes)
    more = keep_to_date(found, header.values, more, environment, notes)
    arguments += ["--verbosity", "2", *more]  # errors and warnings
    return Settings(
        model, found, types, tail, parallel, ctx_size, host, port, has_key, arguments, environment, notes
    )  # fmt: skip


def _prompts_whole(prefixes: Sequence[Prefix], notes: list[str]) -> list[str]:
    """What llama-server needs to be told where a prefix is longer than a sliding window.

    Such a one is loaded by the batch that brings its end, and what came before is computed. For its checkpoints
    llama-server ends a batch some hundred tokens before a prompt's end, which is in the middle of a prefix as a rule.
    """
    long = [len(prefix.tokens) for prefix in prefixes if len(prefix.tokens) > _window(prefix)]
    if not long:
        return []
    notes.append(
        f"a prefix of {max(long)} tokens is longer than the model's sliding window: prompts are evaluated whole, "
        "without llama-server's context checkpoints (-- --ctx-checkpoints 32 has them, and computes such prefixes)"
    )
    return ["--ctx-checkpoints", "0", "--batch-size", str(max(_BATCH, max(long) + _BEHIND))]


def _window(prefix: Prefix) -> float:
    """Tokens of the sliding window that some layers have, infinite if none has one."""
    return min((cache["n_swa"] for cache in prefix.manifest["model"]["caches"] if cache["swa_type"]), default=math.inf)


def _name(argument: str) -> str:
    return argument.partition("=")[0] if argument.startswith("--") else argument


def _prefixes(model: Path, given: Sequence[Path] | None) -> tuple[list[Prefix], list[Path]]:
    """The prefixes that the library will hold, verified, and the files that have to be named to it."""
    named = ikv.in_environment() if given is None else list(given)
    if named == []:
        return [], []
    place = ikv.find(model)
    embedded = list(ikv.read_all(model)) if place == model else []
    beside = ikv.of_environment() if given is None else None
    if named is None:
        named = [place] if place is not None and place != model else []
    files = [path.absolute() for path in named]
    for path in files:
        _check_separator(path)
    if beside is None:
        beside = [prefix for path in files for file in ikv.files_of(path) for prefix in ikv.read_all(file)]
    return [*embedded, *beside], files


def _check_separator(path: Path) -> None:
    if os.pathsep in str(path):
        raise UsageError(f"{path} has a {os.pathsep!r} in it, which separates paths in {ikv.VARIABLE}: rename it")


def _kept(
    kept: Kept, others: Sequence[Prefix], n_ctx: int, notes: list[str], environment: dict[str, str]
) -> tuple[list[Prefix], list[Path]]:
    """Those of kept prefixes that are to be loaded beside others, and their files. What is to be kept is said to the
    library."""
    _check_separator(kept.directory)
    environment[KEEP], environment[KEEP_AFTER] = str(kept.directory), str(kept.after)
    there = {prefix.source.resolve() for prefix in others if prefix.source is not None}
    found, files = [], []
    for prefix in kept.prefixes(others, n_ctx):
        assert prefix.source is not None  # they are of files
        if prefix.source.resolve() in there:
            continue
        if os.pathsep in prefix.source.name:
            notes.append(f"{prefix.source} is left out: it has a {os.pathsep!r} in its name")
            continue
        found.append(prefix)
        files.append(prefix.source)
    return found, files


def _cache(
    asked: tuple[str, str] | None, tail: int | None, header: Mapping[str, object], environment: Mapping[str, str]
) -> tuple[tuple[str, str], int | None, list[str]]:
    """Types of K and V, the tail (None: the library's own choice), and what had to be chosen."""
    from intactkv_export.runtime import BEST_PAIR, WITH_TAIL, choose_kv_types

    types, why = choose_kv_types(asked, header)
    enough = default_tail(WITH_TAIL)
    if asked is None and types == BEST_PAIR and environment.get("INTACTKV_ATTN") != "stock":
        own = tail if tail is not None else environment.get(TAIL, str(enough))
        if str(own).isdecimal() and int(own) >= enough:
            return WITH_TAIL, int(own), []  # said aloud: where our kernel does not read the cache it is no default
    return types, tail, [why] if why else []


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _free_port(host: str, port: int) -> int:
    """The port, or for 0 a free one. Raises UsageError if the host is none, IntactKVError if the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address of this machine: give one, as 127.0.0.1 or 0.0.0.0") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
            probe.listen(1)  # with SO_REUSEADDR two may bind, one may listen
        except OSError as error:
            if error.errno == 98 or "in use" in str(error):
                why = (
                    f"port {port} of {host} is in use: stop what listens there, or give another --port (0: a free one)"
                )
            else:
                why = f"cannot listen on port {port} of {host} ({error.strerror}): give another --host or --port"
            raise IntactKVError(why) from error
        return int(probe.getsockname()[1])
