"""What extra cells begin as, before they are trained: K and V of real text, as if it stood at the first position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from intactkv_export.torch_model import TorchModel, layers

Rows = list[np.ndarray]  # by layer, float32 [n, n_head_kv, head_dim]


def of_text(model: TorchModel, prefix: Sequence[int], text: Sequence[int], n: int) -> tuple[Rows, Rows]:
    """K and V of the first n tokens of a text behind the tokens of a prefix, K turned back to position 0.

    A text that is shorter is read again and again.
    """
    tokens = (list(text) * (n // max(1, len(text)) + 1))[:n]
    cache = layers.empty_cache(model)
    with torch.inference_mode():
        model.decode([[*prefix, *tokens]], cache)
        K, V = layers.cached_rows(model, cache, len(prefix) + n)
        K = model.at_first_position([rows[len(prefix) :] for rows in K], range(len(prefix), len(prefix) + n))
    return [rows.cpu().numpy() for rows in K], [rows[len(prefix) :].float().numpy() for rows in V]
