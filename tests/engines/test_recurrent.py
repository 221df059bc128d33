"""The torch engine's states of hybrid and recurrent models are llama.cpp's, and K and V of their attention layers.

The oracle is llama.cpp in float32, read from the sequence's state. Measured, relative error of the worst layer: 2.5e-6,
of delta nets 5.6e-6.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra [convert] is not installed")
cache_utils = pytest.importorskip("transformers.cache_utils")
if not hasattr(cache_utils, "LinearAttentionLayer"):
    pytest.skip("this transformers keeps recurrent states otherwise", allow_module_level=True)

from intactkv_export.conversion import prefix
from intactkv_export.engines import llama_engine
from intactkv_export.engines import torch_engine as engine
from intactkv_export.errors import IntactKVError
from intactkv_export.models.proven import PROVEN, RECURRENT
from intactkv_export.torch_model import from_huggingface, load
from intactkv_export.torch_model.caches import StateLayout
from intactkv_export.torch_model.from_gguf import check_header
from tests.support import both_engines, random_hybrids, random_models, recurrent_state
from tests.support.cache_rows import random_tokens

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory) -> dict[str, Path]:
    return random_hybrids.build_all(tmp_path_factory.mktemp("hybrids"))


def error(a, b):
    a, b = np.float64(a).reshape(-1), np.float64(b).reshape(-1)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b)) if b.size else float(a.size)


def errors(got, want):
    """{what: relative error} of K, V, r and s of each layer. got: K, V, states. want: a recurrent_state.State."""
    K, V, states = got
    found = {f"K {il}": error(K[il], want.K[il]) for il in want.K}
    found |= {f"V {il}": error(V[il], want.V[il]) for il in want.V}
    for side, name in enumerate("rs"):
        found |= {f"{name} {il}": error(states[il][side], x[side]) for il, x in want.states.items()}
    assert K.keys() == want.K.keys() and states.keys() == want.states.keys()
    return found


def oracle(directory, tokens):
    config = from_huggingface.read_config(directory).get_text_config(decoder=True)
    attention = from_huggingface.attention_layers(config)
    kinds = config.layer_types
    recurrent = [il for il, kind in enumerate(kinds) if kind in ("conv", "linear_attention", "hybrid")]
    path = directory.with_name(directory.name + ".gguf")
    return recurrent_state.after(
        path, tokens, attention, recurrent, ext="mrope_section" in (getattr(config, "rope_parameters", None) or {})
    )


@pytest.mark.parametrize("name", random_hybrids.MODELS)
def test_states_of_every_family(hybrids, name):
    for n in (1, 2, 75):
        tokens = random_tokens(n)
        found = errors(engine.compute_float32(hybrids[name], tokens, None), oracle(hybrids[name], tokens))
        assert max(found.values()) < TOLERANCE, (n, found)


@pytest.mark.parametrize("name", ["lfm2", "granite-h", "falcon-h1", "qwen3.5", "jamba"])
def test_a_long_prefix_in_pieces_is_the_same(hybrids, name, monkeypatch):
    tokens = random_tokens(75)
    monkeypatch.setattr(engine, "_CHUNK", 37)  # the last piece is of one token
    found = errors(engine.compute_float32(hybrids[name], tokens, None), oracle(hybrids[name], tokens))
    assert max(found.values()) < TOLERANCE, found


def test_short_steps_of_time(tmp_path):
    """Of Nemotron-H: transformers has a least one, 1e-3, and states would be twice as large; llama.cpp has none.

    Where exp() is small, softplus in float32 as ggml has it, log(1 + exp()), has few digits: measured, 2e-5.
    """
    directory = random_hybrids.build("nemotron-h", tmp_path / "model", shift={"dt_bias": -8.0})
    random_models.to_gguf([directory])
    tokens = random_tokens(75)
    found = errors(engine.compute_float32(directory, tokens, None), oracle(directory, tokens))
    assert max(found.values()) < 1e-4, found


def test_every_family_is_tested(hybrids):
    tested = {from_huggingface.read_config(path).model_type for path in hybrids.values()}
    assert tested == set(RECURRENT) <= set(PROVEN)


def test_only_k_and_v_are_rounded(hybrids):
    tokens = random_tokens(24)
    exact, rounded = (f(hybrids["falcon-h1"], tokens, None) for f in (engine.compute_float32, engine.compute))
    assert all(rounded[0][il].dtype == np.float16 for il in exact[0])
    for il, both in exact[2].items():
        for a, b in zip(rounded[2][il], both, strict=True):
            assert b.dtype == np.float32 and np.array_equal(a, b)


@pytest.mark.parametrize("name", ["lfm2", "granite-h", "falcon-h1", "nemotron-h-moe", "qwen3-next", "qwen3.5", "mamba"])
def test_both_engines_make_the_same_file(hybrids, tmp_path, name):
    """What the description of the GGUF says of layers, heads, RoPE and sizes of states is the checkpoint's too."""
    got, want = both_engines.files(hybrids[name], tmp_path)
    assert got.states.keys() == want.states.keys()
    for a, b in zip(got.layers, want.layers, strict=True):
        assert max(error(a.K, b.K), error(a.V, b.V)) < 1e-3
    for il, both in want.states.items():
        assert max(error(*pair) for pair in zip(got.states[il], both, strict=True)) < TOLERANCE


