"""LongRoPE in torch: the factors, and the scaling of attention, of a llama.cpp context, from GGUFs and directories."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.conversion import prefix as make_prefix
from intactkv_export.conversion.intact_tokens import shortest
from intactkv_export.engines import Engine
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file, locate
from intactkv_export.prefix import ikv, prompt_for
from tests.support import random_models
from tests.support.cache_rows import Llama, random_tokens
from tests.support.log_probs import llama_log_probs

NAMES = ("phi3-longrope", "phi3-partial")


def log_probs(path, tokens, factors, first):
    with torch.inference_mode():
        return torch.log_softmax(torch_model.load(path, rope_factors=factors).forward([tokens])[:, first:], -1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n_tokens", [64, 600])  # the original context has 512
def test_logits_are_those_of_a_context_of_this_length(models, name, n_tokens):
    """Without word of the factors too: a text in one pass is as long as the context here. Measured: 2e-3 at most."""
    path, tokens = models[name].with_suffix(".gguf"), random_tokens(n_tokens)
    want = llama_log_probs(path, None, "f16", tokens[:1], [tokens[1:]])
    about = Llama(path).rows([1], n_ctx=1024 if n_tokens > random_models.LONGROPE_ORIG else 512)[0]
    for file in (path, models[name]):
        for factors in (about["rope"]["factors"], None):
            assert (log_probs(file, tokens, factors, 1) - want).abs().max() < 1e-2, (file, factors)


def test_a_short_text_behind_a_prefix_with_long_factors(models, tmp_path):
    """As every program of ours runs it (prefix/run_settings.py): whatever the length, the prefix's factors."""
    name = "phi3-partial"
    path = models[name].with_suffix(".gguf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a GGUF of upstream's converter does not say what it was made from
        make_prefix(models[name], path, system_prompt="Be brief.", out=tmp_path / "p.ikv", n_ctx=1024)
    made = ikv.read(tmp_path / "p.ikv")
    factors = torch_model.prefix_factors(made)
    assert factors == gguf_file.longrope(path).sha256
    text = random_tokens(65)[1:]
    want = llama_log_probs(path, tmp_path / "p.ikv", "f16", made.tokens, [text])
    for file in (path, models[name]):
        model = torch_model.load(file, rope_factors=factors)
        with torch.inference_mode():
            got = torch.log_softmax(model.forward([text], model.cache(*torch_model.prefix_rows(made))), -1)
        assert (got - want).abs().max() < 1e-2
        assert (log_probs(file, [*made.tokens, *text], factors, len(made.tokens)) - want).abs().max() < 1e-2
        assert (log_probs(file, [*made.tokens, *text], None, len(made.tokens)) - want).abs().max() > 0.1  # the short


class Here:
    """Stages of a conversion in this process."""

    def run(self, name, function, *arguments, counted=False, **settings):
        return function(*arguments, **({"progress": lambda done, total: None} if counted else {}), **settings)


@pytest.mark.parametrize("n_ctx", [0, 1024])
def test_tokens_are_chosen_with_the_factors_that_the_prefix_will_have(models, monkeypatch, n_ctx):
    """--prefix-tokens auto: both models in torch, before there is a prefix."""
    path = models["phi3-longrope"].with_suffix(".gguf")
    loaded, load = [], torch_model.load
    monkeypatch.setattr(torch_model, "load", lambda *a, **k: loaded.append(k["rope_factors"]) or load(*a, **k))
    engine = Engine("auto", None, "cpu", None, 1, n_ctx)
    prompt, curves = shortest(
        Here(), engine, locate(models["phi3-longrope"]), {"F32": path}, prompt_for(path, "Be brief.", False, "auto")
    )
    factors = Llama(path).rows([1], n_ctx=n_ctx or 512)[0]["rope"]["factors"]
    assert loaded == [factors, factors] and (factors == gguf_file.longrope(path).sha256) == (n_ctx == 1024)
    assert len(prompt.tokens) == curves["F32"].chosen


def test_factors_of_another_model(models):
    for path in (models["phi3-longrope"], models["phi3-longrope"].with_suffix(".gguf")):
        with pytest.raises(IntactKVError, match="neither the short nor the long ones") as e:
            torch_model.load(path, rope_factors="0" * 64)
        assert str(path) in str(e.value)


def test_models_without_longrope_take_no_notice(models):
    tokens = random_tokens(24)
    path = models["llama-llama3"].with_suffix(".gguf")  # it has factors of another kind
    about, _, _ = Llama(path).rows([1])
    assert torch.equal(*(log_probs(path, tokens, factors, 0) for factors in (about["rope"]["factors"], None)))
