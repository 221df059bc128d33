"""Whether a prefix fits a model: asked of the model itself, loaded."""

from __future__ import annotations

from pathlib import Path

from intactkv_export.prefix import Prefix
from intactkv_export.runtime.intact_llama import IntactLlama


def check_fit(prefix: Prefix, model: Path) -> None:
    """Raises IntactKVError if the prefix does not fit a model: its vocabulary, heads, RoPE, reference."""
    IntactLlama(model, prefix.source, "f16", n_ctx=len(prefix.tokens) + 1, n_batch=32).close()
