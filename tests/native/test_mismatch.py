"""Which prompts the library says that they begin with no prefix of a context's: below any server."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.own_process import run
from tests.support.smol import Smol

# What a program does with a context that holds the prefix; `tokens` is another prompt, of 30 tokens
CASES = {
    "in one batch": "ask(tokens)",
    "in pieces": "ask(tokens[:9], last=False); ask(tokens[9:], 9)",
    "in sequences of one batch": "batch([(t, i, [s], i == 29) for s in (0, 1) for i, t in enumerate(tokens)])",
    "behind what another left": (
        "ask(prefix + tokens); L.llama_memory_seq_rm(ctx.memory, 0, 2, -1); ask(tokens[:10], 2)"
    ),
}
SILENT = {
    "the prefix": "ask(prefix + tokens); ask(tokens, len(prefix) + 30)",
    "a part of it": "ask(prefix[:9])",
    "a token or two, to try the context": "ask(tokens[:2])",
    "nothing asked": "ask(tokens, last=False)",
    "a warm-up": "L.llama_set_warmup(ctx.ptr, True); ask(tokens)",
    "embeddings": "L.llama_set_embeddings(ctx.ptr, True); ask(tokens)",
    "pictures": "pictures(12); ask(tokens, 12)",
    "a state that was restored": "ask(tokens, last=False); ctx.restore(ctx.save(0), 1); ask(tokens, 30, 1)",
    "without prefixes": "bindings.set_automatic(ctx.ptr, False); ask(tokens)",
}
CODE = """
import ctypes, sys
from tests.support import automatic, lowlevel
from tests.support.lowlevel import Context, L
from intactkv_export.libllama import bindings
from intactkv_export.prefix import ikv
model = lowlevel.load_model({model!r})
prefix = ikv.read({ikv!r}).tokens
tokens = lowlevel.tokenize(model, "<|im_start|>user\\n" + "Tell me of the secret plan at length. " * 9)[:30]
lines = []
keep = L.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
L.llama_log_set(keep, None)
ctx = automatic.context(model, "q8_0", {ikv!r}, n_seq_max=2, kv_unified=True)
assert ctx.n_prefixes() == 1

def batch(entries):
    assert ctx.batch(entries) == 0

def ask(tokens, at=0, seq=0, last=True):
    batch([(t, at + i, [seq], last and i == len(tokens) - 1) for i, t in enumerate(tokens)])

def pictures(n):
    b = L.llama_batch_init(n, L.llama_model_n_embd(model), 1)
    b.n_tokens = n
    for i in range(n):
        b.pos[i], b.n_seq_id[i], b.logits[i] = i, 1, 0
        b.seq_id[i][0] = 0
    ctypes.memset(b.embd, 0, 4 * n * L.llama_model_n_embd(model))
    assert L.llama_decode(ctx.ptr, b) == 0

{case}
for _ in range({again}):
    L.llama_memory_clear(ctx.memory, True)
    ask(tokens)
print([line for line in lines if "intactkv:" in line])
"""


def lines_of(smol: Smol, case: str, again: int = 0) -> list[str]:
    done = run(CODE.format(model=str(smol.reference), ikv=str(smol.ikv), case=case, again=again))
    assert done.returncode == 0, done.stderr
    found: list[str] = eval(done.stdout)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_said_once_and_no_word_of_it(smol: Smol, case: str) -> None:
    (line,) = lines_of(smol, case, again=2)
    begins = f"intactkv: a prompt does not begin with the prefix {smol.ikv}: "
    assert line.startswith(begins) and line.count("\n") == 1 and "secret" not in line
    same = int(line[len(begins) :].split()[0])
    assert line[len(begins) :].startswith(f"{same} of its {len(smol.tokens)} tokens are the same") and 0 < same < 4


@pytest.mark.parametrize("case", SILENT.values(), ids=SILENT)
def test_nothing_is_said_of(smol: Smol, case: str) -> None:
    assert lines_of(smol, case) == []


def test_a_model_beside_the_first_says_nothing(smol: Smol, tmp_path: Path) -> None:
    """As a draft model: it is given the tokens of the first."""
    copy = tmp_path / "draft.gguf"
    copy.symlink_to(smol.reference)
    case = f"first = ctx; ctx = automatic.context(lowlevel.load_model({str(copy)!r}), 'q8_0', {str(smol.ikv)!r})"
    assert lines_of(smol, f"{case}; assert ctx.n_prefixes() == 1; ask(tokens)") == []
