"""The torch engine's K and V of further families are llama.cpp's, read from its state in float32.

Measured, relative error of the worst layer: 1e-6; StarCoder2 and Gemma up to 2e-4, whose GELU ggml looks up in an F16
table.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

from intactkv_export.engines import torch_engine as engine
from intactkv_export.models.proven import PROVEN, supports
from tests.engines.test_recurrent import error
from tests.support import random_families
from tests.support.cache_rows import Llama, random_tokens

TOLERANCE = 1e-5
TOLERANCE_GELU = 5e-4


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    return random_families.build_all(tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("name", random_families.MODELS)
def test_rows_of_every_family(families, name):
    """The description of the GGUF is the checkpoint's, too."""
    tokens = random_tokens(40)
    step = 8 if name in ("olmo3", "cohere2", "gpt-oss") or "gemma" in name else None
    about, K, V = Llama(families[name].with_name(f"{name}.gguf")).rows(tokens, step=step)
    got_K, got_V, states = engine.compute_float32(families[name], tokens, about)
    assert got_K.keys() == K.keys() and states == {}
    worst = max(error(got[il], want[il]) for got, want in ((got_K, K), (got_V, V)) for il in want)
    assert worst < (TOLERANCE_GELU if name == "starcoder2" or "gemma" in name else TOLERANCE)


def test_every_family_is_proven(families):
    configs = [json.loads((path / "config.json").read_text()) for path in families.values()]
    assert all(supports(config) and (config.get("text_config") or config)["model_type"] in PROVEN for config in configs)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "exaone4"},  # a window of 4096, which llama.cpp has in models of 64 layers alone
        {"model_type": "cohere", "use_qk_norm": True},
        {"model_type": "glm4_moe", "n_group": 2},
        {"model_type": "stablelm", "use_parallel_residual": True},
        {"model_type": "nemotron", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
    ],
)
def test_what_is_not_proven(config):
    assert not supports(config)
