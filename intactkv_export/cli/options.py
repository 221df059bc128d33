"""The program itself, and the options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from intactkv_export.errors import UsageError
from intactkv_export.libllama import KV_TYPES, SCALINGS, Rope, option
from intactkv_export.models import read_text, text_file
from intactkv_export.prefix import from_json

PROG = "intactkv-export"
KV_TYPE_NAMES = ", ".join(KV_TYPES)
FILE_RULE = "its last line break is left out, CRLF read as LF"
# One rule for names (prefix/outputs.py), in the help of each --out
PREFIX_NAME, MODEL_NAME = "NAME or NAME.ikv", "NAME or NAME.gguf"
PREFIX_HELP = "A prefix file, or the name of one in the model. Default: the first embedded, or the file beside it."

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


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

    Names: a model is written to NAME.gguf and a prefix to NAME.ikv, whether --out is given with the ending or without
    it. No input and no other model is ever overwritten; links are followed, and what is replaced keeps its mode.

    Exit codes: 0 done, 1 failed, 2 wrong usage; ended by a signal 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), 141
    (nobody reads the output any more). An error is one sentence on stderr.
    """


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", min=1, help="CPU threads. Default: the cores it may use.")
]
KvType = Annotated[str, typer.Option("--kv-type", help=f"Type of the KV cache, or K,V: {KV_TYPE_NAMES}.")]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-type",
        help=f"Type of the KV cache, or K,V: {KV_TYPE_NAMES}. Default: q8_0,q4_0; q8_0 where it has no tail of "
        "128; f16 where only that fits.",
        show_default=False,
    ),
]
KvTail = Annotated[
    int | None,
    typer.Option(
        "--kv-tail",
        min=0,
        help="Keep the newest N tokens of a quantized cache at F16, its tail; 0: none. Default: $INTACTKV_TAIL, or "
        "128 if K or V has less than 8 bits, else 0.",
        show_default=False,
    ),
]
Reference = Annotated[
    str, typer.Argument(help="The full-precision model: a directory, a hub id, or a GGUF.", show_default=False)
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        "--system-prompt",
        "-s",
        help=f"TEXT or @FILE ({FILE_RULE}). Default: the chat template's own.",
        show_default=False,
    ),
]
Tools = Annotated[
    Path | None,
    typer.Option(
        "--tools",
        metavar="FILE",
        help='Tools that every conversation will have, JSON as in requests to a server: [{"type": "function", ...}].',
        show_default=False,
    ),
]
TemplateArgs = Annotated[
    str | None,
    typer.Option(
        "--template-args",
        metavar="JSON|@FILE",
        help='Variables of the chat template, as llama-server\'s chat_template_kwargs: {"enable_thinking": false}.',
        show_default=False,
    ),
]
Date = Annotated[
    str | None,
    typer.Option(
        "--date",
        metavar="YYYY-MM-DD",
        help="The day that the chat template writes, in every conversation behind the prefix; chat and serve keep to "
        "it. Default: today's, and the prefix ends before it.",
        show_default=False,
    ),
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


def _use_encoding(encoding: str | None) -> str | None:
    """For everything that this command reads, in its other processes too."""
    if encoding is not None:
        os.environ[text_file.VARIABLE] = text_file.check_encoding(encoding)
    return encoding


Encoding = Annotated[
    str | None,
    typer.Option(
        "--encoding",
        help=f"Of the texts it reads, as latin-1. Default: ${text_file.VARIABLE}, or what they show: UTF-8, UTF-16, "
        "the locale's.",
        callback=_use_encoding,
        show_default=False,
    ),
]

_ROPE_HELP = {
    "scaling": f"RoPE scaling: {', '.join(SCALINGS)}.",
    "scale": "The context is longer by this factor.",
    "freq_base": "RoPE base frequency.",
    "freq_scale": "RoPE frequency scale, the inverse of --rope-scale.",
    "yarn_orig_ctx": "YaRN: the context that the model was trained for.",
    "yarn_ext_factor": "YaRN: extrapolation mix; 0: full interpolation.",
    "yarn_attn_factor": "YaRN: magnitude of the attention.",
    "yarn_beta_slow": "YaRN: high correction dimension.",
    "yarn_beta_fast": "YaRN: low correction dimension.",
}


def with_rope(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command upstream's RoPE options, each by default as the model says; it is passed them as `rope`."""
    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "rope"]
    options = []
    for field in dataclasses.fields(Rope):
        kind = str if field.name == "scaling" else int if field.name == "yarn_orig_ctx" else float
        help_ = typer.Option(option(field.name), help=_ROPE_HELP[field.name], show_default=False)
        options.append(
            inspect.Parameter(
                f"rope_{field.name}", inspect.Parameter.KEYWORD_ONLY, default=None,
                annotation=Annotated[kind | None, help_],
            )
        )  # fmt: skip

    @functools.wraps(command)
    def run(**given: Any) -> None:
        values = {field.name: given.pop(f"rope_{field.name}") for field in dataclasses.fields(Rope)}
        command(**given, rope=Rope(**{name: value for name, value in values.items() if value is not None}))

    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    del run.__wrapped__
    return run


def text_or_file(value: str) -> str:
    """An option's TEXT, or the text of the file that @FILE names without the line break that editors put at its end.

    Raises UsageError if it cannot be read, IntactKVError if it is no text.
    """
    if not value.startswith("@"):
        return text_file.argument_text(value, "the text on the command line")
    return read_text(value[1:]).removesuffix("\n")


def tools_of(path: Path | None) -> Any:
    """What --tools names. Raises UsageError, IntactKVError if it is no text."""
    return None if path is None else from_json(read_text(path), str(path))


def template_args_of(value: str | None) -> Any:
    """What --template-args gives, as tools_of()."""
    return None if value is None else from_json(text_or_file(value), "--template-args")


def number_or_word(value: str | None) -> int | str | None:
    return int(value) if value is not None and value.lstrip("-").isdecimal() else value


def n_bytes(value: str, name: str) -> int:
    """What an option says: a number of bytes, or with K, M, G or T behind it, powers of 1000. Raises UsageError."""
    number, factor = value[:-1], {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}.get(value[-1:].upper())
    if factor is None:
        number, factor = value, 1
    try:
        size = float(number) * factor
        if not 1 <= size < 2**63:
            raise ValueError
    except ValueError:
        raise UsageError(f"{name} is {value!r}: give a size, such as 500M or 2G") from None
    return int(size)


def words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",")]
