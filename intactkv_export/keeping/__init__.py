"""Prompts that come again and again, kept on disk: a served model's own prefixes, for its next start.

The library that serves notes which tokens many requests begin with (native/src/keeping); here their rows are computed
beside it, and the directory is kept in order.
"""

from intactkv_export.keeping.directory import Directory, Entry, entries
from intactkv_export.keeping.keeper import Keeper
from intactkv_export.keeping.listing import as_json, report
from intactkv_export.keeping.model import ServedModel

__all__ = ["Directory", "Entry", "Keeper", "ServedModel", "as_json", "entries", "report"]
