"""The tail under random sequence operations, against a plain model of the cache.

With one layer, the K and V of a token follow from the token and its position alone, so what every cell must hold is
known. Two contexts do the same: one with the fused kernel, one with portable attention. After every operation they must
have the cells that the model has, and intact for the same reasons; their logits agree; and the rows in their states,
the intact ones and the quantized ones, are those of the tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from intactkv_export.libllama import state as states
from tests.support import lowlevel, tiny_ggufs
from tests.support.attention_cases import hadamard
from tests.support.lowlevel import Context, L
from tests.support.plain_cache import KEPT, ORDINARY, TAIL, Cell, PlainCache, Token

N_CTX = 512
MAX_CELLS = 300  # of all sequences: beyond, some are removed
TOKENS = range(3, 67)
N_KV = 2  # heads


class Weights:
    """A model of one layer, and the K and V of its tokens."""

    def __init__(self, path: Path, head_dim: int) -> None:
        self.head_dim = head_dim
        self.model = lowlevel.load_model(tiny_ggufs.write(path, "llama", head_dim, n_head_kv=N_KV, n_layer=1))
        ctx = context(self.model, "f32", 0)
        ctx.decode(TOKENS, 0)
        (section,) = states.sections(ctx.save())
        K = section.K[0].values(len(TOKENS)).reshape(len(TOKENS), N_KV, head_dim)
        self.K = self.rope(K, -np.arange(len(TOKENS)))
        self.V = section.V[0].values(len(TOKENS)).reshape(len(TOKENS), N_KV, head_dim)
        self.prefixes: dict[int, tuple[list[int], bytes]] = {}

    def rope(self, K: np.ndarray, pos: np.ndarray) -> np.ndarray:
        """K [n, heads, head_dim], pairs side by side, rotated to where it stands if it was at 0."""
        freq = 10000.0 ** (-np.arange(0, self.head_dim, 2) / self.head_dim)
        turn = np.exp(1j * pos[:, None] * freq[None])[:, None]
        pairs = (K[..., 0::2] + 1j * K[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(K.shape)

    def rows(self, cells: Sequence[Cell], kv: tuple[str, str]) -> list[np.ndarray]:
        """K and V, [n, heads * head_dim], in the basis of a cache of these types."""
        which = [cell.token - TOKENS[0] for cell in cells]
        K = self.rope(self.K[which], np.array([cell.pos for cell in cells]))
        n_rot = [0 if kind == "f16" or self.head_dim % 64 else 64 for kind in kv]
        return [hadamard(x, n).reshape(len(cells), -1) for x, n in zip((K, self.V[which]), n_rot, strict=True)]

    def prefix(self, n: int) -> tuple[list[int], bytes]:
        """n tokens and their state in an F16 cache."""
        if n not in self.prefixes:
            ctx = context(self.model, "f16", 0)
            tokens = [TOKENS[(7 * i) % len(TOKENS)] for i in range(n)]
            ctx.decode(tokens, 0)
            self.prefixes[n] = tokens, ctx.save()
        return self.prefixes[n]


def context(model: Any, kv: str | tuple[str, str], tail: int, **params: Any) -> Context:
    k, v = (kv, kv) if isinstance(kv, str) else kv
    sizes = {"n_ctx": N_CTX, "n_batch": N_CTX, "n_ubatch": N_CTX, "n_threads": 1, "n_threads_batch": 1}
    return Context(model, k, v, tail, **{**sizes, **params})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Weights]:
    root = tmp_path_factory.mktemp("one-layer")
    made: dict[int, Weights] = {}

    def get(head_dim: int) -> Weights:
        if head_dim not in made:
            made[head_dim] = Weights(root / f"{head_dim}.gguf", head_dim)
        return made[head_dim]

    return get


def decode(ctx: Context, batch: Sequence[Token]) -> np.ndarray:
    """The logits, [len(batch), n_vocab]."""
    b = L.llama_batch_init(len(batch), 0, 8)
    b.n_tokens = len(batch)
    for i, (token, pos, seqs) in enumerate(batch):
        b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, pos, len(seqs), 1
        for j, seq in enumerate(seqs):
            b.seq_id[i][j] = seq
    status = L.llama_decode(ctx.ptr, b)
    L.llama_batch_free(b)
    assert status == 0, status
    return np.ctypeslib.as_array(L.llama_get_logits(ctx.ptr), shape=(len(batch), ctx.n_vocab)).copy()


def of_one_stream(state: bytes) -> bytes:
    """A sequence's state as a cache of one stream writes it: without the streams that hold nothing of it."""
    at, n_stream = 12, int.from_bytes(state[8:12], "little")
    before = 0
    while before < n_stream - 1 and state[at : at + 4] == bytes(4):
        before, at = before + 1, at + 4
    behind = 4 * (n_stream - 1 - before)
    assert state[len(state) - behind :] == bytes(behind)
    return state[:8] + (1).to_bytes(4, "little") + state[at : len(state) - behind]


