"""One row of the support table: what a tiny random model does with a prefix. It may crash, so in a process of its own:

    python -m tests.support.architecture_row MODEL.gguf     prints a Row as JSON

A directory of the same name without the suffix is the model as transformers has it: then the torch engine is asked too.
Nothing of an architecture is known here: the prefix is computed by the engines, as `intactkv-export prefix` does it,
and given to contexts with caches of several types. All numbers are relative errors of logits (their mean over the
vocabulary taken away), ||a - b|| / ||b||, over all tokens of several texts: random weights can give logits of which
softmax is all zeros and a one, and then KL divergence says nothing.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from intactkv_export.engines import Engine, check_in_torch, compute, llama_engine
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import bindings
from intactkv_export.models import Reference, gguf_file, identity, locate, weights
from intactkv_export.prefix import Prefix, Prompt
from tests.support import automatic, lowlevel
from tests.support.lowlevel import Context, L

N_PREFIX, N_TEXT, N_TEXTS = 24, 24, 4
N_PROMPTS = 4  # in a quantized model: whether a prefix helps varies more from prompt to prompt than from text to text
TAIL = 64  # more than a text has: every cell behind the prefix is at F16 too
KV_TYPES = ("q8_0", "q4_0")
N_THREADS = 1  # rows are made several at a time
SIZES = dict(n_ctx=256, n_batch=256, n_ubatch=64, n_threads=N_THREADS, n_threads_batch=N_THREADS)
REFUSED = "cannot carry a prefix: "

# A prefix loaded and a tail that holds the whole text: what differs from an F16 cache is where K and V are rounded. Of
# all architectures' errors at most 0.007.
TOLERANCE = 0.02
# Below this another prefix changes nothing, and no check of a prefix could fail.
LEAST_INFLUENCE = 1e-4


@dataclass
class Row:
    """works: in every cache of KV_TYPES and F16. refused: reason says why. f16: only in an F16 cache, reason says why.
    fails: an exception, or a value that is wrong; reason says which."""

    name: str
    architecture: str = ""
    status: str = "fails"
    reason: str = ""
    memory: str = ""  # what it keeps for each token or sequence
    torch: str = ""  # "yes", why not, or "": there is no Hugging Face model to ask with
    calibrate: str = ""  # the same
    numbers: dict[str, float] = field(default_factory=dict)


class Wrong(Exception):
    """A value that is not what it has to be."""


@dataclass
class _Here:
    """Stages without processes: this one is alone already."""

    directory: Path

    def run(self, name: str, function: Callable[..., Any], *args: Any, counted: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative error of logits [n, n_vocab], their means taken away. Raises Wrong for logits that are not finite.

    Without tokens that the graph itself shuts out by the lowest of all numbers (Chameleon's parts of images).
    """
    if not np.isfinite(got).all():
        raise Wrong("logits are not finite")
    open_to_text = (expected > np.finfo(np.float32).min).all(0)
    got, expected = got[:, open_to_text], expected[:, open_to_text]
    a, b = (np.float64(x) - np.float64(x).mean(-1, keepdims=True) for x in (got, expected))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


class Check:
    """A model, prompts that prefixes are computed of, and texts to go on with."""

    def __init__(self, gguf: Path, work: Path) -> None:
        self.gguf, self.work = gguf, work
        self.model = lowlevel.load_model(gguf)
        n_vocab = L.llama_vocab_n_tokens(L.llama_model_get_vocab(self.model))
        tokens = np.random.default_rng(0).integers(
            6, min(n_vocab, 512) - 16, (N_PROMPTS + N_TEXTS, max(N_PREFIX, N_TEXT))
        )
        self.prompts = [[1, *map(int, row[: N_PREFIX - 1])] for row in tokens[:N_PROMPTS]]
        self.prompt = self.prompts[0]
        self.texts = [[int(t) for t in row[:N_TEXT]] for row in tokens[N_PROMPTS:]]
        self.reference = locate(gguf)

    def prefix(self, tokens: Sequence[int], engine: str = "llama", reference: Reference | None = None) -> Prefix:
        prompt = Prompt(list(tokens), "", None, False, None)
        settings = Engine(engine, None, "cpu", None, N_THREADS, 0)
        stages: Any = _Here(self.work)
        reference = reference or self.reference
        return compute(stages, settings, reference, self.gguf, prompt, identity(reference))

    def context(self, kv: str, tail: int = 0, model: Any = None) -> Context:
        with automatic.environment("off"):
            return Context(model or self.model, kv, tail=tail, **SIZES)

    def behind(self, kv: str, prefix: Prefix | Sequence[int], tail: int = 0, model: Any = None) -> list[np.ndarray]:
        """Logits of each text behind a prefix, which is loaded, or tokens, which are computed."""
        found = []
        for text in self.texts:
            ctx = self.context(kv, tail, model)
            if isinstance(prefix, Prefix):
                bindings.load(ctx.ptr, prefix.data)
            else:
                ctx.decode(prefix, 0)
            found.append(ctx.decode(text, N_PREFIX))
        return found


