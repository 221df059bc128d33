"""Calibration: what is minimized, what is kept, what survives a kill, and that the result is an ordinary prefix file.

Random-weight models where structure is what counts; SmolLM2 for the gain, measured by the real runtime.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch
from gguf import GGUFReader

from intactkv_export import torch_model
from intactkv_export.calibration import passes, targets, training
from intactkv_export.calibration.calibrate import _dtypes, calibrate
from intactkv_export.calibration.data import Data, Text
from intactkv_export.calibration.training import Settings
from intactkv_export.conversion import convert
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama.vocabulary import Vocabulary
from intactkv_export.prefix import ikv, inspection
from intactkv_export.runtime.intact_llama import IntactLlama
from intactkv_export.texts import QUESTIONS
from tests.support.log_probs import divergence, llama_log_probs

N_TOKENS = 24
TEXT = " ".join(question for question in QUESTIONS[:40])


@pytest.fixture(scope="module")
def pair(models, tmp_path_factory):
    """(reference directory, Q4_0 GGUF, `.ikv`): a random-weight Llama, converted."""
    root = tmp_path_factory.mktemp("pair")
    result = convert(models["llama-gqa"], root / "tiny.gguf", quant="Q4_0", system_prompt="Be brief.", embed=False)
    return models["llama-gqa"], result.outputs[0].path, result.prefix


@pytest.fixture(scope="module")
def task(pair):
    """Arguments of train() for the random model: 12 sequences, 3 of them held out."""
    directory, gguf, path = pair
    prefix = ikv.read(path)
    reference = torch_model.load(directory)
    sequences = np.random.default_rng(1).integers(6, 490, (12, N_TOKENS)).astype(np.int32)
    wanted = targets.make(reference, prefix.tokens, sequences.tolist(), top_k=64)
    texts = [Text(tokens, wanted[i]) for i, tokens in enumerate(sequences)]
    return (
        torch_model.load(gguf),
        *torch_model.prefix_rows(prefix),
        Data(texts, [0, 1, 2]),
        reference,
        prefix.tokens,
    )


def run(task, state=None, progress=None, **settings):
    model, K, V, data, reference, prefix = task
    chosen = Settings(**{"steps": 8, "every": 2, "batch": 3, **settings})
    return training.train(model, K, V, data, chosen, reference=reference, prefix=prefix, state=state, progress=progress)


def tokens(data, index):
    return np.stack([data.texts[i].tokens for i in index]).tolist()


def wanted(data, index):
    return targets.joined([data.texts[i].targets for i in index]).tensors(torch.device("cpu"))


def test_divergence_of_everything_is_the_kl_divergence():
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(5, 7, 300, generator=generator) for _ in range(2))
    exact = (torch.softmax(p, -1) * (torch.log_softmax(p, -1) - torch.log_softmax(q, -1))).sum(-1)

    def top(k):
        log_p, ids = torch.log_softmax(p, -1).topk(k)
        rest = torch.logsumexp(torch.log_softmax(p, -1).scatter(-1, ids, -torch.inf), -1)
        return ids, log_p, rest

    assert torch.allclose(targets.divergence(q, *top(300)), exact, rtol=1e-4)
    bounds = [targets.divergence(q, *top(k)) for k in (1, 10, 100, 300)]
    for low, high in zip(bounds, bounds[1:], strict=False):
        assert (low <= high + 1e-5).all() and (low >= 0).all()
    assert targets.divergence(p, *top(20)).abs().max() < 1e-5


def test_divergence_has_the_gradient_of_finite_differences():
    generator = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(2))
    log_p, ids = torch.log_softmax(p, -1).topk(8)
    rest = torch.logsumexp(torch.log_softmax(p, -1).scatter(-1, ids, -torch.inf), -1)
    assert torch.autograd.gradcheck(lambda x: targets.divergence(x, ids, log_p, rest), q.requires_grad_())


def test_targets_are_the_references(task):
    _, _, _, data, reference, prefix = task
    with torch.no_grad():
        logits = reference.forward([[*prefix, *data.texts[4].tokens]])[0, len(prefix) :]
    log_p, wanted = torch.log_softmax(logits, -1).numpy(), data.texts[4].targets
    assert np.allclose(np.take_along_axis(log_p, wanted.ids, -1), wanted.log_p, atol=1e-4)
    mass = np.exp(wanted.log_p).sum(-1) + np.exp(wanted.log_rest)
    assert np.allclose(mass, 1, atol=1e-5)


@pytest.mark.parametrize("objective", training.OBJECTIVES)
def test_objectives_lower_the_held_out_divergence(task, objective):
    lr = 3e-2 if "kl" in objective else 3e-3
    result = run(task, objective=objective, steps=24, every=4, lr=lr, patience=9)
    assert result.after < 0.97 * result.before and result.best_step > 0
    assert result.after == min(value for _, value in result.history)
    assert all(x.dtype == np.float16 for x in (*result.K, *result.V))


def test_held_out_is_what_the_result_gives(task):
    model, _, _, data, _, _ = task
    result = run(task, lr=3e-2)
    with torch.no_grad():
        logits = model.forward(tokens(data, range(3)), model.cache(result.K, result.V, "q8_0", batch=3))
    again = float(targets.divergence(logits, *wanted(data, range(3))).mean())
    assert again == pytest.approx(result.after, rel=1e-5)


def test_what_only_gets_worse_is_not_kept(task):
    """A learning rate that destroys the prefix: the result is what it began with, bit for bit, and it ends early."""
    result = run(task, lr=50.0, steps=40, patience=3)
    assert result.best_step == 0 and result.after == result.before and result.steps == 8
    for rows, original in ((result.K, task[1]), (result.V, task[2])):
        assert all(np.array_equal(a, b) for a, b in zip(rows, original, strict=True))


def test_rows_that_a_rotated_cache_cannot_hold_are_no_candidates(task):
    """Each value is below F16's 65504, their sum in the Hadamard basis is not."""
    model = task[0]
    rows = torch.full((1, 2, model.n_head_kv, model.head_dim), 1e4).half()
    assert not training._storable(model, rows, "K", ("q8_0", "q8_0"))
    assert training._storable(model, rows / 2, "K", ("q8_0", "q8_0"))