def intact_rows(section: states.Section) -> tuple[list[int], list[bool], list[np.ndarray]]:
    """Indices into the cells, whether they are the tail's, and their K and V (an empty one: exact in the cache)."""
    data = bytes(section.intact or b"\0\0\0\0")
    (n,) = np.frombuffer(data, "<u4", 1)
    which = np.frombuffer(data, "<u4", n, 4)
    at, rows = 4 + 4 * int(n), []
    while at < len(data):
        (size,) = np.frombuffer(data, "<u8", 1, at)
        rows.append(np.frombuffer(data, "<f2", int(n) * int(size) // 2, at + 8).reshape(int(n), -1))
        at += 8 + int(n) * int(size)
    return (which & 0x7FFFFFFF).tolist(), (which >> 31).astype(bool).tolist(), rows


QUANTS = {8: gguf.GGMLQuantizationType.Q8_0, 2: gguf.GGMLQuantizationType.Q4_0, 1: gguf.GGMLQuantizationType.F16}
ERROR = {8: 0.05, 2: 0.8, 1: 0.01}  # of a value of a row that was rounded once


class Machine:
    """Two contexts and a model that do the same random things."""

    def __init__(self, weights: Weights, kv: tuple[str, str], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rng, self.weights, self.kv, self.monkeypatch = random.Random(seed), weights, kv, monkeypatch
        self.log: list[str] = []
        self.cache, self.contexts = self.make()
        self.is_settled = True  # no shift or copy waits for the next batch

    def make(self, n_seq_max: int | None = None, unified: bool | None = None) -> tuple[PlainCache, list[Context]]:
        n_seq_max = n_seq_max or self.rng.choice([1, 2, 4])
        unified = self.rng.random() < 0.5 if unified is None else unified
        tail, n_ubatch = self.rng.choice([0, 1, 5, 32, 128]), self.rng.choice([1, 4, 16, 64, 512])
        self.log.append(f"new {n_seq_max=} {unified=} {tail=} {n_ubatch=}")
        contexts = []
        for attention in ("fused", "portable"):
            self.monkeypatch.setenv("INTACTKV_ATTN", attention)
            n_ctx = N_CTX if unified else N_CTX * n_seq_max
            contexts.append(
                context(self.weights.model, self.kv, tail, n_ctx=n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max,
                        kv_unified=unified)
            )  # fmt: skip
            assert contexts[-1].tail() == tail
        return PlainCache(n_seq_max, unified, n_ubatch, tail), contexts

    def seq(self) -> int:
        return self.rng.randrange(self.cache.n_seq_max)

    def seq_with_cells(self) -> int:
        return self.rng.choice([s for s in range(self.cache.n_seq_max) if self.cache.of(s)] or [0])

    def range(self, seq: int) -> tuple[int, int]:
        """Of positions: to the end, in the middle, from the beginning, all."""
        end = self.cache.end(seq)
        a, b = sorted(self.rng.randint(0, end) for _ in range(2))
        return self.rng.choice([(a, -1), (max(end - self.rng.randint(1, 6), 0), -1), (a, b), (-1, b), (-1, -1)])

    # --- steps ---

    def step(self) -> None:
        n_cells = sum(len(s) for s in self.cache.streams)
        if n_cells > MAX_CELLS:
            return self.rm()
        name = self.rng.choices(
            ["decode", "one", "rm", "cp", "keep", "add", "clear", "prefix", "states", "move", "tail"],
            [12, 12, 5, 4, 0.5, 3, 0.3, 1, 2, 1, 2],
        )[0]
        getattr(self, name)()

    def decode(self) -> None:
        rng, cache = self.rng, self.cache
        if n := self.coupled_length():
            seqs = tuple(range(cache.n_seq_max))
            batch = [(rng.choice(TOKENS), cache.end(0) + i, seqs) for i in range(n)]
        else:
            batch = []
            seqs = sorted(rng.sample(range(cache.n_seq_max), rng.randint(1, cache.n_seq_max)))
            for seq in seqs:
                start = cache.end(seq) or rng.choice([0, 0, 0, 50])
                n = rng.choice([1, 2, 3, 7, 20, 45])
                batch += [(rng.choice(TOKENS), start + i, (seq,)) for i in range(n)]
            if rng.random() < 0.3:  # interleaved; positions of a sequence still rise
                order = rng.sample([t[2] for t in batch], len(batch))
                queues = {s: [t for t in batch if t[2] == s] for s in set(order)}
                batch = [queues[s].pop(0) for s in order]
        self.log.append(f"decode {batch}")
        self.evaluate(batch)

    def coupled_length(self) -> int:
        """Tokens that belong to all sequences, which then must be at the same place: sometimes."""
        cache = self.cache
        spans = {(cache.of(s)[0].pos if cache.of(s) else -1, cache.end(s)) for s in range(cache.n_seq_max)}
        if not cache.unified or len(spans) > 1 or self.rng.random() < 0.5:
            return 0
        return self.rng.choice([1, 4, 20])

    def one(self) -> None:
        """Token by token."""
        seq = self.seq_with_cells()
        for _ in range(self.rng.randint(1, 8)):
            batch = [(self.rng.choice(TOKENS), self.cache.end(seq), (seq,))]
            self.log.append(f"decode {batch}")
            self.evaluate(batch)
            self.counts()

    def evaluate(self, batch: list[Token]) -> None:
        fused, portable = (decode(ctx, batch) for ctx in self.contexts)
        # the two fit the scales of 4-bit blocks otherwise, and differ by that where the cells are not of the tail
        limit = 0.2 if "q4_0" in self.kv else 0.03
        assert np.linalg.norm(fused - portable) < limit * np.linalg.norm(portable)
        self.cache.decode(batch)
        self.is_settled = True

    def rm(self) -> None:
        seq = -1 if self.rng.random() < 0.15 else self.seq_with_cells()
        p0, p1 = self.range(max(seq, 0))
        self.log.append(f"rm {seq} {p0} {p1}")
        for ctx in self.contexts:
            assert L.llama_memory_seq_rm(ctx.memory, seq, p0, p1)
        self.cache.rm(seq, p0, p1)

    def unless_ties(self, change: Callable[[PlainCache], None]) -> bool:
        """Changes the model, unless two cells of a sequence would be at one position."""
        trial = PlainCache(self.cache.n_seq_max, self.cache.unified, self.cache.n_ubatch, self.cache.tail)
        trial.streams = [[c.copy(c.seqs) for c in cells] for cells in self.cache.streams]
        change(trial)
        if trial.has_ties():
            return False
        self.cache = trial
        return True

    def cp(self) -> None:
        src, dst = self.seq_with_cells(), self.seq()
        p0, p1 = self.range(src) if self.cache.unified else (-1, -1)
        if self.unless_ties(lambda cache: cache.cp(src, dst, p0, p1)):
            self.log.append(f"cp {src} {dst} {p0} {p1}")
            for ctx in self.contexts:
                L.llama_memory_seq_cp(ctx.memory, src, dst, p0, p1)
            self.is_settled &= self.cache.unified or src == dst

    def keep(self) -> None:
        seq = self.seq_with_cells()
        self.log.append(f"keep {seq}")
        for ctx in self.contexts:
            L.llama_memory_seq_keep(ctx.memory, seq)
        self.cache.keep(seq)

    def add(self) -> None:
        seq = self.seq_with_cells()
        p0, p1 = self.range(seq)
        by = self.rng.choice([-40, -7, -1, 1, 3, 60])
        if self.cache.end(seq) < 600 and self.unless_ties(lambda cache: cache.add(seq, p0, p1, by)):
            self.log.append(f"add {seq} {p0} {p1} {by}")
            for ctx in self.contexts:
                L.llama_memory_seq_add(ctx.memory, seq, p0, p1, by)
            self.is_settled = False

    def clear(self) -> None:
        data = self.rng.random() < 0.5
        self.log.append(f"clear {data}")
        for ctx in self.contexts:
            L.llama_memory_clear(ctx.memory, data)
        self.cache.clear()

    def prefix(self) -> None:
        if not self.is_settled:  # llama.cpp would copy over what is loaded
            return
        tokens, state = self.weights.prefix(self.rng.choice([1, 6, 40]))
        seq = self.seq()
        self.log.append(f"prefix {seq} {len(tokens)}")
        for ctx in self.contexts:
            assert ctx.restore(state, seq)
        self.cache.place(seq, [Cell(token, i, {seq}, KEPT) for i, token in enumerate(tokens)])

    def states(self) -> None:
        """From one sequence into another of the same contexts, or into itself."""
        if not self.is_settled:  # llama.cpp saves cells that are still to be shifted or copied as they are
            return
        src, dst = self.seq_with_cells(), self.seq()
        n = len(self.cache.of(src))
        if n == 0 or n + sum(map(len, self.cache.streams)) > N_CTX:
            return
        self.log.append(f"state {src} {dst}")
        for ctx in self.contexts:
            saved = ctx.save(src)
            assert ctx.restore(saved, dst)
            assert self.without_sequence(ctx.save(dst)) == self.without_sequence(saved)
        self.cache.place(dst, self.cache.of(src))

    @staticmethod
    def without_sequence(state: bytes) -> list[Any]:
        return [
            (s.positions.tolist(), [bytes(r.data) for r in [*s.K, *s.V]], bytes(s.intact or b""))
            for s in states.sections(of_one_stream(state))
        ]

    def move(self) -> None:
        """Everything into new contexts with other settings: as a whole, or sequence by sequence."""
        if not self.is_settled:
            return
        old, contexts = self.cache, self.contexts
        if whole := self.rng.random() < 0.5:
            new, made = self.make(old.n_seq_max, old.unified)
            for ctx, other in zip(contexts, made, strict=True):
                saved = ctx.save(None)
                assert other.restore(saved, None)
                assert other.save(None) == saved
            new.streams = old.streams
        else:
            new, made = self.make(max(old.n_seq_max, self.rng.choice([1, 2, 4])))
            if sum(len(old.of(s)) for s in range(old.n_seq_max)) > N_CTX - 64:
                return
            for seq in range(old.n_seq_max):
                if old.of(seq):
                    for ctx, other in zip(contexts, made, strict=True):
                        assert other.restore(of_one_stream(ctx.save(seq)), seq)
                    new.place(seq, old.of(seq))
        self.log.append(f"moved {whole=}")
        self.cache, self.contexts = new, made

    def tail(self) -> None:
        self.cache.tail = self.rng.choice([0, 1, 5, 32, 128])
        self.log.append(f"tail {self.cache.tail}")
        for ctx in self.contexts:
            assert ctx.set_tail(self.cache.tail) == self.cache.tail == ctx.tail()

    # --- checks ---

    def counts(self) -> None:
        for seq in range(-1, self.cache.n_seq_max):
            wanted = self.cache.count(seq, [KEPT, TAIL]), self.cache.count(seq, [TAIL])
            assert all((ctx.n_intact(seq), ctx.n_tail(seq)) == wanted for ctx in self.contexts), seq

    def contents(self) -> None:
        if not self.is_settled:
            return
        for ctx in self.contexts:
            for seq in range(self.cache.n_seq_max):
                self.sequence(ctx, seq)

    def sequence(self, ctx: Context, seq: int) -> None:
        (section,) = states.sections(of_one_stream(ctx.save(seq)))
        at = {cell.pos: cell for cell in self.cache.of(seq)}
        assert sorted(section.positions.tolist()) == sorted(at)
        cells = [at[pos] for pos in section.positions.tolist()]
        if not cells:
            return
        shifts = np.array([[cell.n_shifts] for cell in cells])
        for found, wanted, kv, n in zip(
            (section.K[0], section.V[0]), self.weights.rows(cells, self.kv), self.kv, (shifts, 0 * shifts),
            strict=True,
        ):  # fmt: skip
            rows = np.frombuffer(found.data, np.uint8).reshape(len(cells), -1)
            values = gguf.quants.dequantize(rows, QUANTS[found.type])
            assert (np.abs(values - wanted) < ERROR[found.type] * (1 + n)).all(), (seq, kv)
        which, is_tail, rows = intact_rows(section)
        assert sorted(which) == which == [i for i, cell in enumerate(cells) if cell.kind != ORDINARY]
        assert is_tail == [cells[i].kind == TAIL for i in which]
        some = [cells[i] for i in which]
        if not some:
            return
        for found, wanted, n in zip(rows, self.weights.rows(some, self.kv), (shifts[which], 0), strict=True):
            if found.size:
                assert (np.abs(found - wanted) < 4e-3 * (1 + n)).all(), seq


def run(machine: Machine, n_steps: int, every: int = 5) -> None:
    try:
        for i in range(n_steps):
            machine.step()
            machine.counts()
            if i % every == 0:
                machine.contents()
    except BaseException:
        print(*machine.log[-40:], sep="\n")
        raise


@pytest.mark.parametrize(
    ("head_dim", "kv", "seed"),
    [
        *((64, ("q8_0", "q8_0"), seed) for seed in range(4)),
        *((32, ("q8_0", "q8_0"), seed) for seed in range(4, 7)),
        (64, ("q4_0", "q4_0"), 7),
        (64, ("q4_0", "f16"), 8),
        (64, ("f16", "q4_0"), 9),
    ],
)
def test_random_operations(
    weights: Callable[[int], Weights], monkeypatch: pytest.MonkeyPatch, head_dim: int, kv: tuple[str, str], seed: int
) -> None:
    run(Machine(weights(head_dim), kv, seed, monkeypatch), 150)
