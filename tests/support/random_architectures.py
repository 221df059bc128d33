"""Tiny random Hugging Face models of the architectures that upstream's converter and transformers share.

`build(name, directory)` writes one; names are those of ARCHITECTURES: transformers' class without "ForCausalLM" and
the like. All settings of the class's own configuration are its defaults, but for SMALL, where it has such a setting,
and for what ARCHITECTURES says of it: what a structure needs to be seen (a window shorter than the texts, layers of
each kind), and under "file" what the models on the hub have in config.json and transformers does not write.
random_models.py has the weights, the tokenizer and the models that the torch engine is proven with.

Not here are those whose tensors transformers writes under other names or in other shapes than the hub has them, so that
the converter reads no model of random weights: upstream_archs.py makes these but BitNet (DBRX, DeepSeek V3.2 and V4,
dots3, GLM 5, HY V4, Kimi Linear, MiMo V2, MiniMax M3,
Qwen3-VL MoE).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from intactkv_export import library
from tests.support import random_models
from tests.support.random_models import VOCAB

WINDOW = 16  # tokens: shorter than the prefixes of the tests

# Settings of text models, of any class that has them
SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    q_lora_rank=64,
    kv_lora_rank=256,
    qk_nope_head_dim=64,
    qk_rope_head_dim=64,
    v_head_dim=64,
    index_topk=2048,
    index_head_dim=128,
    index_n_heads=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=32,
    linear_value_head_dim=32,
    sliding_window=WINDOW,
    num_nextn_predict_layers=0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_SMALL_VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, depth=1, num_attention_heads=2, num_heads=2,
    embed_dim=32, out_hidden_size=128,
)  # fmt: skip
_MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [8, 12, 12]}
_MROPE32 = {**_MROPE, "mrope_section": [4, 6, 6]}  # of heads of 32 values
_MLA = dict(num_key_value_heads=4)
_WINDOWS = ["sliding_attention", "full_attention"] * 2
_IMAGE = dict(image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503)

# name: (transformers' class, what differs from its defaults and SMALL)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    name.removesuffix("ForCausalLM").removesuffix("ForConditionalGeneration").removesuffix("LMHeadModel"): (
        name,
        changes,
    )
    for name, changes in [
        ("AfmoeForCausalLM", dict(mup_enabled=True, file=dict(route_norm=True))),
        ("ApertusForCausalLM", {}),
        ("ArceeForCausalLM", {}),
        ("BloomForCausalLM", dict(hidden_size=256, n_head=4)),
        ("GlmForCausalLM", dict(hidden_size=256)),
        ("CohereForCausalLM", {}),
        ("Cohere2ForCausalLM", dict(file=dict(rotary_pct=1.0), num_attention_heads=2)),
        ("Cohere2MoeForCausalLM", {}),
        ("DeepseekV2ForCausalLM", _MLA),
        ("DeepseekV3ForCausalLM", dict(_MLA, file=dict(scoring_func="sigmoid"))),
        ("Glm4MoeLiteForCausalLM", dict(_MLA, file=dict(first_k_dense_replace=1, scoring_func="sigmoid"))),
        ("YoutuForCausalLM", _MLA),
        (
            "Dots1ForCausalLM",
            dict(
                file=dict(scoring_func="sigmoid"),
                n_shared_experts=1,
                num_key_value_heads=4,
                layer_types=["full_attention"] * 4,
            ),
        ),
        ("Ernie4_5ForCausalLM", {}),
        ("Ernie4_5_MoeForCausalLM", dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1)),
        ("ExaoneMoeForCausalLM", dict(layer_types=_WINDOWS, file=dict(scoring_func="sigmoid"))),
        ("Exaone4ForCausalLM", dict(sliding_window=None, layer_types=["full_attention"] * 4)),  # as those up to 1.2B
        ("FalconForCausalLM", dict(num_kv_heads=1, hidden_size=256)),
        (
            "FalconH1ForCausalLM",
            dict(file=dict(head_dim=32), mamba_d_ssm=256, mamba_n_heads=4, mamba_d_head=64, mamba_d_state=32),
        ),
        (
            "Gemma3nForCausalLM",
            dict(
                # llama.cpp has 10 sparse layers and 20 with a cache in its code. Those that share one have
                # tensors of their own in the file, which nobody reads
                file=dict(num_kv_shared_layers=2),
                num_hidden_layers=22,
                num_kv_shared_layers=0,
                layer_types=(["sliding_attention"] * 4 + ["full_attention"]) * 4
                + ["sliding_attention", "full_attention"],
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=256,
                altup_num_inputs=4,
                laurel_rank=64,
                activation_sparsity_pattern=[0.95] * 10 + [0.0] * 12,
                intermediate_size=[128] * 22,
            ),
        ),
        (
            "Gemma4ForCausalLM",
            dict(
                num_hidden_layers=6,
                num_experts=None,
                vocab_size_per_layer_input=VOCAB,
                hidden_size_per_layer_input=32,
                global_head_dim=128,
                num_kv_shared_layers=2,
                layer_types=["sliding_attention", "full_attention"] * 3,
            ),
        ),
        ("GlmMoeDsaForCausalLM", _MLA),
        ("Glm4ForCausalLM", {}),
        (
            "Glm4vForConditionalGeneration",
            dict(
                text_config=dict(
                    rope_parameters={**_MROPE, "mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
                )
            ),
        ),
        ("Glm4MoeForCausalLM", {}),
        ("GptOssForCausalLM", {}),
        ("GPT2LMHeadModel", dict(n_layer=2, n_head=4, file=dict(n_ctx=2048))),
        ("GPTNeoXForCausalLM", dict(file=dict(rotary_pct=0.25))),
        ("GraniteSWAForCausalLM", {}),
        ("GraniteMoeSWAForCausalLM", {}),
        (
            "BambaForCausalLM",
            dict(
                attn_layer_indices=[1, 3],
                mamba_n_heads=4,
                mamba_d_head=64,
                mamba_d_state=64,
                file=dict(attn_layer_indices=[1, 3], attn_rotary_emb=16),
            ),
        ),
        (
            "GraniteMoeHybridForCausalLM",
            dict(
                mamba_n_heads=4,
                mamba_d_head=64,
                mamba_d_state=64,
                layer_types=["mamba", "attention"] * 2,
                file=dict(layer_types=["mamba", "attention"] * 2),
            ),
        ),
        ("GraniteMoeForCausalLM", {}),
        ("GraniteMoeSharedForCausalLM", {}),
        ("HrmTextForCausalLM", {}),
        ("HunYuanDenseV1ForCausalLM", {}),
        (
            "HunYuanMoEV1ForCausalLM",
            dict(file=dict(moe_intermediate_size=[128] * 4, moe_topk=[2] * 4, num_shared_expert=[1] * 4)),
        ),
        ("HunYuanVLForConditionalGeneration", {}),
        ("HYV3ForCausalLM", {}),
        ("Jais2ForCausalLM", {}),
        ("JambaForCausalLM", dict(attn_layer_period=2, attn_layer_offset=1)),
        ("LagunaForCausalLM", dict(layer_types=_WINDOWS)),
        ("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"] * 2)),
        ("Lfm2MoeForCausalLM", dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1)),
        ("Llama4ForCausalLM", dict(attention_chunk_size=8192)),  # llama.cpp has no other
        ("FalconMambaForCausalLM", dict(intermediate_size=256)),
        ("MambaForCausalLM", dict(intermediate_size=256)),
        ("Mamba2ForCausalLM", dict(head_dim=64, num_heads=4, n_groups=2, state_size=64)),
        ("MellumForCausalLM", dict(layer_types=_WINDOWS)),
        ("MiniCPM3ForCausalLM", dict(_MLA, v_head_dim=32)),
        ("MiniMaxM2ForCausalLM", dict(file=dict(rotary_dim=32, scoring_func="sigmoid"))),
        ("MuseGlimmerForConditionalGeneration", {}),
        ("NemotronForCausalLM", dict(hidden_size=256)),
        (
            "NemotronHForCausalLM",
            dict(
                sliding_window=None,
                mamba_num_heads=4,
                mamba_head_dim=64,
                ssm_state_size=64,
                n_groups=2,
                moe_shared_expert_intermediate_size=64,
                layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
            ),
        ),
        ("OlmoForCausalLM", {}),
        ("Olmo2ForCausalLM", {}),
        ("Olmo3ForCausalLM", {}),
        ("PaddleOCRVLForConditionalGeneration", dict(text_config=dict(rope_parameters=_MROPE))),
        ("PhiForCausalLM", dict(num_key_value_heads=4, intermediate_size=512)),
        ("Qwen2VLForConditionalGeneration", dict(_IMAGE, text_config=dict(rope_parameters=_MROPE32))),
        ("Qwen2_5_VLForConditionalGeneration", dict(_IMAGE, text_config=dict(rope_parameters=_MROPE32))),
        ("Qwen3_5ForCausalLM", {}),
        ("Qwen3_5MoeForCausalLM", {}),
        ("Qwen3NextForCausalLM", {}),
        ("Qwen3VLForConditionalGeneration", dict(_IMAGE, text_config=dict(rope_parameters=_MROPE))),
        (
            "Qwen4ExpForCausalLM",
            dict(
                indexer_n_heads=4,
                indexer_kv_heads=1,
                indexer_head_dim=64,
                indexer_budget=2048,
                indexer_compress_ratio=4,
                ple_embed_dim=64,
                ngram_vocab_size_base=500,
                hc_lowrank=8,
                split_ngram_parts=4,
            ),
        ),
        ("SeedOssForCausalLM", {}),
        ("StableLmForCausalLM", {}),
        ("GPTBigCodeForCausalLM", {}),
        ("Starcoder2ForCausalLM", {}),
        (
            "Step3p7ForConditionalGeneration",
            dict(
                text_config=dict(
                    layer_types=_WINDOWS,
                    file=dict(
                        partial_rotary_factors=[1.0, 0.5] * 2, num_attention_groups=2, moe_num_experts=4, moe_top_k=2
                    ),
                )
            ),
        ),
        (
            "T5ForConditionalGeneration",
            dict(
                d_model=128,
                d_ff=128,
                num_layers=2,
                num_decoder_layers=2,
                num_heads=2,
                file=dict(decoder_start_token_id=0),
            ),
        ),
    ]
}


def _config(cls: Any, changes: dict[str, Any], small: dict[str, Any]) -> Any:
    """A configuration of this class: its defaults but for what is small and what is changed, parts of it alike."""
    default = cls()
    parts = getattr(cls, "sub_configs", {})
    known = {**getattr(cls, "attribute_map", {}), **default.to_dict()}
    settings = {k: v for k, v in small.items() if k in known}
    for part, part_cls in parts.items():
        if hasattr(part_cls, "model_type") and isinstance(getattr(default, part, None), part_cls):
            values = SMALL if part == "text_config" else _SMALL_VISION if part == "vision_config" else {}
            settings[part] = _config(part_cls, changes.pop(part, {}), values).to_dict()
    settings |= changes
    return cls(**json.loads(json.dumps(settings)))


def _without_file(changes: dict[str, Any], into: dict[str, Any]) -> dict[str, Any]:
    """The changes but for what only config.json has, which goes into `into`."""
    changes = dict(changes)
    into.update(changes.pop("file", {}))
    for part, values in changes.items():
        if part.endswith("_config"):
            below: dict[str, Any] = {}
            changes[part] = _without_file(values, below)
            into.update({part: below} if below else {})
    return changes


def build(name: str, directory: Path, *, seed: int = 0) -> Path:
    """Write random model `name`, a key of ARCHITECTURES, into `directory` and return it."""
    import torch
    import transformers

    cls, changes = ARCHITECTURES[name]
    only_in_file: dict[str, Any] = {}
    changes = _without_file(json.loads(json.dumps(changes)), only_in_file)
    config = _config(getattr(transformers, cls).config_class, changes, SMALL)
    torch.manual_seed(seed)
    model = getattr(transformers, cls)._from_config(config, dtype=torch.float32)
    random_models._fill(model, config.model_type, seed)
    model.save_pretrained(directory)
    random_models._tokenizer(directory)
    file = directory / "config.json"
    written = json.loads(file.read_text())
    for key, value in only_in_file.items():
        written[key] = {**written.get(key, {}), **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(written, indent=1))
    return directory


# Upstream's converter, as convert runs it, in one process, as most of its time goes into imports. Of every class the
# vocabulary is ours. Prints what it could not convert, and why.
_CONVERT = """
import logging, runpy, sys
converter, *directories = sys.argv[1:]
sys.path.insert(0, converter.rpartition("/")[0])
from pathlib import Path
from intactkv_export.models import weights
weights.settings_of_the_file(Path(converter))
import conversion
from conversion.base import TextModel
conversion.load_all_models()
def below(cls):
    return [cls, *(found for sub in cls.__subclasses__() for found in below(sub))]
for cls in below(TextModel):
    cls.set_vocab = TextModel._set_vocab_sentencepiece
logging.disable(logging.CRITICAL)
for directory in directories:
    sys.argv = [converter, directory, "--outtype", "f32", "--outfile", directory + ".gguf"]
    try:
        runpy.run_path(converter, run_name="__main__")
    except BaseException as error:
        said = str(error).strip().partition(chr(10))[0]
        print(f"{directory}\t{type(error).__name__}: {said}", flush=True)
"""


def to_gguf(directories: Iterable[Path]) -> dict[str, str]:
    """Write NAME.gguf beside each, F32. Returns {name: why it was not converted}."""
    command = [sys.executable, "-c", _CONVERT, str(library.converter_path()), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line]
    return {Path(directory).name: why for directory, why in lines}
