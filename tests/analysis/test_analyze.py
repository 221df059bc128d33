"""An analysis of the real model: its numbers against others' ways to get them, its files; how many tokens to keep."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.smol import SYSTEM_PROMPT, Smol

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from intactkv_export import cli, extras, torch_model
from intactkv_export.analysis import Analysis, analyze, measurements, plots, report, sinks
from intactkv_export.conversion import intact_tokens
from intactkv_export.errors import IntactKVError, UsageError
from intactkv_export.libllama import Vocabulary
from intactkv_export.prefix import ikv
from intactkv_export.runtime import chat as chats
from intactkv_export.runtime.intact_llama import IntactLlama
from intactkv_export.texts import default_text

# How many tokens


@pytest.mark.parametrize(
    ("error", "chosen"),
    [
        ([1, 0.5, 0.5, 0.5], 1),
        ([1, 0.53, 0.524, 0.5], 2),  # 5 % of the drop of 0.5 above 0.5: 0.525
        ([1, 0.9, 0.8, 0.5], 4),
        ([1, 0.5, 0.6, 0.5], 4),  # flat means that no longer prefix is worse
        ([1, 0.3, 0.4, 0.5], 1),  # better than the whole prefix is good enough
        ([1, 1.2, 1.1, 1.3], 1),  # nothing helps: the first token, which every prefix has
        ([1, 1, 1, 1], 1),
        ([0, 0, 0, 0], 1),
    ],
)
def test_choice(error: Sequence[float], chosen: int) -> None:
    assert intact_tokens.smallest_flat([0, 1, 2, 4], error)[0] == chosen


def test_choice_with_another_tolerance() -> None:
    falling = [1, 0.8, 0.6, 0.5]
    assert [intact_tokens.smallest_flat([0, 1, 2, 4], falling, t) for t in (0.0, 0.2, 1.0)] == [
        (4, 0.5),
        (2, 0.6),
        (1, 1.0),
    ]


@given(st.integers(1, 5000))
def test_counts(n_tokens: int) -> None:
    at = intact_tokens.counts(n_tokens)
    assert at[0] == 0 and at[-1] == n_tokens and at == sorted(set(at)) and len(at) <= 28
    assert set(range(min(n_tokens, 4) + 1)) <= set(at)


@given(st.integers(1, 3000), st.data())
def test_the_place_where_the_curve_becomes_flat_is_found(n_tokens: int, data: st.DataObject) -> None:
    knee = data.draw(st.integers(1, n_tokens))
    asked: list[int] = []

    def error(n: int) -> list[float]:
        asked.append(n)
        return [2.0, 4.0] if n < knee else [1.0, 1.0]

    made = intact_tokens.measure_curve(error, n_tokens, lambda: None)
    assert made.chosen == knee
    assert len(asked) == len(set(asked)) == len(made.counts) <= len(intact_tokens.counts(n_tokens)) + 11
    assert made.relative[0] == made.median[0] == 1 and made.relative[-1] == pytest.approx(1 / 3)
    assert made.median[-1] == pytest.approx(3 / 8), "each layer relative to itself: 1/2 and 1/4"
    assert made.mse[made.counts.index(knee)] == [1.0, 1.0]


# The first tokens of a prefix


def test_first_tokens_of_a_prompt(smol: Smol, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["prefix", str(smol.reference), "-m", str(smol.gguf), "-s", SYSTEM_PROMPT, "-t", "2"]
    assert cli.main([*arguments, "-o", str(tmp_path / "five.ikv"), "--prefix-tokens", "5", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    whole, five = ikv.read(smol.ikv), ikv.read(tmp_path / "five.ikv")
    assert said["n_tokens"] == 5 and said["curves"] == {} and five.tokens == whole.tokens[:5]
    assert five.manifest["text"] == said["text"] == "<|im_start|>system\nYou are" and not five.manifest["bos_only"]
    assert five.manifest["messages"] == whole.manifest["messages"], "conversations that begin with these get it"
    for ours, theirs in zip(five.layers, whole.layers, strict=True):
        np.testing.assert_allclose(ours.K, theirs.K[:5], rtol=2e-2, atol=4e-2)  # smol.ikv: with weights at F16

    chat = chats.open_chat(
        smol.gguf, prefix=tmp_path / "five.ikv", kv_type="q4_0", tail=0, n_ctx=512, n_threads=2, notice=print
    )
    chat.sampling = chats.Sampling(max_tokens=8, temperature=0)
    assert "".join(chat.say("Hi")).strip() and chat.llama.intact_cells == 5
    assert chat.llama.input_ids[: len(whole.tokens)].tolist() == whole.tokens, "the whole prompt, five of it loaded"
    for bad, why in (
        ("25", "begin with 24 tokens"),
        ("0", "give 1 to 24"),
        ("few", "give a number of tokens, or auto"),
    ):
        assert cli.main([*arguments, "-o", str(tmp_path / "x.ikv"), "--prefix-tokens", bad]) == 2
        assert why in capsys.readouterr().err
    assert cli.main([*arguments[:4], "--bos-only", "--prefix-tokens", "2"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["five.ikv"]


def test_as_many_tokens_as_help(
    smol: Smol, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intact_tokens, "N_CHUNKS", 2)
    monkeypatch.setattr(intact_tokens, "N_TOKENS", 24)
    arguments = ["prefix", str(smol.reference), "-m", str(smol.gguf), "-s", "Be brief.", "-t", "2"]
    assert cli.main([*arguments, "-o", str(tmp_path / "auto.ikv"), "--prefix-tokens", "auto"]) == 0
    said = capsys.readouterr().out
    made = ikv.read(tmp_path / "auto.ikv")
    chosen = len(made.tokens)
    assert f"{chosen} of 11 tokens" in said and re.search(rf"{chosen}  0\.\d+  flat from here", said)
    llama = IntactLlama(smol.gguf, tmp_path / "auto.ikv", "q8_0", n_ctx=256, n_threads=2)
    llama.create_chat_completion([*made.manifest["messages"], {"role": "user", "content": "Hi"}], max_tokens=1)
    assert llama.intact_cells == chosen


# An analysis


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough for the fewest texts that an analysis takes, four of 128 tokens."""
    path = tmp_path_factory.mktemp("text") / "topics & <more>.txt"
    path.write_text(default_text()[:2400], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(smol: Smol, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    out = tmp_path_factory.mktemp("analysis") / "out"
    return analyze(smol.reference, smol.gguf, out, prefix=smol.ikv, text=text, kv_type="q4_0")


def test_files(made: Analysis) -> None:
    wanted = {f"{name}.{kind}" for name in plots.FIGURES for kind in ("json", "png", "svg")} | {"report.html"}
    assert {path.name for path in made.files} == {path.name for path in made.directory.iterdir()} == wanted
    assert [path.name for path in made.directory.parent.iterdir()] == ["out"], "nothing is left beside it"
    for name, data in made.data.items():
        assert json.loads((made.directory / f"{name}.json").read_text()) == json.loads(json.dumps(data))
    assert made.facts["text"]["n_chunks"] == 4 and made.facts["kv_type"] == "q4_0"
    assert 5e8 < made.facts["peak_bytes"] < 2e9, "one model at a time, at float32"


def test_the_first_token_is_the_pivot(made: Analysis) -> None:
    data = made.data["magnitudes"]
    pivot = data["pivots"][0]
    assert pivot["token"] == 0 and pivot["text"] == "<|im_start|>" and pivot["times_median"] > 20
    assert data["maximum"][pivot["layer"]][0] == pivot["maximum"] == max(map(max, data["maximum"]))
    assert len(data["tokens"]) == 40 and [len(view["values"]) for view in data["layers"]] == [96] * 3
    for view in data["layers"]:
        assert np.max(view["values"], axis=0).tolist() == data["maximum"][view["il"]], "rows lose no maximum"


def test_attention_is_what_transformers_says(
    made: Analysis, smol: Smol, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch_model.load(smol.reference, attention="eager")
    with Vocabulary(smol.reference) as vocabulary:
        tokens = [*smol.tokens, *vocabulary.tokenize(text.read_text(), special=False)[: intact_tokens.N_TOKENS]]
    with torch.inference_mode():
        theirs = torch.stack(model.net(torch.tensor([tokens]), output_attentions=True).attentions)[:, 0].numpy()
    monkeypatch.setattr(sinks, "_QUERIES", 17)  # in parts, one of them across the end of the prefix
    for ours in (made.data["attention"], sinks.attention(model, tokens, 24)):
        np.testing.assert_allclose(ours["first"], theirs[:, :, 24:, 0].mean(2), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(ours["prefix"], theirs[:, :, 24:, :24].sum(3).mean(2), rtol=2e-3, atol=1e-5)
        for view in ours["maps"]:
            np.testing.assert_allclose(view["values"], theirs[view["il"]].mean(0)[:40, :40], rtol=2e-3, atol=1e-6)


def test_intact_tokens_lower_the_error(made: Analysis) -> None:
    data = made.data["curve"]
    error = dict(zip(data["counts"], data["relative"], strict=True))
    assert error[0] == 1 and error[24] < error[1] < 0.8 and data["chosen"] in data["counts"]
    for where, what in (("prefix", "K"), ("prefix", "V"), ("text", "K"), ("text", "V")):
        rows = made.data["kv_error"][where][what]
        assert len(rows["plain"]) == len(rows["prompt"]) == 30
        assert np.median(rows["prompt"]) < np.median(rows["plain"])
        if where == "prefix":
            assert max(rows["prompt"]) < 3e-3 < 1e-2 < min(rows["plain"]), "one rounding to F16 of weights at F16"
    found = {c["name"]: c for c in made.data["divergence"]["configurations"]}
    assert list(found) == ["plain", "rounded", "bos", "prompt"] and found["plain"]["difference"] == [0, 0]
    assert found["prompt"]["total"][0] < found["bos"]["total"][0] < found["plain"]["total"][0]
    for c in found.values():
        assert np.mean(c["mean"]) == pytest.approx(c["total"][0], rel=1e-3) and len(c["error"]) == 16


class Page(HTMLParser):
    """What a page shows, and what it would fetch or run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words, self.tags, self.foreign, self.open = "", set(), [], []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in ("meta", "br", "link", "path", "use", "image", "img"):
            self.open.append(tag)
        self.foreign += [
            value
            for name, value in attrs
            if value and (name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")))
        ]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "use", "image"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


def test_report(made: Analysis) -> None:
    source = (made.directory / "report.html").read_text()
    page = Page(source)
    assert not page.open and not page.foreign and "script" not in page.tags and "@import" not in source
    ids = re.findall(r'\bid="([^"]+)"', source)
    assert len(ids) == len(set(ids)) > 100 and set(re.findall(r'href="#([^"]+)"', source)) <= set(ids)
    assert source.count("<svg") == 5 and plots.INK not in source.split("</style>", 1)[1]
    words = " ".join(page.words.split())
    said = report.headlines(made.data)
    for value in (
        f"{made.data['divergence']['configurations'][0]['total'][0]:.4f} ±",
        report.number(said["kv"]["text"]["K"]["after"]),
        report.percent(said["attention"]["first"]),
        f"{said['attention']['sinks']} of 270 heads",
        "topics & <more>.txt",
        "<|im_start|>system You are a helpful AI assistant",
    ):
        assert value in words
    assert report.summary(made.data)[1].startswith("plain")


def test_untrusted_words_stay_words(made: Analysis) -> None:
    evil = "</code><script>alert(1)</script><img src=http://evil>"
    facts = json.loads(json.dumps(made.facts, default=str))
    facts["model"]["name"] = facts["text"]["name"] = facts["prefix"]["text"] = facts["command"] = evil
    data = json.loads(json.dumps(made.data))
    data["magnitudes"]["pivots"][0]["text"] = "<script>"
    page = Page(report.render(facts, data, {name: "<svg></svg>" for name in plots.FIGURES}))
    assert not page.foreign and not {"script", "img"} & page.tags and evil in page.words and "<script>" in page.words


def test_a_report_says_when_nothing_helps(made: Analysis) -> None:
    data: dict[str, Any] = json.loads(json.dumps(made.data))
    worse = [1.0] + [1.1] * (len(data["curve"]["counts"]) - 1)
    data["curve"] |= {"relative": worse, "chosen": 1}
    data["magnitudes"]["pivots"] = []
    prompt = next(c for c in data["divergence"]["configurations"] if c["name"] == "prompt")
    prompt |= {"total": [data["divergence"]["configurations"][0]["total"][0] * 1.5, 0.01], "difference": [0.1, 0.01]}
    page = Page(report.render(made.facts, data, {name: "<svg></svg>" for name in plots.FIGURES}))
    words = " ".join(page.words.split())
    assert "50 % farther from the reference's" in words and "does not fall with intact tokens" in words
    assert "no pivot tokens" in words
    prompt["difference"] = [0.1, 0.2]
    assert "beyond noise" in report.render(made.facts, data, {name: "<svg></svg>" for name in plots.FIGURES})


def test_numbers_for_people() -> None:
    assert [report.number(x) for x in (0, 0.05121, 12.34, 24920.0, 0.000205, 0.7)] == [
        "0", "0.0512", "12.3", "24,920", "0.000205", "0.7",
    ]  # fmt: skip
    shares = {0.05: "5 %", 0.4812: "48 %", 0.0709: "7.1 %", 1.0: "100 %", 0.0031: "0.31 %"}
    assert [report.percent(x) for x in shares] == list(shares.values())


def test_what_cannot_be_analyzed(smol: Smol, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    arguments = ["analyze", str(smol.reference), "-m", str(smol.gguf), "-o", str(tmp_path / "out")]
    for more, why in (
        ([], "has no prefix, neither embedded nor beside it"),
        (["--prefix", str(smol.ikv), "--text", str(short)], "at least 512 are needed"),
        (["--prefix", str(smol.ikv), "--kv-type", "q9_0"], "q9_0"),
        (["--prefix", str(smol.ikv), "-o", str(short)], "cannot be a directory"),
    ):
        assert cli.main([*arguments, *more]) == 2
        assert why in capsys.readouterr().err
    whole = ikv.read(smol.ikv)
    manifest = {key: whole.manifest[key] for key in whole.manifest.keys() - {"format", "tokens", "model"}}
    manifest["reference"] = {**manifest["reference"], "sha256": "0" * 64}
    K, V = ({layer.il: getattr(layer, name) for layer in whole.layers} for name in ("K", "V"))
    other = tmp_path / "other.ikv"
    ikv.write(other, ikv.build(whole.manifest["model"], whole.tokens, K, V, manifest))
    with pytest.raises(IntactKVError, match="belongs to the reference model 0000"):
        analyze(smol.reference, smol.gguf, tmp_path / "out", prefix=other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.ikv", "short.txt"]


def test_without_torch(smol: Smol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"torch, which is not installed: pip install 'intactkv-export\[convert,plot\]'"
    ):
        analyze(smol.reference, smol.gguf, tmp_path / "out", prefix=smol.ikv)


def test_extra_cells_of_a_prefix_are_no_tokens() -> None:
    """The errors of K and V are those of tokens: of the prefix's, and of the texts behind the extra cells."""
    layout = torch_model.Layout(1, 4, False)
    theirs, n_prefix = torch.randn(1, 1, 9, 4), 3
    apart = theirs.clone()
    apart[:, :, 1] *= 2.0  # of the prefix
    apart[:, :, n_prefix:] *= 1.5
    with_extra = torch.cat([apart[:, :, :n_prefix], torch.full((1, 1, 5, 4), 99.0)], 2)
    cache = torch_model.MixedCache([with_extra], [with_extra], layout, ("f32", "f32"), extra=5)
    cache.update(apart[:, :, n_prefix:], apart[:, :, n_prefix:], 0)
    kv: dict[str, Any] = {where: {"K": {}, "V": {}} for where in ("prefix", "text")}
    measurements._add_kv_errors(kv, "x", cache, {"K": [theirs], "V": [theirs]}, n_prefix)
    of_prefix = float(theirs[:, :, 1].norm() / theirs[:, :, :n_prefix].norm())
    assert kv["prefix"]["K"]["x"] == kv["prefix"]["V"]["x"] == [pytest.approx(of_prefix, rel=1e-3)]
    assert kv["text"]["K"]["x"] == [pytest.approx(0.5, rel=1e-3)]
