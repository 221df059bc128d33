"""Models with recurrent layers (Mamba, RWKV, hybrids) behind a prefix: what computing it gives, and no part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.errors import IntactKVError
from intactkv_export.libllama import bindings, state
from intactkv_export.models.weights import quantize
from intactkv_export.prefix import ikv
from tests.support import hybrids, lowlevel, upstream_archs
from tests.support.hybrids import TOKENS, UPSTREAM, prefix_of
from tests.support.lowlevel import Context, L
from tests.support.own_process import load_state, run

N = 20  # tokens of the prefix
TEXT = TOKENS[N:]
PURE = ("mamba", "mamba2", "rwkv7")  # without a KV cache
NAMES = (*UPSTREAM, "rwkv7")
SOME = ("mamba2", "rwkv7", "falcon-h1", "lfm2", "qwen3next", "qwen35", "kimi-linear")  # a structure each


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    if not upstream_archs.can_build():
        pytest.skip("a compiler and libllama-common are needed (make tools)")
    root = tmp_path_factory.mktemp("recurrent")
    made = upstream_archs.make(root, UPSTREAM)
    assert not made.crashed and not made.left_out
    found = {name.rpartition("-")[0]: path for name, path in made.paths.items()}
    return found | {"rwkv7": hybrids.write_rwkv7(root / "rwkv7.gguf")}


@pytest.fixture(scope="module")
def files(paths: dict[str, Path]) -> dict[str, bytes]:
    """Prefix files, with the rows of an F16 cache."""
    return {name: prefix_of(path, TOKENS[:N]) for name, path in paths.items()}


@pytest.fixture(scope="module")
def weights(paths: dict[str, Path]) -> dict[str, Any]:
    return {name: lowlevel.load_model(path) for name, path in paths.items()}


def context(weights: Any, kv: str, **params: Any) -> Context:
    return Context(weights, kv, **{"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, **params})


def held(weights: Any, kv: str, *data: bytes, **params: Any) -> Context:
    """A context that holds prefixes."""
    ctx = context(weights, kv, n_seq_max=4, **params)
    for each in data:
        bindings.add_prefix(ctx.ptr, each)
    return ctx


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def kl(a: np.ndarray, b: np.ndarray) -> float:
    return lowlevel.kl(a, b)


def last(ctx: Context, tokens: list[int], start: int = 0, seq: int = 0, size: int = 256) -> np.ndarray:
    """Logits of the last of these tokens, the only ones asked for, evaluated in batches of this size."""
    for first in range(start, len(tokens), size):
        part = range(first, min(first + size, len(tokens)))
        assert ctx.batch([(tokens[pos], pos, [seq], pos == len(tokens) - 1) for pos in part]) == 0
    logits = ctx.logits(len(part) - 1)
    assert logits is not None
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_upstreams_state(paths: Any, weights: Any, files: Any, name: str) -> None:
    """Format 2, the sizes of the model; and what computing the same in a cache at F16 saves, byte for byte."""
    prefix = ikv.read(files[name])
    model = prefix.manifest["model"]
    assert prefix.manifest["format"] == 2 and (model["caches"] == []) == (name in PURE)
    assert prefix.states.keys() == {x["il"] for x in model["recurrent"]["layers"]}
    ctx = context(weights[name], "f16")
    ctx.decode(TOKENS[:N], 0)
    saved = ctx.save()[state.BUFFER_HEADER :]
    assert files[name][12 + 4 * N :].startswith(saved)


@pytest.mark.parametrize("name", NAMES)
def test_loaded_into_f16_it_is_what_computing_it_gives_to_the_bit(weights: Any, files: Any, name: str) -> None:
    computed, loaded = context(weights[name], "f16"), context(weights[name], "f16")
    computed.decode(TOKENS[:N], 0)
    assert bindings.load(loaded.ptr, files[name]) == N
    np.testing.assert_array_equal(loaded.decode(TEXT, N), computed.decode(TEXT, N))
    for i in range(4):  # token by token, on reused graphs
        at = [TOKENS[i]], len(TOKENS) + i
        np.testing.assert_array_equal(loaded.decode(*at), computed.decode(*at))


@pytest.mark.parametrize("attention", ["fused", "portable"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PURE])
def test_in_a_quantized_cache_it_is_closer_than_one_computed_there(
    weights: Any, files: Any, name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTACTKV_ATTN", attention)
    exact = context(weights[name], "f16")
    exact.decode(TOKENS[:N], 0)
    want = exact.decode(TEXT, N)
    for kv in ("q8_0", "q4_0"):
        rounded, mixed = context(weights[name], kv), context(weights[name], kv)
        rounded.decode(TOKENS[:N], 0)
        bindings.load(mixed.ptr, files[name])
        assert mixed.n_intact() == N and mixed.attention() == attention
        got, plain = mixed.decode(TEXT, N), rounded.decode(TEXT, N)
        bound = {"q8_0": 0.015, "q4_0": 0.2}[kv]
        assert distance(got, want) < (2.5 * bound if name == "kimi-linear" else bound)  # one rounding of both K and V
        if kv == "q4_0":
            assert distance(got, want) < distance(plain, want)
            assert kl(want, got) < kl(want, plain)


@pytest.mark.parametrize("name, factor", [("plamo2", 0.85), ("rwkv7", 0.99), *((name, 1.02) for name in SOME[2:])])
def test_a_better_models_prefix_brings_a_quantized_one_closer(
    paths: Any, name: str, factor: float, tmp_path: Path, weights: Any
) -> None:
    """Weights at 4 bits and a cache at 8: KL divergence from the reference with its prefix, over that without. In most
    of the random models a prefix hardly matters to what follows: there it is the same to a percent or two."""
    small = tmp_path / "q4.gguf"
    quantize(paths[name], small, "Q4_0", n_threads=2, allow_requantize=True)
    data = prefix_of(paths[name], TOKENS[:N], "f32")
    reference = context(weights[name], "f16")
    reference.decode(TOKENS[:N], 0)
    want = reference.decode(TEXT, N)
    model = lowlevel.load_model(small)
    plain, behind = context(model, "q8_0"), context(model, "q8_0")
    plain.decode(TOKENS[:N], 0)
    bindings.load(behind.ptr, data)
    assert kl(want, behind.decode(TEXT, N)) < factor * kl(want, plain.decode(TEXT, N))


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_states_are_saved_and_restored_to_the_bit(weights: Any, files: Any, name: str, kv: str) -> None:
    """In other sequences, in caches of one stream and of several, of one sequence and of all, with a tail.

    Four: upstream's Kimi Linear needs a number of streams that divides the micro-batch."""
    first = context(weights[name], kv, tail=8)
    bindings.load(first.ptr, files[name])
    first.decode(TEXT[:10], N)
    saved = first.save()
    others = [context(weights[name], kv, tail=8, n_seq_max=4, kv_unified=unified) for unified in (True, False)]
    assert all(ctx.restore(saved, 2) for ctx in others)
    whole = others[0].save(None)
    again = context(weights[name], kv, tail=8, n_seq_max=4, kv_unified=True)
    assert again.restore(whole, None)
    for i, token in enumerate(TEXT[10:14]):
        want = first.decode([token], N + 10 + i)
        for ctx in (*others, again):
            np.testing.assert_array_equal(ctx.decode([token], N + 10 + i, seq=2), want)


