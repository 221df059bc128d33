"""Commands that measure: eval, analyze."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from intactkv_export.cli.options import (
    FILE_RULE,
    KV_TYPE_NAMES,
    PREFIX_HELP,
    AsJson,
    Device,
    Encoding,
    Reference,
    Threads,
    app,
    text_or_file,
    words,
)
from intactkv_export.cli.output import print_json, say, short_path
from intactkv_export.cli.progress_bar import ProgressBar
from intactkv_export.errors import UsageError
from intactkv_export.evaluation import DECODE_BATCH, MODES, REFERENCE
from intactkv_export.models import read_text

_ROWS = "\n".join(
    f"{name:11} {what}" for name, what in {REFERENCE: "the full-precision model itself, F16 cache", **MODES}.items()
)
_EVAL = f"""\
Measure how far quantized models are from their reference, through llama.cpp as the runtime uses it.

KL divergence from the reference's next-token distributions in nats (mean and standard error, median, 99th
percentile, maximum), how often both rank the same token first, perplexity of the text. What the rows differ in:

\b
{_ROWS}

--depths measures behind that much text, and evaluates it as a reply is: a few tokens at a time (--decode-batch). A
whole text at once would all be in the tail (--kv-tail), which is kept intact; without --depths there is none. Texts as
long as the largest depth and --tokens are needed: give a long --text, or few --chunks.

--system-prompt measures behind a whole system prompt, for a prefix that is its beginning: that of the first token,
which serves every prompt, or the first tokens of this one. What follows the prefix the quantized model computes itself.
A prefix of the first token is the row bos then. A model without a chat template reads the prompt as a paragraph.

A line of --tasks is a question: its text as question, question_stem, query, ctx or goal; choices (a list, or an
object of text and label), endings, or sol1 and sol2; the right one as answer, answerKey, gold or label: its index
or label. acc: the likeliest choice is right; acc_norm: the likeliest per byte is.

