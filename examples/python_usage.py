"""IntactLlama is a llama_cpp.Llama: python examples/python_usage.py build/demo/SmolLM2.gguf"""

from __future__ import annotations

import sys

from intactkv_export import IntactLlama

llama = IntactLlama(sys.argv[1], kv_type="q8_0", n_ctx=2048)  # finds the prefix in the GGUF, or beside it
system = llama.prefix.manifest["messages"]  # a conversation that begins with these begins with the prefix

for question in ("Write one sentence about the sea.", "And one about the land."):
    messages = [*system, {"role": "user", "content": question}]
    for chunk in llama.create_chat_completion(messages, stream=True, temperature=0, max_tokens=40):
        print(chunk["choices"][0]["delta"].get("content") or "", end="", flush=True)
    print(f"\n    {llama.intact_cells} intact cells, the prefix was loaded {llama.prefix_stats['loads']} time(s)")

pirate = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Who are you?"}]
answer = llama.create_chat_completion(pirate, temperature=0, max_tokens=40)
print(answer["choices"][0]["message"]["content"])
print(f"    {llama.intact_cells} intact cells: another system prompt, an ordinary result")