@pytest.mark.parametrize("name", NAMES)
def test_copied_to_other_sequences(weights: Any, files: Any, name: str) -> None:
    """What was loaded, by llama_memory_seq_cp(): each goes on by itself."""
    ctx = context(weights[name], "q8_0", n_seq_max=3, kv_unified=True)
    alone = context(weights[name], "q8_0", n_seq_max=3, kv_unified=True)
    bindings.load(ctx.ptr, files[name])
    bindings.load(alone.ptr, files[name], 1)
    for seq in (1, 2):
        L.llama_memory_seq_cp(ctx.memory, 0, seq, -1, -1)
    ctx.decode(TEXT[:9][::-1], N)
    want = alone.decode(TEXT, N, seq=1)
    assert distance(ctx.decode(TEXT, N, seq=1), want) < 1e-5
    assert distance(ctx.decode(TEXT, N, seq=2), want) < 1e-5


@pytest.mark.parametrize("kv", ["f16", "q4_0"])
@pytest.mark.parametrize("name", NAMES)
def test_given_by_itself(weights: Any, files: Any, name: str, kv: str) -> None:
    """To a sequence that begins with all of it, in whatever batches; and where logits are asked within it."""
    by_hand, ctx = context(weights[name], kv), held(weights[name], kv, files[name])
    bindings.load(by_hand.ptr, files[name])
    want = by_hand.decode(TEXT, N)
    assert distance(last(ctx, TOKENS), want[-1]) < 1e-5 and ctx.n_not_computed() == N
    assert distance(last(ctx, TOKENS, seq=1, size=8), last_of(by_hand, files[name], N, 8)) < 1e-4
    assert ctx.n_not_computed() == 2 * N
    assert ctx.batch([(token, i, [2], True) for i, token in enumerate(TOKENS)]) == 0
    for i, logits in enumerate(want):
        found = ctx.logits(N + i)
        assert found is not None and distance(found, logits) < 1e-5
    assert ctx.n_intact(2) == (0 if name in PURE or kv == "f16" else N)


