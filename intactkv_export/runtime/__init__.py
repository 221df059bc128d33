"""A quantized model behind its prefix in llama.cpp: a GGUF goes in, text comes out.

Imported inside functions only: it loads the libraries.
"""

from intactkv_export.runtime.chat import open_chat
from intactkv_export.runtime.conversation import Conversation, Sampling
from intactkv_export.runtime.fit import check_fit, choose_n_ctx
from intactkv_export.runtime.intact_llama import IntactLlama, L
from intactkv_export.runtime.kv_choice import BEST_PAIR, WITH_TAIL, choose_kv_types

__all__ = [
    "BEST_PAIR", "WITH_TAIL", "Conversation", "IntactLlama", "L", "Sampling", "check_fit", "choose_kv_types",
    "choose_n_ctx", "open_chat",
]  # fmt: skip
