"""What a chat is opened with: KV types that fit the heads, a context that holds the prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from intactkv_export.errors import UsageError
from intactkv_export.libllama import KV_TYPES
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.runtime import Sampling, fit, open_chat
from intactkv_export.runtime.intact_llama import IntactLlama
from intactkv_export.runtime.kv_choice import best_kv_types, check_kv_types, head_sizes
from tests.support import random_models, tiny_ggufs
from tests.support.lowlevel import Context, load_model
from tests.support.smol import SYSTEM_PROMPT, Smol


def header(k: int, v: int, **more: int) -> dict[str, object]:
    values = {"attention.key_length": k, "attention.value_length": v, **more}
    return {"general.architecture": "llama", **{f"llama.{name}": value for name, value in values.items()}}


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """{head size: GGUF} of models with random weights."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("heads")
    made = {n: random_models.build("llama-gqa", root / f"h{n}", head_dim=n) for n in (80, 96, 112)}
    random_models.to_gguf(made.values())
    return {n: path.with_name(f"{path.name}.gguf") for n, path in made.items()}


def test_what_fits_is_what_llama_cpp_takes(heads: dict[int, Path]) -> None:
    """The rule is llama.cpp's own: every type, as K and as V, at every size."""
    for size, gguf in heads.items():
        assert head_sizes(gguf_file.read(gguf).values) == ((size,), (size,))
        for pair in [(name, "f16") for name in KV_TYPES] + [("f16", "q8_0")]:
            try:
                check_kv_types(pair, gguf_file.read(gguf).values)
                fits = True
            except UsageError:
                fits = False
            runs = has_context(gguf, pair)
            assert fits == runs, (size, pair)


def has_context(gguf: Path, pair: tuple[str, str]) -> bool:
    """llama.cpp's own answer."""
    try:
        Context(load_model(gguf), *pair)
    except AssertionError:
        return False
    return True


def test_intact_llama_chooses_it_too(heads: dict[int, Path]) -> None:
    with pytest.warns(UserWarning, match="the KV cache is f16: its heads are 80 values wide"):
        llama = IntactLlama(heads[80], n_ctx=256)
    assert llama.prefix_stats["kv_type"] == "f16"
    llama.close()
    with pytest.raises(UsageError, match="cannot be q4_0, its heads are 80 .* give f16, bf16, f32$"):
        IntactLlama(heads[80], kv_type="q4_0", n_ctx=256)


def test_the_best_type_that_fits_is_chosen_and_named(heads: dict[int, Path]) -> None:
    for size, expected in ((80, "f16"), (96, "q8_0/q4_0"), (112, "f16")):
        notices: list[str] = []
        talk = open_chat(heads[size], notice=notices.append, sampling=Sampling(2, 0.0))
        assert talk.llama.prefix_stats["kv_type"] == expected
        assert len(notices) == (expected == "f16")
        if notices:
            assert f"the KV cache is f16: its heads are {size} values wide" in notices[0]
        list(talk.say("Hi"))
    with pytest.raises(UsageError, match="cannot be f16,q4_0, its heads are 80 .* give f16, bf16, f32$"):
        open_chat(heads[80], notice=print, kv_type="f16,q4_0")