def last_of(ctx: Context, data: bytes, n: int, size: int) -> np.ndarray:
    """Logits of the last token, the prefix loaded by hand, the rest in the batches of `size` that all falls into."""
    bindings.load(ctx.ptr, data)
    for first in range(0, len(TOKENS), size):
        part = [pos for pos in range(first, min(first + size, len(TOKENS))) if pos >= n]
        if part:
            got = ctx.decode([TOKENS[pos] for pos in part], part[0])
    return got[-1]


@pytest.mark.parametrize("name", NAMES)
def test_not_given_where_a_token_differs(weights: Any, files: Any, name: str) -> None:
    """In any place of it, or none behind its last: the bits of a context that holds none."""
    for at in (0, N // 2, N - 1):
        other = [*TOKENS[:at], TOKENS[at] + 1, *TOKENS[at + 1 :]]
        ctx, plain = held(weights[name], "q8_0", files[name]), context(weights[name], "q8_0", n_seq_max=4)
        np.testing.assert_array_equal(last(ctx, other), last(plain, other))
        # what was not computed while it could have been the prefix is, at once
        assert distance(last(ctx, other, seq=1, size=7), last(plain, other, seq=1, size=7)) < 0.01
        assert ctx.n_not_computed() == 0 and ctx.n_intact() == 0
    np.testing.assert_array_equal(last(ctx, TOKENS[: N - 1], seq=2), last(plain, TOKENS[: N - 1], seq=2))


@pytest.mark.parametrize("name", SOME)
def test_a_longer_one_takes_its_place(paths: Any, weights: Any, files: Any, name: str) -> None:
    """When it turns out that all of it comes; several sequences of a batch each get their own."""
    longer = prefix_of(paths[name], TOKENS[: N + 10])
    ctx, by_hand = held(weights[name], "q8_0", files[name], longer), context(weights[name], "q8_0")
    bindings.load(by_hand.ptr, longer)
    want = by_hand.decode(TOKENS[N + 10 :], N + 10)[-1]
    assert distance(last(ctx, TOKENS), want) < 1e-5 and ctx.n_not_computed() == N + 10
    assert ctx.batch([(token, i, [1], False) for i, token in enumerate(TOKENS[:N])]) == 0
    assert distance(last(ctx, TOKENS, start=N, seq=1), want) < 1e-5
    assert ctx.n_intact(1) == (0 if name in PURE else N + 10)
    # the longer one has been waited for, and does not come: the shorter one is given
    assert ctx.batch([(token, i, [3], False) for i, token in enumerate(TOKENS[: N + 5])]) == 0
    shorter = context(weights[name], "q8_0")
    bindings.load(shorter.ptr, files[name])
    shorter.decode(TOKENS[N : N + 5], N)
    end = [*TOKENS[: N + 5], *TEXT[::-1]]
    assert distance(last(ctx, end, start=N + 5, seq=3), shorter.decode(end[N + 5 :], N + 5)[-1]) < 1e-4
    L.llama_memory_seq_rm(ctx.memory, 3, -1, -1)
    short = context(weights[name], "q8_0")
    bindings.load(short.ptr, files[name])
    other = [*TOKENS[:N], *TEXT[::-1]]
    both = [(token, i, [2], i == 59) for i, token in enumerate(TOKENS)]
    both += [(token, i, [3], i == 59) for i, token in enumerate(other)]
    assert ctx.batch(both) == 0
    assert distance(ctx.logits(59), want) < 1e-5  # type: ignore[arg-type]
    assert distance(ctx.logits(119), short.decode(TEXT[::-1], N)[-1]) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SOME)
