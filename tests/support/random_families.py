"""Tiny random-weight Hugging Face models of further families whose K and V the torch engine computes.

As random_models has them, which many tests build all of; these are for the engine's tests alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support import random_models
from tests.support.random_models import _BASE, _LLAMA3, VOCAB, _rope

_PARTIAL = dict(_rope(), partial_rotary_factor=0.5)
_YARN = _rope(150000.0, rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False)
_YARN["original_max_position_embeddings"] = 512
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_SHARED = dict(
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    n_group=1,
    topk_group=1,
)
_GRANITE = dict(embedding_multiplier=12.0, attention_multiplier=0.015625, residual_multiplier=0.22, logits_scaling=8.0)
_WINDOWS = dict(sliding_window=8, layer_types=["sliding_attention"] * 3 + ["full_attention"])
_COHERE = dict(tie_word_embeddings=True, logit_scale=0.1, rope_parameters=_rope())
_OSS = dict(_EXPERTS, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
_GEMMA4 = dict(
    num_hidden_layers=6,
    global_head_dim=128,
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=VOCAB,
    sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    tie_word_embeddings=True,
)
_PER_LAYER = dict(hidden_size_per_layer_input=16)
_K_IS_V = dict(attention_k_eq_v=True, num_global_key_value_heads=1)
_MOE4 = dict(enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=64)
_VISION4 = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16)
_GEMMA3N = dict(
    num_hidden_layers=6,
    num_kv_shared_layers=0,  # llama.cpp: those behind the first 20
    hidden_size_per_layer_input=256,
    vocab_size_per_layer_input=VOCAB,
    laurel_rank=64,
    sliding_window=8,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.95] * 6,
    intermediate_size=[256] * 6,
    tie_word_embeddings=True,
)
_OLMO3_YARN = dict(
    full_attention=_rope(
        rope_type="yarn",
        factor=8.0,
        original_max_position_embeddings=256,
        beta_fast=32.0,
        beta_slow=1.0,
        attention_factor=1.2079441541679836,
    ),
    sliding_attention=_rope(),
)
_TEMPERATURE = dict(random_models._BETAS, original_max_position_embeddings=16)  # fewer than the tests' texts have
_ALPHA = _rope(rope_type="dynamic", alpha=1000.0, factor=1.0)
_MISTRAL_SMALL = dict(architectures=["Mistral3ForConditionalGeneration"])  # llama.cpp's architecture is another

# name: (HF model_type, what differs from _BASE, what config.json says besides: real checkpoints do)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "olmo": ("olmo", dict(head_dim=None, rope_parameters=_rope()), {}),
    "olmo2": ("olmo2", dict(head_dim=None, rope_parameters=_rope()), {}),
    "olmo3": ("olmo3", dict(_WINDOWS, head_dim=None, rope_parameters=_rope()), {}),
    "cohere": ("cohere", dict(_COHERE, head_dim=None), {}),
    "cohere2": ("cohere2", dict(_COHERE, **_WINDOWS), {"rotary_pct": 1.0}),
    "glm": ("glm", dict(attention_bias=True, rope_parameters=_PARTIAL), {}),
    "glm4": ("glm4", dict(rope_parameters=_PARTIAL), {}),
    "glm4-moe": ("glm4_moe", dict(_SHARED, use_qk_norm=True, rope_parameters=_PARTIAL), {}),
    "glm4-moe-scaled": (
        "glm4_moe",
        dict(
            _SHARED,
            n_routed_experts=8,
            n_shared_experts=2,
            routed_scaling_factor=2.5,
            attention_bias=True,
            rope_parameters=_PARTIAL,
        ),
        {},
    ),
    "starcoder2": ("starcoder2", dict(head_dim=None, sliding_window=None, rope_parameters=_rope()), {}),
    "granitemoe": ("granitemoe", dict(_GRANITE, **_EXPERTS, head_dim=None, rope_parameters=_rope()), {}),
    "granitemoeshared": (
        "granitemoeshared",
        dict(_GRANITE, **_EXPERTS, head_dim=None, shared_intermediate_size=256, rope_parameters=_rope()),
        {},
    ),
    "ernie4.5": ("ernie4_5", dict(rope_parameters=_rope()), {}),
    "ernie4.5-moe": (
        "ernie4_5_moe",
        dict(
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=128,
            moe_num_shared_experts=1,
            moe_layer_start_index=1,
            moe_layer_interval=1,
            moe_layer_end_index=3,
            rope_parameters=_rope(),
        ),
        {},
    ),
    "exaone4": ("exaone4", dict(sliding_window=None, layer_types=["full_attention"] * 4, rope_parameters=_rope()), {}),
    "gpt-oss": ("gpt_oss", dict(_OSS, rope_parameters=_YARN), {}),
    "olmo3-yarn": ("olmo3", dict(_WINDOWS, head_dim=None, rope_parameters=_OLMO3_YARN), {}),
    "ministral3": ("ministral3", dict(sliding_window=None, rope_parameters=_TEMPERATURE), {}),
    "mistral-small3": ("mistral", dict(sliding_window=None, rope_parameters=_rope(1e6)), _MISTRAL_SMALL),
    "hunyuan": ("hunyuan_v1_dense", dict(rope_parameters=_ALPHA, max_position_embeddings=32768), {}),
    "hunyuan-moe": (
        "hunyuan_v1_moe",
        dict(num_experts=4, moe_topk=2, rope_parameters=_rope()),
        dict(moe_intermediate_size=[256] * 4, moe_topk=[2] * 4, num_shared_expert=[1] * 4),
    ),
    "minimax-m2": (
        "minimax_m2",
        dict(_EXPERTS, rope_parameters=_PARTIAL),
        dict(rotary_dim=32, scoring_func="sigmoid"),
    ),
    "seed-oss": ("seed_oss", dict(rope_parameters=_rope()), {}),
    "nemotron": ("nemotron", dict(head_dim=None, rope_parameters=_PARTIAL), {}),
    "stablelm": ("stablelm", dict(head_dim=None, rope_parameters=_PARTIAL), {}),
    "apertus": ("apertus", dict(rope_parameters=_LLAMA3), {}),
    "arcee": ("arcee", dict(rope_parameters=_rope()), {}),
    "gemma4": ("gemma4_text", {**_GEMMA4, **_PER_LAYER}, {}),
    "gemma4-shared": ("gemma4_text", {**_GEMMA4, **_PER_LAYER, "num_kv_shared_layers": 3}, {}),
    "gemma4-k-is-v": ("gemma4_text", dict(_GEMMA4, **_K_IS_V), {}),
    "gemma4-moe": ("gemma4_text", dict(_GEMMA4, **_K_IS_V, **_MOE4), {}),
    "gemma4-vision": ("gemma4", dict(text_config={**_BASE, **_GEMMA4}, vision_config=_VISION4), {}),
    "gemma3n": ("gemma3n_text", _GEMMA3N, {}),
}


def build_all(root: Path) -> dict[str, Path]:
    """{name: Hugging Face directory} of all in `root`, each with its F32 GGUF beside it as NAME.gguf."""
    return random_models.build_all(build, MODELS, root)


def build(name: str, directory: Path) -> Path:
    """Write random model `name`, a key of MODELS, into `directory` and return it."""
    model_type, differs, besides = MODELS[name]
    base = {} if "text_config" in differs else _BASE
    settings = {key: value for key, value in {**base, **differs}.items() if value is not None}
    if "sliding_window" in differs:
        settings["sliding_window"] = differs["sliding_window"]  # None is not the class's default
    random_models.write(directory, model_type, settings)
    random_models.say(directory, besides)
    return directory
