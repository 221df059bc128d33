"""The report of an analysis: one HTML file that needs nothing else, neither network nor scripts.

What it says about a model is computed from the data of the figures; report.html.jinja has the words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from intactkv_export.analysis import plots
from intactkv_export.escapes import shown

Data = Mapping[str, Any]


def render(facts: Data, data: Mapping[str, Data], svgs: Mapping[str, str]) -> str:
    """The HTML. facts, data: of analyze.Analysis; svgs: the figures, as plots.save() has written them.

    Texts of tokens, names of files and of models are escaped; only the figures are taken as they are.
    """
    figures = {name: Markup(inline(svg, name)) for name, svg in svgs.items()}
    return (
        environment()
        .get_template("report.html.jinja")
        .render(facts=facts, data=data, figures=figures, said=headlines(data), configurations=plots.CONFIGURATIONS)
    )


def environment() -> Environment:
    """Of the template: every text is escaped, for HTML and for whoever reads the page's source in a terminal."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "number": number,
        "percent": lambda share: percent(share).replace(" ", "\u00a0"),  # not broken across lines
        "token": plots.label,
        "megabytes": _megabytes,
    }
    made.filters |= filters
    return made


def headlines(data: Mapping[str, Data]) -> dict[str, Any]:
    """The numbers that the report's text and table name, from the data of the figures."""
    curve, kv, attention = data["curve"], data["kv_error"], data["attention"]
    after = kv["with_prefix"]
    relative = dict(zip(curve["counts"], curve["relative"], strict=True))
    drop = relative[0] - curve["relative"][-1]
    by_name = {made["name"]: made for made in data["divergence"]["configurations"]}
    plain = by_name["plain"]["total"][0]
    return {
        "with_prefix": after,
        "divergence": [
            {
                **made,
                "change": made["total"][0] / plain - 1,
                "is_noise": abs(made["difference"][0]) < 2 * made["difference"][1],
            }
            for made in data["divergence"]["configurations"]
        ],
        "gain": 1 - by_name[after]["total"][0] / plain,
        "gain_is_noise": abs(by_name[after]["difference"][0]) < 2 * by_name[after]["difference"][1],
        "first_text": _bin_gain(by_name["plain"], by_name[after], 0),
        "last_text": _bin_gain(by_name["plain"], by_name[after], -1),
        "kv": {
            where: {
                what: {"plain": median(kv[where][what]["plain"]), "after": median(kv[where][what][after])}
                for what in ("K", "V")
            }
            for where in ("prefix", "text")
        },
        "layer_error": {
            "first": 1 - relative[1],
            "all": drop,
            "first_of_all": (1 - relative[1]) / drop if drop > 0 else 0.0,
        },
        "attention": {
            "first": mean(map(mean, attention["first"])),
            "prefix": mean(map(mean, attention["prefix"])),
            "sinks": sum(share > 0.5 for layer in attention["first"] for share in layer),
            "heads": sum(map(len, attention["first"])),
        },
    }


def summary(data: Mapping[str, Data]) -> list[str]:
    """The headlines as lines of text."""
    said, curve = headlines(data), data["curve"]
    lines = [f"{'KL divergence from the reference':52} {'nats a token':>17}  against plain"]
    for made in said["divergence"]:
        value = f"{made['total'][0]:.4f} ± {made['total'][1]:.4f}"
        change = "" if made["name"] == "plain" else f"{100 * made['change']:+.0f} %"
        lines.append(f"{plots.CONFIGURATIONS[made['name']][2]:52} {value:>17}  {change}".rstrip())
    lines.append("")
    for pivot in data["magnitudes"]["pivots"][:5]:
        lines.append(
            f"pivot token {plots.label(pivot['text'])} at position {pivot['token']}: activations of "
            f"{number(pivot['maximum'])}, {number(pivot['times_median'])} times the median token's"
        )
    lines.append(
        f"attention of the text: {percent(said['attention']['first'])} to the first token, "
        f"{percent(said['attention']['prefix'])} to the prefix"
    )
    lines.append(
        f"layer error: -{percent(said['layer_error']['first'])} with the first token intact, "
        f"-{percent(said['layer_error']['all'])} with all {curve['counts'][-1]}; "
        f"--prefix-tokens auto would keep {curve['chosen']}"
    )
    return lines


def inline(svg: str, name: str) -> str:
    """An SVG file of plots.save() as an element of a page: its ids its own, text and axes in the page's color."""
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    svg = svg.replace(plots.INK, "currentColor").replace("fill: #ffffff", "fill: none")
    return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r'<svg role="img" \1', svg, count=1)


def number(value: float) -> str:
    """Three digits that count: 0.0512, 12.3, 4,560, 0.00021."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.6f}".rstrip("0") if "e" in text else text


def percent(share: float) -> str:
    """A share as a percentage, two digits that count: 48 %, 7.1 %, 0.31 %."""
    return f"{100 * share:.0f} %" if abs(share) >= 0.095 else f"{100 * share:.2g} %"


def _bin_gain(plain: Data, other: Data, i: int) -> float:
    return 1 - other["mean"][i] / plain["mean"][i]


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
