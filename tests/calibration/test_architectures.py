"""Calibration of models that are not dense Llamas: mixtures of experts, and LongRoPE with the prefix's factors.

Random weights, sharp enough that the reference has something to say; quantized, a few steps: the loss falls.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

from intactkv_export.calibration import calibrate
from intactkv_export.conversion import convert
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from tests.support import random_families, random_models

SETTINGS = {"steps": 16, "batch": 4, "seq_len": 32, "sequences": 32, "lr": 3e-2}


@pytest.mark.parametrize(("name", "quant"), [("mixtral", "Q4_0"), ("qwen3-moe", "Q4_K_M")])
def test_a_mixture_of_experts(models, tmp_path, name, quant):
    """The reference as a GGUF: as the student, it is read from one."""
    reference = models[name].with_suffix(".gguf")
    made = convert(reference, tmp_path / "q.gguf", quant=quant, system_prompt="Be brief.", embed=False)
    result = calibrate(reference, made.outputs[0].path, prefix=made.prefix, out=tmp_path / "c.ikv", **SETTINGS)
    assert result.after < 0.93 * result.before and result.manifest["best_step"] > 0
    assert ikv.read(result.out).tokens == ikv.read(made.prefix).tokens


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
