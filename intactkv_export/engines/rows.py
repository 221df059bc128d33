"""K and V as an engine gives them, and their one rounding to F16."""

from __future__ import annotations

import numpy as np

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import KV


def to_float16(rows: KV, name: str) -> KV:
    """Rounded to nearest even, by layer. name: "K" or "V". Raises IntactKVError for a value beyond float16."""
    return {il: _rounded(x, name, il) for il, x in rows.items()}


def _rounded(x: np.ndarray, name: str, il: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        out = x.astype(np.float16)
    finite = np.isfinite(out)
    if not finite.all():
        token, head, i = (int(n) for n in np.argwhere(~finite)[0])
        raise IntactKVError(
            f"{name} of layer {il}, token {token}, head {head} is {x[token, head, i]:g}, beyond float16 (largest "
            f"{np.finfo(np.float16).max:g}): this model's prefix cannot be stored as F16"
        )
    return out
