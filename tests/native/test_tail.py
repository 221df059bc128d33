"""The tail in real and in random models: what it gives, what it costs, what is refused.

Precision is tested on the F16 model: with quantized weights, activations are rounded to 8 bits, and any change of
the input, however small, flips some of them.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from intactkv_export.libllama import bindings
from intactkv_export.libllama import state as states
from tests.support import lowlevel, tiny_ggufs
from tests.support.lowlevel import SYSTEM, Context, L, kl
from tests.support.own_process import load_state

ATTENTION = ["fused", "portable"]


@pytest.fixture(scope="module")
def text(f16: Any) -> list[int]:
    from pydoc_data.topics import topics

    return lowlevel.tokenize(f16, SYSTEM + topics["assert"] + topics["yield"])[:400]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    root = tmp_path_factory.mktemp("tiny")
    made: dict[str, Any] = {}

    def get(arch: str) -> Any:
        if arch not in made:
            made[arch] = lowlevel.load_model(tiny_ggufs.write(root / f"{arch}.gguf", arch))
        return made[arch]

    return get


TINY = [1, *(int(t) for t in np.random.default_rng(3).integers(3, tiny_ggufs.N_VOCAB, 119))]


def small(weights: Any, k: str, v: str | None = None, tail: int | None = 0, **params: Any) -> Context:
    sizes = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256, "n_threads": 1, "n_threads_batch": 1}
    return Context(weights, k, v, tail, **{**sizes, **params})


def logits(ctx: Context, tokens: Sequence[int], steps: Sequence[int], seq: int = 0) -> np.ndarray:
    """In batches of so many tokens; the last step repeats."""
    found, at = [], 0
    while at < len(tokens):
        n = steps[min(len(found), len(steps) - 1)]
        found.append(ctx.decode(tokens[at : at + n], at, seq))
        at += n
    return np.concatenate(found)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- a tail as long as everything ---


@pytest.mark.parametrize(("k", "v"), [("q4_0", "q4_0"), ("q4_0", "f16"), ("f16", "q4_0"), ("iq4_nl", "bf16")])
def test_a_tail_of_everything_is_an_f16_cache(
    f16: Any, text: list[int], monkeypatch: pytest.MonkeyPatch, k: str, v: str
) -> None:
    """Prefill, then token by token."""
    tokens, steps = text[:80], [50, 21, 1]
    exact = logits(Context(f16, "f16"), tokens, steps)
    rounded = kl(exact, logits(Context(f16, k, v), tokens, steps))
    for attention in ATTENTION:
        monkeypatch.setenv("INTACTKV_ATTN", attention)
        ctx = Context(f16, k, v, 1024)
        found = logits(ctx, tokens, steps)
        assert ctx.attention() == attention and ctx.n_tail(0) == ctx.n_intact() == len(tokens)
        assert kl(exact, found) < min(2e-5, rounded / 50)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("swa_full", [False, True])
@pytest.mark.parametrize("arch", ["gemma2", "gpt-oss"])
def test_sliding_windows_and_sinks(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, attention: str, swa_full: bool, arch: str
) -> None:
    """Both caches of such a model have a tail. The window's reuses its cells."""
    monkeypatch.setenv("INTACTKV_ATTN", attention)

    def context(kv: str, tail: int) -> Context:
        return small(tiny(arch), kv, tail=tail, swa_full=swa_full, n_ubatch=32)

    steps = [50, 17, 1]
    exact = logits(context("f16", 0), TINY, steps)
    far = distance(logits(context("q4_0", 0), TINY, steps), exact)
    ctx = context("q4_0", 256)
    assert distance(logits(ctx, TINY, steps), exact) < far / 30
    assert ctx.n_tail(0) == len(TINY)
    # as long as the window: those layers see nothing rounded, token by token
    ctx = context("q4_0", tiny_ggufs.WINDOW)
    partly = distance(logits(ctx, TINY, steps), exact)
    assert ctx.n_tail(0) == tiny_ggufs.WINDOW + 1
    assert partly < far


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("unified", [False, True])
def test_sequences_side_by_side(
    f16: Any, text: list[int], monkeypatch: pytest.MonkeyPatch, attention: str, unified: bool
) -> None:
    """Each has a tail of its own, as if it were alone."""
    monkeypatch.setenv("INTACTKV_ATTN", attention)
    alone = logits(Context(f16, "q4_0", tail=8), text[:40], [16, 1])
    ctx = Context(f16, "q4_0", tail=8, n_seq_max=3, kv_unified=unified, n_ctx=3072)
    for seq in (2, 0):
        found = logits(ctx, text[:40], [16, 1], seq)
        assert kl(alone, found) < 2e-4
    assert [ctx.n_tail(seq) for seq in (-1, 0, 1, 2)] == [17, 9, 0, 8]


