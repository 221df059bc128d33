"""The llama.cpp library in C, from Python: models, contexts, tokens, states of a cache."""

from intactkv_export.libllama import bindings, state
from intactkv_export.libllama.compute_thread import compute
from intactkv_export.libllama.context import N_BATCH, Context, sequence_state
from intactkv_export.libllama.kv_types import EXACT, KV_TYPES, QUANTIZED, TAIL_MAX, WITHOUT_FLASH, default_tail, kv_pair
from intactkv_export.libllama.log import ERROR, errors_logged, quiet_opening
from intactkv_export.libllama.reason import reason
from intactkv_export.libllama.rope import SCALINGS, Rope, option, rope_of
from intactkv_export.libllama.state import KV, States
from intactkv_export.libllama.vocabulary import Vocabulary, token_bytes

__all__ = [
    "ERROR", "EXACT", "KV", "KV_TYPES", "N_BATCH", "QUANTIZED", "SCALINGS", "TAIL_MAX", "WITHOUT_FLASH", "Context",
    "Rope", "States", "Vocabulary", "bindings", "compute", "default_tail", "errors_logged", "kv_pair", "option",
    "quiet_opening", "reason", "rope_of", "sequence_state", "state", "token_bytes",
]  # fmt: skip
