"""The figures of an analysis: data in (analyze.py makes it, or its JSON files hold it), matplotlib figures out.

Nothing is computed here that a figure says: what is drawn is what is in the data. Configurations keep one color in
all figures, from the palette of Okabe and Ito, which colorblind people can tell apart, and a line style of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intactkv_export import extras
from intactkv_export.evaluation import MODES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Data = dict[str, Any]

INK = "#1b1b1b"  # text and axes, and nothing else: a page may replace it by its own color
_FAINT = "#8a8a8a"
_LINES: dict[str, tuple[str, Any]] = {  # color and line style of each mode
    "plain": ("#D55E00", "-"),
    "rounded": ("#E69F00", (0, (4, 1.5))),
    "bos": ("#56B4E9", (0, (1, 1.2))),
    "prompt": ("#0072B2", "-"),
    "calibrated": ("#009E73", (0, (5, 1, 1, 1))),
}
# color, line style, name; the order of legends
CONFIGURATIONS = {mode: (*_LINES[mode], f"{mode}: {what}") for mode, what in MODES.items()}
_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same figure everywhere
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "lines.linewidth": 1.5,
    "axes.titlelocation": "left",
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.fonttype": "path",
    "svg.hashsalt": "intactkv",  # the same data, the same bytes
}
_WIDTH = 7.2  # inches: two columns of a paper
_DPI = 200
_COLORS = "viridis"
_METADATA = {".svg": ("Date", "Creator", "Format", "Type"), ".png": ("Software",)}  # what is left out


def save(name: str, data: Data, directory: Path) -> list[Path]:
    """Draw a figure into NAME.png and NAME.svg of a directory; returns them.

    name: of FIGURES; data: the JSON of that figure (analyze.py). Raises UsageError without matplotlib.
    """
    paths = [directory / f"{name}.{kind}" for kind in ("png", "svg")]
    extras.require("matplotlib", for_="a figure")
    import matplotlib

    style: Any = {**matplotlib.rcParamsDefault} | _STYLE
    with matplotlib.rc_context(style):
        figure = FIGURES[name](data)
        for path in paths:
            figure.savefig(path, dpi=_DPI, metadata=dict.fromkeys(_METADATA[path.suffix]))
    return paths


def magnitudes(data: Data) -> Figure:
    """Pivot tokens: |output of a layer|, channels over tokens in a few layers; its maximum in all layers."""
    from matplotlib.colors import LogNorm

    views, tokens = data["layers"], data["tokens"]
    figure = _figure(6.3)
    grid = figure.add_gridspec(2, len(views), height_ratios=[1, 1.25])
    top = max(max(map(max, view["values"])) for view in views)
    norm = LogNorm(vmin=max(top / 1e4, 1e-3), vmax=top)
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(views))]
    for ax, view in zip(axes, views, strict=True):
        rows = len(view["values"])
        image = ax.imshow(
            view["values"],
            aspect="auto",
            origin="lower",
            cmap=_COLORS,
            norm=norm,
            interpolation="nearest",
            extent=(-0.5, len(tokens) - 0.5, 0, rows * view["channels_per_row"]),
        )
        ax.set_title(f"output of layer {view['il']}")
        ax.set_xlabel("token")
        _positions(ax.xaxis, data)
        _prefix_ends(ax, data)
    axes[0].set_ylabel("channel")
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)
    figure.colorbar(image, ax=axes, label="|activation|", pad=0.01, aspect=16).outline.set_linewidth(0.4)

    ax = figure.add_subplot(grid[1, :])
    image = _heat(ax, data["maximum"], LogNorm(vmax=max(map(max, data["maximum"]))))
    ax.set_title("largest |activation| of each token, all layers")
    ax.set_ylabel("layer")
    _token_axis(ax, tokens)
    _prefix_ends(ax, data)
    figure.colorbar(image, ax=ax, label="max |activation|", pad=0.01, aspect=20).outline.set_linewidth(0.4)
    return figure


def attention(data: Data) -> Figure:
    """Attention sinks: mean over the heads in a few layers; what the first token and the prefix get, by head."""
    from matplotlib.colors import LogNorm, Normalize

    maps = data["maps"]
    figure = _figure(4.9)
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 1.1])
    upper = grid[0].subgridspec(1, len(maps))
    axes = [figure.add_subplot(upper[0, i]) for i in range(len(maps))]
    for ax, view in zip(axes, maps, strict=True):
        values = [[x or float("nan") for x in row] for row in view["values"]]  # 0: a token does not see later ones
        image = ax.imshow(values, aspect="auto", cmap=_COLORS, norm=LogNorm(1e-3, 1), interpolation="nearest")
        ax.set_title(f"layer {view['il']}")
        ax.set_xlabel("attended token")
        _positions(ax.xaxis, data)
        _positions(ax.yaxis, data)
        _prefix_ends(ax, data, both=True)
    axes[0].set_ylabel("attending token")
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)
    bar = figure.colorbar(image, ax=axes, label="share of attention", pad=0.01, aspect=16, extend="min")
    bar.outline.set_linewidth(0.4)

    lower = grid[1].subgridspec(1, 2)
    axes = [figure.add_subplot(lower[0, i]) for i in range(2)]
    n_prefix = data["n_prefix"]
    names = ("first token", f"whole prefix ({n_prefix} token{'' if n_prefix == 1 else 's'})")
    for ax, key, name in zip(axes, ("first", "prefix"), names, strict=True):
        image = _heat(ax, list(zip(*data[key], strict=True)), Normalize(0, 1))
        ax.set_title(f"attention of the text: {name}")
        ax.set_xlabel("layer")
        _whole_numbers(ax)
    axes[0].set_ylabel("head")
    axes[1].tick_params(labelleft=False)
    figure.colorbar(image, ax=axes, label="share", pad=0.01, aspect=16).outline.set_linewidth(0.4)
    return figure


def curve(data: Data) -> Figure:
    """Layer error against the number of intact tokens (figure 2 of the paper)."""
    figure = _figure(3.2)
    ax = figure.add_subplot()
    color = CONFIGURATIONS["prompt"][0]
    counts, error = data["counts"], data["relative"]
    ax.plot(counts, data["median"], color=color, linewidth=0.9, linestyle=(0, (4, 2)), label="median layer")
    ax.plot(counts, error, color=color, marker="o", markersize=3.5, label="mean over the layers", clip_on=False)
    ax.axhline(data["flat_below"], color=_FAINT, linewidth=0.8, linestyle=(0, (1, 1.5)), label="flat below this line")
    chosen = data["chosen"]
    at = counts.index(chosen)
    ring: dict[str, Any] = {"markersize": 8, "markerfacecolor": "none", "markeredgecolor": INK, "markeredgewidth": 1}
    name = f"smallest flat prefix: {chosen} of {counts[-1]} tokens"
    ax.plot([chosen], [error[at]], "o", **ring, linestyle="none", label=name, clip_on=False)
    ax.set_xlim(0, counts[-1])
    ax.set_ylim(0, 1.04 * max(1, *error, *data["median"]))
    ax.set_xlabel("intact tokens at the beginning of the prefix")
    ax.set_ylabel("mean squared error of layer outputs,\nrelative to no intact token")
    if counts[-1] > 64:
        ax.set_xscale("symlog", linthresh=8, linscale=1.5)
    _plain_numbers(ax, counts)
    ax.legend(loc="best")
    return figure


def kv_error(data: Data) -> Figure:
    """Relative error of K and V by layer: without the intact prefix, and with it."""
    figure = _figure(4.6)
    axes = figure.subplots(2, 2, sharex=True)
    for row, name in zip(axes, ("K", "V"), strict=True):
        for ax, where in zip(row, ("prefix", "text"), strict=True):
            for key in ("plain", data["with_prefix"]):
                color, style, label = CONFIGURATIONS[key]
                ax.plot(data[where][name][key], color=color, linestyle=style, label=label)
            if where == "prefix":
                ax.set_yscale("log")
            else:
                ax.set_ylim(bottom=0)
            ax.set_title(f"{name} of the {'prefix' if where == 'prefix' else 'text behind it'}")
            ax.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.5)
            _whole_numbers(ax, y=False)
        row[0].set_ylabel(f"relative error of {name}")
    for ax in axes[1]:
        ax.set_xlabel("layer")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def divergence(data: Data) -> Figure:
    """KL divergence from the reference by position in the text behind the prefix."""
    figure = _figure(3.7)
    ax = figure.add_subplot()
    for made in data["configurations"]:
        color, style, label = CONFIGURATIONS[made["name"]]
        x, mean, error = data["positions"], made["mean"], made["error"]
        ax.plot(x, mean, color=color, linestyle=style, label=label)
        band = [m - e for m, e in zip(mean, error, strict=True)], [m + e for m, e in zip(mean, error, strict=True)]
        ax.fill_between(x, *band, color=color, alpha=0.12, linewidth=0)
    ax.set_xlim(0, data["n_tokens"])
    ax.set_ylim(bottom=0)
    ax.set_xlabel("position in the text, tokens behind the prefix")
    ax.set_ylabel("KL divergence, nats a token")
    ax.grid(axis="y", color=_FAINT, alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "magnitudes": magnitudes,
    "attention": attention,
    "curve": curve,
    "kv_error": kv_error,
    "divergence": divergence,
}


def _figure(height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _heat(ax: Axes, values: Sequence[Sequence[float]], norm: Any) -> Any:
    return ax.imshow(values, aspect="auto", origin="lower", cmap=_COLORS, norm=norm, interpolation="nearest")


def _prefix_ends(ax: Axes, data: Data, both: bool = False) -> None:
    """A line between the prefix and the text behind it."""
    for line in (ax.axvline, ax.axhline) if both else (ax.axvline,):
        line(data["n_prefix_shown"] - 0.5, color="white", linewidth=0.8, linestyle=(0, (2, 2)))


def _token_axis(ax: Axes, tokens: Sequence[str]) -> None:
    from matplotlib.font_manager import fontManager, get_font

    font = get_font(fontManager.findfont("DejaVu Sans"))
    shown = ["".join(c if font.get_char_index(ord(c)) else "□" for c in label(token)) for token in tokens]
    ax.set_xticks(range(len(shown)), shown, rotation=90, fontsize=6.5, parse_math=False)


def label(token: str) -> str:
    """A token's text as it can stand beside an axis: blanks and line breaks visible, not too long."""
    text = repr(token)[1:-1].replace(" ", "␣")
    return text if len(text) <= 14 else text[:13] + "…"


def _whole_numbers(ax: Axes, y: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (ax.xaxis, ax.yaxis) if y else (ax.xaxis,):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=7))


def _positions(axis: Any, data: Data) -> None:
    """Positions of the tokens shown; behind the first of a long prefix come those of the text."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    at = data["positions"]
    axis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda x, _: str(at[int(x)]) if 0 <= x < len(at) else ""))


def _plain_numbers(ax: Axes, counts: Sequence[int]) -> None:
    """Ticks at the counts that were measured, as far as they have room."""
    last, ticks = counts[-1], [counts[0]]
    for count in counts[1:-1]:
        nearest = min(count - ticks[-1], last - count)
        room = last >= 1.6 * count >= 3.2 * ticks[-1] or count <= 3 if last > 64 else nearest >= last / 16
        if room:
            ticks.append(count)
    ticks.append(last)
    ax.set_xticks(ticks, [str(count) for count in ticks], minor=False)
    ax.set_xticks([], minor=True)
