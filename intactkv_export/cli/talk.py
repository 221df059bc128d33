"""Commands that run a model, and what they run on: chat, version."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from intactkv_export import __version__
from intactkv_export.cli.options import AsJson, KvType, Threads, app, text_or_file
from intactkv_export.cli.output import print_json
from intactkv_export.errors import UsageError


@app.command()
def chat(
    model: Annotated[Path, typer.Argument(help="A quantized GGUF.", show_default=False)],
    text: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this message and exit; only the reply is on stdout.")
    ] = None,
    prefix_path: Annotated[
        Path | None, typer.Option("--prefix", help="Prefix file. Default: the one embedded or beside the model.")
    ] = None,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Chat without a prefix.")] = False,
    system_prompt: Annotated[
        str | None,
        typer.Option("--system-prompt", "-s", help="TEXT or @FILE. A prefix brings its own and allows no other."),
    ] = None,
    kv_type: KvType = "q8_0",
    n_predict: Annotated[int, typer.Option("-n", "--n-predict", min=0, help="Longest reply; 0: until it ends.")] = 0,
    ctx_size: Annotated[
        int | None,
        typer.Option("--ctx-size", "-c", min=0, help="Context in tokens; 0: the model's. Default: that, at most 4096."),
    ] = None,
    temp: Annotated[float, typer.Option("--temp", min=0, help="Temperature; 0: always the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="Sample from this probability mass.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", min=0, max=1, help="... of tokens this near the best.")] = 0.05,
    seed: Annotated[int | None, typer.Option("--seed", help="For replies that can be repeated.")] = None,
    threads: Threads = None,
) -> None:
    """Talk to a model. Its prefix is loaded, not computed, and stays at F16 whatever the KV type.

    In a terminal: history with the arrow keys, Ctrl-C stops a reply, /help lists the commands. With -p or from a
    pipe one message is answered.

    \b
    intactkv-export chat smol.gguf
    intactkv-export chat smol.gguf -p "What is a KV cache?" --temp 0
    git diff | intactkv-export chat smol.gguf --kv-type q8_0,q4_0 > review.txt
    """
    from intactkv_export.runtime import chat as chats

    if prefix_path is not None and no_prefix:
        raise UsageError("--prefix and --no-prefix exclude each other: leave one out")
    message = text
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().rstrip("\n")
    if message is not None and not message.strip():
        raise UsageError("there is no message: give one with -p TEXT or on standard input")
    talk = chats.open_chat(
        model,
        prefix=None if no_prefix else prefix_path or "auto",
        kv_type=kv_type,
        n_ctx=ctx_size,
        n_threads=threads,
        system_prompt=None if system_prompt is None else text_or_file(system_prompt),
        sampling=chats.Sampling(n_predict, temp, top_p, min_p, seed),
    )
    if message is not None:
        chats.once(talk, message)
    else:
        chats.interactive(talk)


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
            print(f"{name}: {'stock, without intact cells' if value is None else value}")
