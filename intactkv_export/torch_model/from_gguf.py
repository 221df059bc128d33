"""A GGUF as a transformers model: its header becomes a configuration, its tensors are dequantized by gguf-py.

transformers reads GGUFs too, but leaves out what some models cannot do without: RoPE scaling, the size of a head that
is not n_embd / n_head, Granite's multipliers. What is here is proven against the directories that the GGUFs were
converted from (tests/torch_model/test_model.py); the rest is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from intactkv_export.errors import IntactKVError
from intactkv_export.models import NORMALIZED, RECURRENT, gguf_file, is_reordered
from intactkv_export.torch_model import experts
from intactkv_export.torch_model.from_huggingface import fix_longrope
from intactkv_export.torch_model.rope_pairs import neighbours_to_halves
from intactkv_export.torch_model.rounding import rounded, straight

# Architecture of the GGUF -> model_type of transformers
_MODEL_TYPES = {
    "llama": "llama",
    "granite": "granite",
    "smollm3": "smollm3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "arcee": "arcee",
    "seed_oss": "seed_oss",
    "exaone4": "exaone4",
    "starcoder2": "starcoder2",
    "stablelm": "stablelm",
    "nemotron": "nemotron",
    "lfm2": "lfm2",
    "qwen35": "qwen3_5_text",
}
_WITH_EXPERTS = {
    "llama": "mixtral",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
}
# Proven as their checkpoints mostly are: RoPE that is not scaled, no sliding window, no matrices that are not there
_PLAIN = {"olmo2", "arcee", "seed_oss", "exaone4", "starcoder2", "stablelm", "nemotron", "granitemoe"}
_NOT_PLAIN = ("rope_freqs.weight", "blk.0.ffn_gate_shexp.weight")
# Type of a matrix -> what activations are rounded to before it; q8_K for all others
_ACTIVATIONS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_ACTIVATIONS |= dict.fromkeys(("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"), "q8_0")
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # LongRoPE's, float32 [n_rot/2]
_INSTEAD = (
    "calibrate, analyze and --prefix-tokens auto, which run the quantized GGUF in torch, cannot be used with it; a "
    "prefix without training can be made (--engine torch: of a Hugging Face directory)"
)


def check_header(path: str | Path, name: str | Path | None = None, states: bool = True) -> None:
    """Raises what load() would, as far as the header tells; a GGUF with a vocabulary and no tensors is enough.

    name: what the error calls it; None: its path. states: whether the caller carries those of recurrent layers.
    """
    model = _Model(Path(name or path), [gguf_file.read(file) for file in gguf_file.shards(path)])
    if model.model_type in RECURRENT and not states:
        raise IntactKVError(
            f"{model.path} of architecture {model.arch!r} has states of recurrent layers, which cannot be analyzed "
            "yet: give the number of a prefix's tokens yourself"
        )
    model.rope()


def load(
    path: str | Path,
    device: str,
    dtype: str,
    attention: str,
    round_activations: bool = False,
    rope_factors: str | None = None,
) -> Any:
    """A causal language model of transformers with the GGUF's weights, in evaluation mode, on the device.

    round_activations: to 8 bits before they meet quantized weights, as llama.cpp's CPU backend does
    (vec_dot_type of type_traits_cpu in ggml-cpu.c); gradients pass that straight through. rope_factors: see
    from_huggingface.fix_longrope().

    Raises IntactKVError if the GGUF is damaged or incomplete, or the architecture, RoPE scaling or a tensor type is
    not among those that are proven.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    model = _Model(Path(path), [gguf_file.read(file) for file in gguf_file.shards(path)])
    config = AutoConfig.for_model(**model.config())
    fix_longrope(config, rope_factors, path)
    attention = "eager" if config.model_type == "gemma2" else attention
    with init_empty_weights(include_buffers=False):
        net = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    experts.set_up(net, device, round_activations)
    weights = dict(model.weights(list(net.state_dict()), net.dtype, device))
    net.load_state_dict(weights, strict=False, assign=True)
    net.tie_weights()
    missing = sorted(name for name, weight in net.state_dict().items() if weight.is_meta)
    if missing:
        raise IntactKVError(
            f"{path} lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}: convert the model again"
        )
    if model.llama3_factors is not None:
        rotary = net.get_decoder().rotary_emb
        rotary.inv_freq = rotary.inv_freq / model.llama3_factors
    if round_activations:
        model.round_activations(net)
    return net.eval().to(device)


