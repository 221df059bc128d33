"""The same models in torch: a Hugging Face directory or a GGUF goes in, a model with a mixed cache comes out.

Imported inside functions only: it loads torch and transformers.
"""

from intactkv_export.torch_model import from_gguf, from_huggingface, layers, rope_pairs, rounding
from intactkv_export.torch_model.caches import Layout, MixedCache, StateLayout
from intactkv_export.torch_model.model import TorchModel, load, prefix_factors, prefix_rows, prefix_states

__all__ = [
    "Layout",
    "MixedCache",
    "StateLayout",
    "TorchModel",
    "from_gguf",
    "from_huggingface",
    "layers",
    "load",
    "prefix_factors",
    "prefix_rows",
    "prefix_states",
    "rope_pairs",
    "rounding",
]