# --- what it gives ---


@pytest.mark.parametrize(("k", "v"), [("q4_0", "q4_0"), ("q8_0", "q8_0"), ("q8_0", "q4_0")])
def test_fused_is_as_portable(f16: Any, text: list[int], monkeypatch: pytest.MonkeyPatch, k: str, v: str) -> None:
    steps = [40, 16, 16, 1]
    exact = logits(Context(f16, "f16"), text[:90], steps)
    rounded = kl(exact, logits(Context(f16, k, v), text[:90], steps))
    found = {}
    for attention in ATTENTION:
        monkeypatch.setenv("INTACTKV_ATTN", attention)
        found[attention] = logits(Context(f16, k, v, 32), text[:90], steps)
    assert kl(found["portable"], found["fused"]) < rounded / 10  # 1200, 23 and 360 times as small measured
    assert max(kl(exact, x) for x in found.values()) < rounded / 5


def test_how_much_closer_to_f16(f16: Any, text: list[int]) -> None:
    """In ubatches of 16: what is evaluated at once sees itself at F16, whatever the tail."""
    text = text[:256]
    exact = logits(Context(f16, "f16"), text, [16])
    without = kl(exact, logits(Context(f16, "q4_0"), text, [16]))
    ctx = Context(f16, "q4_0", tail=None)
    assert ctx.tail() == 128
    assert kl(exact, logits(ctx, text, [16])) < without / 6


# --- states ---


@pytest.mark.parametrize("whole", [False, True], ids=["sequence", "context"])
@pytest.mark.parametrize(
    ("arch", "k", "v"),
    [("llama", "q4_0", "q4_0"), ("llama", "q4_0", "f16"), ("llama", "f16", "q8_0"), ("gemma2", "q4_0", "q5_1")],
)
def test_states_bit_for_bit(tiny: Callable[[str], Any], arch: str, k: str, v: str, whole: bool) -> None:
    def context(tail: int) -> Context:
        return small(tiny(arch), k, v, tail, swa_full=False, n_ubatch=32)

    seq = None if whole else 0
    ctx = context(20)
    exact = small(tiny(arch), "f16", n_ubatch=32)
    exact.decode(TINY[:6], 0)
    assert ctx.restore(exact.save())
    for at, n in ((6, 40), (46, 10), (56, 3)):
        ctx.decode(TINY[at : at + n], at)
    assert (ctx.n_intact(), ctx.n_tail()) == (6 + 23, 23)
    saved = ctx.save(seq)
    for tail in (20, 5, 0, 64):
        again = context(tail)
        assert again.restore(saved, seq)
        assert (again.n_intact(), again.n_tail(), again.tail()) == (6 + 23, 23, tail)
        assert again.save(seq) == saved
        # from here on as the context where it was saved, which was at this moment given this tail
        assert ctx.restore(saved, seq) and ctx.set_tail(tail) == tail
        for at in (59, 60, 64):
            n = 4 if at == 60 else 1
            np.testing.assert_array_equal(again.decode(TINY[at : at + n], at), ctx.decode(TINY[at : at + n], at))
            # the prefix, what is left of the tail, and the new ones
            left = min(23 + at - 59, tail)
            assert again.n_intact() == ctx.n_intact() == 6 + left + (n if tail else 0)
        assert again.save(seq) == ctx.save(seq)


def test_states_without_flash_attention(tiny: Callable[[str], Any]) -> None:
    """V is transposed there. With an exact V the tail has K alone; with any other it is refused."""
    off = {"flash_attn_type": 0}
    ctx, again = (small(tiny("llama"), "q4_0", "f16", 20, **off) for _ in range(2))
    logits(ctx, TINY[:60], [30, 1])
    assert again.restore(ctx.save()) and again.n_tail() == 21
    assert again.save() == ctx.save()
    np.testing.assert_array_equal(again.decode(TINY[60:61], 60), ctx.decode(TINY[60:61], 60))
    ctx = small(tiny("llama"), "bf16", tail=0, **off)
    assert ctx.set_tail(20) == -1
    assert "flash attention is off in this context, its bf16 V cache is transposed" in bindings.last_error()
    assert np.isfinite(logits(ctx, TINY[:60], [30, 1])).all()


