"""A model without its last layers: another kind with the same vocabulary, as a draft model is."""

from __future__ import annotations

from pathlib import Path

import gguf


def write(source: Path, target: Path, n_layer: int) -> Path:
    """The GGUF source with its first layers only."""
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        if field.name == f"{arch}.block_count":
            writer.add_block_count(n_layer)
        elif not field.name.startswith(("GGUF.", "general.architecture", "intactkv.")):
            element = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        part = tensor.name.split(".")
        if part[0] != "blk" or int(part[1]) < n_layer:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
