"""Prefixes of a first token that stays in sight of all later ones, of tiny models with sliding windows.

The rows are not trained: they are larger than the reference's, so that it shows whether a token sees them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from intactkv_export.engines import llama_engine
from intactkv_export.prefix import ikv

ORIGIN = {
    "text": "", "messages": None, "bos_only": True, "chat_template_sha256": None,
    "reference": {"sha256": "0" * 64, "dtype": "F32", "name": "x", "quantized": False},
    "engine": {"name": "llama", "dtype": "f32", "versions": {}}, "created_by": "the tests",
}  # fmt: skip


def write(gguf: Path, out: Path, token: int, n_extra: int = 0, in_sight: bool = True) -> ikv.Prefix:
    """A prefix file of this token, and n_extra cells that resemble it."""
    model, K, V, _ = llama_engine.compute(gguf, [token], n_threads=1)
    rng = np.random.default_rng(0)

    def more(rows: np.ndarray) -> np.ndarray:
        extra = rows + 0.3 * rng.standard_normal((n_extra, *rows.shape[1:])) * rows.std()
        return np.concatenate([2 * rows, extra]).astype(np.float16)

    manifest = ORIGIN | {"calibrated": {"in_sight": in_sight}} | ({"extra_cells": n_extra} if n_extra else {})
    k, v = ({il: more(rows[il]) for il in sorted(rows)} for rows in (K, V))
    out.write_bytes(ikv.build(model, [token], k, v, manifest))
    return ikv.read(out)
