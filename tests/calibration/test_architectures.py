"""Calibration of models that are not dense Llamas: mixtures of experts, LongRoPE with the prefix's factors, hybrids.

Random weights, sharp enough that the reference has something to say; quantized, a few steps: the loss falls.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import numpy as np
import torch

from intactkv_export import torch_model
from intactkv_export.calibration import calibrate
from intactkv_export.conversion import convert
from intactkv_export.errors import UsageError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from tests.support import random_families, random_hybrids, random_latents, random_models
from tests.support.cache_rows import random_tokens
from tests.support.log_probs import divergence, llama_log_probs

# lr of the first token and of a prompt. No lr made a prompt of Nemotron's random experts better, and a prompt of
# Falcon-H1's moves less than roundings do that fall to the other side
HYBRIDS = {
    **dict.fromkeys(("lfm2", "lfm2-moe", "granite-h", "granite-h-dense", "nemotron-h"), (3e-2, 3e-2)),
    **dict.fromkeys(("qwen3-next", "qwen3.5", "qwen3.5-moe"), (3e-2, 3e-2)),
    **dict.fromkeys(("falcon-h1", "nemotron-h-moe"), (3e-2,)),
}
SETTINGS = {"steps": 16, "batch": 4, "seq_len": 32, "sequences": 32, "lr": 3e-2}
LONGER = {"steps": 48, "batch": 8, "seq_len": 32, "sequences": 128, "lr": 2e-2}


@pytest.mark.parametrize(("name", "quant"), [("mixtral", "Q4_0"), ("qwen3-moe", "Q4_K_M")])
def test_a_mixture_of_experts(models, tmp_path, name, quant):
    """The reference as a GGUF: as the student, it is read from one."""
    reference = models[name].with_suffix(".gguf")
    made = convert(reference, tmp_path / "q.gguf", quant=quant, system_prompt="Be brief.", embed=False)
    result = calibrate(reference, made.outputs[0].path, prefix=made.prefix, out=tmp_path / "c.ikv", **SETTINGS)
    assert result.after < 0.93 * result.before and result.manifest["best_step"] > 0
    assert ikv.read(result.out).tokens == ikv.read(made.prefix).tokens


@pytest.mark.parametrize("name", ["glm4", "glm4-moe-scaled", "ministral3", "gpt-oss", "minimax-m2"])
def test_llama_cpp_is_nearer_to_the_reference(tmp_path, name):
    """A prompt, then the first token alone: behind the trained file llama.cpp says more nearly what the reference says,
    of texts that were not trained on."""
    directory = random_families.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    nearer_in_llama_cpp(directory.with_name(f"{name}.gguf"), tmp_path)


@pytest.mark.parametrize("name", ["deepseek2", "glm4-moe-lite"])
def test_latents(tmp_path, name):
    """MLA: the rows that are trained are latents."""
    directory = random_latents.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    nearer_in_llama_cpp(directory.with_name(f"{name}.gguf"), tmp_path)


def nearer_in_llama_cpp(reference, work):
    """Of a reference as a GGUF, quantized here."""
    for number, prompt in enumerate(({"system_prompt": "Be brief."}, {"bos_only": True})):
        made = convert(reference, work / f"q{number}.gguf", quant="Q4_0", embed=False, **prompt)
        quantized, tokens = made.outputs[0].path, ikv.read(made.prefix).tokens
        result = calibrate(reference, quantized, prefix=made.prefix, out=work / f"c{number}.ikv", **LONGER)
        assert result.after < result.before and result.manifest["best_step"] > 0
        texts = other_texts(reference, quantized, made.prefix, work / f"other{number}")
        want = llama_log_probs(reference, made.prefix, "f16", tokens, texts)
        before, after = (
            divergence(want, llama_log_probs(quantized, path, "q8_0", tokens, texts))
            for path in (made.prefix, result.out)
        )
        assert after < before, (prompt, before, after)


def other_texts(reference, quantized, prefix, directory):
    """As a training has them, of another seed."""
    settings = {**LONGER, "steps": 0, "seed": 1 << 20, "directory": directory}
    calibrate(reference, quantized, prefix=prefix, out=directory.with_suffix(".ikv"), **settings)
    (path,) = directory.glob("texts-*.npz")
    with np.load(path) as found:
        return found["tokens"].tolist()


@pytest.mark.parametrize("name", ["olmo2", "seed-oss", "starcoder2", "granitemoe"])
def test_another_family_and_its_first_token(tmp_path, name):
    """The first token alone, which serves every prompt."""
    directory = random_families.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    reference = directory.with_name(f"{name}.gguf")
    made = convert(reference, tmp_path / "q.gguf", quant="Q4_0", bos_only=True, embed=False)
    result = calibrate(reference, made.outputs[0].path, prefix=made.prefix, out=tmp_path / "c.ikv", **SETTINGS)
    assert result.after < result.before and result.manifest["best_step"] > 0
    assert len(ikv.read(result.out).tokens) == 1


@pytest.mark.parametrize(("n_ctx", "as_gguf"), [(0, True), (1024, False)])
def test_longrope(models, tmp_path, n_ctx, as_gguf):
    """The short factors, and the long ones of a context of more than 512 tokens; the reference a GGUF, and a directory.

    The divergence before the first step is small only if reference, prefix and student have the same factors.
    """
    reference = models["phi3-longrope"].with_suffix(".gguf") if as_gguf else models["phi3-longrope"]
    prompt = {"system_prompt": "Be brief.", "embed": False, "n_ctx": n_ctx}
    made = convert(reference, tmp_path / "q.gguf", quant="Q4_0,Q8_0", **prompt)
    coarse, gguf = (output.path for output in made.outputs)
    long = ikv.read(made.prefix).manifest["model"]["rope"]["factors"] == gguf_file.longrope(gguf).sha256
    assert long == (n_ctx == 1024)
    settings = {**SETTINGS, "prefix": made.prefix, "out": tmp_path / "c.ikv"}
    assert calibrate(reference, gguf, **{**settings, "steps": 0}).before < 1e-3
    result = calibrate(reference, coarse, **settings)
    assert result.after < 0.93 * result.before and result.manifest["best_step"] > 0


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrid_and_its_states(tmp_path, name):
    """The first token, then a prompt: K, V and states are trained; llama.cpp says behind the file what torch says."""
    directory = random_hybrids.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    reference = directory.with_name(f"{name}.gguf")
    prompts: tuple[dict[str, Any], ...] = {"bos_only": True}, {"system_prompt": "Be brief."}
    for number, (prompt, lr) in enumerate(zip(prompts, HYBRIDS[name], strict=False)):
        made = convert(reference, tmp_path / f"q{number}.gguf", quant="Q4_0", embed=False, **prompt)
        quantized = made.outputs[0].path
        settings = {**SETTINGS, "lr": lr}
        result = calibrate(reference, quantized, prefix=made.prefix, out=tmp_path / f"c{number}.ikv", **settings)
        assert result.after < result.before and result.manifest["best_step"] > 0
        before, after = ikv.read(made.prefix), ikv.read(result.out)
        assert after.tokens == before.tokens and after.states.keys() == before.states.keys()
        assert all((a[0] != b[0]).any() for a, b in zip(after.states.values(), before.states.values(), strict=True))
        tokens = random_tokens(32)
        want = llama_log_probs(quantized, result.out, "q8_0", after.tokens, [tokens])
        model = torch_model.load(quantized, round_activations=True, states=True)
        cache = model.cache(*torch_model.prefix_rows(after), "q8_0", states=torch_model.prefix_states(after))
        with torch.no_grad():
            got = torch.log_softmax(model.forward([tokens], cache), -1)
        plain = llama_log_probs(quantized, made.prefix, "q8_0", before.tokens, [tokens])
        assert divergence(want, got) < 0.2 * divergence(want, plain)
    with pytest.raises(UsageError, match="--cells 2 with recurrent layers"):
        calibrate(reference, quantized, prefix=made.prefix, out=tmp_path / "x.ikv", cells=2)


def test_a_hybrids_training_goes_on(tmp_path):
    """After an interruption, from what was kept: the same file, bit for bit. And no step changes nothing."""
    directory = random_hybrids.build("lfm2", tmp_path / "lfm2")
    random_models.to_gguf([directory])
    reference = directory.with_name("lfm2.gguf")
    made = convert(reference, tmp_path / "q.gguf", quant="Q4_0", bos_only=True, embed=False)
    model, settings = made.outputs[0].path, {**SETTINGS, "steps": 6, "prefix": made.prefix}
    whole = calibrate(reference, model, out=tmp_path / "whole.ikv", **settings)

    class Stop(Exception):
        pass

    def stop(phase, done, total, note=""):
        if phase == "train" and done == 4:
            raise Stop

    with pytest.raises(Stop):
        calibrate(reference, model, out=tmp_path / "parts.ikv", progress=stop, **settings)
    calibrate(reference, model, out=tmp_path / "parts.ikv", **settings)
    a, b = ikv.read(whole.out), ikv.read(tmp_path / "parts.ikv")
    assert a.data == b.data
    nothing = calibrate(reference, model, out=tmp_path / "nothing.ikv", **{**settings, "steps": 0})
    kept, own = ikv.read(nothing.out), ikv.read(made.prefix)
    assert all((kept.states[il][0] == own.states[il][0]).all() for il in own.states)
