"""A chat with a model: opened with a prefix, a KV cache and a context that fit it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from intactkv_export import library
from intactkv_export.libllama import default_tail, kv_pair
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.runtime.conversation import Conversation, Sampling, opening_messages
from intactkv_export.runtime.fit import choose_n_ctx
from intactkv_export.runtime.intact_llama import IntactLlama
from intactkv_export.runtime.kv_choice import BEST_PAIR, WITH_TAIL, choose_kv_types


def open_chat(
    model: Path,
    *,
    notice: Callable[[str], None],
    prefix: str | Path | None = "auto",
    kv_type: str | tuple[str, str] | None = None,
    tail: int | None = None,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    system_prompt: str | None = None,
    sampling: Sampling | None = None,
    **llama_kwargs: Any,
) -> Conversation:
    """A conversation with a model, its prefix loaded when the first message is evaluated. Raises IntactKVError.

    notice: is told what had to be chosen or dropped. kv_type: None: q8_0 for K and q4_0 for V with the default tail,
    q8_0 for both where there is none, or where a head cannot be cut into their blocks the best that fits. tail: as of
    IntactLlama. n_ctx: None: what the model was trained for, at most 4096, or as much as holds the prefix and 2048
    tokens more; 0: all that it was trained for.
    """
    asked = None if kv_type is None else kv_pair(kv_type)  # what is misspelt needs no file to be seen
    header = gguf_file.read(gguf_file.first_part(model)).values
    pair, why = choose_kv_types(asked, header)
    if why:
        notice(why)
    enough = default_tail(WITH_TAIL)
    smaller = asked is None and pair == BEST_PAIR and library.is_patched() and (tail is None or tail >= enough)
    loaded = None
    if prefix is not None:
        loaded = ikv.own(model) if prefix == "auto" else ikv.named(model, prefix)
    n_prefix, of_prefix = 0, ""
    if loaded is not None:
        n_prefix, of_prefix = loaded.n_cells, f"the prefix in {loaded.source} has {loaded.contents}"
    n_ctx = choose_n_ctx(n_ctx, n_prefix, of_prefix, header)
    settings = {"n_ctx": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads, **llama_kwargs}
    llama = IntactLlama(model, loaded, WITH_TAIL if smaller else pair, tail, **settings)
    if smaller and llama.tail < enough:  # the library says so: by this model, its attention, or INTACTKV_TAIL
        llama.close()
        llama = IntactLlama(model, loaded, pair, tail, **settings)
    talk = Conversation(llama, opening_messages(llama, system_prompt), sampling or Sampling(), notice)
    if llama.prefix is not None and (day := llama.prefix.manifest.get("date")):
        notice(f"conversations are rendered with {day} as the day, as their prefix was")
    if llama.prefix is not None and not talk.begins_with_prefix():
        notice(
            f"conversations with {model} do not begin with the tokens of the prefix {llama.prefix_path}, so it is "
            "never used: make one for this model's chat template with `intactkv-export prefix`"
        )
    return talk
