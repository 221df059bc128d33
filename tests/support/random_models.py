"""Tiny random-weight Hugging Face models, one for each structure whose K/V layout the torch engine must get
right.

`build(name, directory)` writes a directory that transformers loads and upstream's converter accepts:
config.json, model.safetensors (float32), a SentencePiece tokenizer trained on the spot (512 pieces, byte
fallback, ChatML markers as control tokens) and a chat template. About 1M to 4M parameters, head size 64, so
quantized caches use upstream's Hadamard rotation on them. The weights are no use for text: they are scaled so
that every layer, every bias and every head changes the K and V of the layers after it, which is what a test
of layout needs.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from intactkv_export import library

VOCAB = 512
LONGROPE_ORIG = 512  # tokens: a larger context of llama.cpp uses Phi-3's long factors, up to it the short ones

_BASE: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)


def _rope(theta: float = 10000.0, **scaling: Any) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default", **scaling}


def _longrope(n_rot: int) -> dict[str, Any]:
    pairs = n_rot // 2
    return _rope(
        rope_type="longrope",
        original_max_position_embeddings=LONGROPE_ORIG,
        short_factor=[1.0 + 0.02 * i for i in range(pairs)],
        long_factor=[1.5 + 0.25 * i for i in range(pairs)],
    )


_LLAMA3 = _rope(
    500000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=128,
)
_YARN = _rope(1000000.0, rope_type="yarn", factor=4.0, original_max_position_embeddings=512)
_EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
_QWEN_EXPERTS = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=128, decoder_sparse_step=1, mlp_only_layers=[]
)
_QWEN3_MOE = dict(_QWEN_EXPERTS, norm_topk_prob=True)
_GEMMA = dict(query_pre_attn_scalar=64, tie_word_embeddings=True, hidden_activation="gelu_pytorch_tanh")
# A window of 8 tokens: prefixes of the tests are longer, so a cache that drops what left the window is seen.
_GEMMA3: dict[str, Any] = dict(
    _GEMMA,
    num_hidden_layers=7,
    num_key_value_heads=1,
    sliding_window=8,
    layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(7)],
)
_GEMMA3_ROPE = {
    "full_attention": _rope(1000000.0, rope_type="linear", factor=8.0),
    "sliding_attention": _rope(),
}
_VISION = dict(
    mm_tokens_per_image=4,
    image_token_index=509,
    boi_token_index=510,
    eoi_token_index=511,
    vision_config=dict(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    ),
)
_PHI3 = dict(head_dim=None, sliding_window=None)

# name: (HF model_type, what differs from _BASE)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha": ("llama", dict(num_key_value_heads=4, rope_parameters=_rope())),
    "llama-gqa": ("llama", dict(rope_parameters=_rope(100000.0))),
    "llama-bias": ("llama", dict(attention_bias=True, rope_parameters=_rope())),
    "llama-llama3": ("llama", dict(rope_parameters=_LLAMA3)),
    "llama-linear": ("llama", dict(rope_parameters=_rope(rope_type="linear", factor=4.0))),
    "llama-yarn": ("llama", dict(rope_parameters=_YARN)),
    "mistral": ("mistral", dict(sliding_window=None, rope_parameters=_rope(1000000.0))),
    "mixtral": ("mixtral", dict(sliding_window=None, rope_parameters=_rope(1000000.0), **_EXPERTS)),
    "granite": (
        "granite",
        dict(
            head_dim=None,
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=8.0,
            rope_parameters=_rope(),
        ),
    ),
    "smollm3": ("smollm3", dict(head_dim=None, rope_parameters=_rope(5000000.0))),
    "qwen2": ("qwen2", dict(head_dim=None, rope_parameters=_rope(1000000.0))),
    "qwen2-yarn": ("qwen2", dict(head_dim=None, rope_parameters=_YARN)),
    "qwen3": ("qwen3", dict(rope_parameters=_rope(1000000.0))),
    "qwen2-moe": (
        "qwen2_moe",
        dict(_QWEN_EXPERTS, head_dim=None, shared_expert_intermediate_size=192, rope_parameters=_rope(1000000.0)),
    ),
    "qwen3-moe": ("qwen3_moe", dict(_QWEN3_MOE, rope_parameters=_rope(1000000.0))),
    "qwen3-moe-yarn": ("qwen3_moe", dict(_QWEN3_MOE, rope_parameters=_YARN)),
    "olmoe": (
        "olmoe",
        dict(head_dim=None, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, rope_parameters=_rope()),
    ),
    "qwen3-yarn": ("qwen3", dict(rope_parameters=_YARN)),
    "gemma": ("gemma", dict(num_key_value_heads=1, rope_parameters=_rope(), tie_word_embeddings=True)),
    "gemma2": ("gemma2", dict(_GEMMA, sliding_window=8, rope_parameters=_rope())),
    "gemma3": ("gemma3_text", dict(_GEMMA3, rope_parameters=_GEMMA3_ROPE)),
    "gemma3-vision": (
        "gemma3",
        dict(text_config={**_BASE, **_GEMMA3, "rope_parameters": _GEMMA3_ROPE}, **_VISION),
    ),
    "phi3": ("phi3", dict(_PHI3, rope_parameters=_rope())),
    "phi3-longrope": (
        "phi3",
        dict(_PHI3, original_max_position_embeddings=LONGROPE_ORIG, rope_parameters=_longrope(64)),
    ),
    "phi3-partial": (
        "phi3",
        dict(
            _PHI3,
            original_max_position_embeddings=LONGROPE_ORIG,
            partial_rotary_factor=0.75,
            rope_parameters=_longrope(48),
        ),
    ),
}

# One latent of kv_lora_rank + qk_rope_head_dim values a token, V is its first kv_lora_rank: as DeepSeek's, or smaller
_LATENT: dict[str, Any] = dict(
    head_dim=None,
    num_key_value_heads=4,
    num_hidden_layers=3,
    q_lora_rank=64,
    kv_lora_rank=256,
    qk_rope_head_dim=64,
    qk_nope_head_dim=64,
    v_head_dim=32,
    rope_parameters=_rope(),
)
_LATENT_EXPERTS: dict[str, Any] = dict(
    _LATENT,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    moe_intermediate_size=64,
    first_k_dense_replace=1,
)
_LATENT_YARN = dict(_YARN, mscale=0.707, mscale_all_dim=0.707)
MLA: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek2-lite": (
        "deepseek_v2",
        dict(_LATENT_EXPERTS, num_hidden_layers=26, q_lora_rank=None, kv_lora_rank=512, rope_parameters=_LATENT_YARN),
    ),
    "deepseek2": ("deepseek_v2", _LATENT_EXPERTS),
    "deepseek3": ("deepseek_v3", dict(_LATENT_EXPERTS, scoring_func="sigmoid")),
    "glm4-moe-lite": ("glm4_moe_lite", dict(_LATENT_EXPERTS, kv_lora_rank=512)),
}

# Not for the torch engine: YaRN betas that only llama.cpp's architecture has, a head that no block of a quantized cache
# divides, a sliding window that upstream's converter ignores
_BETAS = dict(_YARN, beta_fast=4.0, beta_slow=1.5, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.1)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ministral3": ("ministral3", dict(sliding_window=None, rope_parameters=_BETAS)),
    "llama-head80": ("llama", dict(head_dim=80, rope_parameters=_rope())),
    "mistral-window": ("mistral", dict(sliding_window=16, rope_parameters=_rope())),
    **MLA,
    "deepseek32": (
        "deepseek_v32",
        dict(_LATENT_EXPERTS, scoring_func="sigmoid", index_n_heads=4, index_head_dim=64, index_topk=8),
    ),
}


def build(name: str, directory: Path | str, *, seed: int = 0, **changes: Any) -> Path:
    """Write random model `name` (a key of MODELS or OTHERS), with changed settings, into `directory` and return it."""
    model_type, differs = {**MODELS, **OTHERS}[name]
    settings = {**({} if "text_config" in differs else _BASE), **differs, **changes}
    settings = {k: v for k, v in settings.items() if v is not None}
    for key in differs.keys() & {"sliding_window", "q_lora_rank"}:
        settings[key] = differs[key]  # None is not the class's default
    return write(directory, model_type, settings, seed)


def write(directory: Path | str, model_type: str, settings: dict[str, Any], seed: int = 0) -> Path:
    """A random model of a class of transformers, with settings of its configuration, in `directory`."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    from intactkv_export.torch_model import from_huggingface

    directory = Path(directory)
    # Copied through JSON: a config class changes the dictionaries that it is given.
    config = AutoConfig.for_model(model_type, **json.loads(json.dumps(settings)))
    auto_class = AutoModelForImageTextToText if "vision_config" in settings else from_huggingface.auto_class(config)
    model = auto_class.from_config(config, dtype=torch.float32)
    _fill(model, model_type, seed)
    model.save_pretrained(directory)
    _tokenizer(directory)
    return directory


