"""How long work is run. A function goes in, with its arguments; its value comes out, with time and peak memory.

Stages are processes of their own; files are written whole or not at all; progress is told by one protocol.
"""

from intactkv_export.work import atomic, lock, streams
from intactkv_export.work.cores import multiplies_bfloat16, usable_cores
from intactkv_export.work.interrupts import interrupts_at_once
from intactkv_export.work.memory import peak_bytes
from intactkv_export.work.progress import Progress, Steps, silent
from intactkv_export.work.space import check_space, full, is_full
from intactkv_export.work.stages import Stage, Stages, run

__all__ = [
    "Progress", "Stage", "Stages", "Steps", "atomic", "check_space", "full", "interrupts_at_once",
    "is_full", "lock", "multiplies_bfloat16", "peak_bytes", "run", "silent", "streams", "usable_cores",
]  # fmt: skip
