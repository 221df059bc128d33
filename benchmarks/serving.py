"""A server under load: `serve` with a prefix against upstream's llama-server, from the same source, computing it.

    python -m benchmarks.serving REFERENCE.gguf MODEL.gguf --stock LLAMA-SERVER [--tokens 2000] [--kv-type q8_0]

STOCK is built with `cmake -S native -B build/stock-tools -DINTACTKV_STOCK=ON -DINTACTKV_TOOLS=ON` and target
llama-server. Both get the same arguments; ours also the prefix of a system prompt of --tokens tokens (Python's language
reference), computed by REFERENCE. Each server starts anew for each round, in turn:

alone: one streamed request at a time, each in a slot that keeps nothing of another (cache_prompt false): the time to
the first token of a new conversation. burst: 64 requests at once for 8 slots, of them 40 behind the system prompt, 8
behind half of it, 8 behind another, 8 behind none; 8 are not streamed, 8 are given up after a few tokens. Prompts
stay in their slots as upstream keeps them. Writes serving.json and serving.md.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import pydoc_data.topics
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks import machine
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import ikv
from intactkv_export.serving import choose_settings, program_path

SLOTS, REQUESTS, ALONE = 8, 64, 5
ANSWER = 32  # tokens
OTHER = "You are a pirate. Answer like one, in two sentences at most."
QUESTIONS = ["What does {} do?", "Give a short example of {}.", "When would I not use {}?", "Explain {} to a child."]


@dataclass
class Asked:
    """A request and what came of it. kind: which system prompt; first, whole: seconds; n: tokens of the answer."""

    kind: str
    way: str
    question: str
    first: float | None = None
    whole: float | None = None
    n: int = 0


def long_prompt(model: Path, n: int) -> str:
    """A system prompt of about n tokens: an instruction and pages of Python's language reference."""
    text = "You answer questions about Python. This is the reference:\n\n" + "\n\n".join(
        pydoc_data.topics.topics[name].strip() for name in sorted(pydoc_data.topics.topics)
    )
    with Vocabulary(model) as vocabulary:
        tokens = vocabulary.tokenize(text, special=False)[: n - 10]  # the template's own
        return vocabulary.text(tokens).strip()


def requests() -> list[Asked]:
    """The 64 of a burst, in the same mixed order every time."""
    subjects = sorted(pydoc_data.topics.topics)
    kinds = ["whole"] * 40 + ["half"] * 8 + ["other"] * 8 + ["none"] * 8
    ways = (["streamed"] * 6 + ["at once", "given up"]) * 8
    made = [
        Asked(kind, way, QUESTIONS[i % len(QUESTIONS)].format(subjects[i % len(subjects)].lower()))
        for i, (kind, way) in enumerate(zip(kinds, ways, strict=True))
    ]
    random.Random(0).shuffle(made)
    return made


def ask(url: str, asked: Asked, prompts: dict[str, str | None], *, keep: bool) -> None:
    """Send it and take the times. keep: what is left in the slot may be used (cache_prompt)."""
    system = prompts[asked.kind]
    messages = [{"role": "system", "content": system}] if system is not None else []
    body = {
        "messages": [*messages, {"role": "user", "content": asked.question}],
        "max_tokens": ANSWER,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": keep,
        "stream": asked.way != "at once",
    }
    place = urlsplit(url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=1200)
    start = time.perf_counter()
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )  # fmt: skip
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        if asked.way == "at once":
            asked.n = json.loads(answer.read())["usage"]["completion_tokens"]
        else:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    asked.n += 1
                    asked.first = asked.first or time.perf_counter() - start
                    if asked.way == "given up" and asked.n == 5:
                        break
    asked.whole = time.perf_counter() - start


