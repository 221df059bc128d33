"""How much memory work took at its peak."""

from __future__ import annotations

import resource
import sys


def peak_bytes(device: str = "cpu") -> int:
    """Peak resident memory of this process; for another device than the CPU, of what torch allocated there.

    Not ru_maxrss on Linux: that of a child begins with its parent's.
    """
    if device != "cpu":
        import torch

        if device.startswith("cuda"):
            return int(torch.cuda.max_memory_allocated(device))
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
