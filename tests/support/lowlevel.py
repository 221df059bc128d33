"""llama.cpp's C API for the tests: contexts, batches, states. One context, no conveniences."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from intactkv_export import library

L = library.load()

PARTIAL = 1  # LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30}

SYSTEM = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)


@L.llama_log_callback
def _quiet(level: int, text: bytes, data: Any) -> None:
    pass


L.llama_log_set(_quiet, None)
L.llama_backend_init()


def load_model(path: Any) -> Any:
    model = L.llama_model_load_from_file(str(path).encode(), L.llama_model_default_params())
    assert model
    return model


def tokenize(model: Any, text: str, special: bool = True) -> list[int]:
    raw = text.encode()
    out = (L.llama_token * (len(raw) + 8))()
    n = L.llama_tokenize(L.llama_model_get_vocab(model), raw, len(raw), out, len(out), False, special)
    return list(out[:n])


class Context:
    """A llama_context with KV types k and v, flash attention on, two threads. tail: None: the library's default."""

    def __init__(self, model: Any, k: str, v: str | None = None, tail: int | None = 0, **params: Any) -> None:
        p = L.llama_context_default_params()
        p.n_ctx = p.n_batch = p.n_ubatch = 1024
        p.n_seq_max, p.flash_attn_type, p.n_threads, p.n_threads_batch = 1, 1, 2, 2
        p.type_k, p.type_v = TYPES[k], TYPES[v or k]
        for name, value in params.items():
            setattr(p, name, value)
        self.model = model
        self.n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
        self.ptr = L.llama_init_from_model(model, p)
        assert self.ptr
        self.memory = L.llama_get_memory(self.ptr)
        if tail is not None and hasattr(_lib, "intactkv_set_tail"):
            self.set_tail(tail)

    def __del__(self) -> None:
        if getattr(self, "ptr", None):
            L.llama_free(self.ptr)

    def decode(self, tokens: Sequence[int], pos: int, seq: int = 0) -> np.ndarray:
        """Evaluates tokens at pos... of sequence seq; their logits, F32 [len(tokens), n_vocab]."""
        batch = L.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos + i, 1, 1
            batch.seq_id[i][0] = seq
        status = L.llama_decode(self.ptr, batch)
        L.llama_batch_free(batch)
        assert status == 0, status
        shape = (len(tokens), self.n_vocab)
        return np.ctypeslib.as_array(L.llama_get_logits(self.ptr), shape=shape).copy()

    def batch(self, entries: Sequence[tuple[int, int, Sequence[int], bool]]) -> int:
        """Evaluates (token, position, sequences, whether it has logits), in this order; llama_decode's status."""
        batch = L.llama_batch_init(max(len(entries), 1), 0, max((len(entry[2]) for entry in entries), default=1))
        batch.n_tokens = len(entries)
        for i, (token, pos, seqs, logits) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, pos, len(seqs), logits
            for j, seq in enumerate(seqs):
                batch.seq_id[i][j] = seq
        status = L.llama_decode(self.ptr, batch)
        L.llama_batch_free(batch)
        return int(status)

    def logits(self, i: int) -> np.ndarray | None:
        """Of the token with this index in the last batch, F32 [n_vocab]; None: it has none."""
        found = L.llama_get_logits_ith(self.ptr, i)
        return np.ctypeslib.as_array(found, shape=(self.n_vocab,)).copy() if found else None

    def save(self, seq: int | None = 0) -> bytes:
        """The state of one sequence, or (None) of the whole context."""
        if seq is None:
            data = (ctypes.c_uint8 * L.llama_state_get_size(self.ptr))()
            n = L.llama_state_get_data(self.ptr, data, len(data))
        else:
            data = (ctypes.c_uint8 * L.llama_state_seq_get_size(self.ptr, seq))()
            n = L.llama_state_seq_get_data(self.ptr, data, len(data), seq)
        return bytes(data[:n])

    def restore(self, state: bytes, seq: int | None = 0) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if seq is None:
            return bool(L.llama_state_set_data(self.ptr, data, len(data)) == len(data))
        return bool(L.llama_state_seq_set_data(self.ptr, data, len(data), seq))

    def save_partial(self, seq: int) -> bytes:
        """What of a sequence's state cannot step back: a server's checkpoint."""
        data = (ctypes.c_uint8 * L.llama_state_seq_get_size_ext(self.ptr, seq, PARTIAL))()
        return bytes(data[: L.llama_state_seq_get_data_ext(self.ptr, data, len(data), seq, PARTIAL)])

    def restore_partial(self, state: bytes, seq: int) -> bool:
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return bool(L.llama_state_seq_set_data_ext(self.ptr, data, len(data), seq, PARTIAL))

    def n_intact(self, seq: int = -1) -> int:
        return int(_lib.intactkv_n_cells(self.ptr, seq))

    def n_tail(self, seq: int = -1) -> int:
        return int(_lib.intactkv_n_tail_cells(self.ptr, seq))

    def set_tail(self, n: int) -> int:
        """The tail in force; -1: refused."""
        return int(_lib.intactkv_set_tail(self.ptr, n))

    def tail(self) -> int:
        return int(_lib.intactkv_tail(self.ptr))

    def arena_bytes(self) -> int:
        return int(_lib.intactkv_arena_bytes(self.ptr))

    def n_prefixes(self) -> int:
        return int(_lib.intactkv_n_prefixes(self.ptr))

    def n_not_computed(self) -> int:
        return int(_lib.intactkv_n_not_computed(self.ptr))

    def attention(self) -> str:
        return str(_lib.intactkv_attention(self.ptr).decode())


_lib = L.llama_cpp._lib
if hasattr(_lib, "intactkv_version"):  # this module also drives unpatched libraries
    _lib.intactkv_n_cells.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    _lib.intactkv_n_tail_cells.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    _lib.intactkv_set_tail.argtypes = [ctypes.c_void_p, ctypes.c_int32]
    _lib.intactkv_tail.argtypes = [ctypes.c_void_p]
    _lib.intactkv_arena_bytes.argtypes = [ctypes.c_void_p]
    _lib.intactkv_arena_bytes.restype = ctypes.c_size_t
    _lib.intactkv_n_prefixes.argtypes = [ctypes.c_void_p]
    _lib.intactkv_n_not_computed.argtypes = [ctypes.c_void_p]
    _lib.intactkv_n_not_computed.restype = ctypes.c_uint64
    _lib.intactkv_attention.argtypes = [ctypes.c_void_p]
    _lib.intactkv_attention.restype = ctypes.c_char_p


def kl(p_logits: np.ndarray, q_logits: np.ndarray) -> float:
    """Mean KL divergence, nats, of softmax(q) from softmax(p); logits [n, n_vocab]."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))

    p, q = log_softmax(p_logits), log_softmax(q_logits)
    return float((np.exp(p) * (p - q)).sum(-1).mean())
