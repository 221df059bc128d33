"""A prefix embedded as it was before it moved behind the tensors: the uint8 array `intactkv.state` of the metadata."""

from __future__ import annotations

import struct
from pathlib import Path

from intactkv_export.models import gguf_file


def embed_as_array(gguf: Path, prefix: bytes, out: Path) -> Path:
    """The GGUF with one key more, the first; tensor data behind it at the next multiple of the alignment."""
    header, data = gguf_file.read(gguf), gguf.read_bytes()
    n_keys = struct.unpack_from("<Q", data, 16)[0]
    key = b"intactkv.state"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<iiQ", 9, 0, len(prefix)) + prefix
    end = header._tensor_list[1]
    made = data[:16] + struct.pack("<Q", n_keys + 1) + entry + data[24:end]
    out.write_bytes(made + b"\0" * (-len(made) % header.alignment) + data[header.data :])
    return out
