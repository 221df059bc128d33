"""What the runtime says after each token behind a prefix, and how far two such answers are apart."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from intactkv_export.runtime.intact_llama import IntactLlama


def llama_log_probs(path, prefix_path, kv_type, prefix, chunks):
    """[chunk, token, vocabulary]: the runtime's log probabilities behind the prefix."""
    n = len(prefix) + len(chunks[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        llama = IntactLlama(path, prefix_path, kv_type, n_ctx=n, n_batch=n, n_ubatch=n, n_threads=2, n_threads_batch=2)
    llama.eval(prefix)
    out = []
    for chunk in chunks:
        llama._ctx.kv_cache_seq_rm(0, len(prefix), -1)
        llama._batch.set_batch(batch=chunk, n_past=len(prefix), logits_all=True)
        llama._ctx.decode(llama._batch)
        out.append(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(chunk), llama.n_vocab())).copy())
    llama.close()
    return torch.log_softmax(torch.from_numpy(np.stack(out)), -1)


def divergence(p, q):
    """Mean over all tokens of KL(p || q), nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())
