"""A prefix file in stock llama.cpp with an F16 cache: no code of this project is used.

    python examples/stock_llama_cpp.py build/demo/SmolLM2.gguf build/demo/SmolLM2.ikv

llama_state_seq_load_file loads the prefix; the rest of a prompt is evaluated behind it.
"""

from __future__ import annotations

import ctypes
import sys

import llama_cpp
from llama_cpp import Llama

model, ikv = sys.argv[1:]
llama = Llama(model, n_ctx=2048, flash_attn=True, verbose=False)  # the rows are stored for flash attention

tokens, n = (llama_cpp.llama_token * llama.n_ctx())(), ctypes.c_size_t()
size = llama_cpp.llama_state_seq_load_file(llama.ctx, ikv.encode(), 0, tokens, len(tokens), ctypes.byref(n))
if size == 0:
    sys.exit(f"{ikv} does not fit {model}")
llama.n_tokens = n.value
llama.input_ids[: n.value] = tokens[: n.value]  # Llama reuses what a prompt has in common with its cache
print(f"{n.value} tokens of prefix loaded: {llama.detokenize(tokens[: n.value], special=True).decode()!r}")

prefix = list(tokens[: n.value])
rest = "Write one sentence about the sea.<|im_end|>\n<|im_start|>assistant\n"
prompt = prefix + llama.tokenize(rest.encode(), add_bos=False, special=True)
print(llama.create_completion(prompt, max_tokens=40, temperature=0)["choices"][0]["text"])