def test_several_sequences_share_tokens(weights: Any, files: Any, name: str) -> None:
    """Tokens that belong to two sequences: both have the prefix, and go on apart. Upstream cannot split such a batch of
    a model without a KV cache: it fails as ever, and nothing is left."""
    ctx = held(weights[name], "q8_0", files[name], kv_unified=True)
    by_hand = context(weights[name], "q8_0", n_seq_max=4, kv_unified=True)
    status = ctx.batch([(token, i, [0, 1], i == N) for i, token in enumerate(TOKENS[: N + 1])])
    if name in PURE:
        assert status == 1 and ctx.n_not_computed() == 0 and L.llama_memory_seq_pos_max(ctx.memory, 1) == -1
        return
    assert status == 0 and ctx.n_not_computed() == N
    bindings.load(by_hand.ptr, files[name])
    by_hand.decode(TOKENS[N : N + 1], N)
    want = by_hand.decode(TOKENS[N + 1 :], N + 1)[-1]
    for seq in (0, 1):
        assert distance(ctx.decode(TOKENS[N + 1 :], N + 1, seq=seq)[-1], want) < 1e-4


@pytest.mark.parametrize("name", SOME)
def test_a_failed_batch_leaves_what_was_there(weights: Any, files: Any, name: str) -> None:
    """No room for all of it: the sequence goes on as if it had not been tried."""
    if name in PURE:
        pytest.skip("a recurrent state always has room")
    ctx, plain = held(weights[name], "q8_0", files[name], n_ctx=256), context(weights[name], "q8_0", n_seq_max=4)
    n_cells = L.llama_n_ctx_seq(ctx.ptr)
    rest = [TOKENS[i % 60] for i in range(n_cells + 8)]
    first, more = TOKENS[:10], [*TOKENS[10:N], *rest]
    for each in (ctx, plain):
        assert each.batch([(token, i, [0], False) for i, token in enumerate(first)]) == 0
    assert ctx.batch([(token, 10 + i, [0], False) for i, token in enumerate(more[: n_cells - 2])]) == 1
    assert L.llama_memory_seq_pos_max(ctx.memory, 0) == 9
    np.testing.assert_array_equal(
        ctx.decode([3, 4, 5], 10), plain.decode([3, 4, 5], 10)
    )  # as it was: not one cell, not the state


DEFERRED = 12  # of the prefix's tokens


@pytest.fixture(params=SOME)
def waiting(request: pytest.FixtureRequest, weights: Any, files: Any) -> tuple[str, Context, Context]:
    """Name, a context whose sequence 0 has some of the prefix's tokens, and nothing computed; one that has computed
    them."""
    name = request.param
    ctx = held(weights[name], "q8_0", files[name], kv_unified=True)
    assert ctx.batch([(token, i, [0], False) for i, token in enumerate(TOKENS[:DEFERRED])]) == 0
    assert ctx.n_not_computed() == DEFERRED and L.llama_memory_seq_pos_max(ctx.memory, 0) == DEFERRED - 1
    plain = context(weights[name], "q8_0", n_seq_max=4, kv_unified=True)
    assert plain.batch([(token, i, [0], False) for i, token in enumerate(TOKENS[:DEFERRED])]) == 0
    return name, ctx, plain