def test_another_models_gguf_is_refused(hybrids, tmp_path):
    with pytest.raises(IntactKVError, match="number of layers is 2 in .*lfm2 but 1 in the GGUF"):
        prefix(
            hybrids["lfm2"],
            hybrids["lfm2"].with_name("granite-h.gguf"),
            bos_only=True,
            engine="torch",
            out=tmp_path / "x",
        )
    about = llama_engine.describe(hybrids["granite-h"].with_name("granite-h.gguf"))
    about["recurrent"]["layers"][1]["n_s"] += 1
    with pytest.raises(
        IntactKVError, match="layer 2 has a state of 1920 and 16384 values in .*, 1920 and 16385 in the GGUF"
    ):
        engine.compute(hybrids["granite-h"], [1], about)


def test_what_cannot_be_analyzed_or_trained_yet(hybrids):
    """Most are trained (tests/torch_model/test_states.py); analysis knows no states, of no model."""
    for name in ("lfm2", "qwen3.5", "falcon-h1"):
        gguf = hybrids[name].with_name(f"{name}.gguf")
        with pytest.raises(IntactKVError, match="has states of recurrent layers"):
            load(hybrids[name])
        with pytest.raises(IntactKVError, match="has states of recurrent layers, which cannot be analyzed yet"):
            load(gguf)
        with pytest.raises(IntactKVError, match="has states of recurrent layers, which cannot be analyzed yet"):
            prefix(hybrids[name], gguf, system_prompt="Be brief.", prefix_tokens="auto", out=gguf.with_suffix(".ikv"))
        check_header(gguf)
    for name in ("jamba", "mamba2"):
        with pytest.raises(IntactKVError, match=f"'{name}' has states of recurrent layers"):
            load(hybrids[name], states=True)
        with pytest.raises(IntactKVError, match=f"architecture '{name}'.*, which torch cannot read from a GGUF"):
            check_header(hybrids[name].with_name(f"{name}.gguf"))


def rows_and_states(layout, generator):
    n_r, n_s = (x.numel() for x in layout.empty())
    return torch.randn(n_r, generator=generator), torch.randn(n_s, generator=generator)


def test_the_layout_is_its_own_inverse(hybrids):
    """Of every family, and of random sizes: llama.cpp's rows to transformers' states and back, and the other way."""
    generator = torch.Generator().manual_seed(0)
    layouts = [StateLayout.of(from_huggingface.read_config(path).get_text_config()) for path in hybrids.values()]
    for _ in range(50):
        n_k, per_k, size_k, size_v, width, n_state = torch.randint(1, 6, (6,), generator=generator).tolist()
        n_v = n_k * per_k
        channels = 2 * n_k * size_k + n_v * size_v
        layouts += [StateLayout((channels, width), (n_v, size_v, size_k), True, head) for head in (0, n_k)]
        layouts += [StateLayout((channels, width), (n_v, size_v, n_state)), StateLayout((channels, width))]
    for layout in layouts:
        r, s = rows_and_states(layout, generator)
        inputs, state = layout.to_cache(r, s)
        back = layout.to_rows(inputs, state)
        assert torch.equal(back[0], r) and torch.equal(back[1], s)
        older = torch.cat([torch.randn(inputs[..., :1].shape, generator=generator), inputs], -1)
        assert torch.equal(layout.to_rows(older, state)[0], r)
        moved = layout.to_cache(*layout.to_rows(inputs, state))
        assert torch.equal(moved[0], inputs) and (state is None or torch.equal(moved[1], state))


def test_the_layouts_sizes_are_llama_cpps(hybrids):
    for name, path in hybrids.items():
        about = llama_engine.describe(path.with_name(f"{name}.gguf"))
        layout = StateLayout.of(from_huggingface.read_config(path).get_text_config())
        assert {(x["n_r"], x["n_s"]) for x in about["recurrent"]["layers"]} == {tuple(map(len, layout.empty()))}
