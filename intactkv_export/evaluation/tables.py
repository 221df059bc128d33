"""The figures of an evaluation as tables: for the eye in a terminal, as plain text in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from intactkv_export.escapes import shown
from intactkv_export.evaluation.metrics import Difference, Estimate, Figures, Impossible, differences, summary

_NOISE = " ~"
_TITLE = 60  # characters of a system prompt
LEGEND = "~ within noise: less than two standard errors; of accuracies: p of McNemar's exact test 0.05 or more"


def tables(results: Sequence[Figures], impossible: Sequence[Impossible] = ()) -> Iterator[RenderableType]:
    """For each system prompt and model a table of the configurations, with those that are not possible below, and one
    of their differences, then the answers to questions."""
    for system_prompt in dict.fromkeys(r.system_prompt for r in results) or (None,):
        behind = "" if system_prompt is None else f' behind the system prompt "{_short(shown(system_prompt))}"'
        own = [r for r in results if r.system_prompt == system_prompt]
        yield from _of_models(own, impossible, behind)


def _of_models(results: Sequence[Figures], impossible: Sequence[Impossible], behind: str) -> Iterator[RenderableType]:
    """behind: what the title of a model's tables says after its name."""
    references = [r for r in results if r.mode == "reference"]
    measured = (r.model for r in results if r.mode != "reference")
    for model in dict.fromkeys([*measured, *(x.model for x in impossible)]):
        rows = [r for r in results if r.model == model and r.mode != "reference"]
        compared = list(differences(rows))
        yield Text(f"\n{shown(model)}{behind}", style="bold")
        yield _configurations([*_by_depth(references), *rows])
        for x in (x for x in impossible if x.model == model):
            yield Text(f"{x.kv_type} is not possible: {shown(x.why)}")
        if compared:
            yield Text("\ndifferences, chunk by chunk")
            yield _differences(compared)
        if any(r.answers for r in rows):
            yield Text("\nquestions")
            yield _questions([*references[:1], *rows], compared)
        if compared:
            yield Text(f"\n{LEGEND}", style="dim")


def _short(text: str) -> str:
    """The beginning of a text, on a line."""
    line = " ".join(text.split())
    return line if len(line) <= _TITLE else f"{line[: _TITLE - 3]}..."


def _by_depth(references: Sequence[Figures]) -> list[Figures]:
    """The first of each depth."""
    return list({r.depth: r for r in reversed(references)}.values())[::-1]


def _table(columns: Sequence[str], where: Sequence[str] = ()) -> Table:
    """where: names of columns of _where(), behind the first two."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for i, column in enumerate([*columns[:2], *where, *columns[2:]]):
        table.add_column(column, justify="left" if i < 2 else "right", no_wrap=i < 3 + len(where))
    return table


def _where(rows: Sequence[Figures]) -> dict[str, Callable[[Figures], str]]:
    """What tells rows at depths apart: name of a column -> its text. {}: they are all of texts evaluated at once."""
    if all(r.way.ubatch is None for r in rows):
        return {}
    found: dict[str, Callable[[Figures], str]] = {"depth": lambda r: str(r.depth)}
    ways = [r.way for r in rows if r.mode != "reference"]
    if len({way.ubatch for way in ways}) > 1:
        found["ubatch"] = lambda r: "" if r.mode == "reference" else str(r.way.ubatch)
    if any(way.tail for way in ways):
        found["tail"] = lambda r: "" if r.mode == "reference" else str(r.way.tail)
    return found


def _places(where: Mapping[str, object]) -> int:
    """Decimals of a KL divergence. With a tail it is some ten thousandths."""
    return 5 if where else 4


def _configurations(rows: Sequence[Figures]) -> Table:
    where = _where(rows)
    columns = ("KV", "prefix", "KL divergence", "median", "99 %", "max", "% same top", "perplexity")
    table = _table(columns, list(where))
    places = _places(where)
    for r in rows:
        kld = ["", "", "", ""] if r.mode == "reference" else [f"{summary(r.kld):.{places}f}"]
        if len(kld) == 1:
            kld += [f"{r.percentile(50):.{places}f}", f"{r.percentile(99):.3f}", f"{r.percentile(100):.2f}"]
        top1 = "" if r.mode == "reference" else f"{_percent(summary(r.top1)):.1f}"
        table.add_row(r.kv_type, r.mode, *(text(r) for text in where.values()), *kld, top1, f"{r.perplexity:.2f}")
    return table


def _differences(rows: Sequence[Difference]) -> Table:
    where = _where([d.a for d in rows])
    table = _table(("KV", "difference", "KL divergence", "% same top", "log perplexity"), list(where))
    for d in rows:
        kld, top1, log_perplexity = d.kld, d.top1, d.log_perplexity
        table.add_row(
            d.a.kv_type,
            f"{d.a.mode} - {d.b.mode}",
            *(text(d.a) for text in where.values()),
            f"{kld:+.{_places(where)}f}{_mark(kld)}",
            f"{_percent(top1):+.1f}{_mark(top1)}",
            f"{log_perplexity:+.4f}{_mark(log_perplexity)}",
        )
    return table


def _questions(rows: Sequence[Figures], compared: Sequence[Difference]) -> Table:
    n = next(len(r.answers.acc) for r in rows if r.answers)
    table = _table(("KV", "prefix", f"acc of {n}, %", "against plain", "acc_norm, %", "against plain"))
    plain = {(d.a.kv_type, d.a.mode): d for d in compared if d.b.mode == "plain"}
    for r in rows:
        if r.answers is None:
            continue
        d = plain.get((r.kv_type, r.mode))
        against = r.answers.against(d.b.answers) if d is not None and d.b.answers is not None else {}
        cells = []
        for name in ("acc", "acc_norm"):
            cells.append(f"{_percent(Estimate(*r.answers.accuracy(name))):.1f}")
            gain = against.get(name)
            noise = _NOISE if gain and gain["within_noise"] else ""
            cells.append(f"{100 * gain['difference']:+.1f} (p {gain['mcnemar_p']:.2g}){noise}" if gain else "")
        table.add_row(r.kv_type, r.mode, *cells)
    return table


def _percent(x: Estimate) -> Estimate:
    return Estimate(100 * x.mean, 100 * x.error)


def _mark(x: Estimate) -> str:
    return _NOISE if x.within_noise else ""
