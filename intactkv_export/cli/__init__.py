"""What is typed: words of a command line go in, an exit code comes out."""

from intactkv_export.cli.main import main

__all__ = ["main"]
