"""`inspect DIRECTORY`: a line for each prefix."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from intactkv_export.keeping.directory import Entry, facts

_WORDS = 96  # characters of a prompt


def as_json(directory: Path, found: Sequence[Entry]) -> dict[str, Any]:
    """For programs."""
    return {"directory": str(directory), "prefixes": [facts(entry) for entry in found]}


def report(directory: Path, found: Sequence[Entry]) -> list[str]:
    """For people: what was used last comes first."""
    size = sum(entry.n_bytes for entry in found)
    n = len(found)
    lines = [f"{n} prefix{'' if n == 1 else 'es'} in {directory}, {size / 1e6:,.1f} MB"]
    for entry in sorted(found, key=lambda entry: -entry.used):
        used = datetime.fromtimestamp(entry.used).strftime("%Y-%m-%d %H:%M")
        head = f"{entry.path.name}: {entry.n_bytes / 1e6:,.1f} MB, last used {used}"
        lines.append("")
        if entry.prefix is None:
            lines += [head, f"  not to be used: {entry.problem}"]
            continue
        manifest = entry.prefix.manifest
        name = manifest["reference"]["name"]
        made = f"by a served model itself, {entry.prefix.kept['model']}" if entry.prefix.kept else f"from {name}"
        words = " ".join(manifest["text"].split())
        words = words if len(words) <= _WORDS else f"{words[: _WORDS - 1]}…"
        lines.append(f"{head}{', pinned' if entry.pinned else ''}")
        lines.append(f"  {entry.prefix.contents}, made {made}")
        lines.append(f"  {words!r}")
    return lines
