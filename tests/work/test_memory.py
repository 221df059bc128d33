"""Peak memory is that of the process that is asked, whatever its parent took."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss misleads on Linux alone")
def test_a_child_does_not_begin_with_its_parents_peak() -> None:
    """ru_maxrss does: a calibration that was started by a program of 600 MB said that it took 600 MB at least."""
    ballast = bytearray(600_000_000)
    ballast[::4096] = b"\1" * len(ballast[::4096])
    code = (
        "import resource\n"
        "from intactkv_export.work import peak_bytes\n"
        "print(peak_bytes(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, misleading = map(int, done.stdout.split())
    assert ours < 200_000_000, "its own"
    assert misleading > 500_000_000, "if this fails, the other way would do by now"
