"""Default threads: the cores that this process may use, by affinity and by the quota of its control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from intactkv_export.work import usable_cores

V2 = "30 1 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "33 32 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n"


def system(tmp_path: Path, groups: str, mounts: str, files: dict[str, str]) -> Path:
    """A directory with /proc and /sys as a system has them."""
    for name, text in {"proc/self/cgroup": groups, "proc/self/mountinfo": mounts, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "cores"),
    [
        ("0::/box\n", V2.format(root="/"), {"sys/fs/cgroup/box/cpu.max": "200000 100000\n"}, 2),
        ("0::/box\n", V2.format(root="/"), {"sys/fs/cgroup/box/cpu.max": "150000 100000\n"}, 2),
        ("0::/box\n", V2.format(root="/"), {"sys/fs/cgroup/box/cpu.max": "50000 100000\n"}, 1),
        ("0::/box\n", V2.format(root="/"), {"sys/fs/cgroup/box/cpu.max": "max 100000\n"}, 8),
        ("0::/\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),  # in a container
        ("0::/a/b\n", V2.format(root="/"), {"sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                                            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 4),
        ("0::/../x\n", V2.format(root="/"), {"sys/fs/cgroup/cpu.max": "500000 100000\n"}, 5),
        ("4:cpu,cpuacct:/box\n0::/\n", V1.format(root="/"),
         {"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "200000\n",
          "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}, 2),
        ("4:cpu,cpuacct:/docker/1f\n", V1.format(root="/docker/1f"),  # a container sees its own group as the mount
         {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 1),
        ("4:cpu,cpuacct:/box\n", V1.format(root="/"),
         {"sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n"}, 8),
        ("", "", {}, 8),
        ("0::/box\n", V2.format(root="/"), {"sys/fs/cgroup/box/cpu.max": "9900000 100000\n"}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_control_groups(
    tmp_path: Path, groups: str, mounts: str, files: dict[str, str], cores: int
) -> None:
    assert usable_cores(system(tmp_path, groups, mounts, files)) == cores


def test_where_there_is_no_affinity_nor_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores(tmp_path) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux sets an affinity")
def test_a_process_that_is_bound_to_one_core_has_one() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from intactkv_export.work import usable_cores; print(usable_cores())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1\n"
