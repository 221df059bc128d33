"""A drafting head (MTP) behind the layers of a tiny model of upstream's test: one more block, and what makes it a head.

Its own cache, another context (ctx_type), and what it reads of the model: the hidden state of every token.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LIKE = 1  # the layer whose tensors the head gets: one with attention


def append(source: Path, target: Path) -> Path:
    """The GGUF source with a head, in target."""
    reader = gguf.GGUFReader(source)
    arch = str(reader.fields["general.architecture"].contents())
    n_layer = int(reader.fields[f"{arch}.block_count"].contents())
    n_embd = int(reader.fields[f"{arch}.embedding_length"].contents())
    writer = gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        value, element = field.contents(), None
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            if not value:
                continue
            element = field.types[1]
            if field.name.startswith(f"{arch}.") and len(value) == n_layer:
                value = [*value, value[LIKE]]
        elif field.name == f"{arch}.block_count":
            value = n_layer + 1
        elif field.name == f"{arch}.nextn_predict_layers":
            value = 1
        writer.add_key_value(field.name, value, field.types[0], element)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        if tensor.name.startswith(f"blk.{LIKE}.") and not tensor.name.endswith("scale"):
            name = tensor.name.replace(f"blk.{LIKE}.", f"blk.{n_layer}.")
            writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type)
    rng, head = np.random.default_rng(0), f"blk.{n_layer}.nextn"
    writer.add_tensor(f"{head}.eh_proj.weight", rng.standard_normal((n_embd, 2 * n_embd), np.float32) / n_embd**0.5)
    for name in ("enorm", "hnorm", "shared_head_norm"):
        writer.add_tensor(f"{head}.{name}.weight", np.ones(n_embd, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