def _mean(got: Sequence[np.ndarray], expected: Sequence[np.ndarray], n: int | None = None) -> float:
    """Of the texts' errors, geometric; n: of their first tokens only."""
    found = [error(a[:n], b[:n]) for a, b in zip(got, expected, strict=True)]
    return float(np.exp(np.mean(np.log(np.maximum(found, 1e-30)))))


def measure(check: Check, row: Row) -> None:
    """All that has to hold. Raises Wrong or what the program raises."""
    numbers = row.numbers
    prefixes = [check.prefix(prompt) for prompt in check.prompts]
    own, other = prefixes[:2]
    exact = check.behind("f16", check.prompt)
    numbers["influence"] = _mean(check.behind("f16", other), exact)  # of the prefix on what follows
    if numbers["influence"] < LEAST_INFLUENCE:
        raise Wrong(f"the prefix of another text changes logits by {numbers['influence']:.1g} only")
    numbers["f16"] = _mean(check.behind("f16", own), exact)
    _not_above(numbers["f16"], TOLERANCE, "a prefix in an F16 cache: error")
    for kv in KV_TYPES:
        try:
            check.context(kv)
        except AssertionError:
            row.status, row.reason = "f16", f"llama.cpp makes no context with a {kv} cache of heads of this size"
            break
        mixed = check.behind(kv, own, TAIL)
        numbers[kv] = _mean(mixed, exact)
        _not_above(numbers[kv], TOLERANCE, f"a prefix and a tail in a {kv} cache: error")
        ctx = check.context(kv)
        if bindings.load(ctx.ptr, own.data) and ctx.n_intact():
            first, plain = check.behind(kv, own), check.behind(kv, check.prompt)
            numbers[f"{kv} first"], numbers[f"{kv} first, plain"] = _mean(first, exact, 1), _mean(plain, exact, 1)
            limit = max(numbers[f"{kv} first, plain"], numbers["f16"] * 2)
            _not_above(numbers[f"{kv} first"], limit, f"the first token behind a prefix in a {kv} cache: error")
    _of_quantized(check, row, prefixes)
    for kv in ("f16", *KV_TYPES) if row.status != "f16" else ("f16",):
        _automatic(check, own, kv)
        _state(check, own, kv)


def _not_above(value: float, limit: float, what: str) -> None:
    if not value <= limit:
        raise Wrong(f"{what} {value:.2g}, which has to be at most {limit:.2g}")


def _of_quantized(check: Check, row: Row, prefixes: Sequence[Prefix]) -> None:
    """The reference's prefixes in a quantized model make it no less like the reference; those of other prompts do.

    Where another prompt's prefix changes less than the quantization does, it cannot be told.
    """
    target = check.work / "q4_0.gguf"
    weights.quantize(check.gguf, target, "Q4_0", n_threads=N_THREADS)
    model = lowlevel.load_model(target)
    of_prompts = []
    for prompt, own, other in zip(check.prompts, prefixes, prefixes[1:] + prefixes[:1], strict=True):
        exact = check.behind("f16", prompt)
        of_prompts.append([_mean(check.behind("f16", x, model=model), exact) for x in (prompt, own, other)])
    L.llama_model_free(model)
    plain, right, wrong = np.exp(np.log(of_prompts).mean(0)).tolist()
    row.numbers |= {
        f"q4_0 weights, {name}": value
        for name, value in zip(("plain", "own", "other"), (plain, right, wrong), strict=True)
    }
    if row.numbers["influence"] > plain:
        _not_above(right, plain, "the prefix in a quantized model: error")
        if right >= wrong:
            raise Wrong(f"the prefix of another text is as good in a quantized model: {wrong:.2g}, its own {right:.2g}")


