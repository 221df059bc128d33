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

_MROPE = _rope(1000000.0, mrope_section=[8, 12, 12])
_IMAGE = dict(image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503)
_EYE = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=256)
# a large epsilon: llama.cpp has none for these
_QWEN_VL = {**_BASE, "head_dim": None, "rms_norm_eps": 1e-3, "rope_parameters": _MROPE}
# as the first Qwen2-VL and Qwen2.5-VL on the hub have it: the text's settings beside the vision's
_FLAT = {
    **_BASE,
    "text_config": None,
    "head_dim": None,
    "rms_norm_eps": 1e-3,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
_FLAT["rope_scaling"] = {"type": "mrope", "mrope_section": [8, 12, 12]}
# 61 and 62 of the 64 pairs are turned by neither of the three: llama.cpp leaves them as they are
_IMROPE = _rope(10000.0, mrope_section=[24, 20, 20], mrope_interleaved=True)
_EYE3 = dict(_EYE, deepstack_visual_indexes=[0], num_position_embeddings=16)
_PIXTRAL = dict(model_type="pixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
_PIXTRAL |= dict(head_dim=16, image_size=28, patch_size=14)
_MINISTRAL3 = _rope(
    1000000.0,
    rope_type="yarn",
    factor=16.0,
    original_max_position_embeddings=128,
    beta_fast=4.0,
    beta_slow=1.5,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)
_SCOUT = _rope(
    500000.0,
    rope_type="llama3",
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=1.0,
    original_max_position_embeddings=8192,
)
_LLAMA4 = dict(intermediate_size=64, intermediate_size_mlp=256, num_experts_per_tok=1)
_SCOUT4 = dict(_LLAMA4, num_local_experts=4, interleave_moe_layer_step=1, rope_parameters=_SCOUT)
_MAVERICK4 = dict(_LLAMA4, num_local_experts=128, interleave_moe_layer_step=2, use_qk_norm=False)
_VISION_LLAMA4 = dict(
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
    vision_output_dim=32,
    projector_input_dim=32,
    projector_output_dim=32,
)
_DYNAMIC = _rope(10000.0, rope_type="dynamic", alpha=1000.0, factor=1.0, beta_fast=32, beta_slow=1)
_HUNYUAN = dict(head_dim=128, max_position_embeddings=32768, rope_parameters=_DYNAMIC)
_HUNYUAN_MOE = dict(moe_intermediate_size=[256] * 4, moe_topk=[2] * 4, num_shared_expert=[1] * 4)
_HY3 = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, num_shared_experts=1)
_TWO_WINDOWS = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2)
_OLD = {key: _BASE[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
_GPT2 = dict(_OLD, n_embd=256, n_layer=4, n_head=4, n_positions=2048)
_NEOX = dict(num_key_value_heads=None, head_dim=None, intermediate_size=512)

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
    "mistral3": (  # of Mistral Small 3's architecture in llama.cpp
        "mistral",
        dict(sliding_window=None, rope_parameters=_rope(1e6)),
        dict(architectures=["Mistral3ForConditionalGeneration"]),
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
    "qwen2-vl": (
        "qwen2_vl",
        dict(text_config=_QWEN_VL, vision_config=dict(_EYE, embed_dim=32, hidden_size=256), **_IMAGE),
        _FLAT,
    ),
    "qwen2.5-vl": ("qwen2_5_vl", dict(text_config=_QWEN_VL, vision_config=_EYE, **_IMAGE), {}),
    "qwen2.5-vl-flat": ("qwen2_5_vl", dict(text_config=_QWEN_VL, vision_config=_EYE, **_IMAGE), _FLAT),
    "qwen3-vl": (
        "qwen3_vl",
        dict(
            text_config={**_BASE, "head_dim": 128, "rope_parameters": _IMROPE},
            vision_config=_EYE3,
            **_IMAGE,
        ),
        {},
    ),
    "qwen3-vl-moe": (
        "qwen3_vl_moe",
        dict(
            text_config={
                **_BASE,
                "head_dim": 128,
                "rope_parameters": _IMROPE,
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 96,
                "norm_topk_prob": True,
            },
            vision_config=_EYE3,
            **_IMAGE,
        ),
        {},
    ),
    "mistral-small3": (
        "mistral3",
        dict(
            text_config={**_BASE, "model_type": "mistral", "head_dim": 32, "rope_parameters": _rope(1e9)},
            vision_config=_PIXTRAL,
        ),
        {},
    ),
    "ministral3": ("ministral3", dict(rope_parameters=_MINISTRAL3), {}),
    "ministral3-vision": (
        "mistral3",
        dict(
            text_config={**_BASE, "model_type": "ministral3", "rope_parameters": _MINISTRAL3},
            vision_config=_PIXTRAL,
        ),
        {},
    ),
    "minimax-m2": ("minimax_m2", dict(_EXPERTS, rotary_dim=32), {"scoring_func": "sigmoid"}),
    "llama4": ("llama4_text", _SCOUT4, {}),
    "llama4-128": ("llama4_text", dict(_MAVERICK4, rope_parameters=_rope(500000.0)), {}),
    "llama4-vision": ("llama4", dict(text_config={**_BASE, **_SCOUT4}, vision_config=_VISION_LLAMA4), {}),
    "dots1": (
        "dots1",
        dict(_SHARED, head_dim=None, num_key_value_heads=4, routed_scaling_factor=2.5, rope_parameters=_rope()),
        {"scoring_func": "sigmoid"},
    ),
    "hy3": ("hy_v3", dict(_HY3, rope_parameters=_rope()), {}),
    "hunyuan": ("hunyuan_v1_dense", _HUNYUAN, {}),
    "hunyuan-moe": (
        "hunyuan_v1_moe",
        dict(_HUNYUAN, num_attention_heads=2, num_key_value_heads=1, num_experts=4, moe_topk=2),
        _HUNYUAN_MOE,
    ),
    "jais2": ("jais2", dict(head_dim=None, rope_parameters=_rope()), {}),
    "cohere2-moe": (
        "cohere2_moe",
        dict(
            _TWO_WINDOWS, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, logit_scale=0.1, rms_norm_eps=None
        ),
        {},
    ),
    "exaone-moe": (
        "exaone_moe",
        dict(_TWO_WINDOWS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, rope_parameters=_rope()),
        {"scoring_func": "sigmoid"},
    ),
    "granite-swa": ("granite_swa", dict(_GRANITE, **_TWO_WINDOWS, head_dim=None, rope_parameters=_rope()), {}),
    "granite-moe-swa": (
        "granitemoe_swa",
        dict(_GRANITE, **_TWO_WINDOWS, **_EXPERTS, head_dim=None, rope_parameters=_rope()),
        {},
    ),
    "afmoe": (
        "afmoe",
        dict(
            _WINDOWS,
            num_experts=4,
            num_experts_per_tok=2,
            num_shared_experts=1,
            num_dense_layers=1,
            moe_intermediate_size=64,
            mup_enabled=True,
            route_scale=2.826,
            rope_parameters=_rope(),
        ),
        {"route_norm": True, "score_func": "sigmoid"},
    ),
    "hrm": (
        "hrm_text",
        dict(num_hidden_layers=1, num_key_value_heads=None, rope_parameters=_rope()),
        {},
    ),
    "glm4v": (
        "glm4v",
        dict(
            text_config={**_BASE, "rope_parameters": dict(_PARTIAL, mrope_section=[4, 6, 6])},
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=256),
            image_token_id=500,
            video_token_id=501,
            image_start_token_id=502,
            image_end_token_id=503,
            video_start_token_id=504,
            video_end_token_id=505,
        ),
        {},
    ),
    "paddleocr-vl": (
        "paddleocr_vl",
        dict(
            text_config={**_BASE, "rope_parameters": dict(_MROPE)},
            vision_config=dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
            **_IMAGE,
        ),
        {},
    ),
    "phi2": ("phi", dict(_NEOX, intermediate_size=1024, rope_parameters=_PARTIAL), {}),
    "falcon": ("falcon", dict(_NEOX, num_kv_heads=1, rope_parameters=_rope()), {}),
    "gpt-neox": (
        "gpt_neox",
        dict(_NEOX, rope_parameters=dict(_rope(), partial_rotary_factor=0.25)),
        {"rotary_pct": 0.25},
    ),
    "gpt2": ("gpt2", _GPT2, {"n_ctx": 2048}),
    "starcoder": ("gpt_bigcode", _GPT2, {}),
    "bloom": ("bloom", dict(_OLD, hidden_size=256, n_layer=4, n_head=4), {}),
}


def build_all(root: Path) -> dict[str, Path]:
    """{name: Hugging Face directory} of all in `root`, each with its F32 GGUF beside it as NAME.gguf."""
    return random_models.build_all(build, MODELS, root)


def build(name: str, directory: Path) -> Path:
    """Write random model `name`, a key of MODELS, into `directory` and return it."""
    model_type, differs, besides = MODELS[name]
    base = {} if differs.keys() & {"text_config", "n_layer"} else _BASE
    settings = {key: value for key, value in {**base, **differs}.items() if value is not None}
    if "sliding_window" in differs:
        settings["sliding_window"] = differs["sliding_window"]  # None is not the class's default
    random_models.write(directory, model_type, settings)
    random_models.say(directory, besides)
    if model_type == "qwen3_vl_moe":
        _transpose_experts(directory / "model.safetensors")
    return directory


def _transpose_experts(path: Path) -> None:
    """As the hub has them, [experts, columns, rows]: transformers reads them so, and writes them the other way."""
    from safetensors.torch import load_file, save_file

    from intactkv_export.torch_model import experts

    tensors = load_file(path)
    turned = {name: x.transpose(1, 2).contiguous() if experts.is_stacked(name) else x for name, x in tensors.items()}
    save_file(turned, path, metadata={"format": "pt"})
