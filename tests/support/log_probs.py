"""What the runtime says after each token behind a prefix, and how far two such answers are apart."""

from __future__ import annotations

import warnings

import numpy as np
import torch

from intactkv_export.prefix import ikv, run_settings
from intactkv_export.runtime.intact_llama import IntactLlama


def llama_log_probs(path, prefix_path, kv_type, prefix, chunks, tail=0, step=None):
    """[chunk, token, vocabulary]: the runtime's log probabilities behind the prefix.

    step: how many tokens are decoded at a time, None: a chunk.
    """
    n = len(prefix) + len(chunks[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"n_batch": n, "n_ubatch": n, "n_threads": 2, "n_threads_batch": 2}
        if prefix_path is not None:
            settings |= run_settings(ikv.read(prefix_path), path)
        llama = IntactLlama(path, prefix_path, kv_type, tail, n_ctx=n, **settings)
    llama.eval(prefix)
    out = []
    for chunk in chunks:
        llama._ctx.kv_cache_seq_rm(0, len(prefix), -1)
        logits = []
        for start in range(0, len(chunk), step or len(chunk)):
            part = chunk[start : start + (step or len(chunk))]
            llama._batch.set_batch(batch=part, n_past=len(prefix) + start, logits_all=True)
            llama._ctx.decode(llama._batch)
            logits.append(np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(len(part), llama.n_vocab())).copy())
        out.append(np.concatenate(logits))
    llama.close()
    return torch.log_softmax(torch.from_numpy(np.stack(out)), -1)


def divergence(p, q):
    """Mean over all tokens of KL(p || q), nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())