def _in_torch(check: Check, row: Row, directory: Path) -> None:
    """Whether the torch engine computes the same prefix, and whether one can be trained. Raises Wrong."""
    reference = locate(directory)
    try:
        prefix = check.prefix(check.prompt, "torch", reference)
    except UsageError as no:
        row.torch = str(no)
    else:
        exact = check.behind("f16", check.prompt)
        row.numbers["torch"] = _mean(check.behind("f16", prefix), exact)
        _not_above(row.numbers["torch"], TOLERANCE, "a prefix of the torch engine: error")
        row.torch = "yes"
    try:
        check_in_torch(reference, check.work / "q4_0.gguf", "cpu", "--calibrate")
    except IntactKVError as no:
        row.calibrate = str(no)
    else:
        row.calibrate = "yes"


def _automatic(check: Check, own: Prefix, kv: str) -> None:
    """Given by the library itself to a sequence that begins with its tokens: the bits of one loaded by hand."""
    path = check.work / "own.ikv"
    path.write_bytes(own.data)
    tokens = [*check.prompt, *check.texts[0]]
    ctx = automatic.context(check.model, kv, path, **SIZES)
    by_hand = check.context(kv)
    bindings.load(by_hand.ptr, own.data)
    expected = by_hand.decode(check.texts[0], N_PREFIX)
    if ctx.batch([(t, i, [0], i >= N_PREFIX) for i, t in enumerate(tokens)]):
        raise Wrong(f"{kv}: llama_decode refuses a batch that begins with an automatic prefix")
    got = np.stack([ctx.logits(i) for i in range(N_PREFIX, len(tokens))])
    if ctx.n_not_computed() != N_PREFIX:
        raise Wrong(f"{kv}: {ctx.n_not_computed()} of {N_PREFIX} tokens came from the automatic prefix")
    if not np.array_equal(got, expected):
        raise Wrong(
            f"{kv}: behind an automatic prefix other logits than behind one loaded by hand: {error(got, expected):.2g}"
        )


def _state(check: Check, own: Prefix, kv: str) -> None:
    """A sequence saved in the middle of a text and loaded by another context goes on with the same bits."""
    text, half = check.texts[0], N_TEXT // 2
    ctx, again = check.context(kv), check.context(kv)
    bindings.load(ctx.ptr, own.data)
    ctx.decode(text[:half], N_PREFIX)
    saved = ctx.save()
    if not again.restore(saved):
        raise Wrong(f"{kv}: a saved sequence is not loaded again")
    if not np.array_equal(again.decode(text[half:], N_PREFIX + half), ctx.decode(text[half:], N_PREFIX + half)):
        raise Wrong(f"{kv}: other logits after a state was saved and loaded")


def _memory(about: dict[str, Any]) -> str:
    """What the model keeps, in a few words, from its description."""
    kinds = []
    for cache in about["caches"]:
        window = {0: "", 2: "chunks"}.get(cache["swa_type"], "window")
        window += f" {cache['n_swa']}" if window else ""
        sizes = sorted({(x["head_dim_k"], x["head_dim_v"]) for x in cache["layers"]})
        for k, v in sizes:
            kinds.append(" ".join(filter(None, [f"K and V {k}/{v}" if v else f"latents {k}", window])))
    if about.get("recurrent"):
        kinds.append("recurrent states")
    return "; ".join(kinds)


def examine(gguf: Path) -> Row:
    """The row of a model. A crash is the caller's to see."""
    row = Row(gguf.stem)
    with tempfile.TemporaryDirectory(prefix="row-") as work:
        try:
            row.architecture = architecture(gguf)
            row.memory = _memory(llama_engine.describe(gguf))
            row.status = "works"
            check = Check(gguf, Path(work))
            measure(check, row)
            if gguf.with_suffix("").is_dir():
                _in_torch(check, row, gguf.with_suffix(""))
        except Exception as problem:
            said = str(problem).replace(f"{gguf.parent}/", "")
            refused = isinstance(problem, IntactKVError) and REFUSED in said
            row.status = "refused" if refused else "fails"
            row.reason = said.partition(REFUSED)[2] if refused else f"{type(problem).__name__}: {said}"
    row.numbers = {name: value for name, value in row.numbers.items() if math.isfinite(value)}
    return row


def architecture(gguf: Path) -> str:
    return str(gguf_file.read(gguf).values["general.architecture"])


if __name__ == "__main__":
    print(json.dumps(asdict(examine(Path(sys.argv[1])))))
