"""The command line. It parses, calls, prints, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from intactkv_export import __version__
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.progress import Progress

PROG = "intactkv-export"
INTERRUPTED = 130  # 128 + SIGINT, as shells count
_KV_TYPES = "f16, q8_0, q5_1, q5_0, q4_1, q4_0, bf16, iq4_nl"

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. Default: by the cores.")]
KvType = Annotated[str, typer.Option("--kv-type", help=f"Type of the KV cache, or K,V: {_KV_TYPES}.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantized GGUF models with an intact prefix (IntactKV) for llama.cpp.

    The keys and values of a model's first tokens (its system prompt) are computed once by the full-precision model,
    stored beside the quantized one, and kept at F16 in front of a quantized KV cache.

    \b
    intactkv-export convert ./SmolLM2 -o smol.gguf --quant Q4_K_M --system-prompt "You are terse."
    intactkv-export chat smol.gguf --kv-type q8_0

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error is one sentence on stderr.
    """


Reference = Annotated[
    str, typer.Argument(help="The full-precision model: a directory, a hub id, or a GGUF.", show_default=False)
]
SystemPrompt = Annotated[
    str | None,
    typer.Option("--system-prompt", "-s", help="TEXT or @FILE. Default: the chat template's own.", show_default=False),
]
BosOnly = Annotated[bool, typer.Option("--bos-only", help="Keep only the first token intact; for base models.")]
PrefixTokens = Annotated[
    str | None,
    typer.Option(
        "--prefix-tokens",
        metavar="N|auto",
        help="Keep only the first N tokens of the prefix; auto: as many as help (needs torch).",
        show_default=False,
    ),
]
Requantize = Annotated[
    bool, typer.Option("--allow-requantize", help="Take a quantized reference; the prefix file says so.")
]
Engine = Annotated[str, typer.Option("--engine", help="What computes the prefix: auto, llama or torch.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="To compute in: float32 (default), auto: as the weights; torch: float16, bfloat16."),
]
Device = Annotated[str, typer.Option("--device", help="Of the torch engine: cpu, cuda, ...")]
Offload = Annotated[
    Path | None, typer.Option("--offload-dir", help="Where torch puts weights that do not fit in memory.")
]
Context = Annotated[
    int, typer.Option("--ctx-size", "-c", min=0, help="Context the prefix will be used in; LongRoPE models need it.")
]


@app.command()
def convert(
    reference: Reference,
    out: Annotated[Path, typer.Option("--out", "-o", help="OUT.gguf and OUT.ikv are written.", show_default=False)],
    quant: Annotated[str, typer.Option("--quant", "-q", help="Types of llama.cpp, comma-separated.")] = "Q4_K_M",
    system_prompt: SystemPrompt = None,
    bos_only: BosOnly = False,
    prefix_tokens: PrefixTokens = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix (llama-imatrix).")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Train the prefix for each type, as the command calibrate does.")
    ] = False,
    engine: Engine = "auto",
    embed: Annotated[bool, typer.Option("--embed/--no-embed", help="Store the prefix in the GGUF too.")] = True,
    keep_reference: Annotated[bool, typer.Option("--keep-reference", help="Keep OUT.reference.gguf.")] = False,
    allow_requantize: Requantize = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    offload_dir: Offload = None,
    ctx_size: Context = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and compute its prefix: OUT.gguf, ready to chat with, and OUT.ikv.

    The system prompt is rendered by the model's own chat template; the prefix is what every conversation with it
    begins with. With several types, OUT-TYPE.gguf share one OUT.ikv; calibrated, each has its own OUT-TYPE.ikv.

    \b
    intactkv-export convert ./SmolLM2 -o smol.gguf --system-prompt @prompt.txt
    intactkv-export convert HuggingFaceTB/SmolLM2-135M-Instruct -o smol.gguf --quant Q4_0,Q4_K_M,Q2_K
    intactkv-export convert smol-f16.gguf -o smol.gguf --quant Q3_K_M --calibrate
    intactkv-export convert smol-f16.gguf -o smol.gguf --bos-only --no-embed
    """
    from intactkv_export.convert import convert as run

    prompt = None if system_prompt is None else _text_or_file(system_prompt)
    with Progress(quiet=as_json) as progress:
        result = run(
            reference, out, quant=quant, system_prompt=prompt, bos_only=bos_only,
            prefix_tokens=_number_or_word(prefix_tokens), imatrix=imatrix, calibrate=calibrate, embed=embed,
            keep_reference=keep_reference, allow_requantize=allow_requantize, engine=engine, dtype=dtype,
            device=device, offload_dir=offload_dir, n_threads=threads, n_ctx=ctx_size, progress=progress,
        )  # fmt: skip
    _print_result(result, as_json)


@app.command()
def prefix(
    reference: Reference,
    model: Annotated[Path, typer.Option("--model", "-m", help="A GGUF quantized from it.", show_default=False)],
    system_prompt: SystemPrompt = None,
    bos_only: BosOnly = False,
    prefix_tokens: PrefixTokens = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: MODEL with .ikv.")] = None,
    embed: Annotated[
        bool | None,
        typer.Option("--embed/--no-embed", help="Also store it in MODEL. Default: if it has one.", show_default=False),
    ] = None,
    engine: Engine = "auto",
    allow_requantize: Requantize = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    offload_dir: Offload = None,
    ctx_size: Context = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Compute a prefix for another system prompt, for a model that is quantized already.

    \b
    intactkv-export prefix ./SmolLM2 -m smol.gguf --system-prompt "You are a poet." -o poet.ikv
    intactkv-export chat smol.gguf --prefix poet.ikv
    """
    from intactkv_export.convert import prefix as run

    prompt = None if system_prompt is None else _text_or_file(system_prompt)
    with Progress(quiet=as_json) as progress:
        result = run(
            reference, model, out=out, system_prompt=prompt, bos_only=bos_only,
            prefix_tokens=_number_or_word(prefix_tokens), embed=embed, engine=engine,
            allow_requantize=allow_requantize, dtype=dtype, device=device, offload_dir=offload_dir,
            n_threads=threads, n_ctx=ctx_size, progress=progress,
        )  # fmt: skip
    _print_result(result, as_json)