def _fill(model: Any, model_type: str, seed: int) -> None:
    """Random weights: matrices keep the size of their input, norms scatter around one, biases are large."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    norm_mean = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma multiplies by 1 + weight
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim == 1:
                p.copy_(0.5 * noise if name.endswith("bias") else norm_mean + 0.2 * noise)
            elif "embed" in name:
                p.copy_(noise)
            else:
                p.copy_(noise / p.shape[-1] ** 0.5)
        for name, p in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # decides which experts are chosen
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))


def _tokenizer(directory: Path) -> None:
    import pydoc_data.topics as topics

    import sentencepiece

    model = io.BytesIO()
    text = "\n".join(topics.topics[k] for k in sorted(topics.topics))[:100_000]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_writer=model,
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        # llama.cpp looks <|endoftext|> up in every model whose name contains "phi-3" or "phi3"
        control_symbols=["<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "LlamaTokenizer",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "add_bos_token": True,
                "add_eos_token": False,
                "chat_template": "{{ bos_token }}{% for m in messages %}"
                "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            }
        )
    )


def build_all(make: Callable[[str, Path], Path], names: Iterable[str], root: Path) -> dict[str, Path]:
    """{name: Hugging Face directory} of each in `root`, by make(name, directory), with its F32 GGUF beside it as
    NAME.gguf."""
    made = {name: make(name, root / name) for name in names}
    to_gguf(made.values())
    return made


def say(directory: Path, settings: dict[str, Any]) -> None:
    """Have a model's config.json say what those of real checkpoints do; None: without this one."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **settings}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in settings or v is not None}))


