"""docs/reference/models.md: what each architecture does with a prefix, as tiny random models of it show.

`make models` runs this:

    python -m tests.support.support_table PAGE.md               run all, write the page; exit status 1 if a row fails
    python -m tests.support.support_table PAGE.md --keep DIR    the models and each row's numbers (rows.json) stay there

Models: random_models.py (the torch engine is proven with them), random_architectures.py, upstream_archs.py,
tiny_rwkv.py, tiny_others.py. A row is of one model and made in a process of its own (architecture_row.py). Nothing in
the page is written by hand but FAMILIES, which says what the architectures of well-known models are called, and NONE,
which says why there is no model of some.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.support import random_architectures, random_models, tiny_others, tiny_rwkv, upstream_archs
from tests.support.architecture_row import Row, architecture
from tests.support.paths import REPO

PAGE = REPO / "docs" / "reference" / "models.md"
_SECONDS = 600  # a row takes 2 to 10
_AT_ONCE = 2

# What people download, and the rows that show it: names of models, or of architectures (all rows of these)
FAMILIES: dict[str, tuple[str, ...]] = {
    "Llama 3.x": ("llama-llama3", "llama-gqa"),
    "Llama 4": ("llama4",),
    "Qwen2.5": ("qwen2", "qwen2-yarn"),
    "Qwen3": ("qwen3",),
    "Qwen3 MoE": ("qwen3moe",),
    "Qwen3.5, Qwen3.6": ("qwen35", "qwen35moe"),
    "Qwen3-Next": ("qwen3next",),
    "Qwen2-VL, Qwen2.5-VL, Qwen3-VL (text)": ("qwen2vl", "qwen3vl", "qwen3vlmoe"),
    "Gemma 2": ("gemma2",),
    "Gemma 3": ("gemma3",),
    "Gemma 3n": ("gemma3n",),
    "Gemma 4": ("gemma4",),
    "Mistral": ("mistral",),
    "Ministral 3, Mistral Small 3": ("mistral3",),
    "Phi-3, Phi-4": ("phi3",),
    "gpt-oss": ("gpt-oss",),
    "GLM-4.5, 4.6, 4.7": ("glm4moe",),
    "GLM-4, GLM-4.1V": ("glm4",),
    "GLM-4.7-Flash": ("Glm4MoeLite",),
    "DeepSeek V2, V3, R1": ("DeepseekV2", "DeepseekV3", "deepseek2-moe"),
    "DeepSeek V3.2": ("deepseek32",),
    "DeepSeek V4": ("deepseek4",),
    "Kimi K2": ("DeepseekV3", "deepseek2-moe"),
    "Kimi Linear": ("kimi-linear",),
    "LFM2": ("lfm2", "lfm2moe"),
    "Granite 3": ("granite", "granitemoe"),
    "Granite 4 H": ("granitehybrid",),
    "Nemotron 3, Nemotron-H": ("nemotron_h", "nemotron_h_moe"),
    "Falcon-H1": ("falcon-h1",),
    "SmolLM2": ("llama-gqa",),
    "SmolLM3": ("smollm3",),
    "OLMo 2, OLMo 3": ("olmo2",),
    "MiniMax M2": ("minimax-m2",),
    "MiniMax M3": ("minimax-m3",),
    "MiniMax-01, M1": ("minimax-01",),
    "Mamba, Mamba 2": ("mamba", "mamba2"),
    "RWKV 6, RWKV 7": ("rwkv6", "rwkv7"),
    "BitNet b1.58": ("bitnet",),
}
_ENCODER = "an encoder for embeddings, it has no KV cache"
_DRAFTS = "a drafting head, which llama.cpp runs beside the model that it drafts for"
# Architectures of which no tiny model is tried, and why
NONE: dict[str, str] = {
    **dict.fromkeys(("bert", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3"), _ENCODER),
    **dict.fromkeys(("modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5encoder"), _ENCODER),
    **dict.fromkeys(("dflash", "eagle3", "gemma4-assistant"), _DRAFTS),
    "clip": "an encoder of images, which other models bring",
    "gptj": "llama.cpp knows its name, and cannot load it",
    "plm": "this release of llama.cpp aborts when it computes it, with or without intactkv-export",
    "wavtokenizer-dec": "it makes sound of tokens, and has no KV cache",
}
_STATUS = {
    "works": "works",
    "f16": "works in an F16 cache only",
    "refused": "refused",
    "fails": "**fails**",
}


def run(gguf: Path) -> Row:
    """The row of a model, made in a process of its own; a crash or a process that hangs is a row that fails."""
    command = [sys.executable, "-m", "tests.support.architecture_row", str(gguf)]
    try:
        done = subprocess.run(
            command, cwd=REPO, env=_environment(), capture_output=True, text=True, errors="replace", timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Row(gguf.stem, architecture(gguf), reason=f"no answer in {_SECONDS} seconds")
    try:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        said = [line for line in done.stderr.splitlines() if "ASSERT" in line or "rror" in line]
        reason = f"its process ended with {done.returncode}: {(said or [''])[-1][-200:]}"
        return Row(gguf.stem, architecture(gguf), reason=reason)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))}


def rows(ggufs: Iterable[Path]) -> list[Row]:
    """Of these models, in this order, a few at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(run, ggufs))


