"""Whether a prefix fits a model, asked of the model itself, loaded; and the context that it fits into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from intactkv_export.errors import UsageError
from intactkv_export.prefix import Prefix, run_settings
from intactkv_export.runtime.intact_llama import IntactLlama

_CONTEXT = 4096  # tokens; the KV cache of more is rarely wanted on a small device
_ROOM = 2048  # tokens behind a long prefix, to talk in


def choose_n_ctx(asked: int | None, n_prefix: int, of_prefix: str, header: Mapping[str, object]) -> int:
    """Tokens of a conversation's context: as many as are asked for, 0: as the model was trained for; None: that, at
    most 4096, or as much as holds a prefix of n_prefix cells and 2048 tokens more.

    header: the values of the model's GGUF. of_prefix: what it takes, for the message: raises UsageError if the prefix
    does not fit into what is asked for.
    """
    trained = header.get(f"{header.get('general.architecture')}.context_length")
    trained = trained if isinstance(trained, int) and trained else _CONTEXT
    if asked is None:
        return min(trained, max(_CONTEXT, n_prefix + _ROOM))
    if 0 < asked <= n_prefix:
        raise UsageError(f"{of_prefix}, and --ctx-size is {asked}: give more, at most {trained}, or leave it out")
    return asked or trained


def check_fit(prefix: Prefix, model: Path) -> None:
    """Raises IntactKVError if the prefix does not fit a model: its vocabulary, heads, RoPE, reference.

    The model is run with the RoPE settings that the prefix was made with, as whoever uses the prefix runs it.
    """
    settings = run_settings(prefix, model)
    IntactLlama(model, prefix, "f16", n_ctx=prefix.n_cells + 1, n_batch=32, **settings).close()