def test_activations_computed_twice_give_the_same(task, monkeypatch):
    kept = run(task)
    monkeypatch.setattr(training, "_ACTIVATIONS", 0)
    for objective in ("kl", "mse"):
        checkpointed = run(task, objective=objective)
        if objective == "kl":
            assert np.allclose(kept.history, checkpointed.history, rtol=1e-5)
    assert all("forward" not in vars(layer) for layer in task[0].decoder_layers)


def test_a_tail_is_trained_with(task, monkeypatch):
    """Of all there is: an F16 cache. Of some: in between, and the same when activations are computed twice."""
    q4_0 = ("q4_0", "q4_0")
    start = {tail: run(task, steps=0, kv_type=q4_0, tail=tail).before for tail in (0, 4, N_TOKENS)}
    exact = run(task, steps=0, kv_type=("f16", "f16")).before
    assert len({*start.values()}) == 3 and start[N_TOKENS] == pytest.approx(exact, rel=0.01)
    kept = run(task, steps=2, kv_type=q4_0, tail=4)
    assert kept.before == start[4]
    monkeypatch.setattr(training, "_ACTIVATIONS", 0)
    assert np.allclose(kept.history, run(task, steps=2, kv_type=q4_0, tail=4).history, rtol=1e-5)


def test_several_passes_give_one_gradient(task, monkeypatch):
    one = run(task)
    monkeypatch.setattr(passes, "_PASS", N_TOKENS)
    assert np.allclose(one.history, run(task).history, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2, 10, 120])
def test_the_rate_is_a_function_of_the_step(steps):
    rates = [training._rate(step, Settings(steps=steps)) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates) and rates[-1] <= 2 / steps
    if steps == 120:
        assert rates[0] == pytest.approx(1 / 6) and rates[5:61] == [1.0] * 56 and rates[90] == 0.5
    assert {training._rate(step, Settings("mse", steps=steps)) for step in range(steps)} == {1.0}


def test_a_model_that_is_close_takes_small_steps():
    assert [training.peak(Settings(), before, 2) for before in (np.inf, 0.3, 0.04, 0.004, 0)] == [0.02] * 3 + [0.002, 0]
    assert [training.peak(Settings(), before, 1) for before in (0.3, 0.004)] == pytest.approx([0.05, 0.005])
    assert training.peak(Settings(), 0.3, 1, states=True) == 0.01 and training.LR > 0.01
    assert training.peak(Settings(lr=0.5), 0.001, 1) == 0.5
    assert training.peak(Settings("mse"), 0.001, 1) == 2e-4


