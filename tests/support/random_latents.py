"""Tiny random-weight Hugging Face models that cache latents (MLA), for the torch engine: random_models.MLA, as their
checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import random_models

_EPSILON = 1e-6  # the latent's norm has it in transformers whatever config.json says
_SIGMOID = dict(scoring_func="sigmoid")  # of V3's and GLM's experts; in their config.json
_GROUPS = dict(_SIGMOID, n_routed_experts=8, n_group=4, topk_group=2)
_YARN = dict(_SIGMOID, rope_parameters=random_models._LATENT_YARN)

# name: (key of random_models.MLA, what differs)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek2-lite": ("deepseek2-lite", {}),
    "deepseek2": ("deepseek2", {}),
    "deepseek3": ("deepseek3", _GROUPS),
    "deepseek3-yarn": ("deepseek3", _YARN),
    "glm4-moe-lite": ("glm4-moe-lite", _SIGMOID),
}


def build(name: str, directory: Path) -> Path:
    """Write random model `name`, a key of MODELS, into `directory` and return it."""
    like, differs = MODELS[name]
    return random_models.build(like, directory, rms_norm_eps=_EPSILON, **differs)