def test_states_of_before_the_tail(tiny: Callable[[str], Any]) -> None:
    """The bit of the tail was not written: such cells are kept."""
    ctx = small(tiny("llama"), "q4_0", tail=10)
    logits(ctx, TINY[:30], [29, 1])
    saved = bytearray(ctx.save())
    (section,) = states.sections(saved)
    assert section.intact is not None
    at, n = section.end - len(section.intact), 11
    indices = np.frombuffer(saved, "<u4", n + 1, at)
    np.testing.assert_array_equal(indices, [n, *(0x80000000 + np.arange(19, 30))])
    saved[at + 4 : at + 4 + 4 * n] = np.arange(19, 30, dtype="<u4").tobytes()
    assert ctx.restore(bytes(saved))
    assert (ctx.n_intact(), ctx.n_tail()) == (n, 0)
    ctx.decode(TINY[30:60], 30)
    ctx.decode(TINY[60:61], 60)
    assert (ctx.n_intact(), ctx.n_tail()) == (n + 11, 11)


def test_damaged_state_is_refused_and_leaves_nothing(tiny: Callable[[str], Any]) -> None:
    ctx = small(tiny("llama"), "q4_0", tail=10)
    logits(ctx, TINY[:30], [29, 1])
    saved = ctx.save()
    other = small(tiny("llama"), "q4_0", tail=10)
    for size in [*range(0, len(saved), 997), *range(len(saved) - 8, len(saved))]:
        assert not other.restore(saved[:size])
        assert (other.n_intact(), other.n_tail()) == (0, 0)
    np.testing.assert_array_equal(
        logits(other, TINY[:30], [29, 1]), logits(small(tiny("llama"), "q4_0", tail=10), TINY[:30], [29, 1])
    )


def test_stock_libraries_refuse_the_file(
    model: Any, f16: Any, text: list[int], stock_lib: Path, tmp_path: Path
) -> None:
    ctx = Context(f16, "q4_0", tail=4)
    ctx.decode(text[:20], 0)
    path = tmp_path / "tail.state"
    tokens = (L.llama_token * 20)(*text[:20])
    assert L.llama_state_seq_save_file(ctx.ptr, str(path).encode(), 0, tokens, 20)
    ours, stock = (load_state(model("F16"), "q4_0", path, lib) for lib in (None, stock_lib))
    assert ours.stdout.startswith("True 20"), ours.stderr
    assert stock.stdout.startswith("False") and "494b0003" in stock.stdout, stock.stdout + stock.stderr


# --- what it costs ---


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_a_token_costs_no_graph_and_no_memory(
    tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, attention: str, arch: str
) -> None:
    monkeypatch.setenv("INTACTKV_ATTN", attention)
    reused = {}
    for tail in (0, 100):
        ctx = small(tiny(arch), "q4_0", tail=tail, n_ctx=1024, swa_full=False, n_ubatch=32)
        held = ctx.arena_bytes()
        before = L.llama_perf_context(ctx.ptr).n_reused
        logits(ctx, TINY * 5, [20, 1])  # 580 times one token
        reused[tail] = L.llama_perf_context(ctx.ptr).n_reused - before
        if not Path("/proc/self/statm").exists():
            continue
        memory = resident()
        for _ in range(3):
            L.llama_memory_clear(ctx.memory, False)
            logits(ctx, TINY * 5, [20, 1])
        assert ctx.arena_bytes() == held
        assert resident() - memory < 2 << 20
    # another graph when the cache that is seen grows; with portable attention for each 64 intact cells too
    assert reused[0] >= 575
    assert reused[100] >= reused[0] - (2 if attention == "portable" else 0)


