"""How a model must be run for a prefix to fit: the RoPE settings and LongRoPE factors that the prefix was made with."""

from __future__ import annotations

import os
from typing import Any

from intactkv_export.libllama import rope_of
from intactkv_export.models import gguf_file
from intactkv_export.prefix.ikv import Prefix


def run_settings(prefix: Prefix, model: str | os.PathLike[str]) -> dict[str, Any]:
    """Arguments of llama_cpp.Llama, whatever its n_ctx: a short context takes the long LongRoPE factors too.

    model: the GGUF that is run. Raises IntactKVError if it cannot be read.
    """
    settings = rope_of(prefix.manifest.get("rope_options")).llama_kwargs
    long = gguf_file.longrope(model)
    if long is not None and prefix.manifest["model"]["rope"]["factors"] == long.sha256:
        settings["kv_overrides"] = {long.key: 1}
        settings["yarn_orig_ctx"] = settings["yarn_orig_ctx"] or long.n_ctx_orig
    return settings