def test_a_sequence_that_waits_is_copied_and_kept_aside(
    waiting: tuple[str, Context, Context], weights: Any, files: Any
) -> None:
    """As a server's checkpoints do, and prompts that several conversations share: it waits there too."""
    name, ctx, _ = waiting
    by_hand = context(weights[name], "q8_0")
    bindings.load(by_hand.ptr, files[name])
    want = by_hand.decode(TEXT, N)[-1]
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    checkpoint = ctx.save_partial(0)
    assert distance(last(ctx, TOKENS, start=DEFERRED, seq=1), want) < 1e-5
    assert distance(last(ctx, TOKENS, start=DEFERRED), want) < 1e-5
    assert ctx.restore_partial(checkpoint, 0)
    if name not in PURE:  # the attention part goes back as ever
        assert L.llama_memory_seq_rm(ctx.memory, 0, DEFERRED, -1)
    assert L.llama_memory_seq_pos_max(ctx.memory, 0) == DEFERRED - 1
    assert distance(last(ctx, TOKENS, start=DEFERRED), want) < 1e-5
    assert ctx.restore_partial(checkpoint, 0)
    if name not in PURE:
        assert L.llama_memory_seq_rm(ctx.memory, 0, DEFERRED, -1)
    plain = context(weights[name], "q8_0")
    other = [*TOKENS[:DEFERRED], *TEXT]
    assert distance(last(ctx, other, start=DEFERRED), plain.decode(other, 0)[-1]) < 1e-4


def test_a_sequence_that_waits_is_computed_before_it_is_saved(waiting: tuple[str, Context, Context]) -> None:
    name, ctx, plain = waiting
    assert ctx.save() == plain.save() and ctx.n_not_computed() == 0
    assert ctx.save(None) == plain.save(None)
    ctx2 = waiting[2]
    np.testing.assert_array_equal(ctx.decode(TEXT, DEFERRED), ctx2.decode(TEXT, DEFERRED))


def test_a_sequence_that_waits_and_is_asked_about(waiting: tuple[str, Context, Context]) -> None:
    """Logits within the prefix are those of computing it; then what is left of it comes, all of it."""
    name, ctx, plain = waiting
    got = ctx.decode(TOKENS[DEFERRED : N - 1], DEFERRED)
    np.testing.assert_array_equal(got, plain.decode(TOKENS[DEFERRED : N - 1], DEFERRED))
    assert ctx.n_not_computed() == 0


def test_a_sequence_that_waits_and_is_moved(waiting: tuple[str, Context, Context]) -> None:
    """By any distance: what it waits for may come no more, and its tokens are computed, then moved. Part of it only: it
    cannot go on, and says so by its status."""
    name, ctx, plain = waiting
    if not L.llama_memory_can_shift(ctx.memory):
        pytest.skip("upstream moves no sequence of this model")
    L.llama_memory_seq_cp(ctx.memory, 0, 1, -1, -1)
    for distance_moved in (5, 100):
        for each in (ctx, plain):
            L.llama_memory_seq_add(each.memory, 0, 0, -1, distance_moved)
    at = DEFERRED + 105
    np.testing.assert_array_equal(ctx.decode(TEXT, at), plain.decode(TEXT, at))
    assert ctx.n_not_computed() == 0
    if name not in PURE:
        L.llama_memory_seq_add(ctx.memory, 1, 4, -1, 3)
        assert ctx.batch([(token, DEFERRED + 3 + i, [1], True) for i, token in enumerate(TEXT)]) < 0


def test_saving_a_sequence_that_waits_leaves_the_outputs(weights: Any, files: Any) -> None:
    """Of the batch before, which the program may not have looked at."""
    for name in SOME:
        ctx = held(weights[name], "q8_0", files[name], kv_unified=True)
        plain = context(weights[name], "q8_0", n_seq_max=4, kv_unified=True)
        entries = [(token, i, [0], False) for i, token in enumerate(TOKENS[:DEFERRED])]
        entries += [(token, i, [1], i in (3, 8)) for i, token in enumerate(TEXT[:9])]
        for each in (ctx, plain):
            assert each.batch(entries) == 0
        assert ctx.n_not_computed() == DEFERRED
        ctx.save(0)
        assert ctx.n_not_computed() == 0 and ctx.logits(DEFERRED) is None
        for i in (3, 8):
            got, want = ctx.logits(DEFERRED + i), plain.logits(DEFERRED + i)
            assert got is not None and want is not None and distance(got, want) < 1e-4