def test_memory_is_had_when_the_tail_is_set(tiny: Callable[[str], Any]) -> None:
    """For the tails of all sequences and one ubatch, or as many as the cache has cells."""
    row = 2 * 2 * 2 * 64 * 2  # layers, K and V, heads of 64 values, F16
    ctx = small(tiny("llama"), "q4_0", tail=10, n_ubatch=32, n_seq_max=4, kv_unified=True)
    assert ctx.arena_bytes() == (4 * 10 + 32) * row
    assert ctx.set_tail(1 << 30) == 1 << 30
    assert ctx.arena_bytes() == 256 * row
    assert (ctx.set_tail(0), ctx.arena_bytes()) == (0, 0)
    assert ctx.set_tail(3) == 3
    logits(ctx, TINY, [100, 1], seq=3)
    assert ctx.arena_bytes() == (4 * 3 + 32) * row
    assert (ctx.set_tail(0), ctx.n_tail()) == (0, 4)
    ctx.decode(TINY[:1], len(TINY), seq=3)
    assert ctx.n_tail() == ctx.n_intact() == 0


# --- settings and refusals ---


def why_refused(weights: Any, kv: str) -> str:
    """What llama.cpp logs when no context can be made."""
    lines: list[str] = []
    keep = L.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    L.llama_log_set(keep, None)
    try:
        p = L.llama_context_default_params()
        p.n_ctx, p.flash_attn_type = 256, 1
        p.type_k = p.type_v = lowlevel.TYPES[kv]
        assert not L.llama_init_from_model(weights, p)
    finally:
        L.llama_log_set(lowlevel._quiet, None)
    return "".join(lines)


def test_variable(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for value, tail in (("12", 12), ("0", 0), ("", 128), ("100000", 100000)):
        monkeypatch.setenv("INTACTKV_TAIL", value)
        assert small(tiny("llama"), "q4_0", tail=None).tail() == tail
        assert small(tiny("llama"), "f16", tail=None).tail() == 0
    for value in ("abc", "-1", "12x", "1.5", "99999999999999999999"):
        monkeypatch.setenv("INTACTKV_TAIL", value)
        assert f"INTACTKV_TAIL is '{value}': give a number of cells" in why_refused(tiny("llama"), "q4_0")


def test_stock_attention_reads_no_tail(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTACTKV_ATTN", "stock")
    ctx = small(tiny("llama"), "q4_0", tail=None)
    assert (ctx.tail(), ctx.attention(), ctx.arena_bytes()) == (0, "stock", 0)
    assert ctx.set_tail(-1) == ctx.set_tail(0) == 0
    assert ctx.set_tail(64) == -1
    why = "a tail of 64 intact cells was asked for, and INTACTKV_ATTN=stock reads no intact cell"
    assert why in bindings.last_error()
    assert ctx.tail() == 0
    monkeypatch.setenv("INTACTKV_TAIL", "64")
    assert why in why_refused(tiny("llama"), "q4_0")
    assert small(tiny("llama"), "f16", tail=None).tail() == 0  # it has no use for one


@pytest.mark.parametrize(
    ("k", "v", "tail"),
    [
        *((kv, kv, 128) for kv in ("q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl")),
        *((kv, kv, 0) for kv in ("q8_0", "bf16", "f16", "f32")),
        ("q8_0", "q4_0", 128),
        ("f16", "q4_0", 128),
        ("f32", "q4_0", 0),  # not read by the fused kernel
    ],
)
def test_default(tiny: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, k: str, v: str, tail: int) -> None:
    monkeypatch.delenv("INTACTKV_TAIL", raising=False)
    ctx = small(tiny("llama"), k, v, None)
    assert ctx.tail() == tail
    is_exact = {k, v} <= {"f16", "f32"}
    assert ctx.set_tail(7) == (0 if is_exact else 7)
    assert ctx.set_tail(-1) == tail
    monkeypatch.setenv("INTACTKV_ATTN", "portable")
    assert small(tiny("llama"), k, v, None).tail() == 0


def test_a_model_that_can_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_ggufs.write(tmp_path / "embeddings.gguf", "llama", **{"attention.causal": False})
    model = lowlevel.load_model(path)
    ctx = small(model, "q4_0", tail=None)
    assert (ctx.tail(), ctx.set_tail(0), ctx.set_tail(-1)) == (0, 0, 0)
    assert ctx.set_tail(100) == -1
    assert re.fullmatch(
        "a tail of 100 intact cells was asked for, and a model of .* cannot carry a prefix: .*set the tail to 0",
        bindings.last_error(),
    )
    monkeypatch.setenv("INTACTKV_TAIL", "100")  # for the models that can
    assert small(model, "q4_0", tail=None).tail() == 0
