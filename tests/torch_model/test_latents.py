"""GGUFs of models that cache latents (MLA) in torch: llama.cpp's logits, weights, cache, and a prefix of such rows.

Random weights. The prefix files are the llama engine's, so what their rows mean is llama.cpp's word.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import torch

from intactkv_export import torch_model
from intactkv_export.conversion import prefix
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.torch_model.caches import LatentLayout
from intactkv_export.torch_model.from_gguf import check_header
from tests.engines.test_latents import rows
from tests.support import random_latents, random_models
from tests.support.cache_rows import random_tokens
from tests.support.log_probs import divergence, llama_log_probs
from tests.torch_model.test_experts import quantized

NAMES = ("deepseek2-lite", "deepseek2", "deepseek3", "deepseek3-yarn", "glm4-moe-lite")
OTHERS = ("youtu", "mistral-small4")


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """{name: (Hugging Face directory, GGUF at F32, prefix file)}."""
    root = tmp_path_factory.mktemp("latents")
    made = random_models.build_all(random_latents.build, NAMES, root)
    found = {}
    for name, directory in made.items():
        gguf = directory.with_name(f"{name}.gguf")
        prefix(gguf, gguf, system_prompt="Be brief.", engine="llama", out=root / f"{name}.ikv")
        found[name] = directory, gguf, root / f"{name}.ikv"
    return found


def behind(model, path, tokens, kv_type="f32", **kwargs):
    """Log probabilities behind a prefix file."""
    cache = model.cache(*torch_model.prefix_rows(ikv.read(path)), kv_type, **kwargs)
    with torch.no_grad():
        return torch.log_softmax(model.forward([tokens], cache), -1)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpps(latents, name):
    """F32 weights, without a prefix and behind one."""
    _, gguf, path = latents[name]
    model, tokens = torch_model.load(gguf, states=True), random_tokens(64)
    with torch.no_grad():
        got = torch.log_softmax(model.forward([tokens])[:, 1:], -1)
    want = llama_log_probs(gguf, None, "f16", tokens[:1], [tokens[1:]])
    assert (got - want).abs().max() < 2e-2 and divergence(want, got) < 1e-6
    want = llama_log_probs(gguf, path, "f16", ikv.read(path).tokens, [tokens])
    assert divergence(want, behind(model, path, tokens, "f16")) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_is_the_same(latents, name):
    """transformers works out each head's K and V of the latents: what llama.cpp absorbs makes no difference."""
    directory, gguf, path = latents[name]
    tokens = random_tokens(32)
    want, got = (behind(torch_model.load(x, states=True), path, tokens) for x in (directory, gguf))
    assert (want - got).abs().max() < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_are_llama_cpps(latents, tmp_path, name):
    """Rows of the second layer, behind the first one's matrices, the absorbed ones too: the median over tokens."""
    path, tokens = quantized(latents[name][1], tmp_path / "q.gguf", "Q4_0"), random_tokens(64)
    want = rows(path, tokens)

    def errors(rounds):
        model = torch_model.load(path, round_activations=rounds, states=True)
        cache = torch_model.layers.empty_cache(model)
        with torch.inference_mode():
            model.forward([tokens], cache)
        K, V = torch_model.layers.cached_rows(model, cache, len(tokens), exact=True)
        assert all(x.shape == (len(tokens), 1, 0) for x in V)
        error = np.linalg.norm(K[1][:, 0].numpy() - want[1], axis=-1) / np.linalg.norm(want[1], axis=-1)
        return np.median(error)

    assert errors(True) < 1e-5 and errors(False) > 5e-3


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3-yarn", "glm4-moe-lite"])
def test_a_quantized_cache_is_llama_cpps(latents, name):
    """A token at a time without a tail and with one, against what a q4_0 cache does to the model.

    The median over the tokens: where one takes other experts, by a value between two steps, it differs by far more.
    """
    _, gguf, path = latents[name]
    tokens, prompt, model = random_tokens(48), ikv.read(path).tokens, torch_model.load(gguf, states=True)
    exact = llama_log_probs(gguf, path, "f16", prompt, [tokens])
    for tail in (0, 8):
        want = llama_log_probs(gguf, path, "q4_0", prompt, [tokens], tail=tail, step=1)
        got = behind(model, path, tokens, "q4_0", tail=tail)
        error, effect = ((want.exp() * (want - x)).sum(-1).median() for x in (got, exact))
        assert error < 0.2 * effect, (tail, error, effect)


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_pieces_are_the_whole(latents, name):
    """A cache that grows, in a batch, and one that does not and is followed."""
    _, gguf, path = latents[name]
    model, tokens = torch_model.load(gguf, states=True), random_tokens(40)
    both = torch_model.prefix_rows(ikv.read(path))
    pieces = [tokens[:20], tokens[20:21], tokens[21:]]
    with torch.no_grad():
        whole = model.forward([tokens], model.cache(*both, "f32"))
        cache, followed, after = model.cache(*both, "f32", batch=2), [], None
        grown = torch.cat([model.forward([piece, piece], cache) for piece in pieces], 1)
        for piece in pieces:
            after = model.cache(*both, "f32", grows=False, after=after)
            followed.append(model.forward([piece], after))
    for got in (grown, torch.cat(followed, 1)):
        assert (got - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_gradients_are_transformers_own(latents, name):
    """Of both parts of a row, where transformers makes each head's K and V of it."""
    directory, gguf, path = latents[name]
    tokens, file = random_tokens(12), ikv.read(path)
    K, V = ([torch.from_numpy(x).float() for x in side] for side in torch_model.prefix_rows(file))
    found = []
    for source in (directory, gguf):
        model, leaves = torch_model.load(source, states=True), [x.clone().requires_grad_() for x in K]
        logits = model.forward([tokens[:-1]], model.cache(leaves, V, "f32", grows=False))
        torch.log_softmax(logits[0], -1).gather(-1, torch.tensor(tokens[1:])[:, None]).sum().backward()
        found.append([x.grad for x in leaves])
    for want, got in zip(*found, strict=True):
        assert want[..., :-64].abs().max() > 0 and want[..., -64:].abs().max() > 0
        assert (got - want).abs().max() < 1e-3 * want.abs().max()


@pytest.mark.parametrize("name", ["deepseek2", "deepseek3"])
def test_rows_turned_back(latents, name):
    """The latent stays; what RoPE turned of the same text here and there is the same."""
    model, tokens = torch_model.load(latents[name][1], states=True), random_tokens(8)
    found = []
    for first in (0, 40):
        cache, ids = torch_model.layers.empty_cache(model), torch.arange(first, first + 8)[None]
        with torch.no_grad():
            model.net(input_ids=torch.tensor([tokens]), position_ids=ids, **{model._cache_argument: cache})
        K, _ = torch_model.layers.cached_rows(model, cache, 8, exact=True)
        found.append((K, model.at_first_position(K, range(first, first + 8))))
    (here, at_0), (there, back) = found
    for il, rows_0 in enumerate(at_0):
        assert torch.allclose(rows_0[0], here[il][0], atol=1e-5)
        assert (rows_0 - back[il]).abs().max() < 1e-3 * rows_0.abs().max()
        assert torch.equal(back[il][..., :-64], there[il][..., :-64])
        assert (back[il] - there[il])[..., -64:].abs().max() > 0.3 * rows_0[..., -64:].abs().max()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"deepseek2.expert_gating_func": 1, "deepseek2.expert_group_count": 2}, "softmax experts with expert_group_"),
        ({"deepseek2.attention.temperature_scale": 1}, "attention.temperature_scale"),
        ({"deepseek2.rope.scaling.yarn_log_multiplier": None}, "YaRN without rope.scaling.yarn_log_multiplier"),
    ],
)
def test_what_torch_cannot_read(latents, tmp_path, changes, why):
    with open(tmp_path / "other.gguf", "wb") as file:
        gguf_file.copy(latents["deepseek3-yarn"][1], file, changes)
    with pytest.raises(IntactKVError, match=why):
        check_header(tmp_path / "other.gguf")


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tmp_path, name):
    directory = random_latents.build(name, tmp_path / name)
    random_models.to_gguf([directory])
    with pytest.raises(IntactKVError, match="which torch cannot read from a GGUF"):
        check_header(tmp_path / f"{name}.gguf")


def test_latents_that_no_cache_holds():
    class Text:
        kv_lora_rank, qk_rope_head_dim = 48, 16

    with pytest.raises(IntactKVError, match="a latent of 48 values with 16 that RoPE turns"):
        LatentLayout.of(Text, False)


def test_nothing_is_analyzed(latents):
    with pytest.raises(IntactKVError, match=r"latents \(MLA\), which cannot be analyzed yet"):
        check_header(latents["deepseek2"][1], states=False)
    with pytest.raises(IntactKVError, match=r"latents \(MLA\), which cannot be analyzed yet"):
        torch_model.load(latents["deepseek2"][0])