def to_gguf(directories: Iterable[Path]) -> None:
    """Write NAME.gguf beside each: upstream's converter, F32, in one process, as most of its time goes into imports.

    Architectures whose tokenizer it looks for as BPE alone get ours as well.
    """
    code = (
        "import pathlib, runpy, sys\n"
        "converter, *dirs = sys.argv[1:]\n"
        "sys.path.insert(0, converter.rpartition('/')[0])\n"
        "from intactkv_export.models import weights\n"
        "weights.settings_of_the_file(pathlib.Path(converter))\n"
        "from conversion.base import TextModel\n"
        "from conversion.chatglm import ChatGLMModel\n"
        "from conversion.command_r import Cohere2MoeModel\n"
        "from conversion.exaone import Exaone4Model\n"
        "from conversion.gemma import Gemma4Model\n"
        "from conversion.glm import Glm4Model\n"
        "from conversion.hunyuan import HunYuanModel, HunYuanMoEModel, HYV3Model\n"
        "from conversion.nemotron import NemotronHModel\n"
        "from conversion.stablelm import StableLMModel\n"
        "TextModel._set_vocab_gpt2 = TextModel._set_vocab_glm = TextModel._set_vocab_sentencepiece\n"
        "Cohere2MoeModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece\n"
        "for own in (ChatGLMModel, Exaone4Model, Gemma4Model, Glm4Model, HunYuanModel, HunYuanMoEModel, HYV3Model,\n"
        "            NemotronHModel, StableLMModel):\n"
        "    own.set_vocab = TextModel._set_vocab_sentencepiece\n"
        "for d in dirs:\n"
        "    sys.argv = [converter, d, '--outtype', 'f32', '--outfile', d + '.gguf']\n"
        "    runpy.run_path(converter, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(library.converter_path()), *map(str, directories)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
