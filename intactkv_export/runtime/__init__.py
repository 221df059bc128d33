"""A quantized model behind its prefix in llama.cpp: a GGUF goes in, text comes out.

Imported inside functions only: it loads the libraries.
"""

from intactkv_export.runtime.chat import open_chat
from intactkv_export.runtime.conversation import Conversation, Sampling
from intactkv_export.runtime.fit import check_fit
from intactkv_export.runtime.intact_llama import IntactLlama, L

__all__ = ["Conversation", "IntactLlama", "L", "Sampling", "check_fit", "open_chat"]