@pytest.mark.parametrize("objective", ["kl", "mse"])
def test_a_step_is_relative_to_the_row(task, monkeypatch, objective):
    """AdamW's first step moves each value by lr times 1/6 times the row's root mean square; for mse by lr."""
    better = itertools.count(0, -1)
    monkeypatch.setattr(training, "_held_out", lambda *_: (next(better), []))
    result = run(task, objective=objective, steps=1, lr=0.1)
    for before, after in ((task[1], result.K), (task[2], result.V)):
        before, after = (np.stack(x).astype(np.float32) for x in (before, after))
        moved = np.sqrt(((after - before) ** 2).mean((2, 3)))
        unit = np.sqrt((before**2).mean((2, 3))) / 6 if objective == "kl" else 1.0
        assert np.allclose(moved, 0.1 * unit, rtol=0.03)


def test_a_row_of_zeros_has_a_unit():
    """What a sliding window has left behind."""
    rows = torch.ones(2, 3, 1, 4)
    rows[0, 1] = 0
    assert torch.equal(training._scale(3 * rows, Settings())[:, :, 0, 0], torch.tensor([[3.0, 1.0, 3.0], [3.0] * 3]))


def same(a, b):
    return a.history == b.history and all(np.array_equal(x, y) for x, y in zip([*a.K, *a.V], [*b.K, *b.V], strict=True))


def test_a_seed_decides(task):
    assert same(run(task, seed=3), run(task, seed=3))
    assert not same(run(task, seed=3), run(task, seed=4))


