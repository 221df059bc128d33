"""IntactKV computed: a reference model and tokens go in, K and V of all layers at F16 come out, as a prefix file.

Two engines, llama.cpp on a GGUF and transformers on a Hugging Face directory. Both give {layer: float16 [n_tokens,
n_head_kv, head_dim]} in llama.cpp's layout, computed in float32 and rounded once.
"""

from intactkv_export.engines import llama_engine
from intactkv_export.engines.choose import check_device, check_in_torch, choose
from intactkv_export.engines.compute import Engine, compute, longrope_factors

__all__ = ["Engine", "check_device", "check_in_torch", "choose", "compute", "llama_engine", "longrope_factors"]
