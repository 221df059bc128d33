"""A plain model of a KV cache with intact cells: which tokens it holds, where, for which sequences, and why they are
intact. No rows, no cells' indices: what they hold follows from the token and its position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Token = tuple[int, int, tuple[int, ...]]  # token, position, sequences

ORDINARY, KEPT, TAIL = "ordinary", "kept", "tail"


@dataclass
class Cell:
    token: int
    pos: int
    seqs: set[int]
    kind: str = ORDINARY
    n_shifts: int = 0  # times that its K was rotated once more, and rounded

    def copy(self, seqs: Iterable[int]) -> Cell:
        return Cell(self.token, self.pos, set(seqs), self.kind, self.n_shifts)


class PlainCache:
    def __init__(self, n_seq_max: int, unified: bool, n_ubatch: int, tail: int) -> None:
        self.n_seq_max, self.n_ubatch, self.tail = n_seq_max, n_ubatch, tail
        self.unified = unified or n_seq_max == 1
        self.streams: list[list[Cell]] = [[] for _ in range(1 if self.unified else n_seq_max)]

    def stream(self, seq: int) -> list[Cell]:
        return self.streams[0 if self.unified else seq]

    def of(self, seq: int) -> list[Cell]:
        """The cells of a sequence, by position."""
        return sorted((c for c in self.stream(seq) if seq in c.seqs), key=lambda c: c.pos)

    def end(self, seq: int) -> int:
        return max((c.pos for c in self.of(seq)), default=-1) + 1

    def count(self, seq: int, kinds: Sequence[str]) -> int:
        cells = [c for s in self.streams for c in s] if seq < 0 else self.of(seq)
        return sum(c.kind in kinds for c in cells)

    def has_ties(self) -> bool:
        """Two cells of a sequence at one position: which is newer, only their indices say."""
        return any(len({c.pos for c in self.of(s)}) < len(self.of(s)) for s in range(self.n_seq_max))

    # --- operations ---

    def decode(self, batch: Sequence[Token]) -> None:
        for ubatch in self._ubatches(batch):
            new = [Cell(token, pos, set(seqs)) for token, pos, seqs in ubatch]
            for cell in new:
                self.stream(min(cell.seqs)).append(cell)
            newest: set[int] = set()
            for seq in range(self.n_seq_max):
                n = self.tail + sum(seq in c.seqs for c in new)
                newest |= {id(c) for c in self.of(seq)[-n:]} if n else set()
            for cells in self.streams:
                for cell in cells:
                    if cell.kind == TAIL and id(cell) not in newest:
                        cell.kind = ORDINARY
            for cell in new:
                cell.kind = TAIL if self.tail else ORDINARY

    def _ubatches(self, batch: Sequence[Token]) -> list[list[Token]]:
        """As llama_batch_allocr splits it: in order; for streams, equally many of sequences that follow each other."""
        if self.unified:
            return [list(batch[i : i + self.n_ubatch]) for i in range(0, len(batch), self.n_ubatch)]
        res, left = [], list(batch)
        while left:
            seqs: list[int] = []
            for _, _, (seq,) in left:
                if seq not in seqs and (not seqs or seq == seqs[-1] + 1) and len(seqs) <= self.n_ubatch:
                    seqs.append(seq)
            queues = {s: [t for t in left if t[2] == (s,)] for s in seqs}
            n = min([max(1, self.n_ubatch // len(seqs)), *(len(q) for q in queues.values())])
            res.append([t for q in queues.values() for t in q[:n]])
            left = [t for t in left if t not in res[-1]]
        return res

    def _drop(self, gone: Callable[[Cell], bool]) -> None:
        for cells in self.streams:
            cells[:] = [c for c in cells if not gone(c)]

    def rm(self, seq: int, p0: int, p1: int) -> None:
        p0, p1 = max(p0, 0), p1 if p1 >= 0 else 1 << 31
        if seq < 0:
            self._drop(lambda c: p0 <= c.pos < p1)
            return
        for cell in self.of(seq):
            if p0 <= cell.pos < p1:
                cell.seqs.remove(seq)
        self._drop(lambda c: not c.seqs)

    def cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        if src == dst:
            return
        if not self.unified:
            self.streams[dst] = [c.copy([dst]) for c in self.streams[src] if src in c.seqs]
            return
        p0, p1 = max(p0, 0), p1 if p1 >= 0 else 1 << 31
        for cell in self.of(src):
            if p0 <= cell.pos < p1:
                cell.seqs.add(dst)

    def keep(self, seq: int) -> None:
        cells = self.stream(seq)
        cells[:] = [c for c in cells if seq in c.seqs]
        for cell in cells:
            cell.seqs = {seq}

    def add(self, seq: int, p0: int, p1: int, by: int) -> None:
        p0, p1 = max(p0, 0), p1 if p1 >= 0 else 1 << 31
        for cell in self.of(seq):
            if p0 <= cell.pos < p1:
                cell.pos += by
                cell.n_shifts += 1
        self._drop(lambda c: c.pos < 0)

    def clear(self) -> None:
        self._drop(lambda c: True)

    def place(self, seq: int, cells: Iterable[Cell]) -> None:
        """A sequence's state, loaded: in place of what was there."""
        cells = [c.copy([seq]) for c in cells]
        self.rm(seq, -1, -1)
        self.stream(seq).extend(cells)
