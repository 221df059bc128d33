"""ik_llama.cpp on request: run by the Python of a virtual environment that has the package ik-llama-cpp-python.

    python ik_worker.py MODEL N_CTX KV_TYPE N_THREADS

Commands come as lines of JSON on stdin, answers go as lines to stdout: ["fill", n] evaluates tokens until n cells are
used; ["decode", n] and ["prefill", n] answer with seconds and take the cells back. Only ik-llama-cpp-python and the
standard library are used here.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import sys
import time

GGML_TYPES = {"f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints is not an answer
    from ik_llama_cpp import _ctypes_api as L

    path, n_ctx, kv_type, n_threads = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    library = L._lib if hasattr(L, "_lib") else L.lib
    remove = library.llama_kv_cache_seq_rm
    remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
    L.llama_backend_init()
    model_params = L.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model = L.llama_model_load_from_file(path.encode(), model_params)
    params = L.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = GGML_TYPES[kv_type]
    params.flash_attn = True
    context = L.llama_init_from_model(model, params)
    if not context:
        sys.exit("ik_worker: no context")
    n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    rng = random.Random(0)
    batch = L.llama_batch_init(512, 0, 1)
    used = 0

    def evaluate(n: int, size: int) -> float:
        nonlocal used
        start = time.perf_counter()
        for first in range(0, n, size):
            batch.n_tokens = min(size, n - first)
            for i in range(batch.n_tokens):
                batch.token[i] = rng.randrange(n_vocab)
                batch.pos[i] = used + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = i == batch.n_tokens - 1
            if L.llama_decode(context, batch) != 0:
                sys.exit("ik_worker: llama_decode failed")
            used += batch.n_tokens
        return time.perf_counter() - start

    for line in sys.stdin:
        command, n = json.loads(line)
        if command == "fill":
            seconds = evaluate(n - used, 512)
        else:
            before = used
            seconds = evaluate(n, 1 if command == "decode" else 512)
            remove(context, 0, before, -1)
            used = before
        print(json.dumps(seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
