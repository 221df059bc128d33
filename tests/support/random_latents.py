"""Tiny random-weight Hugging Face models that cache latents (MLA), for the torch engine: random_models.MLA, as their
checkpoints are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import random_families, random_models

_EPSILON = 1e-6  # the latent's norm has it in transformers whatever config.json says
_SIGMOID = dict(scoring_func="sigmoid")  # of V3's and GLM's experts; in their config.json
_GROUPS = dict(_SIGMOID, n_routed_experts=8, n_group=4, topk_group=2)
_YARN = dict(_SIGMOID, rope_parameters=random_models._LATENT_YARN)
_SMALL4 = {
    **random_models._BASE,
    **random_models._LATENT_EXPERTS,
    "model_type": "mistral4",
    "head_dim": 128,
    "rms_norm_eps": _EPSILON,
    "first_k_dense_replace": 0,
    "norm_topk_prob": True,
    "rope_parameters": {**random_families._MINISTRAL3, "beta_fast": 32.0, "beta_slow": 1.0},
}

# name: (key of random_models.MLA or a model_type, what differs from it or from random_models._LATENT)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek2-lite": ("deepseek2-lite", {}),
    "deepseek2": ("deepseek2", {}),
    "deepseek3": ("deepseek3", _GROUPS),
    "deepseek3-yarn": ("deepseek3", _YARN),
    "glm4-moe-lite": ("glm4-moe-lite", _SIGMOID),
    "youtu": ("youtu", {}),
    "mistral-small4": ("mistral3", dict(text_config=_SMALL4, vision_config=random_families._PIXTRAL)),
}


def build(name: str, directory: Path) -> Path:
    """Write random model `name`, a key of MODELS, into `directory` and return it."""
    like, differs = MODELS[name]
    if like in random_models.MLA:
        return random_models.build(like, directory, rms_norm_eps=_EPSILON, **differs)
    own = {**random_models._BASE, **random_models._LATENT, "rms_norm_eps": _EPSILON}
    return random_models.write(directory, like, differs or {k: v for k, v in own.items() if v is not None})
