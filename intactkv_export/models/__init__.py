"""Files of models: a path or a hub id goes in; what it is and which one it is comes out, or a GGUF of another type."""

from intactkv_export.models import gguf_file, imatrix, reference, tensor_types, text_file, weights
from intactkv_export.models.dtypes import DTYPES, FLOATS, check_dtype
from intactkv_export.models.proven import (
    HALVED,
    LATENT,
    NEIGHBOURS,
    NORMALIZED,
    PROVEN,
    RECURRENT,
    UNEVEN,
    is_reordered,
    supports,
    why_not,
)
from intactkv_export.models.reference import (
    KEY_CONVERTED,
    KEY_REFERENCE,
    Reference,
    check_convertible,
    check_same_reference,
    identity,
    locate,
)
from intactkv_export.models.text_file import read_text

__all__ = [
    "DTYPES", "FLOATS", "HALVED", "KEY_CONVERTED", "KEY_REFERENCE", "LATENT", "NEIGHBOURS", "NORMALIZED", "PROVEN",
    "RECURRENT", "UNEVEN", "Reference", "check_convertible", "check_dtype", "check_same_reference", "gguf_file",
    "identity", "imatrix", "is_reordered", "locate", "read_text", "reference", "supports", "tensor_types", "text_file",
    "weights", "why_not",
]  # fmt: skip
