"""IntactLlama is a llama_cpp.Llama: python examples/python_usage.py build/demo/SmolLM2.gguf [TOKENS]"""

from __future__ import annotations

import sys

from intactkv_export import IntactLlama

n_reply = int(sys.argv[2]) if len(sys.argv) > 2 else 40
llama = IntactLlama(sys.argv[1], kv_type="q8_0", n_ctx=2048)  # finds the prefix in the GGUF, or beside it
opening = llama.prefix_messages  # a conversation that begins with these begins with the prefix; [] for some prefixes

for question in ("Write one sentence about the sea.", "And one about the land."):
    messages = [*opening, {"role": "user", "content": question}]
    for chunk in llama.create_chat_completion(messages, stream=True, temperature=0, max_tokens=n_reply):
        print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print(f"\n    {llama.intact_cells} intact cells, the prefix was loaded {llama.prefix_stats['loads']} time(s)")

pirate = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]
answer = llama.create_chat_completion(pirate, temperature=0, max_tokens=n_reply)
print(answer["choices"][0]["message"]["content"])
print(f"    {llama.intact_cells} intact cells: another system prompt, so none of the prefix's but perhaps the first")
