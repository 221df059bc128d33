"""What a whole graph computes for attention, against float64: the cells' own bits, the arena's own bits, nothing else.

The inputs of layer il are taken out of the running graph (Qcur) and out of the saved state (K, V, intact rows), in
the cache's Hadamard basis, in which Q is rotated here. The fused kernel turns its result back, the others' is turned
back by a later node.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from intactkv_export import library
from tests.support import lowlevel
from tests.support.attention_cases import hadamard
from tests.support.lowlevel import SYSTEM, Context, L

N_LAYER, N_HEAD, N_HEAD_KV, HEAD_DIM = 30, 9, 3, 64
Array = NDArray[np.float64]


class Capture:
    """A ggml_backend_sched_eval_callback that keeps the named F32 tensors of the last graph."""

    def __init__(self, names: set[str]) -> None:
        ggml = ctypes.CDLL(str(next(library.library_path().glob("*ggml-base*"))))
        for name, result, *args in (
            ("ggml_get_name", ctypes.c_char_p, ctypes.c_void_p),
            ("ggml_nbytes", ctypes.c_size_t, ctypes.c_void_p),
            ("ggml_backend_tensor_get", None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t),
        ):
            getattr(ggml, name).restype, getattr(ggml, name).argtypes = result, args
        self.tensors: dict[str, NDArray[np.float32]] = {}

        def callback(tensor: int, ask: bool, _: Any) -> bool:
            name = ggml.ggml_get_name(tensor).decode()
            if not ask and name in names:
                data = (ctypes.c_uint8 * ggml.ggml_nbytes(tensor))()
                ggml.ggml_backend_tensor_get(tensor, data, 0, len(data))
                self.tensors[name] = np.frombuffer(data, np.float32).copy()
            return name in names or not ask

        field = dict(L.llama_context_params._fields_)["cb_eval"]
        self._keep = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(callback)
        self.cb_eval = ctypes.cast(self._keep, field)


def read_layers(state: bytes, at: int, n: int) -> tuple[list[Array], int]:
    """K of every layer, then V, [n, n_embd_gqa]; and where the state goes on."""
    out = []
    for _ in range(2 * N_LAYER):
        kind, row_bytes = struct.unpack_from("<iQ", state, at)
        raw = np.frombuffer(state, np.uint8, n * row_bytes, at + 12).reshape(n, row_bytes)
        out.append(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(kind)).astype(np.float64))
        at += 12 + n * row_bytes
    return out, at


@pytest.mark.parametrize("attention", ["portable", "fused"])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
def test_whole_graph_against_float64(model: Any, monkeypatch: Any, kv: str, attention: str) -> None:
    from pydoc_data.topics import topics

    monkeypatch.setenv("INTACTKV_ATTN", attention)
    weights = lowlevel.load_model(model("F16"))
    prefix = lowlevel.tokenize(weights, SYSTEM)
    tokens = lowlevel.tokenize(weights, topics["assert"] + topics["yield"], special=False)[:250]
    source = Context(weights, "f16")
    source.decode(prefix, 0)
    state, n_prefix = source.save(), len(prefix)

    layers = (0, 3)
    capture = Capture({f"{name}-{il}" for il in layers for name in ("Qcur", "kqv_out")})
    ctx = Context(weights, kv, cb_eval=capture.cb_eval)
    assert ctx.restore(state) and ctx.attention() == attention
    ctx.decode(tokens, n_prefix)
    saved, n = ctx.save(), n_prefix + len(tokens)

    header = 8 + 4 + 4 + 12 * n + 8  # magic and sequence, n_stream, n_cells, cells, v_trans and n_layer
    cells, at = read_layers(saved, header, n)
    assert struct.unpack_from(f"<{n_prefix + 1}I", saved, at) == (n_prefix, *range(n_prefix))
    at += 4 * (n_prefix + 1)
    exact, _ = read_layers(state, 8 + 4 + 4 + 12 * n_prefix + 8, n_prefix)
    intact: dict[tuple[int, int], Array] = {}
    for il in range(N_LAYER):
        for side in range(2):
            (row_bytes,) = struct.unpack_from("<Q", saved, at)
            rows = np.frombuffer(saved, np.float16, n_prefix * row_bytes // 2, at + 8)
            intact[side, il] = rows.reshape(n_prefix, -1).astype(np.float64)
            at += 8 + n_prefix * row_bytes
            # the arena is the F16 prefix in the cache's basis, rounded once
            rotated = hadamard(exact[side * N_LAYER + il], HEAD_DIM)
            assert np.all(np.abs(intact[side, il] - rotated) <= np.abs(rotated) * 2**-11 + 2**-20)
    assert at == len(saved)

    def attend(il: int, use_intact: bool) -> Array:
        K, V = cells[il].copy(), cells[N_LAYER + il].copy()
        if use_intact:
            K[:n_prefix], V[:n_prefix] = intact[0, il], intact[1, il]
        K, V = (x.reshape(n, N_HEAD_KV, HEAD_DIM).repeat(N_HEAD // N_HEAD_KV, 1) for x in (K, V))
        Q = hadamard(capture.tensors[f"Qcur-{il}"].reshape(-1, N_HEAD, HEAD_DIM).astype(np.float64), HEAD_DIM)
        weight = np.einsum("thd,nhd->htn", Q, K) / np.sqrt(HEAD_DIM)
        future = np.arange(n) > np.arange(len(tokens))[:, None] + n_prefix
        weight = np.exp(np.where(future, -np.inf, weight - weight.max(-1, keepdims=True)))
        return np.asarray(np.einsum("htn,nhd->thd", weight / weight.sum(-1, keepdims=True), V))

    for il in layers:
        got = capture.tensors[f"kqv_out-{il}"].reshape(-1, N_HEAD, HEAD_DIM)
        back = HEAD_DIM if attention == "fused" else 0
        expected = hadamard(attend(il, use_intact=True), back)
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        # portable works in F16; fused rounds Q to 8 bits for quantized K, as upstream's own op does
        assert error < (1e-3 if attention == "portable" else 1e-2)
        # the control: had it read the quantized copies of the prefix, it would be seen
        control = hadamard(attend(il, use_intact=False), back)
        assert error < 0.95 * np.linalg.norm(got - control) / np.linalg.norm(expected)
