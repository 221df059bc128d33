"""Whether a prefix fits a model: asked of the model itself, loaded."""

from __future__ import annotations

from pathlib import Path

from intactkv_export.libllama import bindings, rope_of
from intactkv_export.models import gguf_file
from intactkv_export.prefix import Prefix
from intactkv_export.runtime.intact_llama import IntactLlama


def check_fit(prefix: Prefix, model: Path) -> None:
    """Raises IntactKVError if the prefix does not fit a model: its vocabulary, heads, RoPE, reference.

    The model is given what whoever uses the prefix gives it: the RoPE settings that the prefix was made with, and the
    long factors of LongRoPE where it has them, in a context no longer than the prefix.
    """
    settings = rope_of(prefix.manifest.get("rope_options")).llama_kwargs
    rope, original = prefix.manifest["model"]["rope"], gguf_file.longrope_original(model)
    if original is not None and rope["factors"] != "none":
        found = IntactLlama(model, None, "f16", n_ctx=len(prefix.tokens) + 1, n_batch=32, **settings)
        short = bindings.describe(found.ctx)["rope"]["factors"]
        found.close()
        if rope["factors"] != short:
            settings |= {"kv_overrides": {original[0]: 1}, "yarn_orig_ctx": rope["n_ctx_orig"]}
    IntactLlama(model, prefix.source, "f16", n_ctx=len(prefix.tokens) + 1, n_batch=32, **settings).close()
