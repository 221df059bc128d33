"""The pages of the documentation that are made from the program itself.

    python docs/generate.py          write docs/reference/cli.md (`make docs`)

tests/docs/test_reference.py compares the page with what is made now. Width and colors are fixed; the wording of options
is typer's, whose version constraints.txt pins.
"""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from intactkv_export.cli import main as cli  # noqa: F401  # its commands register themselves
from intactkv_export.cli.options import PROG, app

CLI_PAGE = Path(__file__).resolve().parent / "reference" / "cli.md"
WIDTH = 100

_HEAD = """\
# Command line

Made from `--help` by `make docs`; do not edit. The guides show each command at work: [guides](../guides/).
"""


def commands() -> list[str]:
    """Names of the commands, in the order of `intactkv-export --help`."""
    return [str(command.name or command.callback.__name__) for command in app.registered_commands if command.callback]


def help_of(*words: str) -> str:
    """What `intactkv-export WORDS --help` prints."""
    done = CliRunner().invoke(app, [*words, "--help"], prog_name=PROG, terminal_width=WIDTH, color=False)
    if done.exit_code:
        raise RuntimeError(f"{' '.join((PROG, *words))} --help failed: {done.output}") from done.exception
    return "\n".join(line.rstrip() for line in done.output.strip("\n").splitlines())


def cli_page() -> str:
    """The text of docs/reference/cli.md."""
    parts = [_HEAD, f"```\n{help_of()}\n```\n"]
    parts += [f"## {name}\n\n```\n{help_of(name)}\n```\n" for name in commands()]
    return "\n".join(parts)


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page(), encoding="utf-8")
    print(f"written: {CLI_PAGE}")