def test_interrupted_training_goes_on_bit_for_bit(task, tmp_path, monkeypatch):
    whole = run(task)
    state = tmp_path / "state.pt"
    for stop in (1, 3, 5, 7):
        monkeypatch.setattr(training, "_SAVE", 0 if stop == 5 else 1e9)  # saved after each step, or each evaluation

        def interrupt(step, steps, held_out, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(task, state=state, progress=interrupt)
    assert same(run(task, state=state), whole)
    with pytest.raises(UsageError, match=r"other settings \(lr is None there and 0.01 here\)"):
        run(task, state=state, lr=0.01)


def test_training_needs_no_llama_cpp(pair):
    """Where there is a GPU there may be torch alone: a GGUF, a prefix file and sequences are enough."""
    code = (
        "import sys; sys.modules['llama_cpp'] = None\n"
        "import numpy as np\n"
        "from intactkv_export import torch_model\n"
        "from intactkv_export.calibration import data, targets, training\n"
        "from intactkv_export.prefix import ikv\n"
        "directory, gguf, path = sys.argv[1:]\n"
        "prefix, sequences = ikv.read(path), np.arange(64).reshape(4, 16) + 6\n"
        "wanted = targets.make(torch_model.load(directory), prefix.tokens, sequences.tolist())\n"
        "made = data.Data([data.Text(tokens, wanted[i]) for i, tokens in enumerate(sequences)], [0])\n"
        "settings = training.Settings(steps=1)\n"
        "training.train(torch_model.load(gguf), *torch_model.prefix_rows(prefix), made, settings)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, pair)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def command(pair, out, *more):
    directory, gguf, prefix = pair
    text = out.with_name("text.txt")
    text.write_text(TEXT)
    return [
        *(
            sys.executable,
            "-m",
            "intactkv_export",
            "calibrate",
            str(directory),
            "-m",
            str(gguf),
            "--prefix",
            str(prefix),
        ),
        *("-o", str(out), "--data", str(text), "--seq-len", str(N_TOKENS), "--sequences", "16", "--steps", "24"),
        *more,
    ]


def test_killed_and_started_again(pair, tmp_path):
    """kill -9 in the middle of training; the same command then ends with the file of a run that was left alone."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (tmp_path / name / "out.ikv" for name in ("whole", "killed"))
    assert subprocess.run(command(pair, whole), capture_output=True).returncode == 0
    process = subprocess.Popen(command(pair, killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "killed" / "out.ikv.calibrating"
    deadline = time.monotonic() + 120
    while not (work / "tiny.pt").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and (work / "tiny.pt").is_file() and not killed.exists()
    done = subprocess.run(command(pair, killed, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in killed.parent.iterdir()) == ["out.ikv", "text.txt"]
    summary = json.loads(done.stdout)
    assert summary["manifest"] == ikv.read(killed).manifest["calibrated"]
    assert summary["manifest"]["held_out"]["after"] <= summary["manifest"]["held_out"]["before"]


@pytest.fixture(scope="module")
def calibrated(smol, tmp_path_factory):
    """SmolLM2 Q4_0, 8 steps on what the reference itself writes."""
    out = tmp_path_factory.mktemp("calibrated") / "smol.ikv"
    return calibrate(
        smol.reference, smol.gguf, prefix=smol.ikv, out=out, steps=8, batch=3, seq_len=32, sequences=16, seed=1
    )


def test_calibrated_is_closer_to_the_reference_in_llama_cpp(calibrated, smol):
    """On text it was not trained on, through the runtime, with the KV type it was trained for."""
    with Vocabulary(smol.reference) as vocabulary:
        tokens = vocabulary.tokenize(TEXT, special=False)
    chunks = [tokens[i * 128 : (i + 1) * 128] for i in range(3)]
    reference = llama_log_probs(smol.reference, None, "f16", smol.tokens, chunks)
    before, after = (
        divergence(reference, llama_log_probs(smol.gguf, path, "q8_0", smol.tokens, chunks))
        for path in (smol.ikv, calibrated.out)
    )
    assert after < 0.99 * before
    assert calibrated.after < 0.97 * calibrated.before


def test_a_gpu_computes_in_float32_what_is_small(pair, monkeypatch):
    assert [_dtypes(pair[1], device, "kl", False) for device in ("cuda", "mps")] == [("float32", "float32")] * 2
    n_weights = sum(tensor.n_elements for tensor in GGUFReader(pair[1]).tensors)
    monkeypatch.setitem(_dtypes.__globals__, "_EXACT", int(n_weights))
    assert _dtypes(pair[1], "cuda", "kl", False) == ("float32", "float32")
    monkeypatch.setitem(_dtypes.__globals__, "_EXACT", int(n_weights) - 1)
    assert _dtypes(pair[1], "cuda", "kl", False) == ("bfloat16", "bfloat16")


def test_a_cpu_computes_a_coarse_model_in_what_it_multiplies(pair, monkeypatch):
    for can, kind in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setitem(_dtypes.__globals__, "multiplies_bfloat16", lambda can=can: can)
        assert _dtypes(pair[1], "cpu", "kl", False) == (kind, kind)
        assert _dtypes(pair[1], "cpu", "kl", True) == ("float32", kind)
        assert _dtypes(pair[1], "cpu", "mse", False) == ("float32", "float32")
    monkeypatch.setitem(_dtypes.__globals__, "multiplies_bfloat16", lambda: True)
    monkeypatch.setitem(_dtypes.__globals__, "_COARSE", 4.0)
    assert _dtypes(pair[1], "cpu", "kl", False) == ("float32", "float32")


def test_the_result_is_an_ordinary_prefix_file(calibrated, smol, tmp_path):
    original, made = ikv.read(smol.ikv), ikv.read(calibrated.out)
    assert made.tokens == original.tokens and made.manifest["calibrated"] == calibrated.manifest
    unchanged = made.manifest.keys() - {"calibrated", "created_by"}
    assert all(made.manifest[key] == original.manifest[key] for key in unchanged)
    about = calibrated.manifest
    assert (about["objective"], about["data"]["kind"], about["kv_type"]) == ("kl", "self", "q8_0")
    assert about["kv_tail"] == 0
    assert about["model"]["type"] == "Q4_0" and about["held_out"]["n_tokens"] == 2 * 32
    assert {"texts", "train"} == set(calibrated.seconds) and calibrated.peak_bytes > 1e8
    embedded = ikv.embed(smol.gguf, made, tmp_path / "smol.gguf")
    llama = IntactLlama(embedded, n_ctx=64)
    llama.eval([*made.tokens, 100])
    assert llama.intact_cells == len(made.tokens)
    llama.close()
    line = next(line for line in map(str, inspection.report(made, None, None)) if line.startswith("calibrated"))
    assert f"kl, step {about['best_step']} of {about['steps']}" in line


def test_the_tail_is_that_of_the_kv_type(pair, tmp_path):
    """Unless another is given; the prefix file says which."""
    reference, gguf, prefix = pair
    settings = {"prefix": prefix, "kv_type": "q8_0,q4_0", "steps": 0, "seq_len": 16, "sequences": 2}
    exact = {"kv_type": "f16"}  # such a cache has none, whatever is asked for
    for tail, expected, changes in ((None, 128, {}), (3, 3, {}), (0, 0, {}), (5, 0, exact)):
        out = calibrate(reference, gguf, out=tmp_path / f"{tail}.ikv", tail=tail, **{**settings, **changes}).out
        made = ikv.read(out)
        assert made.manifest["calibrated"]["kv_tail"] == expected
        report = " ".join(" ".join(map(str, inspection.report(made, None, None))).split())
        assert (f"with a tail of {expected}" in report) == (expected > 0)


def refusal(pair, tmp_path, error=IntactKVError, **changes):
    directory, gguf, prefix = pair
    arguments = {"reference": directory, "model": gguf, "prefix": prefix, "out": tmp_path / "out.ikv", **changes}
    with pytest.raises(error) as e:
        calibrate(arguments.pop("reference"), arguments.pop("model"), **arguments)
    assert "\n" not in str(e.value) and not (tmp_path / "out.ikv").exists()
    return str(e.value)


def test_refuses_what_makes_no_sense(pair, models, smol, tmp_path):
    assert "'hinge'" in refusal(pair, tmp_path, UsageError, objective="hinge")
    assert "0 sequences" in refusal(pair, tmp_path, UsageError, batch=0)
    assert "-1" in refusal(pair, tmp_path, UsageError, tail=-1)
    assert "q3_0" in refusal(pair, tmp_path, UsageError, kv_type="q3_0")
    for changes in ({"seed": -1}, {"seed": 1 << 32}, {"lr": 0.0}, {"lr": -0.1}, {"lr": math.nan}, {"lr": math.inf}):
        assert "give a seed of" in refusal(pair, tmp_path, UsageError, **changes)
    assert "prefix" in refusal(pair, tmp_path, UsageError, model=models["qwen2"].with_suffix(".gguf"), prefix=None)
    assert "belong together" in refusal(pair, tmp_path, reference=models["qwen2"])
    assert "belong together" in refusal(pair, tmp_path, prefix=smol.ikv)


def test_a_start_that_failed_does_not_stand_in_the_way(pair, tmp_path):
    """A file that is not there, then one that is; a rate that leads nowhere, then another: the same directory."""
    quick = {"steps": 2, "batch": 2, "seq_len": 16, "sequences": 4}
    refusal(pair, tmp_path, UsageError, data=tmp_path / "nowhere.txt", **quick)
    assert "gradient" in refusal(pair, tmp_path, lr=1e38, **quick)
    directory, gguf, prefix = pair
    made = calibrate(directory, gguf, prefix=prefix, out=tmp_path / "out.ikv", **quick)
    assert made.manifest["steps"] == 2 and not list(tmp_path.glob("*.calibrating"))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_divergence_that_is_no_number_ends_it(pair, tmp_path, monkeypatch, value):
    """Before the training, not when the prefix file is written."""
    monkeypatch.setattr(training, "_held_out", lambda *_: (value, [value]))
    quick = {"steps": 1, "batch": 2, "seq_len": 16, "sequences": 4}
    assert f"before training is {value}" in refusal(pair, tmp_path, **quick)


def test_convert_calibrates_each_type(models, tmp_path):
    """Two types: each GGUF has its own prefix, embedded or beside it, and none that was not calibrated."""
    settings = {"steps": 2, "batch": 2, "seq_len": 16, "sequences": 8}
    result = convert(
        models["llama-gqa"].with_suffix(".gguf"), tmp_path / "tiny", quant="Q4_0,Q2_K", system_prompt="Be brief.",
        calibrate=settings,
    )  # fmt: skip
    for name in ("Q4_0", "Q2_K"):
        gguf, path = tmp_path / f"tiny-{name}.gguf", tmp_path / f"tiny-{name}.ikv"
        prefix = ikv.read(path)
        assert ikv.read(gguf).data == prefix.data
        about = prefix.manifest["calibrated"]
        assert about["steps"] == 2 and about["model"]["type"] == name
        assert result.calibrated[name] == {"prefix": path, **about["held_out"]}
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf", ".gguf", ".ikv", ".ikv"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        IntactLlama(tmp_path / "tiny-Q4_0.gguf", n_ctx=64).close()
    with pytest.warns(UserWarning, match=r"calibrated for tiny-Q4_0\.gguf"):
        IntactLlama(tmp_path / "tiny-Q2_K.gguf", tmp_path / "tiny-Q4_0.ikv", n_ctx=64).close()
