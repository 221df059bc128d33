"""The number formats that torch may compute in."""

from __future__ import annotations

from collections.abc import Sequence

from intactkv_export.errors import UsageError

FLOATS = ("float32", "float16", "bfloat16")
DTYPES = (*FLOATS, "auto")  # auto: as the weights are stored


def check_dtype(dtype: str | None, allowed: Sequence[str] = DTYPES) -> None:
    """Raises UsageError for a name that is not among those allowed; None is the default, whatever that is."""
    if dtype is not None and dtype not in allowed:
        raise UsageError(f"unknown dtype {dtype!r}: give one of {', '.join(allowed)}")