def test_a_sequence_that_waits_goes_on_in_another_context(
    waiting: tuple[str, Context, Context], paths: Any, weights: Any, files: Any
) -> None:
    """From a checkpoint: where the prefix is held as if it had waited there; elsewhere it is refused."""
    name, ctx, plain = waiting
    checkpoint = ctx.save_partial(0)
    other = held(weights[name], "q8_0", files[name], kv_unified=True)
    want = plain.decode(TEXT, DEFERRED)
    assert other.batch([(token, i, [0], True) for i, token in enumerate(TOKENS[:DEFERRED])]) == 0
    assert other.restore_partial(checkpoint, 0)
    np.testing.assert_array_equal(other.decode(TEXT, DEFERRED), want)
    for data in ((), (prefix_of(paths[name], TEXT[:8]),)):
        none = held(weights[name], "q8_0", *data, kv_unified=True)
        assert none.batch([(token, i, [0], True) for i, token in enumerate(TOKENS[:DEFERRED])]) == 0
        assert not none.restore_partial(checkpoint, 0)
        assert L.llama_memory_seq_pos_max(none.memory, 0) == -1
        assert np.isfinite(none.decode(TEXT, 0)).all()


def test_first_token_alone(paths: Any, weights: Any) -> None:
    """Its state is the one after it."""
    for name in SOME:
        data = prefix_of(paths[name], TOKENS[:1])
        ctx, plain = context(weights[name], "f16"), context(weights[name], "f16")
        assert bindings.load(ctx.ptr, data) == 1
        plain.decode(TOKENS[:1], 0)
        np.testing.assert_array_equal(ctx.decode(TOKENS[1:], 1), plain.decode(TOKENS[1:], 1))


def test_another_models_prefix_is_refused(weights: Any, files: Any, paths: Any) -> None:
    """Before anything changes, with both values."""
    for name in SOME:
        for other in SOME:
            if name != other:
                ctx = context(weights[name], "q8_0")
                with pytest.raises(
                    IntactKVError, match=r"the prefix belongs to another model: \S+ is .* in the prefix"
                ):
                    bindings.load(ctx.ptr, files[other])
                assert L.llama_memory_seq_pos_max(ctx.memory, 0) == -1
    prefix = ikv.read(files["mamba2"])
    model = {**prefix.manifest["model"], "recurrent": {"n_layer": 2, "layers": [{"il": 0, "n_r": 4, "n_s": 4}]}}
    zeros = {0: (np.zeros(4, np.float32), np.zeros(4, np.float32))}
    origin = {k: v for k, v in prefix.manifest.items() if k not in ("format", "tokens", "model")}
    ctx = context(weights["mamba2"], "f16")
    with pytest.raises(IntactKVError, match="the number of recurrent layers is 1 in the prefix and 2 in the model"):
        bindings.verify(ikv.build(model, prefix.tokens, {}, {}, origin, zeros), ctx.ptr)


BITS = """
import hashlib
from tests.support import lowlevel
from tests.support.hybrids import TOKENS
model = lowlevel.load_model({path!r})
for kv in ("f16", "q8_0"):
    ctx = lowlevel.Context(model, kv, n_ctx=256, n_batch=256, n_ubatch=256, n_seq_max=2, tail=None)
    h = hashlib.sha256(ctx.decode(TOKENS, 0).tobytes())
    for i in range(4):
        h.update(ctx.decode([TOKENS[i]], 60 + i).tobytes())
    saved = ctx.save()
    h.update(saved)
    assert ctx.restore(saved, 1)
    h.update(ctx.decode([7], 64, seq=1).tobytes())
    print(kv, h.hexdigest())
"""


@pytest.mark.parametrize("name", NAMES)
def test_without_a_prefix_the_bits_are_upstreams(paths: Any, stock_lib: Path, name: str) -> None:
    code = BITS.format(path=str(paths[name]))
    ours, stock = run(code, INTACTKV_ATTN="stock"), run(code, lib=stock_lib)
    assert ours.returncode == stock.returncode == 0, ours.stderr + stock.stderr
    assert ours.stdout.count("\n") == 2 and ours.stdout == stock.stdout


@pytest.mark.parametrize("name", SOME)
def test_stock_loads_the_file_into_f16(paths: Any, files: Any, stock_lib: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ikv"
    path.write_bytes(files[name])
    for kv, lib in (("f16", stock_lib), ("f16", None), ("q8_0", None)):
        done = load_state(paths[name], kv, path, lib)
        assert done.stdout.startswith(f"True {N}"), done.stdout + done.stderr
