"""KV caches in torch: the mixed one, and one with room for what is written a token at a time.

MixedCache: an intact prefix, and behind it rows rounded as llama.cpp's KV type rounds them. A transformers cache, so
every architecture and attention implementation works on it unchanged. Gradients reach the prefix's K and V, and pass
the rounding of the other rows straight through.

With a tail, the newest rows are also there as intact cells hold them. update() then returns both versions, the rounded
ones of all cells and behind them the intact ones of the newest, and the mask shows each query one of the two
(attention.py). A softmax over both is the softmax over the cells, whatever comes between: a cap, a scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DummyLayer, DynamicLayer

from intactkv_export.errors import UsageError
from intactkv_export.libllama import EXACT
from intactkv_export.torch_model.caches.states import RowsAndStates, StateLayer, StatesCache
from intactkv_export.torch_model.rope_pairs import halves_to_neighbours, neighbours_to_halves
from intactkv_export.torch_model.rounding import rotate, rotation, rounded, stored, straight


@dataclass(frozen=True)
class Layout:
    """How llama.cpp lays out K and V of a head. interleaved: K's RoPE pairs are neighbours (RoPE type "norm")."""

    n_head_kv: int
    head_dim: int
    interleaved: bool
    n_still: int = 0  # the first values of a row, which RoPE does not turn and whose order is one: a latent's

    def cached(self, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
        """llama.cpp's rows of K and V as a layer's keys and values."""
        return self.to_cache(K, "K"), self.to_cache(V, "V")

    def rows(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of cached()."""
        return self.to_rows(keys, "K"), self.to_rows(values, "V")

    def to_cache(self, rows: Tensor, kind: str) -> Tensor:
        """llama.cpp's rows [..., n, n_head_kv, head_dim] as transformers' [..., n_head_kv, n, head_dim].

        kind: "K" or "V".
        """
        if kind == "K" and self.interleaved:
            rows = self._turned(rows, neighbours_to_halves)
        return rows.transpose(-2, -3)

    def to_rows(self, cached: Tensor, kind: str) -> Tensor:
        """The inverse of to_cache()."""
        rows = cached.transpose(-2, -3)
        return self._turned(rows, halves_to_neighbours) if kind == "K" and self.interleaved else rows

    def _turned(self, rows: Tensor, order: Callable[[Tensor], Tensor]) -> Tensor:
        """Rows with those values in another order that RoPE turns."""
        return torch.cat([rows[..., : self.n_still], order(rows[..., self.n_still :])], -1)

    def as_cached(self, states: Tensor, kind: str, kv_type: str) -> Tensor:
        """K or V [batch, n_head_kv, n, head_dim] as a cache of this type returns them: same shape and dtype."""
        return self._round_trip(states, kind, kv_type, lambda rows: stored(rows, kv_type))

    def as_intact(self, states: Tensor, kind: str, kv_type: str) -> Tensor:
        """K or V as intact cells of a cache of this type return them: F16 rows, in the basis of the others."""
        return self._round_trip(states, kind, kv_type, lambda rows: rounded(rows, "f16"))

    def _round_trip(self, states: Tensor, kind: str, kv_type: str, rounding: Callable[[Tensor], Tensor]) -> Tensor:
        """Through rounding(rows [..., n_head_kv * head_dim]) in the basis of such a cache; gradients pass it."""

        def round_trip(x: Tensor) -> Tensor:
            size = self._rotation(kv_type, kind)
            rows = rotate(self.to_rows(x.float(), kind), size)
            back = rotate(rounding(rows.flatten(-2)).view_as(rows), size)
            return self.to_cache(back, kind).to(x.dtype)

        return states if kv_type == "f32" else straight(states, round_trip)

    def _rotation(self, kv_type: str, kind: str) -> int:
        return rotation(kv_type, self.head_dim, kind == "V")


class MixedLayer(DynamicLayer):
    """One layer's K and V. It begins with the prefix's rows; update() rounds what is appended."""

    def __init__(
        self, K: Tensor, V: Tensor, layout: Layout, kv_type: tuple[str, str], grows: bool, tail: int = 0
    ) -> None:
        super().__init__()
        self.keys, self.values = K, V
        self.dtype, self.device = K.dtype, K.device
        self.is_initialized = True
        self._layout, self._kv_type, self._grows, self._tail = layout, kv_type, grows, tail
        self._intact = K[..., :0, :], V[..., :0, :]  # of the newest tail - 1 that were appended
        self._passed: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # after the last update()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All K and V so far with these appended, each [batch, n_head_kv, n, head_dim].

        With a tail, behind the n rows the newest ones again, intact: those that attention.n_intact() counts.
        """
        k = self._layout.as_cached(key_states, "K", self._kv_type[0])
        v = self._layout.as_cached(value_states, "V", self._kv_type[1])
        keys, values = torch.cat([self.keys, k], -2), torch.cat([self.values, v], -2)
        if not self._tail:
            self._note((keys, values), self._intact)
            return keys, values
        k, v = (
            torch.cat([before, self._layout.as_intact(states, kind, kv_type)], -2)
            for before, states, kind, kv_type in zip(
                self._intact, (key_states, value_states), "KV", self._kv_type, strict=True
            )
        )
        first = max(0, k.shape[-2] - (self._tail - 1))
        self._note((keys, values), (k[..., first:, :], v[..., first:, :]))
        return torch.cat([keys, k], -2), torch.cat([values, v], -2)

    def _note(self, rows: tuple[Tensor, Tensor], intact: tuple[Tensor, Tensor]) -> None:
        if self._grows:
            (self.keys, self.values), self._intact = rows, intact
        else:
            self._passed = tuple(x.detach() for x in rows), tuple(x.detach() for x in intact)

    def followed(self, K: Tensor, V: Tensor) -> MixedLayer:
        """A layer of these prefix rows, as many as this one's, that goes on where the last pass ended."""
        assert self._passed is not None  # the caller's part of the contract
        rows, intact = self._passed
        keys, values = (torch.cat([new, x[..., new.shape[-2] :, :]], -2) for new, x in zip((K, V), rows, strict=True))
        after = MixedLayer(keys, values, self._layout, self._kv_type, self._grows, self._tail)
        after._intact = intact
        return after


class MixedCache(StatesCache):
    """A cache that begins with an intact prefix.

    K, V: by layer, tensors in transformers' layout [batch, n_head_kv, n_prefix, head_dim], which may require a
    gradient. kv_type: of K and of V, names of libllama.KV_TYPES. grows: keep what is appended, to go on generating;
    else every forward pass begins where the cache does, and can be repeated (gradient checkpointing does); followed()
    is the cache that goes on behind it.
    tail: each token sees as many of the newest cells, itself included, intact, as if tokens came one at a time; F16 and
    F32 caches, all of whose cells are, have none. extra: how many of the prefix's rows, the last ones, stand for no
    token: they are at the first token's position, and tokens go on where the prefix's tokens end (positions()).
    in_sight: no sliding window hides the prefix from the tokens behind it (Prefix.in_sight).
    states: of the recurrent layers, by layer, what transformers has after the prefix (StateLayout.to_cache()), which
    may require a gradient too. attention: the layers that have K and V; None: all. A layer may have both, or neither.

    Raises UsageError if tail or extra is negative, or extra more than there are rows.

    No layer forgets what left its sliding window; the model's mask hides it.
    """

    def __init__(
        self,
        K: Sequence[Tensor],
        V: Sequence[Tensor],
        layout: Layout,
        kv_type: tuple[str, str],
        grows: bool = True,
        tail: int = 0,
        extra: int = 0,
        in_sight: bool = False,
        states: Mapping[int, tuple[Tensor, Tensor | None]] | None = None,
        attention: Sequence[int] | None = None,
    ) -> None:
        if tail < 0:
            raise UsageError(f"a tail of {tail} tokens: give 0 or more")
        self.tail = 0 if set(kv_type) <= EXACT else tail
        self.n_prefix, self.n_extra, self.in_sight = K[0].shape[-2], extra, in_sight
        if not 0 <= extra <= self.n_prefix:
            raise UsageError(f"{extra} extra cells among the {self.n_prefix} of a prefix: give its rows, then theirs")
        rows = [MixedLayer(k, v, layout, kv_type, grows, self.tail) for k, v in zip(K, V, strict=True)]
        with_rows = range(len(rows)) if attention is None else attention
        super().__init__(layers=by_layer(dict(zip(with_rows, rows, strict=True)), states or {}, grows))

    def followed(self, K: Sequence[Tensor], V: Sequence[Tensor]) -> MixedCache:
        """What a cache that does not grow would be after its last forward pass, behind other rows of the prefix.

        K, V: as many rows as before, with their own gradient; the cells of the pass, and the states after it, have
        none. So a long text is trained on piece by piece, in the memory of one.
        """
        after, rows = copy(self), zip(K, V, strict=True)
        after.layers = []
        for x in self.layers:
            if isinstance(x, RowsAndStates):
                x = x.followed_by(x.rows.followed(*next(rows)))
            elif isinstance(x, StateLayer):
                x = x.followed()
            elif isinstance(x, MixedLayer):
                x = x.followed(*next(rows))
            after.layers.append(x)
        return after

    def positions(self, n_new: int) -> Tensor:
        """Where all rows are, n_new more included: int64 [n]. RoPE turned, or will turn, K by as much."""
        n = self.get_seq_length() + n_new
        positions = torch.arange(n)
        positions[self.n_prefix :] -= self.n_extra
        positions[self.n_prefix - self.n_extra : self.n_prefix] = 0
        return positions


def by_layer(
    rows: Mapping[int, DynamicLayer], states: Mapping[int, tuple[Tensor, Tensor | None]], grows: bool = True
) -> list[Any]:
    """The layers of a cache up to the last that keeps anything: rows of K and V, states, both, or nothing (feed-forward
    networks)."""
    made: list[Any] = []
    for il in range(max([*rows, *states]) + 1):
        if il in rows and il in states:
            made.append(RowsAndStates(rows[il], *states[il], grows))
        elif il in rows:
            made.append(rows[il])
        else:
            made.append(StateLayer(*states[il], grows) if il in states else DummyLayer())
    return made


class RoomyLayer(DynamicLayer):
    """One layer's K and V, in room for n_tokens tokens from the beginning; what update() returns are views of it.

    transformers' own layer moves all of them to a new place for each token.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self._n_tokens = n_tokens
        self._room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All K and V so far with these appended, each [batch, n_head_kv, n, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._room is None or self._room[0].shape[0] != key_states.shape[0]:
            # the first tokens, or the first after batch_repeat_interleave()
            self._room = self._moved(self.keys, key_states), self._moved(self.values, value_states)
        first = self.get_seq_length()
        n = first + key_states.shape[-2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:n] = states
        self.keys, self.values = (room[:, :, :n] for room in self._room)
        return self.keys, self.values

    def _moved(self, rows: Tensor, like: Tensor) -> Tensor:
        """Room for this layer's K or V, which begins with these rows."""
        batch, n_head_kv, _, head_dim = like.shape
        room = like.new_empty(batch, n_head_kv, self._n_tokens, head_dim)
        if rows.numel():
            room[:, :, : rows.shape[-2]] = rows
        return room