\b
intactkv-export eval ./SmolLM2 smol.gguf
intactkv-export eval smol-f16.gguf smol-Q4_0.gguf smol-Q2_K.gguf --kv-type q8_0 --modes plain,prompt
intactkv-export eval smol-f16.gguf smol.gguf --kv-type q8_0,q8_0/q4_0,q4_0 --depths 512,2048 --kv-tail 0,128
intactkv-export eval smol-f16.gguf smol.gguf --prefix first.ikv -s "You are terse." -s @other.txt
intactkv-export eval smol-f16.gguf smol.gguf --calibrated tuned.ikv --text self --tasks arc.jsonl --json
"""


@app.command("eval", help=_EVAL)
def evaluate(
    reference: Reference,
    models: Annotated[list[Path], typer.Argument(help="GGUFs quantized from it.", show_default=False)],
    prefix_path: Annotated[
        Path | None,
        typer.Option("--prefix", help=PREFIX_HELP),
    ] = None,
    calibrated: Annotated[Path | None, typer.Option("--calibrated", help="A prefix calibrated for the model.")] = None,
    kv_type: Annotated[
        str, typer.Option("--kv-type", help=f"Types, comma-separated, K/V if they differ: {KV_TYPE_NAMES}.")
    ] = ("f16,q8_0,q4_0"),
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            help=f"Comma-separated, of {REFERENCE}, {', '.join(MODES)}. Default: all that there are.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE|self",
            help="A text; self: conversations that the reference writes (needs torch). "
            "Default: Python's language reference.",
            show_default=False,
        ),
    ] = None,
    task_file: Annotated[Path | None, typer.Option("--tasks", help="Multiple-choice questions, JSONL.")] = None,
    system_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--system-prompt",
            "-s",
            metavar="TEXT|@FILE",
            help=f"Measure behind this prompt, which begins with the prefix ({FILE_RULE}); may be given several times. "
            "Default: right behind the prefix.",
            show_default=False,
        ),
    ] = None,
    chunks: Annotated[int, typer.Option("--chunks", min=1, help="Texts, each right behind the prefix.")] = 12,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of a text that are measured.")] = 256,
    depths: Annotated[
        str | None,
        typer.Option(
            "--depths", metavar="N[,N...]", help="Measure behind that many tokens of text too.", show_default=False
        ),
    ] = None,
    decode_batch: Annotated[
        int | None,
        typer.Option(
            "--decode-batch",
            min=1,
            help=f"With --depths: tokens evaluated at a time, at most. Default: {DECODE_BATCH}.",
            show_default=False,
        ),
    ] = None,
    ubatch: Annotated[
        int | None,
        typer.Option(
            "--ubatch",
            min=1,
            help="With --depths: rows of texts evaluated that many tokens at a time too, as a prompt is.",
            show_default=False,
        ),
    ] = None,
    kv_tail: Annotated[
        str | None,
        typer.Option(
            "--kv-tail",
            metavar="N[,N...]",
            help="With --depths: how many of the newest tokens a quantized cache keeps at F16. "
            "Default: $INTACTKV_TAIL, or 128 if K or V has less than 8 bits, else 0.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            metavar="N",
            help="Cut the text and measure as `llama-perplexity -c N --kl-divergence` does, for a prefix of the first "
            "token: --chunks windows, the second half of each. Instead of --tokens and --depths.",
            show_default=False,
        ),
    ] = None,
    allow_requantize: Annotated[bool, typer.Option("--allow-requantize", help="Take a quantized reference.")] = False,
    threads: Threads = None,
    encoding: Encoding = None,
    as_json: AsJson = False,
) -> None:
    from intactkv_export import evaluation

    texts = evaluation.Texts(
        n_chunks=chunks,
        n_tokens=tokens,
        text=text if text in (None, evaluation.SELF) else read_text(text),
        questions=evaluation.multiple_choice.read(task_file) if task_file else (),
    )
    impossible: list[evaluation.metrics.Impossible] = []
    with ProgressBar(quiet=as_json) as progress:
        results = list(
            evaluation.evaluate(
                reference,
                models,
                prefix_path,
                calibrated=calibrated,
                kv_types=words(kv_type),
                modes=None if modes is None else words(modes),
                texts=texts,
                system_prompt=[text_or_file(value) for value in system_prompt] if system_prompt else None,
                n_threads=threads,
                allow_requantize=allow_requantize,
                depths=_numbers("--depths", depths),
                decode_batch=decode_batch,
                ubatch=ubatch,
                kv_tails=_numbers("--kv-tail", kv_tail),
                window=window,
                progress=progress,
                impossible=impossible.append,
            )
        )
    if as_json:
        figures = evaluation.metrics.as_json(results, impossible)
        print_json(
            {
                "reference": reference,
                "chunks": chunks,
                "tokens": None if window else tokens,
                "window": window,
                **figures,
            }
        )
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 132)
    for part in evaluation.tables.tables(results, impossible):
        console.print(part)


def _numbers(option: str, text: str | None) -> list[int]:
    """Of an option that takes several. Raises UsageError."""
    try:
        return [] if text is None else [int(word) for word in words(text)]
    except ValueError as error:
        raise UsageError(f"{option} {text}: give whole numbers, comma-separated, for example 512,2048") from error


@app.command()
def analyze(
    reference: Reference,
    model: Annotated[Path, typer.Option("--model", "-m", help="A GGUF quantized from it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the figures.", show_default=False)],
    prefix_path: Annotated[
        Path | None,
        typer.Option("--prefix", help=PREFIX_HELP),
    ] = None,
    html: Annotated[bool, typer.Option("--html/--no-html", help="Write report.html, one file with everything.")] = True,
    text: Annotated[
        Path | None, typer.Option("--text", help="Text to measure on. Default: Python's language reference.")
    ] = None,
    kv_type: Annotated[str, typer.Option("--kv-type", help=f"Type of the KV cache: {KV_TYPE_NAMES}.")] = "q8_0",
    device: Device = "cpu",
    encoding: Encoding = None,
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
    from intactkv_export import analysis
    from intactkv_export.analysis import report

    with ProgressBar(quiet=as_json) as progress:
        made = analysis.analyze(
            reference,
            model,
            out,
            prefix=prefix_path,
            text=text,
            kv_type=kv_type,
            device=device,
            html=html,
            progress=progress,
        )
    if as_json:
        files = [str(path) for path in made.files]
        print_json({"files": files, "facts": made.facts, "headlines": report.headlines(made.data)})
    else:
        for line in report.summary(made.data):
            say(line)
        say(f"\n{len(made.files)} files in {short_path(made.directory)}, beginning with {made.files[-1].name}")