@app.command()
def analyze(
    reference: Reference,
    model: Annotated[Path, typer.Option("--model", "-m", help="A GGUF quantized from it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the figures.", show_default=False)],
    prefix_path: Annotated[
        Path | None, typer.Option("--prefix", help="Prefix file. Default: the one embedded or beside the model.")
    ] = None,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html, one file with everything.")] = True,
    text: Annotated[
        Path | None, typer.Option("--text", help="UTF-8 text to measure on. Default: Python's language reference.")
    ] = None,
    kv_type: Annotated[str, typer.Option("--kv-type", help=f"Type of the KV cache: {_KV_TYPES}.")] = "q8_0",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw what quantization does to a model and what its prefix undoes, as in the paper.

    Five figures, each as PNG and SVG with its data as JSON: activations of the reference, its attention, the error of
    the layers against the number of intact tokens, the error of K and V by layer, the KL divergence by position.
    report.html explains them for this model. Needs the extras convert and plot.

    \b
    intactkv-export analyze ./SmolLM2 -m smol.gguf -o analysis
    intactkv-export analyze smol-f16.gguf -m smol-Q4_0.gguf --prefix smol.ikv --text novel.txt -o analysis
    """
    from intactkv_export import analyze as analysis
    from intactkv_export import report

    with Progress(quiet=as_json) as progress:
        made = analysis.analyze(
            reference, model, out, prefix=prefix_path, text=text, kv_type=kv_type, device=device, html=html,
            progress=progress,
        )  # fmt: skip
    if as_json:
        files = [str(path) for path in made.files]
        _print_json({"files": files, "facts": made.facts, "headlines": report.headlines(made.data)})
    else:
        for line in report.summary(made.data):
            print(line)
        print(f"\n{len(made.files)} files in {_short(made.directory)}, beginning with {made.files[-1].name}")


@app.command()
def calibrate(
    reference: Reference,
    model: Annotated[Path, typer.Option("--model", "-m", help="A GGUF quantized from it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The prefix file to write.", show_default=False)],
    prefix_path: Annotated[
        Path | None, typer.Option("--prefix", help="To begin with. Default: the one embedded or beside the model.")
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="self: texts the reference writes itself; or FILE: .jsonl, .json, text.")
    ] = "self",
    objective: Annotated[str, typer.Option("--objective", help="kl, mse or kl+mse.")] = "kl",
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Default: kl 120, mse 160.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Largest step, relative to K and V; mse: absolute. Default: kl 0.02, less where the model is close to "
            "the reference; mse 0.0002.",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="Sequences in a step. Default: kl 4, mse 16.")] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", help="Tokens in a sequence. Default: kl 256, mse 1024.")
    ] = None,
    sequences: Annotated[int, typer.Option("--sequences", help="To sample or read; one in eight is held out.")] = 256,
    kv_type: KvType = "q8_0",
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of torch. Default: float32; over 2^30 weights on a GPU bfloat16.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same result for the same seed on one CPU.")] = 0,
    allow_requantize: Requantize = False,
    as_json: AsJson = False,
) -> None:
    """Train a prefix for one quantized model: same size, same speed, smaller error.

    The weights stay as they are; the prefix's keys and values are trained so that the quantized model, with its KV
    cache as it will be, says what the reference says (kl), or its layers give what the reference's give (mse). What is
    measured best on held-out sequences is written; that may be what it began with. After an interruption the same
    command goes on where it was (OUT.calibrating).

    FILE: {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]} a line, an array of those, or
    plain text.

    \b
    intactkv-export calibrate ./SmolLM2 -m smol.gguf -o smol-calibrated.ikv
    intactkv-export embed smol-calibrated.ikv smol.gguf
    intactkv-export calibrate ./SmolLM2 -m smol.gguf -o chats.ikv --data chats.jsonl --device cuda --steps 400
    """
    from intactkv_export.calibrate import calibrate as run

    k, _, v = kv_type.partition(",")
    with Progress(quiet=as_json) as progress:
        result = run(
            reference, model, prefix=prefix_path, out=out, data=data, objective=objective, steps=steps, lr=lr,
            batch=batch, seq_len=seq_len, sequences=sequences, kv_type=(k.strip(), (v or k).strip()), device=device,
            dtype=dtype, seed=seed, allow_requantize=allow_requantize, progress=progress,
        )  # fmt: skip
    if as_json:
        _print_json(result.to_dict())
        return
    made, n_held_out = result.manifest, result.manifest["held_out"]["n_tokens"]
    kept = f"step {made['best_step']} of {made['steps']}" if made["best_step"] else "no step was better: as it began"
    print(f"\n{_short(result.out)}: {result.n_tokens} tokens, {result.n_bytes:,} bytes, {kept}")
    print(f"KL divergence on {n_held_out:,} held-out tokens: {result.before:.4f} -> {result.after:.4f}")
    for stage, seconds in result.seconds.items():
        print(f"{stage:24} {seconds:7.1f} s")
    print(f"{'peak memory':24} {_megabytes(result.peak_bytes):>9}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An .ikv file, or a GGUF with a prefix.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A GGUF to compare with; it also gives the tokens' text.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Show every token, however long the prefix is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a prefix file holds: prompt, origin, sizes, and a heat map of its K and V norms.

    In the map a row is a token and a column a layer: pivot tokens stand out, their norms are far from the others'.

    \b
    intactkv-export inspect smol.ikv -m smol.gguf
    intactkv-export inspect smol.gguf --json
    """
    from intactkv_export import show

    prefix = show.load(file)
    if model is not None:
        show.check_fit(prefix, model)
    if as_json:
        _print_json(show.as_json(prefix))
        return
    console = Console(width=show.WIDTH, highlight=False)
    fits = None if model is None else str(model)
    for line in show.report(prefix, show.token_texts(prefix, model), fits, every):
        console.print(line, soft_wrap=True)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An .ikv file, or a GGUF with a prefix.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The GGUF it is for. Default: the one it is embedded in.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a prefix: checksum, structure, and with a model also its identity, vocabulary, heads and RoPE.

    Exit code 0 if it can be loaded, else 1 and one sentence that says why not.

    \b
    intactkv-export verify smol.ikv -m smol.gguf
    """
    from intactkv_export import bindings, show

    found = show.load(file)
    against = model or (found.source if found.embedded else None)
    if against is not None:
        show.check_fit(found, against)
    else:
        bindings.verify(found.data)
    result = {"file": str(found.source), "tokens": len(found.tokens), "sha256": found.sha256, "model": against}
    if as_json:
        _print_json(result)
    else:
        print(f"{found.source}: {len(found.tokens)} tokens, whole{f', fits {against}' if against else ''}")


@app.command()
def embed(
    file: Annotated[Path, typer.Argument(help="An .ikv file.", show_default=False)],
    model: Annotated[Path, typer.Argument(help="The GGUF to store it in.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write. Default: MODEL itself.")] = None,
) -> None:
    """Store a prefix in a GGUF, so that there is one file to ship. Stock llama.cpp ignores it.

    \b
    intactkv-export embed smol.ikv smol.gguf -o smol-with-prefix.gguf
    """
    from intactkv_export import prefix_file, show

    found = prefix_file.read(file)
    show.check_fit(found, model)
    print(f"{prefix_file.embed(model, found, out)}: {len(found.tokens)} tokens, {len(found.data):,} bytes embedded")


@app.command()
def extract(
    model: Annotated[Path, typer.Argument(help="A GGUF with a prefix embedded.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write. Default: MODEL with .ikv.")] = None,
) -> None:
    """Write the prefix that is embedded in a GGUF to an .ikv file, for stock llama.cpp for instance.

    \b
    intactkv-export extract smol.gguf -o smol.ikv
    """
    from intactkv_export import prefix_file

    out = out or model.with_suffix(".ikv")
    found = prefix_file.extract(model, out)
    print(f"{out}: {len(found.tokens)} tokens, {len(found.data):,} bytes")


@app.command("eval")
def evaluate(
    reference: Reference,
    models: Annotated[list[Path], typer.Argument(help="GGUFs quantized from it.", show_default=False)],
    prefix_path: Annotated[
        Path | None, typer.Option("--prefix", help="Prefix file. Default: the one embedded or beside each model.")
    ] = None,
    calibrated: Annotated[Path | None, typer.Option("--calibrated", help="A prefix calibrated for the model.")] = None,
    kv_type: Annotated[str, typer.Option("--kv-type", help=f"Types of the KV cache, comma-separated: {_KV_TYPES}.")] = (
        "f16,q8_0,q4_0"
    ),
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            help="Comma-separated. Default: reference, plain, rounded, bos, prompt and, if there is one, calibrated.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE|self",
            help="UTF-8 text; self: conversations that the reference writes (needs torch). "
            "Default: Python's language reference.",
            show_default=False,
        ),
    ] = None,
    task_file: Annotated[Path | None, typer.Option("--tasks", help="Multiple-choice questions, JSONL.")] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Texts, each right behind the prefix.")] = 12,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of a text.")] = 256,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Take a quantized reference.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far quantized models are from their reference, through llama.cpp as the runtime uses it.

    KL divergence from the reference's next-token distributions in nats (mean and standard error, median, 99th
    percentile, maximum), how often both rank the same token first, perplexity of the text. What the rows differ in:

    \b
    reference   the full-precision model itself, F16 cache
    plain       the quantized model computes the prefix's tokens itself
    rounded     it is given the reference's prefix, rounded to the KV type with the rest
    bos         it is given the first token of it, intact
    prompt      it is given all of it, intact
    calibrated  it is given the calibrated one, intact

    A line of --tasks is a question: its text as question, question_stem, query, ctx or goal; choices (a list, or an
    object of text and label), endings, or sol1 and sol2; the right one as answer, answerKey, gold or label: its index
    or label. acc: the likeliest choice is right; acc_norm: the likeliest per byte is.

    \b
    intactkv-export eval ./SmolLM2 smol.gguf
    intactkv-export eval smol-f16.gguf smol-Q4_0.gguf smol-Q2_K.gguf --kv-type q8_0 --modes plain,prompt
    intactkv-export eval smol-f16.gguf smol.gguf --calibrated tuned.ikv --text self --tasks arc.jsonl --json
    """
    from intactkv_export import evaluate as evaluation
    from intactkv_export import figures, scoreboard, tasks

    with Progress(quiet=as_json) as progress:
        results = list(
            evaluation.evaluate(
                reference, models, prefix_path, calibrated=calibrated, kv_types=_words(kv_type),
                modes=None if modes is None else _words(modes),
                text=text if text in (None, evaluation.SELF) else _text_or_file(f"@{text}"),
                questions=tasks.read(task_file) if task_file else (), n_chunks=chunks, n_tokens=tokens,
                n_threads=threads, allow_requantize=allow_requantize, progress=progress,
            )
        )  # fmt: skip
    if as_json:
        _print_json({"reference": reference, "chunks": chunks, "tokens": tokens, **figures.as_json(results)})
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    for part in scoreboard.tables(results):
        console.print(part)


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
    from intactkv_export import chat as chatting

    if prefix_path is not None and no_prefix:
        raise UsageError("--prefix and --no-prefix exclude each other: leave one out")
    message = text
    if message is None and not sys.stdin.isatty():
        message = sys.stdin.read().rstrip("\n")
    if message is not None and not message.strip():
        raise UsageError("there is no message: give one with -p TEXT or on standard input")
    k, _, v = kv_type.partition(",")
    talk = chatting.open_chat(
        model,
        prefix=None if no_prefix else prefix_path or "auto",
        kv_type=(k.strip(), (v or k).strip()),
        n_ctx=ctx_size,
        n_threads=threads,
        system_prompt=None if system_prompt is None else _text_or_file(system_prompt),
        sampling=chatting.Sampling(n_predict, temp, top_p, min_p, seed),
    )
    if message is not None:
        chatting.once(talk, message)
    else:
        chatting.interactive(talk)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Print the versions of this program and of the llama.cpp libraries it runs on."""
    from intactkv_export import bindings, library

    llama_cpp = library.load()
    facts = {
        "intactkv-export": __version__,
        "llama-cpp-python": llama_cpp.__version__,
        "libraries": str(llama_cpp.llama_cpp._base_path),
        "libraries built from intactkv-export": bindings.version() if library.is_patched() else None,
        "system": llama_cpp.llama_print_system_info().decode(),
    }
    if as_json:
        _print_json(facts)
    else:
        for name, value in facts.items():
            print(f"{name}: {'stock, without intact cells' if value is None else value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = [a for a in given if a != "--debug"]  # it may stand anywhere
    debug = len(args) < len(given)
    warnings.showwarning = _warn
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal may lack a character, not a reply
    try:
        code = app(args or ["--help"], prog_name=PROG, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        return _explain(error)


def _explain(error: BaseException) -> int:
    if isinstance(error, IntactKVError):
        print(f"{PROG}: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # whoever read our output has gone; nothing more can be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, typer.BadParameter.__base__ or ()):  # the parser's usage errors
        command = error.ctx.command_path if error.ctx else PROG  # type: ignore[attr-defined]
        message = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        print(f"{PROG}: {message[:1].lower()}{message[1:]}: see `{command} --help`", file=sys.stderr)
        return UsageError.exit_code
    print(f"{PROG}: internal error: {type(error).__name__}: {error}; run with --debug to see where", file=sys.stderr)
    return IntactKVError.exit_code


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"{PROG}: warning: {message}", file=sys.stderr)


def _text_or_file(value: str) -> str:
    """An option's TEXT, or the text of the file that @FILE names. Raises UsageError if it cannot be read."""
    if not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the text in {value[1:]} ({error}): check the path") from error


