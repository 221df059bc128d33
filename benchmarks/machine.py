"""What a benchmark ran on, for its JSON and the foot of its plot."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path


def describe() -> dict[str, object]:
    """CPU, cores this process may use, caches, memory, load average, compiler, commit, time."""
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "caches": _caches(),
        "memory": _proc("/proc/meminfo", "MemTotal"),
        "load_average": os.getloadavg(),
        "system": platform.platform(),
        "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def line(machine: dict[str, object]) -> str:
    """One line for a plot."""
    load = machine["load_average"]
    assert isinstance(load, tuple)
    return (
        f"{machine['cpu']}, {machine['cores']} cores, load {load[0]:.1f}, commit {machine['commit']}, {machine['time']}"
    )


def publish(table: Iterable[str], path: Path) -> None:
    """Print a table with a line on this machine below it, and write both to a file."""
    lines = [*table, "", line(describe())]
    print("\n".join(["", *lines]))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _proc(path: str, field: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), None)


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = (index / "level").read_text().strip(), (index / "type").read_text().strip()
        found[f"L{level} {kind}"] = (index / "size").read_text().strip()
    return found


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
