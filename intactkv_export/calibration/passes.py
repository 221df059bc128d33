"""Which texts pass through the model together: in a step of training, in one forward pass, and in which pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from intactkv_export.calibration.data import Data

PIECE = 256  # tokens of a text in one forward pass
_PASS = 1024  # tokens of all texts in one forward pass


def steps(data: Data, batch: int, seed: int) -> Callable[[int], list[int]]:
    """Which texts a step trains on, all of one length: epoch after epoch, each in an order of its own that the seed
    decides. batch: of the shortest texts; of longer ones as many as have about as many tokens."""
    groups = data.by_length(data.trained)
    shortest = min(groups)
    sizes = {n_tokens: max(1, batch * shortest // n_tokens) for n_tokens in groups}
    n_steps = {n_tokens: -(-len(index) // sizes[n_tokens]) for n_tokens, index in groups.items()}
    kept: dict[int, list[list[int]]] = {}

    def epoch(number: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        made = []
        for n_tokens, index in groups.items():
            order = [index[i] for i in torch.randperm(len(index), generator=generator).tolist()]
            order = (order * 2)[: n_steps[n_tokens] * sizes[n_tokens]]  # the last step is filled with the first texts
            made += [order[start : start + sizes[n_tokens]] for start in range(0, len(order), sizes[n_tokens])]
        return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]

    def step(number: int) -> list[int]:
        which = number // sum(n_steps.values())
        if which not in kept:
            kept.clear()
            kept[which] = epoch(which)
        return kept[which][number % sum(n_steps.values())]

    return step


def pieces(n_tokens: int, size: int = PIECE) -> Iterator[slice]:
    """Where the pieces of a text are that pass one after another."""
    return (slice(start, min(start + size, n_tokens)) for start in range(0, n_tokens, size))


def together(index: Sequence[int], n_tokens: int) -> Iterator[Sequence[int]]:
    """Texts of one length, as many at a time as go into one forward pass of n_tokens tokens each."""
    n = max(1, _PASS // n_tokens)
    return (index[start : start + n] for start in range(0, len(index), n))