def _number_or_word(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",")]


def _print_result(result: Any, as_json: bool) -> None:
    """What convert or prefix made: files, then what each stage took."""
    if as_json:
        _print_json(result.to_dict())
        return
    print(f"\n{'file':40} {'size':>12} {'bits/weight':>12}")
    for made in result.outputs:
        print(f"{_short(made.path):40} {_megabytes(made.n_bytes):>12} {made.bits_per_weight:12.2f}")
    for path in [made["prefix"] for made in result.calibrated.values()] or [result.prefix]:
        print(f"{_short(path):40} {_megabytes(path.stat().st_size):>12}")
    for name, curve in result.curves.items():
        _print_curve(name, curve)
    where = " and embedded" if result.embedded else ""
    for name, made in result.calibrated.items():
        print(f"\n{name}: held-out KL divergence {made['before']:.4f}, calibrated {made['after']:.4f}")
    print(f"\nprefix: {result.n_tokens} tokens at F16, by the {result.engine} engine, in a file of its own{where}")
    print(f"\n{'stage':24} {'time':>9} {'peak memory':>14}")
    for stage in result.stages:
        print(f"{stage.name:24} {stage.seconds:7.1f} s {_megabytes(stage.peak_bytes):>14}")


def _print_curve(name: str, curve: Any) -> None:
    """What --prefix-tokens auto went by."""
    print(f"\n{name}: {curve.chosen} of {curve.counts[-1]} tokens have to be intact: the layers' mean squared error is")
    print(f"{'intact tokens':>14}  relative to none")
    for count, error in zip(curve.counts, curve.relative, strict=True):
        print(f"{count:14}  {error:.3f}{'  flat from here' if count == curve.chosen else ''}")


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def _short(path: Path) -> str:
    """Relative to where we are, if it is below."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))
