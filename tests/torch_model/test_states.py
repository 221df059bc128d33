"""Hybrids in torch: GGUFs of every family that can be trained for, and the states of their recurrent layers behind a
prefix.

Random weights. The prefix file is the llama engine's, so what its states mean is llama.cpp's word.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the extra [convert] is not installed")

import gguf as gguf_py
import torch
from safetensors.torch import load_file

from intactkv_export import torch_model
from intactkv_export.errors import IntactKVError
from intactkv_export.models import gguf_file
from intactkv_export.prefix import ikv
from intactkv_export.torch_model.from_gguf import check_header
from tests.support import random_hybrids, random_models
from tests.support.cache_rows import random_tokens
from tests.support.hybrids import prefix_of
from tests.support.log_probs import divergence, llama_log_probs
from tests.torch_model.test_experts import quantized

NAMES = (
    "lfm2",
    "lfm2-moe",
    "granite-h",
    "granite-h-dense",
    "falcon-h1",
    "nemotron-h",
    "nemotron-h-moe",
    "nemotron-h-latent",
    "qwen3-next",
    "qwen3.5",
    "qwen3.5-moe",
)


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    """{name: (Hugging Face directory, GGUF at F32, prefix file)}."""
    root = tmp_path_factory.mktemp("hybrids")
    made = {}
    for name, directory in random_models.build_all(random_hybrids.build, NAMES, root).items():
        gguf, path = (root / f"{name}.{suffix}" for suffix in ("gguf", "ikv"))
        path.write_bytes(prefix_of(gguf, random_tokens(24)))
        made[name] = directory, gguf, path
    return made


def behind(model, path, tokens, kv_type="f32", tail=0, **kwargs):
    """Log probabilities behind a prefix file."""
    file = ikv.read(path)
    states = torch_model.prefix_states(file)
    cache = model.cache(*torch_model.prefix_rows(file), kv_type, tail=tail, states=states, **kwargs)
    with torch.no_grad():
        return torch.log_softmax(model.forward([tokens], cache), -1)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_the_directorys(hybrids, name):
    """And what is computed with them. Falcon-H1's multipliers are in the GGUF's matrices."""
    directory, gguf, _ = hybrids[name]
    whole, read = (torch_model.load(path, states=True) for path in (directory, gguf))
    want, got = whole.net.state_dict(), read.net.state_dict()
    assert want.keys() == got.keys()
    for key, weight in want.items() if name != "falcon-h1" else ():
        torch.testing.assert_close(got[key], weight, atol=1e-6, rtol=1e-5, msg=key)
    with torch.no_grad():
        a, b = (model.forward([random_tokens(75)]) for model in (whole, read))
    assert (a - b).abs().max() < 1e-5 * a.abs().max()


def test_q_k_v_and_gate_in_one_matrix(hybrids, tmp_path):
    """As the first GGUFs of Qwen3-Next have them, which llama.cpp reads too."""
    directory, gguf, path = hybrids["qwen3-next"]
    weights = load_file(directory / "model.safetensors")
    reader, old = gguf_py.GGUFReader(gguf), tmp_path / "old.gguf"
    writer = gguf_py.GGUFWriter(old, "qwen3next")
    for field in reader.fields.values():
        if field.types and not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], *field.types[1:2])
    for tensor in reader.tensors:
        layer, _, part = tensor.name.removeprefix("blk.").partition(".")
        if part == "attn_qkv.weight":
            whole = weights[f"model.layers.{layer}.linear_attn.in_proj_qkvz.weight"].numpy()
            writer.add_tensor(f"blk.{layer}.ssm_in.weight", whole)
        elif part != "attn_gate.weight":
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokens = random_tokens(48)
    got, same = (behind(torch_model.load(file, states=True), path, tokens, "f16") for file in (old, gguf))
    assert torch.equal(got, same)
    assert divergence(llama_log_probs(old, path, "f16", ikv.read(path).tokens, [tokens]), got) < 2e-7


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("granite-h", {"granitehybrid.rope.scaling.finetuned": True}, "'granitehybrid' has RoPE, with which"),
        ("granite-h", {"granitehybrid.rope.scaling.finetuned": None}, "'granitehybrid' has RoPE, with which"),
        ("nemotron-h-moe", {"nemotron_h_moe.expert_group_count": 2}, "has expert_group_count 2, with which"),
        ("falcon-h1", {"falcon-h1.rope.dimension_count": 16}, "has rope.dimension_count 16 in heads of"),
        ("lfm2", {"lfm2.attention.sliding_window": 8}, "has attention.sliding_window 8, with which"),
        ("lfm2-moe", {"lfm2moe.expert_gating_func": 1}, "has expert_gating_func 1, with which"),
    ],
)
def test_what_torch_cannot_read(hybrids, tmp_path, name, changes, message):
    with open(tmp_path / "other.gguf", "wb") as file:
        gguf_file.copy(hybrids[name][1], file, changes)
    with pytest.raises(IntactKVError, match=message):
        check_header(tmp_path / "other.gguf")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_llama_cpps(hybrids, name):
    """F32 weights, behind the first token and behind a prefix file, whose states are llama.cpp's own."""
    _, gguf, path = hybrids[name]
    model, tokens = torch_model.load(gguf, states=True), random_tokens(64)
    with torch.no_grad():
        got = torch.log_softmax(model.forward([tokens])[:, 1:], -1)
    assert divergence(llama_log_probs(gguf, None, "f16", tokens[:1], [tokens[1:]]), got) < 1e-6
    want = llama_log_probs(gguf, path, "f16", ikv.read(path).tokens, [tokens])
    assert divergence(want, behind(model, path, tokens, "f16")) < 2e-7
    file = ikv.read(path)  # and the states matter
    with torch.no_grad():
        other = torch.log_softmax(model.forward([tokens], model.cache(*torch_model.prefix_rows(file), "f16")), -1)
    assert divergence(want, other) > 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_quantized_weights_are_llama_cpps(hybrids, tmp_path, name):
    """Q4_0: much nearer to llama.cpp than with activations that are not rounded."""
    gguf, path = quantized(hybrids[name][1], tmp_path / "q.gguf", "Q4_0"), hybrids[name][2]
    tokens = random_tokens(48)
    want = llama_log_probs(gguf, path, "f16", ikv.read(path).tokens, [tokens])
    rounded, exact = (
        divergence(want, behind(torch_model.load(gguf, round_activations=rounds, states=True), path, tokens, "f16"))
        for rounds in (True, False)
    )
    assert rounded < 0.5 * exact, (rounded, exact)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "granite-h"])