class _Model:
    """The files of one GGUF model."""

    def __init__(self, path: Path, files: list[gguf_file.Gguf]) -> None:
        self.path, self.file = path, files[0].path
        self.values = files[0].values
        self.tensors = {tensor.name: (file.path, tensor) for file in files for tensor in file.tensors}
        self.arch = str(self.values.get("general.architecture"))
        with_experts = bool(self.values.get(f"{self.arch}.expert_count"))
        self.model_type = (_WITH_EXPERTS if with_experts else _MODEL_TYPES).get(self.arch)
        if self.model_type is None:
            raise IntactKVError(
                f"{path} is of architecture {self.arch!r}{' with experts' if with_experts else ''}, which torch cannot "
                f"read from a GGUF, only {', '.join(_MODEL_TYPES)}, and with experts {', '.join(_WITH_EXPERTS)}: "
                f"{_INSTEAD}"
            )
        self._check_longrope()
        self._check_plain()
        scale = self.get("expert_weights_scale", 1.0)
        if scale not in (0.0, 1.0):
            raise IntactKVError(
                f"{path} multiplies what its experts give by {scale}, which torch cannot read from a GGUF: {_INSTEAD}"
            )

    def _check_plain(self) -> None:
        keys = [key for key in ("attention.sliding_window", "rope.scaling.factor") if self.get(key, 0)]
        if self.arch in _PLAIN and (found := keys + [name for name in _NOT_PLAIN if name in self.tensors]):
            raise IntactKVError(
                f"{self.path} of architecture {self.arch!r} has {found[0]}, with which torch cannot read a GGUF of it: "
                f"{_INSTEAD}"
            )

    def _check_longrope(self) -> None:
        factors = {_LONG, _SHORT} & self.tensors.keys()
        scaled = self.get("rope.scaling.attn_factor", 1.0) != 1.0
        if self.arch != "phi3" and (factors or scaled):
            raise IntactKVError(
                f"{self.path} of architecture {self.arch!r} scales its RoPE as LongRoPE does, which torch reads from a "
                f"GGUF of architecture 'phi3' only: {_INSTEAD}"
            )
        if self.tensors and (len(factors) == 1 or (scaled and not factors)):  # a header alone has no tensors
            raise IntactKVError(
                f"{self.path} has LongRoPE and not both of {_LONG} and {_SHORT}, which torch needs from a GGUF: "
                "convert the model again"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the header, below the architecture's name."""
        value = self.values.get(f"{self.arch}.{key}", default)
        if value is None and default is None:
            raise IntactKVError(f"{self.path} does not give {self.arch}.{key} as one number: convert the model again")
        return value

    def config(self) -> dict[str, Any]:
        """Arguments of AutoConfig.for_model()."""
        heads, n_embd = self.get("attention.head_count"), self.get("embedding_length")
        head_dim = self.get("attention.key_length", n_embd // heads)
        config = {
            "model_type": self.model_type,
            "vocab_size": self.tensors["token_embd.weight"][1].shape[1],
            "hidden_size": n_embd,
            "intermediate_size": self.get("feed_forward_length"),
            "num_hidden_layers": self.get("block_count") - self.get("nextn_predict_layers", 0),
            "num_attention_heads": heads,
            "num_key_value_heads": self._n_head_kv(heads, head_dim),
            "head_dim": head_dim,
            "max_position_embeddings": self.get("context_length"),
            **self._epsilon(),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "attention_bias": "blk.0.attn_q.bias" in self.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            "rope_parameters": self.rope(),
            # a padding token of the class's own would be another vocabulary's
            **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
        }
        return config | self._own(head_dim, n_embd // heads)

    def _n_head_kv(self, heads: int, head_dim: int) -> int:
        """The header of a hybrid has a list, 0 where a layer has none: then as the layers' own matrices say."""
        if self.model_type not in RECURRENT:
            return int(self.get("attention.head_count_kv", heads))
        first = next((x for name, (_, x) in self.tensors.items() if name.endswith(".attn_k.weight")), None)
        if first is None:
            raise IntactKVError(f"{self.path} has no attention layer, and torch can train nothing else: {_INSTEAD}")
        return first.shape[1] // head_dim

    def _kinds(self, recurrent: str, sign: str) -> list[str]:
        """layer_types of a hybrid, whose recurrent layers have a tensor of this name."""
        n_layer = self.get("block_count") - self.get("nextn_predict_layers", 0)
        return [recurrent if f"blk.{il}.{sign}" in self.tensors else "full_attention" for il in range(n_layer)]

    def _epsilon(self) -> dict[str, Any]:
        """Of the norms: those that are no RMS norms have another key, and as many names as architectures."""
        names = {"starcoder2": "norm_epsilon", "stablelm": "layer_norm_eps", "nemotron": "norm_eps"}
        if self.arch == "lfm2":
            return {"norm_eps": self.get("attention.layer_norm_rms_epsilon")}
        if self.arch in names:
            return {names[self.arch]: self.get("attention.layer_norm_epsilon")}
        return {"rms_norm_eps": self.get("attention.layer_norm_rms_epsilon")}

    def _own(self, head_dim: int, embd_per_head: int) -> dict[str, Any]:
        """What only some architectures have; as llama.cpp's src/models/ARCH.cpp reads it."""
        n_layer = self.get("block_count")
        if self.arch in ("granite", "granitemoe"):
            keys = {"embedding_multiplier": "embedding_scale", "attention_multiplier": "attention.scale",
                    "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}  # fmt: skip
            return {name: self.get(key) for name, key in keys.items()} | self._experts()
        if self.arch in ("stablelm", "nemotron"):
            rotary = self.get("rope.dimension_count", head_dim) / head_dim
            return {
                "partial_rotary_factor": rotary,
                "rope_parameters": self.rope() | {"partial_rotary_factor": rotary},
                "use_qkv_bias": "blk.0.attn_q.bias" in self.tensors,
                "qk_layernorm": "blk.0.attn_q_norm.weight" in self.tensors,
                "use_parallel_residual": "blk.0.ffn_norm.weight" not in self.tensors,
            }
        if self.arch in ("starcoder2", "exaone4"):
            return {"sliding_window": None, "layer_types": ["full_attention"] * n_layer}
        if self.arch == "phi3":
            rotary = self.get("rope.dimension_count", head_dim) / head_dim
            n_ctx_orig = self.rope().get("original_max_position_embeddings", self.get("context_length"))
            return {
                "sliding_window": None,
                "partial_rotary_factor": rotary,
                "original_max_position_embeddings": n_ctx_orig,  # the class has a default, and prefers it to the RoPE's
            }
        if self.arch == "lfm2":
            return {
                "layer_types": self._kinds("conv", "shortconv.conv.weight"),
                "conv_L_cache": self.get("shortconv.l_cache"),
                "conv_bias": "blk.0.shortconv.conv.bias" in self.tensors,
                "block_auto_adjust_ff_dim": False,
            }
        if self.arch == "qwen35":
            n_head_v = self.get("ssm.time_step_rank")
            rotary = self.get("rope.dimension_count") / head_dim
            return {
                "layer_types": self._kinds("linear_attention", "ssm_conv1d.weight"),
                "linear_conv_kernel_dim": self.get("ssm.conv_kernel"),
                "linear_num_key_heads": self.get("ssm.group_count"),
                "linear_key_head_dim": self.get("ssm.state_size"),
                "linear_num_value_heads": n_head_v,
                "linear_value_head_dim": self.get("ssm.inner_size") // n_head_v,
                "partial_rotary_factor": rotary,
                "rope_parameters": self.rope() | {"partial_rotary_factor": rotary},
            }
        if self.arch == "qwen2":
            return {"sliding_window": None, "use_sliding_window": False}
        if self.get("expert_count", 0):
            return self._experts()
        if self.arch == "gemma2":
            return {
                "attn_logit_softcapping": self.get("attn_logit_softcapping", 50.0),
                "final_logit_softcapping": self.get("final_logit_softcapping", 30.0),
                "sliding_window": self.get("attention.sliding_window", 4096),
                "query_pre_attn_scalar": embd_per_head if n_layer == 46 else head_dim,  # 46: Gemma 2 27B
            }
        if self.arch == "gemma3":
            return {
                "final_logit_softcapping": self.get("final_logit_softcapping", 0.0) or None,
                "sliding_window": self.get("attention.sliding_window", 0) or None,
                "query_pre_attn_scalar": embd_per_head if n_layer == 62 else head_dim,  # 62: Gemma 3 27B
                "layer_types": ["full_attention" if il % 6 == 5 else "sliding_attention" for il in range(n_layer)],
                "rope_parameters": {
                    "full_attention": self.rope(),
                    "sliding_attention": {"rope_type": "default", "rope_theta": self.get("rope.freq_base_swa", 1e4)},
                },
            }
        return {}

    def _experts(self) -> dict[str, Any]:
        """Of a mixture of experts. Whether the weights of those chosen add up to 1 is not in the header."""
        if not self.get("expert_count", 0):
            return {}
        n_ff, n_used = self.get("feed_forward_length"), self.get("expert_used_count")
        return {
            "num_local_experts" if self.arch in ("llama", "granitemoe") else "num_experts": self.get("expert_count"),
            "num_experts_per_tok": n_used,
            "norm_topk_prob": NORMALIZED.get(str(self.model_type), True),
            "moe_intermediate_size": self.get("expert_feed_forward_length", n_ff // n_used),
            "shared_expert_intermediate_size": self.get("expert_shared_feed_forward_length", n_ff),
            "sliding_window": None,
            "use_sliding_window": False,
            "qkv_bias": "blk.0.attn_q.bias" in self.tensors,
        }

    def rope(self) -> dict[str, Any]:
        """rope_parameters of transformers."""
        base = {"rope_theta": self.get("rope.freq_base", 1e4)}
        if long := gguf_file.longrope(self.file):
            return base | {
                "rope_type": "longrope",
                "short_factor": self._dequantized(_SHORT).tolist(),
                "long_factor": self._dequantized(_LONG).tolist(),
                "original_max_position_embeddings": long.n_ctx_orig,
                "attention_factor": self.get("rope.scaling.attn_factor", 1.0),
            }
        kind = self.get("rope.scaling.type", "none")
        if kind == "none":
            return base | {"rope_type": "default"}
        if kind not in ("linear", "yarn"):
            raise IntactKVError(
                f"{self.path} has RoPE scaling {kind!r}, and torch reads only linear and yarn from a GGUF: {_INSTEAD}"
            )
        base |= {"rope_type": kind, "factor": self.get("rope.scaling.factor")}
        if kind == "yarn":
            base["original_max_position_embeddings"] = self.get("rope.scaling.original_context_length")
        return base

    @property
    def llama3_factors(self) -> Tensor | None:
        """What divides each RoPE frequency, [n_rot/2]: Llama 3's scaling, worked out by the converter."""
        name = "rope_freqs.weight"
        return torch.from_numpy(self._dequantized(name)) if name in self.tensors else None

    def weights(self, names: list[str], dtype: torch.dtype, device: str) -> Iterator[tuple[str, Tensor]]:
        """Each of the transformers model's tensors that the GGUF has."""
        for name in names:
            own = self._own_names(name)
            if not all(x in self.tensors for x in own):
                continue
            if experts.is_stacked(name):
                yield name, self._stacked(own, dtype, device)
            else:
                weight = self._in_order(name, self._dequantized(own[0]))
                yield name, torch.from_numpy(np.ascontiguousarray(weight)).to(device, dtype)

    def _stacked(self, names: list[str], dtype: torch.dtype, device: str) -> Tensor:
        """Matrices of all experts, those of each one above the other, [n_expert, rows, columns].

        One at a time: a layer's experts may be most of what the memory holds.
        """
        shapes = [self.tensors[name][1].shape for name in names]  # columns, rows, experts
        n_rows = [shape[1] for shape in shapes]
        out = torch.empty(shapes[0][2], sum(n_rows), shapes[0][0], dtype=dtype, device=device)
        for i in range(len(out)):
            for part, name in zip(out[i].split(n_rows), names, strict=True):
                part.copy_(torch.from_numpy(self._dequantized(name, i)))
        return out

    def round_activations(self, net: Any) -> None:
        """Before each matrix of the net, round what comes in as ggml does for that matrix's type."""
        for name, module in net.named_modules():
            if isinstance(module, torch.nn.Linear):
                (own,) = self._own_names(f"{name}.weight")
                kind = self._activations(own if own in self.tensors else "token_embd.weight")  # tied
                module.register_forward_pre_hook(lambda _, x, kind=kind: (_rounded(x[0], kind),))
            elif experts.are(module):
                first, last = (self._activations(self._own_names(f"{name}.{x}")[0]) for x in experts.PARTS)
                module.round_inputs = partial(_rounded, kind=first), partial(_rounded, kind=last)

    def _activations(self, name: str) -> str:
        """What activations are rounded to before they meet a matrix."""
        return _ACTIVATIONS.get(self._kind(self.tensors[name][1]).name, "q8_K")

    def _own_names(self, name: str) -> list[str]:
        """The GGUF's name of a tensor of transformers, several of one that holds several; "" if it has none."""
        name = name.replace(".block_sparse_moe.", ".mlp.").replace(
            ".mlp.router.", ".mlp.gate."
        )  # names that gguf-py knows
        name = name.replace(".dt_bias", ".dt_proj.bias")
        parts = experts.parts(name) if experts.is_stacked(name) else [name]
        return [self._names.get_name(part, try_suffixes=(".weight", ".bias")) or "" for part in parts]

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        arch = next(key for key, own in gguf.MODEL_ARCH_NAMES.items() if own == self.arch)
        return gguf.get_tensor_name_map(arch, self.get("block_count"))

    def _in_order(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Undo what upstream's converter does to a tensor of transformers."""
        if ".linear_attn." in name:
            return self._of_delta_net(name.rpartition(".linear_attn.")[2].removesuffix(".weight"), weight)
        one_more = self.arch.startswith("gemma") or self.arch in ("nemotron", "qwen35")
        if one_more and name.endswith("norm.weight"):
            return weight - 1
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}.get(name.split(".")[-2])
        if heads and is_reordered(str(self.model_type)):
            by_head = weight.reshape(self.get(heads), -1, weight.size // len(weight)).swapaxes(1, 2)
            return neighbours_to_halves(by_head).swapaxes(1, 2).reshape(weight.shape)
        if name.endswith(".conv.conv.weight"):
            return weight[:, None]
        return weight.reshape(1, -1) if name.endswith("shared_expert_gate.weight") else weight

    def _of_delta_net(self, part: str, weight: np.ndarray) -> np.ndarray:
        """As _in_order(): llama.cpp has the first head of V of every head of K together, transformers those of one."""
        n_k, n_v = self.get("ssm.group_count"), self.get("ssm.time_step_rank")
        size = self.get("ssm.inner_size") // n_v

        def by_k(rows: np.ndarray, size: int) -> np.ndarray:
            return rows.reshape(n_v // n_k, n_k, size, -1).swapaxes(0, 1).reshape(rows.shape)

        if part == "out_proj":
            return by_k(weight.T, size).T
        if part == "in_proj_z":
            return by_k(weight, size)
        if part in ("in_proj_qkv", "conv1d"):
            v = -n_v * size
            whole = np.concatenate([weight[:v], by_k(weight[v:], size)])
            return whole[:, None] if part == "conv1d" else whole
        if part == "A_log":
            weight = np.log(-weight)
        return weight if part == "norm" else by_k(weight, 1)

    def _dequantized(self, name: str, index: int | None = None) -> np.ndarray:
        """float32, slowest dimension first. index: along that dimension; None: all of the tensor."""
        path, tensor = self.tensors[name]
        kind = self._kind(tensor)
        block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
        shape = tensor.shape if index is None else tensor.shape[:-1]
        size = prod(shape) // block * n_bytes
        at = tensor.offset + (index or 0) * size
        raw = np.fromfile(path, np.uint8, size, offset=at)
        if len(raw) < size:
            raise IntactKVError(f"{path} is cut off inside {name}, {size} bytes from byte {at}: get it again")
        try:
            return dequantize(raw.reshape(*reversed(shape[1:]), -1), kind).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise self._unknown(tensor) from error

    def _kind(self, tensor: gguf_file.Tensor) -> gguf.GGMLQuantizationType:
        try:
            return gguf.GGMLQuantizationType(tensor.type)
        except ValueError as error:
            raise self._unknown(tensor) from error

    def _unknown(self, tensor: gguf_file.Tensor) -> IntactKVError:
        return IntactKVError(
            f"{self.path} holds {tensor.name} in type {tensor.type}, and gguf-py {version('gguf')} cannot read it: "
            "use another quantization type"
        )


def _rounded(x: Tensor, kind: str) -> Tensor:
    return straight(x, lambda x: rounded(x.float(), kind).to(x.dtype))
