"""A quantized model behind its prefix in llama.cpp: a GGUF goes in, text comes out.

Imported inside functions only: it loads the libraries.
"""

from intactkv_export.runtime import chat
from intactkv_export.runtime.fit import check_fit
from intactkv_export.runtime.intact_llama import IntactLlama, L

__all__ = ["IntactLlama", "L", "chat", "check_fit"]
