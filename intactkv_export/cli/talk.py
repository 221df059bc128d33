"""Commands that run a model, and what they run on: chat, serve, tool, version."""

from __future__ import annotations

import contextlib
import os
import select
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from intactkv_export import __version__
from intactkv_export.cli.options import (
    FILE_RULE,
    PREFIX_HELP,
    AsJson,
    Encoding,
    KvCache,
    KvTail,
    Threads,
    app,
    n_bytes,
    text_or_file,
    with_rope,
)
from intactkv_export.cli.output import print_json, remark, say
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Rope
from intactkv_export.models import text_file
from intactkv_export.work import interrupts_at_once, usable_cores

if TYPE_CHECKING:
    from intactkv_export.keeping import Directory

# Options of llama-server with which a model computes other rows than its file says, and variables of its environment
_OPTIONS_OF_ROWS = ("--rope-", "--yarn-", "--override-kv", "--lora", "--control-vector")
_VARIABLES_OF_ROWS = ("LLAMA_ARG_ROPE_", "LLAMA_ARG_YARN_")

_PATIENCE = 1.0  # seconds without a byte from a pipe, after which it is said that it is waited for


@app.command()
@with_rope
def chat(
    model: Annotated[Path, typer.Argument(help="A quantized GGUF.", show_default=False)],
    text: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this message and exit; a pipe's text follows it.")
    ] = None,
    prefix_path: Annotated[
        Path | None,
        typer.Option("--prefix", help=PREFIX_HELP),
    ] = None,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Chat without a prefix.")] = False,
    system_prompt: Annotated[
        str | None,
        typer.Option(
            "--system-prompt", "-s", help=f"TEXT or @FILE ({FILE_RULE}). A prefix brings its own and allows no other."
        ),
    ] = None,
    kv_type: KvCache = None,
    kv_tail: KvTail = None,
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", min=0, help="Longest reply; 0: until it ends.")] = 0,
    ctx_size: Annotated[
        int | None,
        typer.Option(
            "--ctx-size",
            "-c",
            min=0,
            help="Context in tokens; 0: the model's. Default: that, at most 4096, or the prefix and 2048 more.",
            show_default=False,
        ),
    ] = None,
    temp: Annotated[float, typer.Option("--temp", min=0, help="Temperature; 0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample from this probability mass.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="... of tokens this near the best.")] = 0.05,
    seed: Annotated[
        int | None, typer.Option("--seed", help="For replies that can be repeated; /stats names the one in use.")
    ] = None,
    encoding: Encoding = None,
    threads: Threads = None,
    *,
    rope: Rope,
) -> None:
    """Talk to a model. Its prefix is loaded, not computed, and stays at F16 whatever the KV type.

    In a terminal: a paste is one message, Alt-Enter begins another line, the arrow keys bring back earlier messages,
    Ctrl-C stops a reply, /help lists the commands. With -p or from a pipe one message is answered; with both, -p
    and then the pipe's text (-p TEXT < /dev/null: without).

    Caches worth having, their bytes beside those of f16, and how near their replies are to it:

    \b
      --kv-type f16        1      the same
      --kv-type q8_0       0.53   very near
      --kv-type q8_0,q4_0  0.41   as q8_0, by its tail; the default
      --kv-type q4_0       0.28   by its tail 6 to 20 times nearer than without

    \b
    intactkv-export chat smol.gguf
    intactkv-export chat smol.gguf -p "What is a KV cache?" --temp 0
    git diff | intactkv-export chat smol.gguf -p "Review this" --kv-type q4_0 > review.txt
    """
    from intactkv_export import runtime
    from intactkv_export.cli import terminal

    if prefix_path is not None and no_prefix:
        raise UsageError("--prefix and --no-prefix exclude each other: leave one out")
    message = _message(text)
    talk = runtime.open_chat(
        model,
        notice=terminal.notice,
        prefix=None if no_prefix else prefix_path or "auto",
        kv_type=kv_type,
        tail=kv_tail,
        n_ctx=ctx_size,
        n_threads=threads,
        system_prompt=None if system_prompt is None else text_or_file(system_prompt),
        sampling=runtime.Sampling(n_predict, temp, top_p, min_p, seed),
        **rope.llama_kwargs,
    )
    if message is not None:
        terminal.once(talk, message)
    else:
        terminal.interactive(talk)


def _message(prompt: str | None) -> str | None:
    """The one message to answer: --prompt, then what is piped. None: there is a terminal to talk in.

    Raises UsageError if there is neither, IntactKVError if what is piped is no text.
    """
    stdin = sys.stdin  # None: closed
    parts = [] if prompt is None else [text_file.argument_text(prompt, "--prompt")]
    if stdin is not None and (_is_piped(stdin.fileno()) if parts else not stdin.isatty()):
        if parts and not select.select([stdin], [], [], _PATIENCE)[0]:
            remark("waiting for standard input to end, it goes behind -p; `< /dev/null` leaves it out")
        try:
            piped = stdin.buffer.read()
        except OSError as error:
            raise IntactKVError(f"cannot read standard input ({error.strerror}): give the message with -p") from error
        parts.append(text_file.decode(piped, "standard input").rstrip("\n"))
    elif stdin is not None and not parts:
        return None
    message = "\n\n".join(part for part in parts if part.strip())
    if not message:
        raise UsageError("there is no message: give one with -p TEXT or on standard input")
    return message


def _is_piped(fd: int) -> bool:
    """Whether somebody means what is there to be read: a pipe or a file, and not what a service manager leaves open."""
    mode = os.fstat(fd).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A quantized GGUF.", show_default=False)],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ...]", help="For llama-server as it is.", show_default=False)
    ] = None,
    prefix_paths: Annotated[
        list[Path] | None,
        typer.Option(
            "--prefix",
            help="An .ikv file, or a directory of them, beside the prefixes embedded in the model; may be repeated. "
            "Default: $LLAMA_INTACTKV, or the file beside the model.",
            show_default=False,
        ),
    ] = None,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Serve without any prefix.")] = False,
    kv_type: KvCache = None,
    kv_tail: KvTail = None,
    parallel: Annotated[int, typer.Option("--parallel", min=1, help="Conversations answered at once.")] = 4,
    ctx_size: Annotated[
        int | None,
        typer.Option(
            "--ctx-size",
            "-c",
            min=0,
            help="Tokens of one conversation; 0: the model's. Default: that, at most 4096, or the longest prefix and "
            "2048 more.",
            show_default=False,
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0: every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: a free one.")] = 8080,
    keep: Annotated[
        Path | None,
        typer.Option(
            "--keep",
            metavar="DIRECTORY",
            help="Keep system prompts that come again and again there, as .ikv files, and load them at the next start. "
            "They are texts of your users: the files are readable for you alone.",
            show_default=False,
        ),
    ] = None,
    keep_after: Annotated[
        int,
        typer.Option(
            "--keep-after", min=2, max=256, help="Requests that begin alike and then differ, until it is kept."
        ),
    ] = 3,
    keep_size: Annotated[
        str, typer.Option("--keep-size", metavar="SIZE", help="Of all that is kept; beyond it the longest unused goes.")
    ] = "2G",
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            envvar="LLAMA_API_KEY",
            help="KEY, or @FILE with one a line: what clients have to say. The command line is seen by others here.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON object.")] = False,
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP: upstream's llama-server on these libraries, prefixes loaded before the first request.

    Every conversation whose tokens begin with a prefix gets it, and does not compute it. It has OpenAI's API
    (/v1/chat/completions, ...), metrics (/metrics), and a web page if it was built with one. It is ready when it says
    where it listens; /health answers 200 from then on. Ctrl-C or SIGTERM ends it.

    With --keep the model computes what many requests begin with once more, at low priority and with a cache at F16, and
    has it at once after the next start. `inspect DIRECTORY` lists what is there; rename a kept file to pin it. Files of
    other models are left out, with a word.

    \b
    intactkv-export serve smol.gguf --parallel 8
    intactkv-export serve smol.gguf --keep ~/.cache/prompts --keep-size 500M
    intactkv-export serve smol.gguf --prefix prompts/ --host 0.0.0.0 --api-key @key.txt
    intactkv-export serve smol.gguf -- --spec-type ngram-simple --verbosity 3
    """
    if prefix_paths and no_prefix:
        raise UsageError("--prefix and --no-prefix exclude each other: leave one out")
    with interrupts_at_once():
        from intactkv_export import runtime, serving  # noqa: F401 (llama_cpp and numpy: the longest imports)
    size = n_bytes(keep_size, "--keep-size")
    n_threads = threads or usable_cores()
    with contextlib.ExitStack() as stack:
        kept, directory = None, None
        if keep is not None:
            directory = stack.enter_context(_directory(keep, model, size, no_prefix, more or []))
            kept = serving.Kept(directory.path, directory.fitting, keep_after)
        settings = serving.choose_settings(
            model,
            prefixes=[] if no_prefix else prefix_paths or None,
            kv_type=kv_type,
            tail=kv_tail,
            parallel=parallel,
            ctx_size=ctx_size,
            threads=n_threads,
            host=host,
            port=port,
            api_key=None if api_key is None else text_or_file(api_key),
            kept=kept,
            more=more or [],
        )
        server = stack.enter_context(serving.Server(settings, remark))
        for note in settings.notes:
            remark(note)
        server.wait_until_ready()
        for note in server.never_used():
            remark(note)
        if directory is not None:
            from intactkv_export import keeping

            keeping.Keeper(directory, settings.ctx_size, n_threads, remark)
        if as_json:
            print_json(server.facts())
        else:
            for line in server.report():
                say(line)
        sys.stdout.flush()
        server.wait()


def _directory(path: Path, model: Path, size: int, no_prefix: bool, more: list[str]) -> Directory:
    """The directory of --keep. Raises UsageError if a served model would not compute what its file says."""
    from intactkv_export import keeping
    from intactkv_export.prefix import ikv

    if no_prefix or ikv.in_environment() == []:
        raise UsageError("--keep is for prefixes, and none are to be used: leave out --no-prefix, LLAMA_INTACTKV=off")
    others = [word for word in more if word.startswith(_OPTIONS_OF_ROWS)]
    others += [name for name in os.environ if name.startswith(_VARIABLES_OF_ROWS)]
    if others:
        raise UsageError(
            f"--keep computes with the model as its file says, and {others[0]} changes it: give one of both"
        )
    return keeping.Directory(path, keeping.ServedModel(model), size, remark)


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def tool(
    name: Annotated[str | None, typer.Argument(help="A program.", show_default=False)] = None,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[...]", help="Its arguments, as they are.", show_default=False)
    ] = None,
) -> None:
    """Run a program of llama.cpp's own on these libraries: llama-server, llama-bench, ...; without NAME: list them.

    They give every sequence that begins with a prefix of the model that prefix. Exit code and signals are the
    program's.

    \b
    intactkv-export tool llama-bench -m smol.gguf -fa 1 -ctk q8_0 -ctv q8_0
    LLAMA_INTACTKV=off intactkv-export tool llama-cli -m smol.gguf
    """
    from intactkv_export import serving

    if name is None:
        for each in serving.program_names():
            say(each)
    else:
        serving.run_program(name, arguments or [])


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the versions of this program and of the llama.cpp libraries it runs on."""
    from intactkv_export import library
    from intactkv_export.libllama import bindings

    llama_cpp = library.load()
    facts = {
        "intactkv-export": __version__,
        "llama-cpp-python": llama_cpp.__version__,
        "libraries": str(llama_cpp.llama_cpp._base_path),
        "libraries built from intactkv-export": bindings.version() if library.is_patched() else None,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    if as_json:
        print_json(facts)
    else:
        for name, value in facts.items():
            say(f"{name}: {'stock, without intact cells' if value is None else value}")
