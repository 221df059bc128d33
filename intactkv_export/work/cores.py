"""The CPU: how many cores this process may use, by which every default number of threads goes, and what they can."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cores(root: Path = _ROOT) -> int:
    """Cores that the scheduler lets this process have: by its affinity and by the CPU quota of its control groups.

    A quota of 1.5 cores counts as 2: two threads use it up, one would not. At least 1. root: where /proc and /sys are.
    """
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS, nor on Windows
        allowed = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(min([allowed, *quotas]), 1)


def multiplies_bfloat16(root: Path = _ROOT) -> bool:
    """Whether an x86-64 CPU has instructions that multiply bfloat16, twice as fast as float32. Where /proc does not say
    so, and on other CPUs, for which it is not tried: False."""
    flags = next((line for line in _lines(root / "proc/cpuinfo") if line.startswith("flags")), "").split()
    return bool({"avx512_bf16", "amx_bf16"} & set(flags))


def _quotas(root: Path) -> Iterator[float]:
    """The CPU quota, in cores, of each control group that this process is in, and of those around it."""
    for version, mounted, group in _hierarchies(root):
        # In a container the mount may begin at the group itself: then only the mount is there to be read.
        path = root.joinpath(mounted.lstrip("/"), group.lstrip("/"))
        top = root.joinpath(mounted.lstrip("/"))
        while path.is_relative_to(top):
            quota = _quota_v2(path) if version == 2 else _quota_v1(path)
            if quota is not None:
                yield quota
            path = path.parent


def _hierarchies(root: Path) -> Iterator[tuple[int, str, str]]:
    """(version, where it is mounted, the group of this process there) of what may limit the CPU."""
    groups: dict[str, str] = {}  # controller, "" for version 2: group
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        groups |= dict.fromkeys(controllers.split(","), group)
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        mounted_root, mounted = before.split(" ")[3:5]
        kind, _, options = (after.split(" ") + ["", ""])[:3]
        if kind == "cgroup2" and "" in groups:
            yield 2, mounted, _below(groups[""], mounted_root)
        elif kind == "cgroup" and "cpu" in options.split(",") and "cpu" in groups:
            yield 1, mounted, _below(groups["cpu"], mounted_root)


def _below(group: str, mounted_root: str) -> str:
    """The group's path from the mount point on: a bind mount shows a part of the hierarchy only."""
    if mounted_root != "/" and (group + "/").startswith(mounted_root + "/"):
        return group[len(mounted_root) :]
    return "/" if "/.." in group else group  # a group outside the namespace: what is mounted is what can be read


def _quota_v2(group: Path) -> float | None:
    words = " ".join(_lines(group / "cpu.max")).split()
    return _ratio(*words) if len(words) == 2 else None


def _quota_v1(group: Path) -> float | None:
    words = [*_lines(group / "cpu.cfs_quota_us"), *_lines(group / "cpu.cfs_period_us")]
    return _ratio(*words) if len(words) == 2 else None


def _ratio(quota: str, period: str) -> float | None:
    """Cores of a quota and its period, both in microseconds; None: "max", or -1, no limit."""
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _lines(path: Path) -> list[str]:
    """Lines of a file; none if it cannot be read, which is so on systems without control groups."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
