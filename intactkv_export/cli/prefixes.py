"""Commands about a prefix that is there: inspect, verify, embed, extract."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from intactkv_export.cli.options import MODEL_NAME, PREFIX_NAME, AsJson, app
from intactkv_export.cli.output import print_json, say
from intactkv_export.errors import UsageError

Name = Annotated[
    str | None,
    typer.Option("--name", "-n", help="Of several in a GGUF, this one.", show_default=False),
]


@app.command()
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="An .ikv file, a GGUF with prefixes, or a directory of .ikv files.", metavar="FILE", show_default=False
        ),
    ],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="A GGUF to compare with; it also gives the tokens' text.")
    ] = None,
    name: Name = None,
    every: Annotated[bool, typer.Option("--all", help="Show every token, however long the prefix is.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a prefix file holds: prompt, origin, sizes, and a heat map of its K and V norms.

    In the map a row is a token and a column a layer: pivot tokens stand out, their norms are far from the others'. Of
    several in a GGUF the names are listed and each is shown, the default first; --name shows one of them. Of a
    directory, as `serve --keep` fills one, each file is listed: who made it, when it was last used, if it is pinned.

    \b
    intactkv-export inspect smol.ikv -m smol.gguf
    intactkv-export inspect smol.gguf --name poet --json
    intactkv-export inspect ~/.cache/prompts
    """
    from intactkv_export.prefix import ikv, inspection

    if file.is_dir():
        _inspect_directory(file, as_json, given="--name" if name else "--model" if model else None)
        return
    shown = list(ikv.read_all(file)) if name is None else [ikv.read(file, name)]
    if model is not None:
        from intactkv_export.runtime import check_fit

        for prefix in shown:
            check_fit(prefix, model)
    if as_json:
        made = inspection.as_json(shown[0])
        if len(shown) > 1:
            made["prefixes"] = [inspection.as_json(prefix) for prefix in shown]
        print_json(made)
        return
    console = Console(width=inspection.WIDTH, highlight=False)
    fits = None if model is None else str(model)
    if len(shown) > 1:
        for line in inspection.listing(shown):
            console.print(line, soft_wrap=True)
    for i, prefix in enumerate(shown):
        if i or len(shown) > 1:
            console.print()
        for line in inspection.report(prefix, inspection.token_texts(prefix, model), fits, every):
            console.print(line, soft_wrap=True)


