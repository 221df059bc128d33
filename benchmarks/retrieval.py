"""What a KV cache does to replies: is a fact found again in a long text, and for how long is a greedy reply the same?

    python -m benchmarks.retrieval MODEL.gguf [--prefix FILE] [--caches f16 q8_0 q8_0,q4_0+128 q4_0+128 q4_0]
        [--tokens 4096] [--draws 50] [--replies 20] [--threads 2] [--out build/benchmarks]

A cache is named by its KV type, or K,V, and the tail behind a +; the first is what the others are compared with.

Retrieval: a text of --tokens tokens of Python's language reference has five sentences "The access code of CITY is
NUMBER." at random places of its first three quarters. After its end "The access code of CITY is" is continued greedily,
for each of the five from the same state: five draws a text. A draw counts if the number follows. A model may be too
small for it: then the first cache finds little too.

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
FACTS = 5  # in a text
N_REPLY = 200


def facts(llama: IntactLlama, n_tokens: int, rng: random.Random) -> tuple[list[int], dict[str, str]]:
    """A text with some facts, as tokens; and the number of each city."""
    cities = rng.sample(CITIES, FACTS)
    numbers = [str(rng.randrange(1000, 9999)) for _ in cities]
    words = llama.tokenize(default_text().encode(), add_bos=False)
    start = rng.randrange(len(words) - n_tokens)
    text = words[start : start + n_tokens - 120]
    sentences = [
        llama.tokenize(f"\n\nThe access code of {city} is {number}.\n\n".encode(), add_bos=False)
        for city, number in zip(cities, numbers, strict=True)
    ]
    for at, sentence in sorted(((rng.randrange(3 * len(text) // 4), s) for s in sentences), reverse=True):
        text[at:at] = sentence
    head = llama.prefix.tokens if llama.prefix is not None else [llama.token_bos()] if llama.token_bos() >= 0 else []
    return [*head, *text], dict(zip(cities, numbers, strict=True))


def greedy(llama: IntactLlama, tokens: list[int], n: int) -> list[int]:
    """n tokens that follow these, the likeliest each time; none is the last because a reply ends."""
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
    for _ in range(args.draws // FACTS):
        tokens, numbers = facts(llama, args.tokens, rng)
        llama.reset()
        llama.eval(tokens)
        state = llama.save_state()
        for city, number in numbers.items():
            llama.load_state(state)
            question = llama.tokenize(f"\n\nThe access code of {city} is".encode(), add_bos=False)
            answers.append((llama.detokenize(greedy(llama, question, 6)).decode(errors="replace").strip(), number))
    replies = []
    for question in ASKED[: args.replies]:
        llama.reset()
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
        lengths, n_draws = row["same_tokens"], len(row["answers"])
        print(
            f"{name:>16}: {row['found']} of {n_draws} found, {row['as_first']} answered as with {args.caches[0]}; "
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
