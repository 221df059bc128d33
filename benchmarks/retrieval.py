"""What a KV cache does to replies: is a fact found again in a long text, and for how long is a greedy reply the same?

    python -m benchmarks.retrieval MODEL.gguf [--prefix FILE] [--caches f16 q8_0 q8_0,q4_0+128 q4_0+128 q4_0]
        [--tokens 4096] [--draws 50] [--replies 20] [--threads 2] [--out build/benchmarks]

A cache is named by its KV type, or K,V, and the tail behind a +; the first is what the others are compared with.

Retrieval: a text of --tokens tokens of Python's language reference has five sentences "The access code of CITY is
NUMBER." at random places of its first three quarters. After its end "The access code of CITY is" is continued greedily,
for one of the five. A draw counts if the number follows. A model may be too small for it: then the first cache finds
little too.

Replies: --replies questions, each answered greedily with 200 tokens; counted are the tokens up to the first that
differs from the first cache's reply. Writes retrieval.json.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.decode import ROOT
from intactkv_export.runtime import IntactLlama
from intactkv_export.texts import default_text

CITIES = (
    "Paris London Berlin Madrid Rome Vienna Oslo Athens Dublin Warsaw Prague Lisbon Cairo Tokyo Delhi Sydney Toronto "
    "Chicago Boston Denver Dallas Seattle Austin Miami Moscow Beijing Seoul Bangkok Manila Nairobi"
).split()
ASKED = (
    "Write a story about a lighthouse keeper.|Explain how a bicycle stays upright.|Describe the life of a bee.|"
    "What is the water cycle?|How is bread made?|Why is the sky blue?|Tell me about the city of Venice.|"
    "How does a clock measure time?|Write a letter to a friend about a journey by train.|What do volcanoes do?|"
    "Explain what a prime number is.|How do birds find their way?|Describe a market in autumn.|What is a library for?|"
    "How does a sail work?|Why do leaves change colour?|Write a poem about winter.|What is glass made of?|"
    "Explain how a telescope works.|Describe how a river changes a valley."
).split("|")
N_REPLY = 200


def facts(llama: IntactLlama, n_tokens: int, rng: random.Random) -> tuple[list[int], str]:
    """A text with five facts and the beginning of one of them at its end, as tokens; and the number to be found."""
    cities = rng.sample(CITIES, 5)
    numbers = [str(rng.randrange(1000, 9999)) for _ in cities]
    words = llama.tokenize(default_text().encode(), add_bos=False)
    start = rng.randrange(len(words) - n_tokens)
    question = llama.tokenize(f"\n\nThe access code of {cities[0]} is".encode(), add_bos=False)
    text = words[start : start + n_tokens - 120]
    sentences = [
        llama.tokenize(f"\n\nThe access code of {city} is {number}.\n\n".encode(), add_bos=False)
        for city, number in zip(cities, numbers, strict=True)
    ]
    for at, sentence in sorted(((rng.randrange(3 * len(text) // 4), s) for s in sentences), reverse=True):
        text[at:at] = sentence
    head = llama.prefix.tokens if llama.prefix is not None else [llama.token_bos()] if llama.token_bos() >= 0 else []
    return [*head, *text, *question], numbers[0]


def greedy(llama: IntactLlama, tokens: list[int], n: int) -> list[int]:
    """n tokens that follow, the likeliest each time; none because the reply has ended."""
    llama.reset()
    llama.eval(tokens)
    found: list[int] = []
    for _ in range(n):
        found.append(int(np.argmax(llama._ctx.get_logits_ith(-1)[: llama.n_vocab()])))
        if len(found) < n:
            llama.eval([found[-1]])
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    kv_type, _, tail = name.partition("+")
    settings = {"n_ctx": args.tokens + 256, "n_threads": args.threads, "n_threads_batch": args.threads}
    llama = IntactLlama(args.model, args.prefix, kv_type, int(tail or 0), **settings)
    rng = random.Random(0)
    answers = []
    for _ in range(args.draws):
        tokens, number = facts(llama, args.tokens, rng)
        answers.append((llama.detokenize(greedy(llama, tokens, 6)).decode(errors="replace").strip(), number))
    replies = []
    for question in ASKED[: args.replies]:
        messages = [*llama.prefix_messages, {"role": "user", "content": question}]
        replies.append(greedy(llama, llama.tokenize(prompt(llama, messages), add_bos=False, special=True), N_REPLY))
    llama.close()
    return {"cache": name, "answers": answers, "replies": replies}


def prompt(llama: IntactLlama, messages: list[dict[str, str]]) -> bytes:
    """What a chat evaluates for these messages, by the model's template."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = llama.metadata["tokenizer.chat_template"]
    bos, eos = (llama._model.token_get_text(token) for token in (llama.token_bos(), llama.token_eos()))
    return Jinja2ChatFormatter(template, eos, bos)(messages=messages).prompt.encode()


def same(a: list[int], b: list[int]) -> int:
    """Tokens that both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prefix", default="auto")
    parser.add_argument("--caches", nargs="+", default=["f16", "q8_0", "q8_0,q4_0+128", "q4_0+128", "q4_0"])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--draws", type=int, default=50)
    parser.add_argument("--replies", type=int, default=len(ASKED))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "benchmarks")
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for name in args.caches:
        row = measure(name, args)
        first = rows[0] if rows else row
        row["found"] = sum(answer.startswith(number) for answer, number in row["answers"])
        row["as_first"] = sum(a == b for a, b in zip(row["answers"], first["answers"], strict=True))
        row["same_tokens"] = [same(a, b) for a, b in zip(row["replies"], first["replies"], strict=True)]
        rows.append(row)
        lengths = row["same_tokens"]
        print(
            f"{name:>16}: {row['found']} of {args.draws} found, {row['as_first']} answered as with {args.caches[0]}; "
            f"replies the same for {np.mean(lengths):.0f} tokens (median {np.median(lengths):.0f}), "
            f"{sum(n == N_REPLY for n in lengths)} of {len(lengths)} to the end",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine.describe(), "model": args.model.name, "tokens": args.tokens, "rows": rows}
    (args.out / "retrieval.json").write_text(json.dumps(result, indent=1))
    print(f"written: {args.out / 'retrieval.json'}")


if __name__ == "__main__":
    main()
