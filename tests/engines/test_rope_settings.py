"""RoPE settings: a model's own YaRN values hold, a user's are part of the prefix, LongRoPE costs no cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from intactkv_export import library
from intactkv_export.cli.main import main
from intactkv_export.conversion import convert, prefix
from intactkv_export.engines import llama_engine as engine
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Context, Rope, bindings, rope_of, state
from intactkv_export.models import supports
from intactkv_export.prefix import ikv, run_settings
from intactkv_export.runtime import IntactLlama, check_fit
from tests.support import random_models

pytestmark = pytest.mark.skipif(not library.is_patched(), reason="the libraries cannot describe a model")
YARN = Rope("yarn", scale=4.0, yarn_orig_ctx=512, yarn_beta_fast=16.0)
OPTIONS = ["--rope-scaling", "yarn", "--rope-scale", "4", "--yarn-orig-ctx", "512", "--yarn-beta-fast", "16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random models as directories, with their F32 GGUFs beside them."""
    pytest.importorskip("torch")
    root = tmp_path_factory.mktemp("rope")
    names = ("llama-gqa", "ministral3", "phi3-longrope")
    random_models.to_gguf([random_models.build(name, root / name) for name in names])
    yield root


def test_a_model_with_betas_of_its_own_takes_the_prefix_that_convert_made(tiny: Path, tmp_path: Path) -> None:
    """llama_cpp.Llama's default is yarn_beta_fast=32, whatever the model says."""
    made = convert(tiny / "ministral3", tmp_path / "x", quant="Q8_0")
    rope = ikv.read(made.prefix).manifest["model"]["rope"]
    assert made.engine == "torch" and (rope["beta_fast"], rope["beta_slow"]) == (4.0, 1.5)
    llama = IntactLlama(tmp_path / "x.gguf", n_ctx=128)
    assert llama.prefix is not None and bindings.describe(llama.ctx)["rope"] == rope
    llama.close()
    check_fit(ikv.read(made.prefix), tmp_path / "x.gguf")
    with pytest.raises(IntactKVError, match="beta_fast is 4.0 in the prefix and 32.0 in the model"):
        IntactLlama(tmp_path / "x.gguf", n_ctx=128, yarn_beta_fast=32.0)


def test_betas_that_llama_cpp_ignores_are_not_for_torch() -> None:
    """The converter writes them for every architecture, llama.cpp reads them for two: K would be rotated otherwise."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    for betas, proven in (({}, True), ({"beta_fast": 32.0, "beta_slow": 1}, True), ({"beta_fast": 4.0}, False)):
        assert supports({"model_type": "llama", "rope_parameters": {**yarn, **betas}}) is proven


def test_settings_of_run_time_are_part_of_the_prefix(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    plain = convert(tiny / "llama-gqa", tmp_path / "plain", quant="Q8_0", engine="llama")
    assert main(["convert", str(tiny / "llama-gqa"), "-o", str(tmp_path / "x"), "-q", "Q8_0", *OPTIONS]) == 0
    gguf, found = tmp_path / "x.gguf", ikv.read(tmp_path / "x.ikv")
    assert found.manifest["engine"]["name"] == "llama", "transformers has no such settings at run time"
    assert rope_of(found.manifest["rope_options"]) == YARN and "rope_options" not in ikv.read(plain.prefix).manifest
    rope = found.manifest["model"]["rope"]
    assert (rope["scaling"], rope["scale"], rope["n_ctx_orig"], rope["beta_fast"]) == ("yarn", 0.25, 512, 16.0)
    for ours, theirs in zip(found.layers, ikv.read(plain.prefix).layers, strict=True):
        assert np.abs(np.float32(ours.K) - theirs.K).max() > 0.1, "computed with them"
    with pytest.raises(IntactKVError, match="RoPE settings the prefix was made with"):
        IntactLlama(gguf, n_ctx=128)
    llama = IntactLlama(gguf, n_ctx=128, **YARN.llama_kwargs)
    assert llama.prefix is not None
    llama.close()
    check_fit(found, gguf)
    assert main(["verify", str(gguf)]) == 0 and main(["inspect", str(gguf)]) == 0
    assert "to be used with --rope-scaling yarn" in " ".join(capfd.readouterr().out.split())
    command = [sys.executable, "-m", "intactkv_export", "chat", str(gguf), "-p", "Hi", "-n", "2"]
    refused, taken = (
        subprocess.run([*command, *options], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        for options in ([], OPTIONS)
    )
    assert refused.returncode == 1 and "RoPE settings the prefix was made with" in refused.stderr
    assert taken.returncode == 0, taken.stderr
    again = prefix(tiny / "llama-gqa", gguf, out=tmp_path / "y.ikv", engine="llama", rope=YARN)
    assert [x.K.tobytes() for x in ikv.read(again.prefix).layers] == [x.K.tobytes() for x in found.layers]


def test_settings_that_make_no_sense(tiny: Path, tmp_path: Path) -> None:
    for settings, message in (
        ({"scaling": "magic"}, "unknown RoPE scaling 'magic'"),
        ({"scale": 4.0, "freq_scale": 0.25}, "give one of both"),
        ({"freq_base": -3.0}, "--rope-freq-base is -3"),
        ({"scale": float("nan")}, "--rope-scale is nan"),
    ):
        with pytest.raises(UsageError, match=message):
            Rope(**settings)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="knows no RoPE settings other than the model's own"):
        convert(tiny / "llama-gqa", tmp_path / "x", engine="torch", rope=YARN)
    with pytest.raises(UsageError, match="--calibrate trains with the model's own RoPE"):
        convert(tiny / "llama-gqa", tmp_path / "x", calibrate=True, rope=YARN)
    assert list(tmp_path.iterdir()) == []


def test_long_factors_in_the_context_that_the_prompt_needs(tiny: Path, tmp_path: Path) -> None:
    """What a context of 1024 tokens gives, in one of 256: phi3-longrope's original context has 512."""
    gguf, tokens = tiny / "phi3-longrope.gguf", [1, *range(100, 120)]
    about, K, _, _ = engine.compute(gguf, tokens, n_threads=2, n_ctx=1 << 20)
    with Context(gguf, 1024, "f32", 2) as large:
        assert bindings.describe(large.ptr) == about == engine.describe(gguf, 1024)
        large.decode(tokens, 0)
        expected, _ = state.rows_by_layer(large.state(), about, len(tokens))
    with engine._context(gguf, 1 << 20, len(tokens) + 1, "f32", 2, None) as small:
        assert library.load().llama_n_ctx(small.ptr) == 256
    for il, rows in K.items():
        assert rows.tobytes() == expected[il].astype(np.float16).tobytes()
    assert engine.describe(gguf, 300)["rope"]["factors"] != about["rope"]["factors"]
    long = prefix(gguf, gguf, out=tmp_path / "long.ikv", n_ctx=1 << 20)
    check_fit(ikv.read(long.prefix), gguf)
    assert "kv_overrides" in run_settings(ikv.read(long.prefix), gguf)
    short = prefix(gguf, gguf, out=tmp_path / "short.ikv")
    check_fit(ikv.read(short.prefix), gguf)
    assert "kv_overrides" not in run_settings(ikv.read(short.prefix), gguf)
