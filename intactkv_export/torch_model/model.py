"""A model in torch: the reference, or the weights of a quantized GGUF, dequantized (the student of a calibration).

A GGUF's tensors are dequantized one by one (gguf-py, every type it knows) and put under the names, and in the order of
rows, that transformers uses. Its rows of K in llama.cpp's layout, its cache with an intact prefix: caches.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.models import FLOATS, LATENT, NEIGHBOURS, RECURRENT, UNEVEN, check_dtype, gguf_file, is_reordered
from intactkv_export.prefix import Prefix
from intactkv_export.torch_model import attention, experts, from_gguf, from_huggingface
from intactkv_export.torch_model.caches import (
    STATES,
    LatentLayout,
    Layout,
    MixedCache,
    RoomyLayer,
    StateLayout,
    StatesCache,
    by_layer,
)
from intactkv_export.torch_model.rope_pairs import turned_back


@dataclass(frozen=True)
class TorchModel:
    """A causal language model of transformers in evaluation mode, all its weights frozen.

    attention, recurrent: the layers that keep K and V, and a state, ascending; state_layout: of the latter (None: there
    are none).
    """

    net: Any
    n_layer: int
    n_vocab: int
    layout: Layout
    attention: tuple[int, ...]
    recurrent: tuple[int, ...] = ()
    state_layout: StateLayout | None = None

    @property
    def n_head_kv(self) -> int:
        return self.layout.n_head_kv

    @property
    def head_dim(self) -> int:
        return self.layout.head_dim

    @property
    def rope(self) -> str:
        """RoPE type of llama.cpp: "norm" pairs neighbouring values, "neox" the halves of a head."""
        return "norm" if self.layout.interleaved else "neox"

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def _cache_argument(self) -> str:
        return from_huggingface.cache_argument(self.net)

    @property
    def decoder_layers(self) -> Sequence[torch.nn.Module]:
        return self.net.get_decoder().layers

    def to_cache(self, rows: Tensor, kind: str) -> Tensor:
        """llama.cpp's rows [n, n_head_kv, head_dim] of kind "K" or "V" -> transformers' [1, n_head_kv, n, head_dim]."""
        return self.layout.to_cache(rows, kind)[None]

    def to_rows(self, cached: Tensor, kind: str) -> Tensor:
        """The inverse of to_cache()."""
        return self.layout.to_rows(cached, kind)[0]

    def cache(
        self,
        K: Sequence[Tensor | np.ndarray],
        V: Sequence[Tensor | np.ndarray],
        kv_type: str | tuple[str, str] = "f16",
        batch: int = 1,
        grows: bool = True,
        tail: int = 0,
        extra: int = 0,
        in_sight: bool = False,
        after: MixedCache | None = None,
        states: Sequence[tuple[Tensor | np.ndarray, Tensor | np.ndarray]] | None = None,
    ) -> MixedCache:
        """A cache that begins with a prefix, the same one for each of `batch` sequences.

        K, V: by layer that has them, llama.cpp's rows [n_prefix, n_head_kv, head_dim], K after RoPE; tensors may
        require a gradient. They stay as they are; later rows are rounded to kv_type (a name of libllama.KV_TYPES, or a
        pair for K and V).
        grows, tail, in_sight: see MixedCache. extra: how many of the rows, the last ones, stand for no token
        (Prefix.n_extra). after: one whose last pass this one follows (MixedCache.followed).
        states: of the recurrent layers in order, llama.cpp's rows r and s, which may require a gradient too; None: as
        before the first token.
        """
        kinds = (kv_type, kv_type) if isinstance(kv_type, str) else kv_type
        kinds = (kinds[0], kinds[0]) if isinstance(self.layout, LatentLayout) else kinds
        place = {"device": self.device, "dtype": self.net.dtype}
        sides = ([torch.as_tensor(x).to(**place) for x in rows] for rows in (K, V))
        cached = [self.layout.cached(*rows) for rows in zip(*sides, strict=True)]
        k, v = ([x[side].expand(batch, -1, -1, -1) for x in cached] for side in (0, 1))
        if after is not None:
            return after.followed(k, v)
        found = self._states(states, batch)
        return MixedCache(k, v, self.layout, kinds, grows, tail, extra, in_sight, found, self.attention)

    def _states(self, states: Any, batch: int = 1) -> dict[int, tuple[Tensor, Tensor | None]]:
        """Those of the recurrent layers as transformers has them: inputs in the net's dtype, recurrences in float32."""
        if self.state_layout is None:
            return {}
        found = {}
        place = {"device": self.device, "dtype": torch.float32}
        given = states or [self.state_layout.empty()] * len(self.recurrent)
        for il, (r, s) in zip(self.recurrent, given, strict=True):
            inputs, state = self.state_layout.to_cache(torch.as_tensor(r).to(**place), torch.as_tensor(s).to(**place))
            wide = None if state is None else state.expand(batch, *state.shape[1:])
            found[il] = inputs.to(self.net.dtype).expand(batch, -1, -1), wide
        return found

    def roomy_cache(self, n_tokens: int) -> Cache:
        """An empty cache with room for n_tokens tokens in the net's dtype; it keeps every position of every layer."""
        return StatesCache(layers=by_layer({il: RoomyLayer(n_tokens) for il in self.attention}, self._states(None)))

    def forward(
        self, tokens: Tensor | Sequence[Sequence[int]], cache: Cache | None = None, hidden: bool = False
    ) -> Any:
        """Logits [batch, n, n_vocab], float32, of the tokens [batch, n] that follow what is in the cache.

        hidden: also return the outputs of the decoder layers, a list of n_layer tensors [batch, n, n_embd], in the
        net's dtype and before the last norm.
        """
        ids = torch.as_tensor(tokens, device=self.device)
        outputs: list[Tensor] = []
        with attention.one_token(ids), self.outputs_of_layers(outputs.append) if hidden else nullcontext():
            out = self.net(input_ids=ids, use_cache=cache is not None, **self._behind(cache, ids))
        logits = out.logits.float()
        return (logits, outputs) if hidden else logits

    def decode(self, tokens: Sequence[Sequence[int]], cache: MixedCache) -> None:
        """Run the decoder layers alone: the logits of a large vocabulary would take more memory than all else."""
        ids = torch.tensor(tokens, device=self.device)
        self.net.get_decoder()(input_ids=ids, use_cache=True, **self._behind(cache, ids))

    def _behind(self, cache: Cache | None, ids: Tensor) -> dict[str, Any]:
        """The net's arguments for tokens [batch, n] that follow what is in the cache: a mixed one, or transformers'."""
        arguments: dict[str, Any] = {self._cache_argument: cache}
        if isinstance(cache, MixedCache):
            n = ids.shape[1]
            if cache.n_extra:
                arguments["position_ids"] = cache.positions(n)[None, -n:].to(self.device)
            if attention.needed(self.net, cache):
                arguments["attention_mask"] = attention.build(self.net, cache, *ids.shape)
        return arguments

    def at_first_position(self, K: Sequence[Tensor | np.ndarray], positions: Sequence[int]) -> list[Tensor]:
        """K's rows as they are at position 0, where extra cells are: what RoPE turned at their positions, turned back.

        K: by layer, llama.cpp's rows [n, n_head_kv, head_dim] after RoPE at `positions`, n of them. The same in
        float32. V has no position. So rows of any text can be what the training of extra cells begins with.
        """
        rotary = self.net.get_decoder().rotary_emb
        text = self.net.config.get_text_config(decoder=True)
        ids = torch.as_tensor(positions, dtype=torch.float32, device=self.device)
        turned = []
        for il, (rows, layer) in enumerate(zip(K, self.decoder_layers, strict=True)):
            cached = self.layout.to_cache(torch.as_tensor(rows).to(self.device, torch.float32), "K")
            kind = from_huggingface.layer_type(text, il)
            if from_huggingface.is_turned(layer.self_attn):
                frequencies = getattr(rotary, f"{kind}_inv_freq", None)
                frequencies = rotary.inv_freq if frequencies is None else frequencies
                gain = getattr(layer.self_attn, "key_layernorm", None)  # HunYuan's, which comes after RoPE
                gain = torch.ones(()) if gain is None else gain.weight.float()
                still, part = cached.tensor_split([self.layout.n_still], -1)
                angles, neighbours = ids[:, None] * frequencies.float(), text.model_type in NEIGHBOURS
                cached = torch.cat([still, turned_back(part / gain, angles, neighbours) * gain], -1)
            turned.append(self.layout.to_rows(cached, "K"))
        return turned

    @contextmanager
    def outputs_of_layers(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Within, take() is given what each decoder layer puts out, [batch, n, n_embd], first layer first."""

        def hook(module: Any, inputs: Any, output: Any) -> None:
            take(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(hook) for layer in self.decoder_layers]
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


def load(
    path: str | Path,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    attention: str = "sdpa",
    round_activations: bool = False,
    rope_factors: str | None = None,
    states: bool = False,
) -> TorchModel:
    """A Hugging Face directory, or a GGUF of any type that gguf-py can dequantize.

    device: "cpu", "cuda", "cuda:1", "mps". dtype: of weights and arithmetic, "float32", "float16" or "bfloat16".
    attention: "sdpa", or "eager" (what some get in any case, see from_huggingface.attention_of()). round_activations:
    of a GGUF, see from_gguf.load().
    rope_factors: those that a LongRoPE model has at every position, see from_huggingface.fix_longrope(); a prefix's
    manifest names them (prefix_factors()). states: whether the caller carries the states of recurrent layers; a model
    with some is refused if not.

    Raises UsageError for an unknown dtype or attention, IntactKVError if the architecture is not proven
    (models/proven.py), the weights cannot be loaded, or the LongRoPE factors are not the model's.
    """
    check_dtype(dtype, FLOATS)
    if attention not in ("sdpa", "eager"):
        raise UsageError(f"attention {attention!r} is unknown: give sdpa or eager")
    with from_huggingface.quiet():
        if gguf_file.is_gguf(Path(path)):
            from_gguf.check_header(path, states=states)
            net = from_gguf.load(path, device, dtype, attention, round_activations, rope_factors)
        else:
            config = from_huggingface.read_config(path)
            _check_plain(config.get_text_config(decoder=True).model_type, path, states)
            text = config.get_text_config(decoder=True)
            attention = from_huggingface.attention_of(text.model_type, attention)
            from_huggingface.fix_longrope(text, rope_factors, path)
            net = from_huggingface.load(path, config, device, dtype, attention=attention)
            experts.set_up(net, device, rounds=False)
    net.requires_grad_(False)
    text = net.config.get_text_config(decoder=True)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    reordered = is_reordered(text.model_type)
    layout = Layout(text.num_key_value_heads, head_dim, reordered)
    if text.model_type in LATENT:
        layout = LatentLayout.of(text, reordered)
    attending, recurrent = from_huggingface.attention_layers(text), from_huggingface.recurrent_layers(text)
    return TorchModel(
        net.eval(),
        text.num_hidden_layers,
        text.vocab_size,
        layout,
        tuple(attending),
        tuple(recurrent),
        StateLayout.of(text) if recurrent else None,
    )


def _check_plain(model_type: str, path: str | Path, states: bool) -> None:
    """Raises IntactKVError for a model whose cache is not one of K and V alone, with the same heads in all layers."""
    what = f"{path} of model type {model_type!r}"
    if model_type in STATES | LATENT and not states:
        from_huggingface.check_analyzable(model_type, what)
    if model_type in (RECURRENT - STATES) | UNEVEN:
        uneven = "layers that share K and V, or have other heads"
        kept = uneven if model_type in UNEVEN else "states of recurrent layers"
        raise IntactKVError(
            f"{what} has {kept}, which nothing can be trained for or analyzed with yet: "
            "use a prefix that is not trained"
        )


def prefix_factors(prefix: Prefix) -> str | None:
    """The RoPE factors that a prefix was computed with: argument rope_factors of load()."""
    factors: str | None = prefix.manifest["model"]["rope"]["factors"]
    return factors


def prefix_rows(prefix: Prefix) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """K and V of a prefix file by layer, float16 [n_cells, n_head_kv, head_dim]: arguments of TorchModel.cache().

    The tokens' rows in order, then those of the extra cells: cache(..., extra=prefix.n_extra). Rows that a sliding
    window has left behind are zero; no later token sees them.
    """

    def whole(rows: np.ndarray, cells: np.ndarray) -> np.ndarray:
        full = np.zeros((prefix.n_cells, *rows.shape[1:]), rows.dtype)
        full[cells] = rows
        return full

    layers = sorted(prefix.layers, key=lambda layer: layer.il)
    return [whole(x.K, x.cells) for x in layers], [whole(x.V, x.cells) for x in layers]


def prefix_states(prefix: Prefix) -> list[tuple[np.ndarray, np.ndarray]]:
    """The states of a prefix file's recurrent layers in order, r and s, float32: the argument `states` of cache()."""
    return [(r.copy(), s.copy()) for _, (r, s) in sorted(prefix.states.items())]
