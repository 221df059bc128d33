"""Whether a prefix fits a model: asked of the model itself, loaded."""

from __future__ import annotations

from pathlib import Path

from intactkv_export.prefix import Prefix, run_settings
from intactkv_export.runtime.intact_llama import IntactLlama


def check_fit(prefix: Prefix, model: Path) -> None:
    """Raises IntactKVError if the prefix does not fit a model: its vocabulary, heads, RoPE, reference.

    The model is run with the RoPE settings that the prefix was made with, as whoever uses the prefix runs it.
    """
    settings = run_settings(prefix, model)
    IntactLlama(model, prefix, "f16", n_ctx=prefix.n_cells + 1, n_batch=32, **settings).close()
