"""Commands that make a model or a prefix: convert, prefix, calibrate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_export.cli.options import (
    PREFIX_HELP,
    PREFIX_NAME,
    AsJson,
    BosOnly,
    Context,
    Date,
    Device,
    Dtype,
    Encoding,
    Engine,
    KvType,
    Offload,
    PrefixTokens,
    Reference,
    Requantize,
    SystemPrompt,
    TemplateArgs,
    Threads,
    Tools,
    app,
    number_or_word,
    template_args_of,
    text_or_file,
    tools_of,
    with_rope,
)
from intactkv_export.cli.output import megabytes, print_gain, print_json, print_result, say, short_path
from intactkv_export.cli.progress_bar import ProgressBar
from intactkv_export.errors import UsageError
from intactkv_export.libllama import Rope


@app.command()
@with_rope
def convert(
    reference: Reference,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="NAME, NAME.gguf or NAME.ikv: both are written.", show_default=False)
    ],
    quant: Annotated[str, typer.Option("--quant", "-q", help="Types of llama.cpp, comma-separated.")] = "Q4_K_M",
    system_prompt: SystemPrompt = None,
    tools: Tools = None,
    template_args: TemplateArgs = None,
    date: Date = None,
    bos_only: BosOnly = False,
    prefix_tokens: PrefixTokens = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix (llama-imatrix).")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Train the prefix for each type, as the command calibrate does; without --system-prompt that of the "
            "first token, which serves every prompt.",
        ),
    ] = False,
    engine: Engine = "auto",
    embed: Annotated[bool, typer.Option("--embed/--no-embed", help="Store the prefix in the GGUF too.")] = True,
    keep_reference: Annotated[bool, typer.Option("--keep-reference", help="Keep NAME.reference.gguf.")] = False,
    allow_requantize: Requantize = False,
    dtype: Dtype = None,
    device: Device = "cpu",
    offload_dir: Offload = None,
    ctx_size: Context = 0,
    threads: Threads = None,
    encoding: Encoding = None,
    as_json: AsJson = False,
    *,
    rope: Rope,
) -> None:
    """Quantize a model and compute its prefix: NAME.gguf, ready to chat with, and NAME.ikv.

    The system prompt is rendered by the model's own chat template as llama-server renders it, with --tools,
    --template-args and --date if they are given; the prefix is what every conversation with the same ones begins with.
    With several types, NAME-TYPE.gguf share one NAME.ikv; calibrated, each has its own NAME-TYPE.ikv.
    Files of these names are replaced if a conversion made them. A prefix made with --rope-... or --yarn-... options is
    for programs that are given the same ones.

    \b
    intactkv-export convert ./SmolLM2 -o smol.gguf --quant Q4_0 --calibrate
    intactkv-export convert ./SmolLM2 -o smol.gguf --system-prompt @prompt.txt
    intactkv-export convert HuggingFaceTB/SmolLM2-135M-Instruct -o smol.gguf --quant Q4_0,Q4_K_M,Q2_K
    intactkv-export convert smol-f16.gguf -o smol.gguf --bos-only --no-embed
    """
    from intactkv_export.conversion import convert as run

    prompt = None if system_prompt is None else text_or_file(system_prompt)
    given_tools, given_args = tools_of(tools), template_args_of(template_args)
    with ProgressBar(quiet=as_json) as progress:
        result = run(
            reference,
            out,
            quant=quant,
            system_prompt=prompt,
            bos_only=bos_only,
            tools=given_tools,
            template_args=given_args,
            date=date,
            prefix_tokens=number_or_word(prefix_tokens),
            imatrix=imatrix,
            calibrate=calibrate,
            embed=embed,
            keep_reference=keep_reference,
            allow_requantize=allow_requantize,
            engine=engine,
            dtype=dtype,
            device=device,
            offload_dir=offload_dir,
            n_threads=threads,
            n_ctx=ctx_size,
            rope=rope,
            progress=progress,
        )
    print_result(result, as_json)


@app.command()
@with_rope
def prefix(
    reference: Reference,
    model: Annotated[
        Path | None,
        typer.Option("--model", "-m", help="A GGUF quantized from it; --like does without.", show_default=False),
    ] = None,
    system_prompt: SystemPrompt = None,
    tools: Tools = None,
    template_args: TemplateArgs = None,
    date: Date = None,
    bos_only: BosOnly = False,
    prefix_tokens: PrefixTokens = None,
    like: Annotated[
        Path | None,
        typer.Option(
            "--like",
            metavar="FILE.ikv",
            help="Of the tokens of this prefix, in place of a prompt: what `serve --keep` has kept, at full precision. "
            "It is written to --out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"{PREFIX_NAME}. Default: MODEL with .ikv.")] = None,
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
    encoding: Encoding = None,
    as_json: AsJson = False,
    *,
    rope: Rope,
) -> None:
    """Compute a prefix for another system prompt, for a model that is quantized already.

    Agents give their tools with every request, and most chat templates put them before or behind the system prompt: a
    prefix for an agent is made with the same --tools and --template-args. They are noted in the file, and chat renders
    with them. A template that writes today's date before the system prompt needs --date: chat and serve then render
    with that day.

    \b
    intactkv-export prefix ./SmolLM2 -m smol.gguf -s @agent.txt --tools tools.json -o agent.ikv
    intactkv-export prefix ./SmolLM2 -m smol.gguf --system-prompt "You are a poet." -o poet.ikv
    intactkv-export chat smol.gguf --prefix poet.ikv
    intactkv-export prefix ./Llama-3.2 -m llama.gguf -s @agent.txt --date $(date +%F)
    intactkv-export prefix ./SmolLM2 --like prompts/kept-0123456789abcdef.ikv -o prompts/agent.ikv
    """
    from intactkv_export.conversion import prefix as run
    from intactkv_export.conversion import remake

    computing: dict[str, Any] = {
        "allow_requantize": allow_requantize,
        "engine": engine,
        "dtype": dtype,
        "device": device,
        "offload_dir": offload_dir,
        "n_threads": threads,
        "n_ctx": ctx_size,
    }
    if like is not None:
        given = {
            "--system-prompt": system_prompt,
            "--tools": tools,
            "--template-args": template_args,
            "--date": date,
            "--bos-only": bos_only or None,
            "--prefix-tokens": prefix_tokens,
            "--embed": embed,
        }
        if other := next((name for name, value in given.items() if value is not None), None):
            raise UsageError(f"--like takes the tokens of {like} and writes a file: leave out {other}")
        if out is None:
            raise UsageError("--like does not say where to write: give --out NAME.ikv")
        with ProgressBar(quiet=as_json) as progress:
            remade = remake(
                reference,
                like,
                out,
                model=model,
                rope=rope or None,
                progress=progress,
                **computing,
            )
        print_result(remade, as_json)
        return
    if model is None:
        raise UsageError("no model is given that the prefix is for: give a GGUF with --model, or --like FILE.ikv")
    prompt = None if system_prompt is None else text_or_file(system_prompt)
    given_tools, given_args = tools_of(tools), template_args_of(template_args)
    with ProgressBar(quiet=as_json) as progress:
        result = run(
            reference,
            model,
            out=out,
            system_prompt=prompt,
            bos_only=bos_only,
            tools=given_tools,
            template_args=given_args,
            date=date,
            prefix_tokens=number_or_word(prefix_tokens),
            embed=embed,
            rope=rope,
            progress=progress,
            **computing,
        )
    print_result(result, as_json)


@app.command()
def calibrate(
    reference: Reference,
    model: Annotated[Path, typer.Option("--model", "-m", help="A GGUF quantized from it.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", "-o", help=f"The prefix file to write: {PREFIX_NAME}.", show_default=False)
    ],
    prefix_path: Annotated[
        Path | None,
        typer.Option("--prefix", help=f"To begin with. {PREFIX_HELP}"),
    ] = None,
    data: Annotated[
        str, typer.Option("--data", help="self: texts the reference writes itself; or FILE: .jsonl, .json, text.")
    ] = "self",
    objective: Annotated[str, typer.Option("--objective", help="kl, mse or kl+mse.")] = "kl",
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Default: kl 100, mse 160.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr",
            help="Largest step, relative to K and V; mse: absolute. Default: kl 0.02, first token alone 0.05, "
            "with recurrent layers 0.01, less where the model is close to the reference; mse 0.0002.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="Short texts in a step, or as many tokens of a long one. Default: kl 4, mse 16."),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            "--seq-len", help="Tokens in a long text; kl: half of all are in texts of 256. Default: 1024, kl+mse 256."
        ),
    ] = None,
    sequences: Annotated[
        int | None, typer.Option("--sequences", help="Texts to sample or read; one in eight is held out. Default: 128.")
    ] = None,
    cells: Annotated[
        int,
        typer.Option("--cells", min=0, help="Extra cells to train, K and V that stand for no token; kept if better."),
    ] = 0,
    in_sight: Annotated[
        bool | None,
        typer.Option(
            "--in-sight/--no-in-sight",
            help="Sliding windows do not hide the first token and its extra cells: give long texts (--seq-len) then. "
            "Default: no, or as it was begun.",
            show_default=False,
        ),
    ] = None,
    kv_type: KvType = "q8_0",
    kv_tail: Annotated[
        int | None,
        typer.Option(
            "--kv-tail",
            min=0,
            help="The newest tokens that the cache will keep at F16. Default: 128 if K or V has less than 8 bits.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps.")] = "cpu",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Of torch. Default: float32; bfloat16 over 2^30 weights on a GPU, and for a model of less than 6 bits "
            "on a CPU that multiplies it.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="The same result for the same seed on one CPU.")] = 0,
    encoding: Encoding = None,
    allow_requantize: Requantize = False,
    as_json: AsJson = False,
) -> None:
    """Train a prefix for one quantized model: same size, same speed, smaller error.

    The weights stay as they are; the prefix's keys and values are trained so that the quantized model, with its KV
    cache as it will be, says what the reference says (kl), or its layers give what the reference's give (mse). What is
    measured best on held-out texts is written; that may be what it began with. After an interruption the same command
    goes on where it was (OUT.calibrating).

    A prefix of the first token (convert --bos-only) is trained for every prompt: on texts under many system prompts and
    none, conversations and documents, short and long. One of a system prompt is trained for that prompt, and begins
    with the trained first token of the model, if it has one.

    FILE: .jsonl, a record a line, or .json, an array of them: {"messages": [{"role", "content"}]}, {"conversations":
    [{"from", "value"}]}, {"prompt", "completion"}, {"instruction", "input", "output"}, {"question", "answer"}, or
    {"text"}; else plain text. Tool calls and their results are read as text. What cannot be used is counted and named.

    \b
    intactkv-export calibrate ./SmolLM2 -m smol.gguf -o smol-calibrated.ikv
    intactkv-export embed smol-calibrated.ikv smol.gguf
    intactkv-export calibrate ./SmolLM2 -m smol.gguf -o chats.ikv --data chats.jsonl --device cuda --steps 400
    """
    from intactkv_export.calibration import calibrate as run

    with ProgressBar(quiet=as_json) as progress:
        result = run(
            reference,
            model,
            prefix=prefix_path,
            out=out,
            data=data,
            objective=objective,
            steps=steps,
            lr=lr,
            batch=batch,
            seq_len=seq_len,
            sequences=sequences,
            cells=cells,
            in_sight=in_sight,
            kv_type=kv_type,
            tail=kv_tail,
            device=device,
            dtype=dtype,
            seed=seed,
            allow_requantize=allow_requantize,
            progress=progress,
        )
    if as_json:
        print_json(result.to_dict())
        return
    made = result.manifest
    print_gain(f"{short_path(result.out)}, {result.contents}", made["held_out"], result.n_bytes)
    kept = f"step {made['best_step']} of {made['steps']}" if made["best_step"] else "no step was better: as it began"
    say(f"kept: {kept}\n")
    for stage, seconds in result.seconds.items():
        say(f"{stage:24} {seconds:7.1f} s")
    say(f"{'peak memory':24} {megabytes(result.peak_bytes):>9}")