@contextlib.contextmanager
def running(program: list[str], environment: dict[str, str], url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers; stopped at the end."""
    place = urlsplit(url)
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:  # fmt: skip
        try:
            for _ in range(600):
                with contextlib.suppress(OSError):
                    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=5)
                    connection.request("GET", "/health")
                    if connection.getresponse().status == 200:
                        break
                assert process.poll() is None, f"{program[0]} ended with {process.returncode}"
                time.sleep(0.1)
            yield process
        finally:
            process.kill()


def memory(pid: int) -> int:
    """Its own resident bytes, without the model's file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def one_round(program: list[str], environment: dict[str, str], url: str, prompts: dict[str, Any]) -> dict[str, Any]:
    """What one start of one server gives: times alone, the burst's requests, its seconds, and memory at the end."""
    with running(program, environment, url) as process:
        ask(url, Asked("none", "at once", "Hello"), prompts, keep=False)  # what is done once only
        alone = [Asked("whole", "streamed", QUESTIONS[i % 4].format(f"a thing {i}")) for i in range(ALONE)]
        for asked in alone:
            ask(url, asked, prompts, keep=False)
    with running(program, environment, url) as process:
        burst = requests()
        threads = [
            threading.Thread(target=ask, args=(url, asked, prompts), kwargs={"keep": True}) for asked in burst
        ]  # fmt: skip
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        return {
            "alone": [asked.first for asked in alone],
            "burst": [asdict(asked) for asked in burst],
            "seconds": seconds,
            "memory": memory(process.pid),
        }


def summary(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Over all rounds of a server: medians of rounds, percentiles of all requests of a kind."""
    burst = [asked for one in rounds for asked in one["burst"]]
    assert all(asked["n"] for asked in burst), "a request without an answer"
    first = {
        kind: [a["first"] for a in burst if a["first"] is not None and kind in ("all", a["kind"])]
        for kind in ("all", "whole")
    }
    return {
        "alone": float(np.median([seconds for one in rounds for seconds in one["alone"]])),
        "tokens_per_second": float(
            np.median([sum(asked["n"] for asked in one["burst"]) / one["seconds"] for one in rounds])
        ),
        "seconds": float(np.median([one["seconds"] for one in rounds])),
        **{
            f"{kind}_p{p}": float(np.percentile(values, p)) for kind, values in first.items() for p in (50, 99)
        },
        "memory": float(np.median([one["memory"] for one in rounds])),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stock", type=Path, required=True, help="upstream's llama-server")
    parser.add_argument("--tokens", type=int, default=2000, help="of the system prompt")
    parser.add_argument("--ctx-size", type=int, default=3072, help="of one conversation")
    parser.add_argument("--kv-type", default="q8_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("build/serving"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    whole = long_prompt(args.model, args.tokens)
    prompts: dict[str, str | None] = {"whole": whole, "half": whole[: len(whole) // 2], "other": OTHER, "none": None}
    text, prefix = args.out / "prompt.txt", args.out / "prompt.ikv"
    text.write_text(whole)
    command = [sys.executable, "-m", "intactkv_export", "prefix", str(args.reference), "-m", str(args.model)]
    subprocess.run([*command, "-s", f"@{text}", "-o", str(prefix), "--no-embed"], check=True)

    asked = {"parallel": SLOTS, "ctx_size": args.ctx_size, "threads": args.threads, "port": 0}
    ours = choose_settings(args.model, prefixes=[prefix], kv_type=args.kv_type, **asked)
    plain = choose_settings(args.model, prefixes=[], kv_type=args.kv_type, **asked)
    default = choose_settings(args.model, prefixes=[prefix], **asked)
    own = str(program_path("llama-server"))
    upstream = {name: value for name, value in os.environ.items() if not name.startswith(("LLAMA_", "INTACTKV_"))}
    servers = {
        f"upstream, {args.kv_type}": ([str(args.stock), *plain.arguments], upstream, plain.url),
        f"serve, {args.kv_type}": ([own, *ours.arguments], dict(ours.environment), ours.url),
        "serve, its default cache": ([own, *default.arguments], dict(default.environment), default.url),
        f"serve without a prefix, {args.kv_type}": ([own, *plain.arguments], dict(plain.environment), plain.url),
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for i in range(args.rounds):
        for name in list(servers)[i % len(servers) :] + list(servers)[: i % len(servers)]:
            rounds[name].append(one_round(*servers[name], prompts))
            last = summary(rounds[name][-1:])
            print(
                f"round {i + 1} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in last.items()), flush=True
            )

    rows = {name: summary(of) for name, of in rounds.items()}
    n_tokens = len(ikv.read(prefix).tokens)
    about = {"tokens": n_tokens, "slots": SLOTS, "machine": machine.describe(), "summary": rows, "rounds": rounds}
    (args.out / "serving.json").write_text(json.dumps(about, indent=1))
    table = [
        f"System prompt of {n_tokens} tokens, {SLOTS} slots, {REQUESTS} requests at once, {args.rounds} rounds.",
        "",
        "| server, KV cache | alone, first token | burst, first token p50 | p99 | behind the prompt p50 | p99 "
        "| all answered | tokens a second | memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {name} | {r['alone']:.3f} s | {r['all_p50']:.2f} s | {r['all_p99']:.2f} s | {r['whole_p50']:.2f} s "
            f"| {r['whole_p99']:.2f} s | {r['seconds']:.1f} s | {r['tokens_per_second']:.1f} "
            f"| {r['memory'] / 1e6:,.0f} MB |"
            for name, r in rows.items()
        ),
    ]
    machine.publish(table, args.out / "serving.md")


if __name__ == "__main__":
    main()
