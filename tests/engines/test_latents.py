"""The torch engine's latents (MLA: DeepSeek, GLM-4.7-Flash) are llama.cpp's rows.

The oracle is llama.cpp in float32, read from the sequence's state. Measured, relative error of the worst layer: 7e-6
with three layers, 1e-5 with 26.
"""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

from intactkv_export.engines import torch_engine as engine
from intactkv_export.errors import IntactKVError
from intactkv_export.models.proven import LATENT, supports
from intactkv_export.torch_model import load
from tests.support import both_engines, random_latents, random_models
from tests.support.cache_rows import Llama, random_tokens
from tests.support.recurrent_state import raw

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    root = tmp_path_factory.mktemp("latents")
    return random_models.build_all(random_latents.build, random_latents.MODELS, root)


def rows(path, tokens):
    """{layer: float32 [n_tokens, n_values]} of a state that has rows of K alone."""
    data, at = raw(Llama(path), tokens), 8
    assert struct.unpack_from("<II", data, at) == (1, len(tokens))
    at += 8 + 12 * len(tokens) + 4
    (n_layer,) = struct.unpack_from("<I", data, at)
    at, found = at + 4, {}
    for il in range(n_layer):
        kind, size = struct.unpack_from("<iQ", data, at)
        assert kind == 0
        found[il] = np.frombuffer(data, "<f4", len(tokens) * size // 4, at + 12).reshape(len(tokens), -1)
        at += 12 + len(tokens) * size
    assert at == len(data)
    return found


@pytest.mark.parametrize("name", random_latents.MODELS)
def test_rows_of_every_family(latents, name):
    tokens = random_tokens(64)
    want = rows(latents[name].with_name(f"{name}.gguf"), tokens)
    K, V, states = engine.compute_float32(latents[name], tokens, None)
    assert K.keys() == V.keys() == want.keys() and states == {}
    for il, row in want.items():
        assert K[il].shape == (64, 1, row.shape[1]) and V[il].shape == (64, 1, 0)
        assert np.linalg.norm(K[il][:, 0] - row) < TOLERANCE * np.linalg.norm(row), il


@pytest.mark.parametrize("name", random_latents.MODELS)
def test_both_engines_make_the_same_file(latents, tmp_path, name):
    """What the description of the GGUF says of layers, latents and RoPE is the checkpoint's too."""
    got, want = both_engines.files(latents[name], tmp_path)
    assert got.manifest["format"] == want.manifest["format"] == 2
    assert got.states == want.states == {}
    for a, b in zip(got.layers, want.layers, strict=True):
        assert a.K.size and a.K.shape == b.K.shape and not a.V.size and not b.V.size
        assert np.linalg.norm(np.float64(a.K) - np.float64(b.K)) < 1e-3 * np.linalg.norm(np.float64(b.K))


def test_no_model_to_train_with(latents):
    with pytest.raises(IntactKVError, match="'deepseek_v2' has latents"):
        load(latents["deepseek2"])


def test_every_family_is_tested(latents):
    configs = [json.loads((path / "config.json").read_text()) for path in latents.values()]
    assert all(supports(config) for config in configs)
    assert {(config.get("text_config") or config)["model_type"] for config in configs} == LATENT


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "deepseek_v3"},  # llama.cpp would choose experts by softmax
        {"model_type": "glm4_moe_lite"},
        {"model_type": "deepseek_v2", "n_group": 8},
        {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "rope_scaling": {"type": "yarn", "mscale": 1.0}},
    ],
)
def test_what_is_not_proven(config):
    assert not supports(config)


def test_glm_4_7_flash_is_known_by_its_size():
    assert supports({"model_type": "glm4_moe_lite", "num_hidden_layers": 47, "vocab_size": 154880})