def test_v_of_four_bits_needs_the_tail(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(**settings: Any) -> tuple[str, int]:
        llama = open_chat(smol.gguf, notice=print, prefix=None, n_ctx=64, **settings).llama
        return llama.prefix_stats["kv_type"], llama.tail

    assert chosen() == chosen(tail=128) == ("q8_0/q4_0", 128)
    assert chosen(tail=0) == ("q8_0", 0) and chosen(tail=64) == ("q8_0", 64)
    assert chosen(kv_type="q8_0") == ("q8_0", 0)
    monkeypatch.setenv("INTACTKV_TAIL", "0")
    assert chosen() == ("q8_0", 0)
    monkeypatch.setenv("INTACTKV_TAIL", "256")
    assert chosen() == ("q8_0/q4_0", 256)
    monkeypatch.delenv("INTACTKV_TAIL")
    for attention in ("stock", "portable"):
        monkeypatch.setenv("INTACTKV_ATTN", attention)
        assert chosen() == ("q8_0", 0)


def test_a_model_with_recurrent_layers_has_a_tail_and_v_of_four_bits(tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    hybrid = tiny_ggufs.write(
        tmp_path / "hybrid.gguf", "granitehybrid", n_head_kv=[0, 2], chat_template=template,
        **{"rope.scaling.finetuned": True},
    )  # fmt: skip
    llama = open_chat(hybrid, notice=print, n_ctx=64).llama
    assert llama.prefix_stats["kv_type"] == "q8_0/q4_0" and llama.tail == 128


def test_k_and_v_of_different_sizes() -> None:
    assert best_kv_types(header(64, 64)) == (("q8_0", "q8_0"), "")
    pair, why = best_kv_types(header(80, 64))
    assert pair == ("f16", "q8_0") and "f16 for K and q8_0 for V" in why and "80 (K) and 64 (V)" in why
    check_kv_types(("f16", "q4_0"), header(80, 64))
    with pytest.raises(UsageError, match="f16, bf16, f32 for K and f16, q8_0, .* for V"):
        check_kv_types(("q8_0", "q8_0"), header(80, 64))
    assert best_kv_types(header(64, 64, **{"attention.key_length_swa": 80}))[0] == ("f16", "q8_0")
    silent = {"general.architecture": "llama", "llama.attention.head_count": None}
    assert best_kv_types(silent) == (("q8_0", "q8_0"), ""), "then llama.cpp decides"
    grok = {**header(64, 64), "general.architecture": "grok"}
    pair, why = best_kv_types(grok)
    assert pair == ("f16", "f16") and "without flash attention" in why
    with pytest.raises(UsageError, match="the V cache of this model cannot be q4_0: .* give f16 for V"):
        check_kv_types(("q8_0", "q4_0"), grok)


def test_a_context_that_holds_the_prefix_and_room_to_talk(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_CONTEXT", 20)  # as 5,009 tokens are to 4,096: the prefix has 24
    monkeypatch.setattr(fit, "_ROOM", 232)
    talk = open_chat(smol.gguf, notice=print, prefix=smol.ikv, kv_type="q4_0", sampling=Sampling(2, 0.0))
    assert talk.llama.n_ctx() == 256 and "".join(talk.say("Hi"))
    monkeypatch.setattr(fit, "_ROOM", 10**6)
    assert open_chat(smol.gguf, notice=print, prefix=smol.ikv, kv_type="q4_0").llama.n_ctx() == 8192, (
        "as it was trained"
    )
    with pytest.raises(UsageError, match="has 24 tokens, and --ctx-size is 24: give more, at most 8192"):
        open_chat(smol.gguf, notice=print, prefix=smol.ikv, n_ctx=24)
    assert SYSTEM_PROMPT == talk.opening[0]["content"]


def test_threads_are_the_cores_it_may_use(smol: Smol, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("intactkv_export.runtime.intact_llama.usable_cores", lambda: 3)
    llama = IntactLlama(smol.gguf, None, "f16", n_ctx=64)
    assert (llama.n_threads, llama.n_threads_batch) == (3, 3)
    assert IntactLlama(smol.gguf, None, "f16", n_ctx=64, n_threads=1).n_threads == 1
    assert "3 threads" in open_chat(smol.gguf, notice=print, n_ctx=64).report()


def test_a_prefix_that_conversations_never_begin_with(smol: Smol, tmp_path: Path) -> None:
    """One of the BOS of plain text, made where the template renders none."""
    gguf, notices = tmp_path / "x.gguf", []
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    ikv.rewrite(smol.gguf, {"tokenizer.chat_template": plain}, gguf)
    open_chat(gguf, notice=notices.append, prefix=smol.bos, n_threads=2)
    (said,) = notices
    assert f"do not begin with the tokens of the prefix {smol.bos}" in said and "\n" not in said
    open_chat(smol.gguf, notice=notices.append, prefix=smol.bos, n_threads=2)
    assert len(notices) == 1