def _inspect_directory(directory: Path, as_json: bool, given: str | None) -> None:
    from intactkv_export import keeping

    if given is not None:
        raise UsageError(f"{directory} is a directory, and {given} is for one file: name the file, or leave it out")
    found = list(keeping.entries(directory))
    if as_json:
        print_json(keeping.as_json(directory, found))
    else:
        for line in keeping.report(directory, found):
            say(line)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="An .ikv file, or a GGUF with prefixes.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The GGUF it is for. Default: the one it is embedded in.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a prefix: checksum, structure, and with a model also its identity, vocabulary, heads and RoPE.

    Of several in a GGUF all are checked. Exit code 0 if they can be loaded, else 1 and one sentence that says why not.

    \b
    intactkv-export verify smol.ikv -m smol.gguf
    """
    from intactkv_export.libllama import bindings
    from intactkv_export.prefix import ikv

    results: list[dict[str, Any]] = []
    for found in ikv.read_all(file):
        against = model or (found.source if found.embedded else None)
        if against is not None:
            from intactkv_export.runtime import check_fit

            check_fit(found, against)
        else:
            bindings.verify(found.data)
        result: dict[str, Any] = {"file": str(found.source), "name": found.name, "tokens": len(found.tokens)}
        result |= {"extra_cells": found.n_extra, "sha256": found.sha256, "model": against}
        results.append(result | ({"kept": found.kept} if found.kept else {}))
        if not as_json:
            which = f"{found.source}" if found.name is None else f"{found.source}, {found.name}"
            made = f", made by {found.kept['model']} itself" if found.kept else ""
            say(f"{which}: {found.contents}, whole{made}{f', fits {against}' if against else ''}")
    if as_json:
        print_json(results[0] | ({"prefixes": results} if len(results) > 1 else {}))


@app.command()
def embed(
    file: Annotated[
        Path, typer.Argument(help="An .ikv file; with --remove the GGUF.", metavar="FILE", show_default=False)
    ],
    model: Annotated[
        Path | None, typer.Argument(help="The GGUF to store it in.", metavar="MODEL", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"Where to write: {MODEL_NAME}. Default: MODEL itself.")
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            "-n",
            help="Of the prefix in the GGUF. Default: prompt or first-token; where there are others, FILE's own.",
            show_default=False,
        ),
    ] = None,
    default: Annotated[
        bool, typer.Option("--default", help="Make it the default: the one that is used where none is named.")
    ] = False,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="NAME", help="Take this one out of the GGUF.", show_default=False)
    ] = None,
) -> None:
    """Store a prefix in a GGUF, so that there is one file to ship. Stock llama.cpp ignores it.

    It is stored beside those that are there. It takes the place of one of the same name, or of the same tokens, as the
    calibrated one of the plain one. The first one stored is the default, which chat, eval and programs of before take;
    --prefix NAME names another. To exchange the only prefix for another prompt's, give the name that it has:
    --name prompt, as `inspect` shows.

    Of a model in parts, NAME-00001-of-00003.gguf, the first gets it; OUT.gguf is then written in as many parts. OUT may
    be an earlier copy of MODEL, and no other model.

    \b
    intactkv-export embed smol.ikv smol.gguf -o smol-with-prefix.gguf
    intactkv-export embed poet.ikv smol.gguf
    intactkv-export chat smol.gguf --prefix poet
    intactkv-export embed --remove poet smol.gguf
    """
    from intactkv_export.prefix import ikv
    from intactkv_export.runtime import check_fit

    if remove is not None:
        if model is not None or name is not None or default:
            raise UsageError("--remove NAME takes one GGUF, and neither FILE, --name nor --default: leave them out")
        done = ikv.remove(file, remove, out)
        say(f"{done.path}: {remove} removed, {_there(done.names)}")
        return
    if model is None:
        raise UsageError("no MODEL is given to store the prefix in: give FILE and MODEL")
    found = ikv.read(file)
    check_fit(found, model)
    done = ikv.add(model, found, out, name, default)
    place = f" in place of {', '.join(done.replaced)}" if done.replaced else ""
    several = f"; {_there(done.names)}" if len(done.names) > 1 else ""
    say(f"{done.path}: {found.contents}, {len(found.data):,} bytes embedded as {done.name}{place}{several}")


def _there(names: list[str]) -> str:
    if not names:
        return "no prefix is left"
    others = f", beside it {', '.join(names[1:])}" if names[1:] else ""
    return f"the default is {names[0]}{others}"


@app.command()
def extract(
    model: Annotated[Path, typer.Argument(help="A GGUF with a prefix embedded.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"Where to write: {PREFIX_NAME}. Default: MODEL with .ikv.")
    ] = None,
    name: Name = None,
) -> None:
    """Write a prefix that is embedded in a GGUF to an .ikv file, for stock llama.cpp for instance.

    Of several it is the default, or the one that --name gives, which is written to NAME.ikv beside MODEL.

    \b
    intactkv-export extract smol.gguf -o smol.ikv
    intactkv-export extract smol.gguf --name poet
    """
    from intactkv_export.models import gguf_file
    from intactkv_export.prefix import ikv, outputs

    beside = model.with_name(f"{name or gguf_file.whole_name(model)}.ikv")
    out = outputs.named(out or beside, ".ikv")
    found = ikv.extract(model, out, name)
    say(f"{out}: {found.contents}, {len(found.data):,} bytes")
