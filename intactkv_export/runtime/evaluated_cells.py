"""What the cells of a sequence were computed in, and so which of them a sequence that goes back may keep.

The result of a token depends, in its last bits, on how many tokens were evaluated with it: the kernels cut a batch
into tiles and share them out among threads by its length. At temperature 0 a last bit can decide for another word.
So a batch is kept whole, or computed again.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from intactkv_export import library
from intactkv_export.libllama import KV_TYPES, QUANTIZED

_SWA_PAD = 256  # cells: llama_kv_cache_iswa
# architectures that have layers without RoPE: llama_kv_cache::build_graph_shift turns K of these too
_LAYERS_WITHOUT_ROPE = {
    "afmoe", "cohere2", "cohere2moe", "exaone-moe", "exaone4", "llama4", "maple", "muse-glimmer", "smallthinker",
    "smollm3",
}  # fmt: skip
_QUANTIZED = {KV_TYPES[name] for name in QUANTIZED}


class Batches:
    """The positions at which the batches of a sequence ended, ascending."""

    def __init__(self, ends: list[int] | None = None) -> None:
        self.ends = ends or []

    @property
    def last(self) -> int:
        """End of the newest."""
        return self.ends[-1] if self.ends else 0

    def whole(self, n: int) -> int:
        """The end of the last batch that n tokens hold whole. Tokens beyond all that is known count as one."""
        if n > self.last:
            return n
        i = bisect_right(self.ends, n)
        return self.ends[i - 1] if i else 0

    def add(self, start: int, end: int, n_batch: int, n_ubatch: int) -> None:
        """Tokens start..end-1 were evaluated, n_batch in a call and n_ubatch at once; what was behind is gone."""
        while self.ends and self.ends[-1] > start:
            self.ends.pop()
        if start > self.last:
            self.ends.append(start)
        for first in range(start, end, n_batch):
            behind = min(first + n_batch, end)
            self.ends += [*range(first + n_ubatch, behind, n_ubatch), behind]

    def shift(self, n_keep: int, n_discard: int) -> None:
        """Tokens n_keep..n_keep+n_discard-1 are gone and the later ones have moved up."""
        later = [end - n_discard for end in self.ends if end > n_keep + n_discard]
        self.ends = [end for end in self.ends if end < n_keep] + ([n_keep] if n_keep else []) + later


def held(L: Any, ctx: Any, n_tokens: int) -> bool:
    """Whether the cache holds all that a token at position n_tokens of sequence 0 attends to.

    A cache of a sliding window forgets what has left the window: it can go on, but hardly ever back.
    """
    memory = L.llama_get_memory(ctx)
    n_swa = L.llama_model_n_swa(L.llama_get_model(ctx))
    oldest_seen = max(n_tokens - n_swa + 1, 0) if n_swa > 0 else 0
    oldest, newest = L.llama_memory_seq_pos_min(memory, 0), L.llama_memory_seq_pos_max(memory, 0)
    return 0 <= oldest <= oldest_seen and newest >= n_tokens - 1


def has_room(L: Any, ctx: Any, params: Any, n_extra: int, in_sight: bool = False) -> bool:
    """Whether the cache of a sliding window always has cells for a whole ubatch, also while n_extra cells that stand
    for no token are in sight. in_sight: those and the first token's always are. It has as many cells as the window and
    one ubatch need, rounded up; with swa_full all of n_ctx.

    params: the context's. Where there is no room llama_decode() fails for some lengths of texts and not for others.
    """
    n_swa = L.llama_model_n_swa(L.llama_get_model(ctx))
    if n_swa <= 0 or params.swa_full or not n_extra:
        return True
    n_cells = min(L.llama_n_ctx(ctx), -(-(n_swa + params.n_ubatch) // _SWA_PAD) * _SWA_PAD)
    return n_cells == L.llama_n_ctx(ctx) or n_swa - 1 + n_extra + in_sight + params.n_ubatch <= n_cells


def can_shift(L: Any, ctx: Any, type_k: int, metadata: dict[str, str]) -> bool:
    """Whether the positions of cells can be changed. Stock llama.cpp says yes in cases where it then crashes, or
    where K of some layers is another one then.

    To shift a quantized K it multiplies with a rotation matrix that is there only if heads have a multiple of 64
    values, over the values that RoPE turns only, which must therefore be all of a head's. The patched one shifts every
    cache (native/src/cells/shift.cpp).
    """
    if not L.llama_memory_can_shift(L.llama_get_memory(ctx)):
        return False
    if metadata.get("general.architecture") in _LAYERS_WITHOUT_ROPE:
        return False
    if type_k not in _QUANTIZED or library.is_patched():
        return True
    model = L.llama_get_model(ctx)
    arch = metadata.get("general.architecture", "")
    n_head, n_embd = L.llama_model_n_head(model), L.llama_model_n_embd(model)
    head = int(metadata.get(f"{arch}.attention.key_length") or n_embd // max(n_head, 1))
    sizes = {head}
    for name in ("attention.key_length_swa", "rope.dimension_count", "rope.dimension_count_swa"):
        if (value := metadata.get(f"{arch}.{name}")) is not None:
            sizes.add(int(value))
    return sizes == {head} and head % 64 == 0