def test_a_quantized_cache_with_a_tail_is_llama_cpps(hybrids, name):
    """A token at a time behind a q4_0 cache, against what such a cache does to the model: too little to the one that is
    left out."""
    _, gguf, path = hybrids[name]
    tokens, prompt = random_tokens(48), ikv.read(path).tokens
    exact = llama_log_probs(gguf, path, "f16", prompt, [tokens])
    want = llama_log_probs(gguf, path, "q4_0", prompt, [tokens], tail=8, step=1)
    got = behind(torch_model.load(gguf, states=True), path, tokens, "q4_0", tail=8)
    assert divergence(want, got) < 0.2 * divergence(want, exact)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_are_the_whole(hybrids, name):
    """A cache that grows, one that is followed, and one that does not grow and is used twice."""
    _, gguf, path = hybrids[name]
    model, tokens, file = torch_model.load(gguf, states=True), random_tokens(40), ikv.read(path)
    rows, states = torch_model.prefix_rows(file), torch_model.prefix_states(file)
    pieces = [tokens[:20], tokens[20:21], tokens[21:22], tokens[22:]]
    with torch.no_grad():
        whole = model.forward([tokens], model.cache(*rows, "f32", states=states))
        cache = model.cache(*rows, "f32", states=states, batch=2)
        grown = torch.cat([model.forward([piece, piece], cache) for piece in pieces], 1)
        followed, after = [], None
        for piece in pieces:
            after = model.cache(*rows, "f32", states=states, grows=False, after=after)
            model.forward([piece], after)
            followed.append(model.forward([piece], after))  # as gradient checkpointing does
        other = [*file.tokens, *tokens]
        one = model.roomy_cache(len(other))
        model.forward([other[:-10]], one)
        one.batch_repeat_interleave(2)
        steps = torch.cat([model.forward([[token]] * 2, one) for token in other[-10:]], 1)
    for got in (grown, torch.cat(followed, 1)):
        assert (got - whole).abs().max() < 1e-4 * whole.abs().max()
    assert (steps - whole[:, -10:]).abs().max() < 1e-3 * whole.abs().max()  # the prefix file's K and V are F16


@pytest.mark.parametrize("name", NAMES)
def test_gradients_pass_from_piece_to_piece(hybrids, name):
    """Also through a pass of one token, for which Mamba 2 writes into the state."""
    _, gguf, path = hybrids[name]
    model, tokens, file = torch_model.load(gguf, states=True), random_tokens(12), ikv.read(path)

    def gradients(pieces):
        leaves = [torch.from_numpy(x).requires_grad_() for pair in torch_model.prefix_states(file) for x in pair]
        states = list(zip(leaves[::2], leaves[1::2], strict=True))
        cache = model.cache(*torch_model.prefix_rows(file), "f32", states=states)
        logits = torch.cat([model.forward([tokens[piece]], cache) for piece in pieces], 1)
        torch.log_softmax(logits[0, :-1], -1).gather(-1, torch.tensor(tokens[1:])[:, None]).sum().backward()
        return [x.grad for x in leaves if x.numel()]

    want, got = gradients([slice(0, 12)]), gradients([slice(0, 5), slice(5, 6), slice(6, 7), slice(7, 12)])
    for a, b in zip(want, got, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_states(hybrids, name):
    """As finite differences have them, along a random direction of each layer's states."""
    _, gguf, path = hybrids[name]
    model, tokens, file = torch_model.load(gguf, attention="eager", states=True), random_tokens(12), ikv.read(path)
    K, V = torch_model.prefix_rows(file)
    flat = [torch.from_numpy(x) for pair in torch_model.prefix_states(file) for x in pair]

    def loss(flat):
        cache = model.cache(K, V, "f32", states=list(zip(flat[::2], flat[1::2], strict=True)), grows=False)
        logits = model.forward([tokens[:-1]], cache)
        return torch.log_softmax(logits[0], -1).gather(-1, torch.tensor(tokens[1:])[:, None]).sum()

    leaves = [x.clone().requires_grad_() for x in flat]
    loss(leaves).backward()
    generator = torch.Generator().manual_seed(0)
    for i, leaf in enumerate(leaves):
        if not leaf.numel():
            continue
        direction = torch.randn(leaf.shape, generator=generator) * leaf.detach().square().mean().sqrt()
        with torch.no_grad():
            slopes = []
            for step in (0.008, 0.004):  # extrapolated (Richardson)
                ends = [
                    loss([x + sign * step * direction if j == i else x for j, x in enumerate(flat)]) for sign in (1, -1)
                ]
                slopes.append(float(ends[0] - ends[1]) / (2 * step))
        numeric, exact = (4 * slopes[1] - slopes[0]) / 3, float((leaf.grad * direction).sum())
        assert leaf.grad.abs().max() > 0 and numeric == pytest.approx(exact, rel=0.05, abs=0.02), i
