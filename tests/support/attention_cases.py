"""Calls of attention: random ones, what float64 makes of them, and the instruction sets to try them with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks import kernel as K

ISAS = ["avx512vnni", "avx512", "avx2", "neon-dotprod", "neon", "portable"]

NEG_INF = np.float16(-np.inf)

FITTED = ["q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]  # types whose blocks get the scale of the smallest error


def each_isa(kernel: K.Kernel) -> Iterator[str]:
    """Every instruction set of this machine in turn; afterwards the best is chosen again."""
    for isa in ISAS:
        if kernel.choose(isa):
            assert kernel.isa() == isa
            yield isa
    kernel.choose(None)


def alibi(max_bias: float, n_head: int) -> np.ndarray:
    """Slopes of the heads, as in ggml_flash_attn_ext."""
    if max_bias <= 0:
        return np.ones(n_head)
    n = 1 << int(np.floor(np.log2(n_head)))
    m0, m1 = 2.0 ** (-max_bias / n), 2.0 ** (-max_bias / 2 / n)
    return np.array([m0 ** (h + 1) if h < n else m1 ** (2 * (h - n) + 1) for h in range(n_head)])


def hadamard(x: np.ndarray, n: int) -> np.ndarray:
    """Each block of n values of the last axis times the orthonormal Walsh-Hadamard matrix (0: x itself)."""
    if n == 0:
        return x
    matrix = np.ones((1, 1))
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = x.reshape(*x.shape[:-1], -1, n)
    return (blocks @ matrix / np.sqrt(n)).reshape(x.shape)


def exact(kernel: K.Kernel, case: K.Case) -> np.ndarray:
    """float64 attention over what the cache and the arena hold."""
    n_stream, n_tokens, n_head, dim_k = case.q.shape
    n_head_kv = case.k.shape[2]
    k = kernel.rounded(case.k, case.type_k).astype(np.float64)
    v = kernel.rounded(case.v, case.type_v).astype(np.float64)
    if case.row_of_cell is not None:
        for stream, cell in np.argwhere(case.row_of_cell >= 0):
            row = case.row_of_cell[stream, cell]
            if case.arena_k is not None:
                k[stream, cell] = case.arena_k[row].astype(np.float16)
            if case.arena_v is not None:
                v[stream, cell] = case.arena_v[row].astype(np.float16)
    out = np.zeros((n_stream, n_tokens, n_head, v.shape[-1]))
    slopes = alibi(case.max_bias, n_head)
    for stream in range(n_stream):
        for head in range(n_head):
            kv_head = head // (n_head // n_head_kv)
            q = hadamard(case.q[stream, :, head].astype(np.float64), case.rot_k)
            s = np.full((n_tokens, k.shape[1]), -np.inf)
            m = np.zeros_like(s)
            if case.mask is not None:
                m = case.mask[stream % case.mask.shape[0], head % case.mask.shape[1], :n_tokens].astype(np.float64)
            seen = m > -np.inf
            live = seen.any(0)
            logits = q @ k[stream, live, kv_head].T * np.float64(np.float32(case.scale))
            if case.softcap:
                logits = case.softcap * np.tanh(logits / case.softcap)
            s[:, live] = logits
            s = np.where(seen, s + slopes[head] * np.where(seen, m, 0), -np.inf)
            top = s.max(1)
            sink = None if case.sinks is None else case.sinks[head].astype(np.float64)
            if sink is not None:
                top = np.maximum(top, sink)
            top = np.where(top == -np.inf, 0, top)
            p = np.exp(s - top[:, None])
            total = p.sum(1) + (0 if sink is None else np.exp(sink - top))
            p = np.divide(p, total[:, None], out=np.zeros_like(p), where=total[:, None] > 0)
            out[stream, :, head] = hadamard(p[:, live] @ v[stream, live, kv_head], case.rot_v)
    return out


def random_case(
    seed: int,
    *,
    dim_k: int = 64,
    dim_v: int | None = None,
    n_head: int = 6,
    n_head_kv: int = 2,
    n_tokens: int = 1,
    n_kv: int = 300,
    n_stream: int = 1,
    type_k: str = "q8_0",
    type_v: str | None = None,
    mask: str | None = "causal",
    n_intact: int = 0,
    latents: bool = False,
    **options,
) -> K.Case:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    dim_v = dim_v or dim_k
    q = normal(n_stream, n_tokens, n_head, dim_k)
    k = normal(n_stream, n_kv, n_head_kv, dim_k) * 2
    v = normal(n_stream, n_kv, n_head_kv, dim_v)
    m = None
    if mask == "causal":
        # the last n_tokens of the used cells are the queries' own; the cells behind them are padding
        used = max(n_tokens, n_kv - n_kv // 8)
        query = used - n_tokens + np.arange(n_tokens)[:, None]
        m = np.where(np.arange(n_kv)[None] <= query, np.float16(0), NEG_INF)
        m = np.broadcast_to(m, (n_stream, 1, n_tokens, n_kv)).astype(np.float16)
        # what was never written may be anything that is not a number
        k[:, used:] = 1e4
    elif mask == "random":
        m = np.where(rng.random((n_stream, 1, n_tokens, n_kv)) < 0.3, np.float16(0), NEG_INF).astype(np.float16)
    elif mask == "values":
        m = (rng.standard_normal((n_stream, 1, n_tokens, n_kv)) * 2).astype(np.float16)
        m[rng.random(m.shape) < 0.3] = NEG_INF
    elif mask == "heads":
        m = (rng.standard_normal((n_stream, n_head, n_tokens, n_kv))).astype(np.float16)
        m[rng.random(m.shape) < 0.5] = NEG_INF
    elif mask == "window":
        query = n_kv - n_tokens + np.arange(n_tokens)[:, None]
        cell = np.arange(n_kv)[None]
        m = np.where((cell <= query) & (cell > query - n_kv // 6), np.float16(0), NEG_INF)
        m = np.broadcast_to(m, (1, 1, n_tokens, n_kv)).astype(np.float16)
    if latents:
        v = k[..., :dim_v]
    case = K.Case(q, k, v, type_k, type_v or type_k, mask=m, scale=dim_k**-0.5, latents=latents, **options)
    if n_intact:
        case.arena_k = normal(n_intact, n_head_kv, dim_k) * 3
        case.arena_v = case.arena_k[..., :dim_v] if latents else normal(n_intact, n_head_kv, dim_v) * 3
        case.row_of_cell = np.full((n_stream, n_kv), -1, np.int32)
        for stream in range(n_stream):
            cells = rng.permutation(n_kv // 2)[: min(n_intact, n_kv // 2)]
            case.row_of_cell[stream, cells] = rng.permutation(n_intact)[: len(cells)]
    return case


def rows_to_round(n: int = 2048) -> np.ndarray:
    """float32 [n, 1, 64]: ordinary, tiny, huge, constant, empty, with one outlier, on the edges between two steps."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, 1, 64)).astype(np.float32)
    x[1::8] *= 1e-7
    x[2::8] *= 1e4
    x[3::8] = x[3::8, :, :1]
    x[4::8] = 0
    x[5::8, :, 40] = 300
    x[6::8] = np.round(x[6::8] * 8) / 2
    x[7::8] *= 1e-30
    return x


def stored(kernel: K.Kernel, rows: np.ndarray, kv_type: str, fused: bool = True) -> bytes:
    """The blocks of a cache that [n, n_head_kv, dim] rows went into, one after the other."""
    n = len(rows)
    return kernel.store(rows, rows[..., :32], (kv_type, "f16"), np.arange(n), n, (0, 0), fused=fused)[0]


def error(result: np.ndarray, truth: np.ndarray) -> float:
    assert np.isfinite(result).all()
    return float(np.abs(result - truth).max() / max(np.abs(truth).max(), 1e-30))