def models(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Write every tiny model below directory; also {name: why there is none} of what could not be made."""
    made = {}
    for name in (*random_models.MODELS, *random_models.OTHERS):
        made[name] = random_models.build(name, directory / name)
    for name in random_architectures.ARCHITECTURES:
        made[name] = random_architectures.build(name, directory / name)
    missing = random_architectures.to_gguf(made.values())
    of_upstream = upstream_archs.make(directory / "upstream")  # has names that are here already
    missing |= of_upstream.crashed
    missing |= {name: NONE.get(name, "upstream's test makes none") for name in of_upstream.left_out}
    there = [path.with_name(path.name + ".gguf") for name, path in made.items() if name not in missing]
    there.append(tiny_rwkv.write(directory / "rwkv7.gguf"))
    there += [tiny_others.write(name, directory / f"{name}.gguf") for name in tiny_others.MODELS]
    return [*there, *of_upstream.paths.values()], missing


def line(row: Row) -> str:
    """The model's line in the page."""
    torch, calibrate = (_yes_or_no(x) for x in (row.torch, row.calibrate))
    return f"| {row.name} | {row.architecture} | {_outcome(row)} | {row.memory or '-'} | {torch} | {calibrate} |"


def _yes_or_no(said: str) -> str:
    return "not asked" if not said else "yes" if said == "yes" else "no"


def _outcome(row: Row) -> str:
    return _STATUS[row.status] + (f": {row.reason}" if row.reason else "")


def _outcomes(found: Sequence[Row]) -> str:
    """Of several rows: one outcome, or each with the names of its rows."""
    by_outcome: dict[str, list[str]] = {}
    for row in found:
        by_outcome.setdefault(_outcome(row), []).append(row.name)
    if not found:
        return "not tried: no tiny model of it could be made"
    if len(by_outcome) == 1:
        return next(iter(by_outcome))
    return "; ".join(f"{', '.join(names)}: {outcome}" for outcome, names in by_outcome.items())


def _any(found: Sequence[Row], name: str) -> str:
    said = [getattr(row, name) for row in found if getattr(row, name)]
    return "yes" if "yes" in said else "no" if said else "not asked"


def page(found: Sequence[Row], missing: dict[str, str]) -> str:
    """The text of the page."""
    by_architecture: dict[str, list[Row]] = {}
    for row in found:
        by_architecture.setdefault(row.architecture, []).append(row)
    architectures = Counter(_of_architecture(x) for x in by_architecture.values())
    statuses = Counter(row.status for row in found)
    works = [row for row in found if row.status == "works"]
    largest = {name: max((r.numbers.get(name, 0.0) for r in works), default=0.0) for name in ("f16", "q8_0", "q4_0")}
    told = [r for r in works if r.numbers["influence"] > r.numbers["q4_0 weights, plain"]]
    parts = [
        _HEAD.format(
            models=len(found),
            architectures=len(by_architecture),
            counts=_counts(architectures),
            rows=_counts(statuses),
            told=len(told),
            works=len(works),
            **{f"error_{name}": f"{value:.1g}" for name, value in largest.items()},
        )
    ]
    parts.append("| family | prefix | torch engine | can be calibrated |\n| --- | --- | --- | --- |")
    for family, names in FAMILIES.items():
        own = [row for row in found if row.name in names or row.architecture in names]
        parts.append(f"| {family} | {_outcomes(own)} | {_any(own, 'torch')} | {_any(own, 'calibrate')} |")
    parts.append(_ALL)
    parts += [line(row) for row in sorted(found, key=lambda r: (r.architecture, r.name))]
    names = {row.architecture for row in found}
    left = {name: why for name, why in missing.items() if name not in names}
    parts.append(_MISSING + "\n".join(f"- {name}: {why}" for name, why in sorted(left.items())))
    return "\n".join(parts) + "\n"


def _of_architecture(found: Sequence[Row]) -> str:
    """The worst that a model of it shows: one that is refused is one that a user may have."""
    return max((row.status for row in found), key=("works", "f16", "refused", "fails").index)


def _counts(found: Counter[str]) -> str:
    one = {"works": "works", "f16": "works in an F16 cache only", "refused": "is refused", "fails": "fails"}
    many = {"works": "work", "f16": "work in an F16 cache only", "refused": "are refused", "fails": "fail"}
    return ", ".join(f"{found[s]} {one[s] if found[s] == 1 else many[s]}" for s in one if found[s])


_HEAD = """\
# Which models work

Made by `make models`; do not edit. It makes {models} tiny models with random weights, of {architectures} architectures,
and tries on each what a prefix is for. They are all that upstream's own test can make, those that upstream's converter
and transformers share, and some that neither makes. A faster test compares lines of this page with one model of each
kind of memory.

- By architecture, the worst of its models: {counts}.
- By model: {rows}.

**Works** means that all of this holds. The llama engine computes a prefix, and it is loaded in F16, q8_0 and q4_0
caches. With a tail, logits of the text behind it are those of an F16 cache (relative error at most {error_f16},
{error_q8_0} and {error_q4_0}); without one, the first token's are nearer to them than without a prefix. In the model
quantized to Q4_0 prefixes of the unquantized one do not make logits worse, and those of other prompts do (a random
model can tell in {told} of {works}; four prompts, their mean). Given by `llama_decode` itself a prefix gives the same
bits; so does a sequence saved and loaded. **Refused**: the reason is what `convert`, `prefix` and
loading say. Quality is not shown here: weights are random.

Torch engine: it computes the same prefix. Can be calibrated: `calibrate` and `convert --calibrate` take it. Not asked:
the tiny model is no Hugging Face directory.

## Families
"""

_ALL = """
## All models

| model | architecture | prefix | keeps for each token (K/V values a head) | torch engine | can be calibrated |
| --- | --- | --- | --- | --- | --- |"""

_MISSING = """
## Not tried

Of these there is no tiny model:

"""


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Try every tiny model (8 minutes of one core), and write the page.")
    parser.add_argument("page", type=Path, help="docs/reference/models.md")
    parser.add_argument(
        "--keep", type=Path, metavar="DIRECTORY", help="of the models and rows.json; else they are deleted"
    )
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="models-") as temporary:
        found, missing = _run_all(given.keep or Path(temporary))
    if given.keep:
        (given.keep / "rows.json").write_text(json.dumps([asdict(row) for row in found], indent=1))
    given.page.write_text(page(found, missing), encoding="utf-8")
    failing = [row for row in found if row.status == "fails"]
    for row in failing:
        print(f"{row.name} ({row.architecture}): {row.reason}", file=sys.stderr)
    print(f"written: {given.page}: {dict(Counter(row.status for row in found))}")
    return 1 if failing else 0


def _run_all(directory: Path) -> tuple[list[Row], dict[str, str]]:
    ggufs, missing = models(directory)
    return rows(ggufs), missing


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
