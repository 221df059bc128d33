"""Figures: what they draw, that they can be read, and that no token's text breaks them. Of made-up data."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg

from intactkv_export.analysis import plots
from intactkv_export.errors import UsageError

HOSTILE = ["$x_{", "\\frac", "日本", "<script>", "\n", "&amp;", " ", "", "a" * 60, "%s{}"]


def made_up(n_prefix: int = 24, n_layer: int = 30) -> dict[str, dict[str, Any]]:
    """Data of every figure, of the shapes that an analysis gives."""
    rng = np.random.default_rng(0)
    shown = min(n_prefix, 32)
    n = shown + 16
    tokens = [HOSTILE[i % len(HOSTILE)] for i in range(n)]
    positions = [*range(shown), *range(n_prefix, n_prefix + 16)]
    counts = [i for i in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384) if i < n_prefix]
    counts.append(n_prefix)
    falling = 0.6 + 0.4 * np.exp(-np.array(counts) / 2.0)
    share = rng.random((n_layer, 9))
    triangle = np.tril(rng.random((n, n)) + 0.01)
    rows = {what: {name: (0.1 * rng.random(n_layer)).tolist() for name in ("plain", "prompt")} for what in "KV"}
    return {
        "magnitudes": {
            "tokens": tokens,
            "n_prefix_shown": shown,
            "positions": positions,
            "maximum": rng.lognormal(1, 2, (n_layer, n)).tolist(),
            "layers": [
                {"il": il, "channels_per_row": 6, "values": rng.lognormal(0, 1, (96, n)).tolist()} for il in (0, 14, 29)
            ],
        },
        "attention": {
            "n_prefix": n_prefix,
            "n_prefix_shown": shown,
            "positions": positions,
            "maps": [
                {"il": il, "values": (triangle / triangle.sum(1, keepdims=True)).tolist()} for il in (0, 10, 19, 29)
            ],
            "first": (share / 2).tolist(),
            "prefix": share.tolist(),
        },
        "curve": {
            "counts": counts,
            "relative": falling.tolist(),
            "median": (falling + 0.1).tolist(),
            "chosen": counts[min(3, len(counts) - 1)],
            "flat_below": 0.7,
        },
        "kv_error": {"with_prefix": "prompt", "prefix": rows, "text": rows},
        "divergence": {
            "n_tokens": 128,
            "positions": [8 * i + 4 for i in range(16)],
            "configurations": [
                {"name": name, "mean": (0.1 + rng.random(16) / 10).tolist(), "error": [0.01] * 16}
                for name in plots.CONFIGURATIONS
            ],
        },
    }


def drawn(name: str, data: dict[str, Any]) -> Any:
    """The figure as save() draws it."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **plots._STYLE}):
        figure = plots.FIGURES[name](data)
        FigureCanvasAgg(figure).draw()
        return figure


def texts(figure: Any) -> list[tuple[str, Any]]:
    """Everything written in a figure that is not turned, with the box it fills, in pixels."""
    legends = [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]
    found = [text for legend in legends for text in legend.get_texts()]
    for ax in figure.axes:
        found += [ax.title, ax._left_title, ax.xaxis.label]
        found += [tick.label1 for axis in (ax.xaxis, ax.yaxis) for tick in axis._update_ticks()]  # those in view
        found += [tick.label2 for tick in ax.yaxis._update_ticks() if tick.label2.get_visible()]
    shown = [text for text in found if text.get_text() and text.get_visible() and text.get_rotation() == 0]
    return [(text.get_text(), text.get_window_extent()) for text in shown if text.get_window_extent().width > 0]


@pytest.mark.parametrize("name", plots.FIGURES)
@pytest.mark.parametrize("n_prefix", [1, 24, 500])
def test_nothing_overlaps_or_is_cut_off(name: str, n_prefix: int) -> None:
    figure = drawn(name, made_up(n_prefix)[name])
    written = texts(figure)
    assert len(written) > 8
    for i, (text, box) in enumerate(written):
        assert min(box.x0, box.y0) >= -1 and box.x1 <= figure.bbox.width + 1, text
        assert box.y1 <= figure.bbox.height + 1, text
        for other, other_box in written[:i]:
            overlap_x = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
            overlap_y = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
            assert overlap_x <= 0.5 or overlap_y <= 0.5, f"{text!r} and {other!r} overlap"


@pytest.mark.parametrize("name", plots.FIGURES)
def test_files_are_whole(name: str, tmp_path: Path) -> None:
    data = made_up()[name]
    before = deepcopy(data)
    png, svg = plots.save(name, data, tmp_path)
    assert data == before, "data is only read"
    assert [png.name, svg.name] == [f"{name}.png", f"{name}.svg"]
    image = matplotlib.image.imread(png)
    assert image.shape[1] == 1440 and image[..., :3].min() < 0.2 < 0.9 < image[..., :3].max()
    root = ET.fromstring(svg.read_bytes())
    assert root.tag.endswith("svg") and len(list(root.iter())) > 50


def test_the_same_data_make_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    files = [plots.save("curve", made_up()["curve"], directory) for directory in (tmp_path, tmp_path / "again")]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_curves_are_the_data() -> None:
    data = made_up()
    (ax,) = drawn("curve", data["curve"]).axes
    lines = {line.get_label(): line for line in ax.lines}
    np.testing.assert_array_equal(lines["mean over the layers"].get_xdata(), data["curve"]["counts"])
    np.testing.assert_array_equal(lines["mean over the layers"].get_ydata(), data["curve"]["relative"])
    ring = next(line for label, line in lines.items() if "smallest flat" in label)
    assert ring.get_xdata()[0] == data["curve"]["chosen"] and "3 of 24" in ring.get_label()
    (ax,) = drawn("divergence", data["divergence"]).axes
    for line, made in zip(ax.lines, data["divergence"]["configurations"], strict=True):
        np.testing.assert_array_equal(line.get_ydata(), made["mean"])
    axes = {ax._left_title.get_text(): ax for ax in drawn("attention", data["attention"]).axes}
    first = axes["attention of the text: first token"].images[0].get_array()
    np.testing.assert_array_equal(first, np.transpose(data["attention"]["first"]))


def test_a_configuration_has_one_color() -> None:
    data = made_up()
    color: dict[str, set[str]] = {}
    for name in ("divergence", "kv_error"):
        for ax in drawn(name, data[name]).axes:
            for line in ax.lines:
                color.setdefault(line.get_label(), set()).add(line.get_color())
    assert color == {label: {code} for code, _, label in plots.CONFIGURATIONS.values()}
    assert len({code for code, _, _ in plots.CONFIGURATIONS.values()}) == len(plots.CONFIGURATIONS) == 5


def test_labels_of_tokens() -> None:
    assert [plots.label(token) for token in (" the", "\n", "日", "", "'", "$1$")] == [
        "␣the",
        "\\n",
        "日",
        "",
        "'",
        "$1$",
    ]
    assert len(plots.label("x" * 60)) == 14


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'intactkv-export\[plot\]'"):
        plots.save("curve", {}, tmp_path)
