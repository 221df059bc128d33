"""Commands about a prefix that is there: inspect, verify, embed, extract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from intactkv_export.cli.options import MODEL_NAME, PREFIX_NAME, AsJson, app
from intactkv_export.cli.output import print_json, say


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
    from intactkv_export.prefix import ikv, inspection

    prefix = ikv.load(file)
    if model is not None:
        from intactkv_export.runtime import check_fit

        check_fit(prefix, model)
    if as_json:
        print_json(inspection.as_json(prefix))
        return
    console = Console(width=inspection.WIDTH, highlight=False)
    fits = None if model is None else str(model)
    for line in inspection.report(prefix, inspection.token_texts(prefix, model), fits, every):
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
    from intactkv_export.libllama import bindings
    from intactkv_export.prefix import ikv

    found = ikv.load(file)
    against = model or (found.source if found.embedded else None)
    if against is not None:
        from intactkv_export.runtime import check_fit

        check_fit(found, against)
    else:
        bindings.verify(found.data)
    result = {"file": str(found.source), "tokens": len(found.tokens), "extra_cells": found.n_extra}
    result |= {"sha256": found.sha256, "model": against}
    if as_json:
        print_json(result)
    else:
        say(f"{found.source}: {found.contents}, whole{f', fits {against}' if against else ''}")


@app.command()
def embed(
    file: Annotated[Path, typer.Argument(help="An .ikv file.", show_default=False)],
    model: Annotated[Path, typer.Argument(help="The GGUF to store it in.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"Where to write: {MODEL_NAME}. Default: MODEL itself.")
    ] = None,
) -> None:
    """Store a prefix in a GGUF, so that there is one file to ship. Stock llama.cpp ignores it.

    A prefix embedded before is replaced. Of a model in parts, NAME-00001-of-00003.gguf, the first gets it; OUT.gguf is
    then written in as many parts. OUT may be an earlier copy of MODEL, and no other model.

    \b
    intactkv-export embed smol.ikv smol.gguf -o smol-with-prefix.gguf
    """
    from intactkv_export.prefix import ikv
    from intactkv_export.runtime import check_fit

    found = ikv.read(file)
    check_fit(found, model)
    say(f"{ikv.embed(model, found, out)}: {found.contents}, {len(found.data):,} bytes embedded")


@app.command()
def extract(
    model: Annotated[Path, typer.Argument(help="A GGUF with a prefix embedded.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"Where to write: {PREFIX_NAME}. Default: MODEL with .ikv.")
    ] = None,
) -> None:
    """Write the prefix that is embedded in a GGUF to an .ikv file, for stock llama.cpp for instance.

    \b
    intactkv-export extract smol.gguf -o smol.ikv
    """
    from intactkv_export.models import gguf_file
    from intactkv_export.prefix import ikv, outputs

    beside = model.with_name(f"{gguf_file.whole_name(model)}.ikv")
    out = outputs.named(out or beside, ".ikv")
    found = ikv.extract(model, out)
    say(f"{out}: {found.contents}, {len(found.data):,} bytes")
