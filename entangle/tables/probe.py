"""The probe's tables for a terminal. Text from a data set is untrusted: it is printed with markup switched off."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.wording import explain
from entangle.catalogue import LossRow

_COLOURS = {
    Regime.IDEAL: "green",
    Regime.BOTH_UP: "yellow",
    Regime.BOTH_DOWN: "red",
    Regime.INVERTED: "magenta",
    Regime.DEGENERATE: "dim",
}


def percent(share: Mapping[str, float], *, interval: bool = True) -> str:
    """`62 [51-72]`: a share and its interval in per cent; a dot for none at all."""
    if share["count"] == 0 and not interval:
        return "·"
    text = f"{100 * share['share']:.0f}"
    return f"{text} [{100 * share['low']:.0f}-{100 * share['high']:.0f}]" if interval else text


def heading(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> Text:
    """Pairs counted, and what the numbers are of: model, parameters, precision, metric."""
    text = Text(count_line(summary), "bold")
    text.append(
        f"\n{model_name(provenance)}, {provenance['probed_parameters']:,} {provenance['probed_kind']} parameters, "
        f"scores in {provenance['score_dtype']}, {provenance['metric'].upper()} metric, "
        f"reference {provenance['reference']}\n",
        style="not bold",
    )
    return text


def model_name(provenance: Mapping[str, Any]) -> str:
    """Model and adapter, without the folders that they lie in."""
    names = [provenance["model_name_or_path"], provenance["adapter_name_or_path"]]
    return " + ".join(dict.fromkeys(Path(name).name for name in names if name))


def verification_table(verification: Mapping[str, Any]) -> Table:
    """Predicted against measured changes of real SGD steps, per loss."""
    table = Table(title="Predictions against one real SGD step per pair and loss", title_justify="left")
    for column in ("loss", "steps", "signs agree", "slope", "R^2", "error ratio on halving"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for loss, row in verification.items():
        table.add_row(
            Text(loss), str(row["steps"]), f"{row['signs_agree']} of {row['signs_compared']}",
            *(_number(row[key]) for key in ("slope", "r_squared", "error_ratio")),
        )  # fmt: skip
    return table


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None or value != value else format(value, form)


def regime_table(summary: Mapping[str, Any]) -> Table:
    """Share of pairs per regime and loss, with 95 % intervals."""
    shares = summary["regimes"]
    shown = _occurring(shares)
    table = Table(title="Share of pairs per regime, % [95 % interval]", title_justify="left")
    table.add_column("loss")
    table.add_column("rho", justify="right")
    for regime in shown:
        table.add_column(regime, justify="right", style=_COLOURS[regime])
    for loss, row in shares.items():
        rho = summary["incentive_ratio"].get(loss)
        table.add_row(Text(loss), "inf" if rho is None else f"{rho:.3g}", *(percent(row[r]) for r in shown))
    return table


def group_table(summary: Mapping[str, Any], losses: int = 3) -> Table:
    """Regimes for each value of the grouping column, under the losses whose verdicts differ most."""
    groups = summary["groups"]
    title = f"By {groups['column']}: ideal / both up / both down, %"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column(Text(groups["column"]), no_wrap=True)
    table.add_column("cosine", justify="right")
    table.add_column("ideal rho", justify="right", no_wrap=True)
    shown = most_different(groups["values"], losses)
    for loss in shown:
        table.add_column(Text(loss), justify="right")
    for value, group in groups["values"].items():
        band = "-".join("inf" if edge is None else _number(edge, ".2f") for edge in group["band"])
        cells = (_split(group["regimes"][loss]) for loss in shown)
        table.add_row(Text(value), _number(group["cosine"], ".2f"), band, *cells)
    table.caption = "medians of the two gradients' cosine and of the edges of the ideal band, c/A and B/c"
    return table


def most_different(groups: Mapping[str, Mapping[str, Any]], count: int) -> list[str]:
    """The first loss, then each time the one whose regime counts are farthest from those already chosen."""
    losses = list(next(iter(groups.values()))["regimes"])
    counts = {
        loss: [group["regimes"][loss][regime]["count"] for group in groups.values() for regime in REGIMES]
        for loss in losses
    }

    def distance(loss: str, other: str) -> int:
        return sum(abs(a - b) for a, b in zip(counts[loss], counts[other], strict=True))

    chosen = losses[:1]
    while len(chosen) < min(count, len(losses)):
        rest = [loss for loss in losses if loss not in chosen]
        chosen.append(max(rest, key=lambda loss: min(distance(loss, other) for other in chosen)))
    return sorted(chosen, key=losses.index)


def _split(regimes: Mapping[str, Mapping[str, float]]) -> Text:
    text = Text()
    for regime in (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN):
        text.append("/" if text else "").append(f"{100 * regimes[regime]['share']:.0f}", _COLOURS[regime])
    return text


def loss_table(rows: Sequence[LossRow]) -> Table:
    """The catalogue: name, formula, incentive ratio, what a loss reads."""
    table = Table(title=f"{len(rows)} losses (`entangle losses NAME` explains one)", title_justify="left")
    for column in ("name", "formula", "rho = d_w / d_l", "reads"):
        table.add_column(column, no_wrap=column == "name")
    for number, row in enumerate(rows):
        if number == 0 or row.family != rows[number - 1].family:
            table.add_section()
        table.add_row(*(Text(cell) for cell in (row.name, row.formula, row.ratio, row.reads)))
    return table


def _occurring(shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Regime]:
    """The regimes worth a column: the three usual ones, the others where a pair has them."""
    usual = (Regime.IDEAL, Regime.BOTH_UP, Regime.BOTH_DOWN)
    return [r for r in REGIMES if r in usual or any(row[r]["count"] for row in shares.values())]


def quantile_table(summary: Mapping[str, Any]) -> Table:
    """How cosines and ratios are distributed over the pairs."""
    meanings = {
        "cosine": "cosine of the two gradients",
        "norm_ratio": "norm ratio |g_l| / |g_w|",
        "ratio_chosen": "c / A  (DPO lowers the chosen if above 1)",
        "ratio_rejected": "c / B  (DPO raises the rejected if above 1)",
        "length_ratio": "rejected / chosen tokens",
    }
    table = Table(title="Distribution over the pairs", title_justify="left")
    table.add_column("quantile")
    for quantile in next(iter(summary["quantiles"].values())):
        table.add_column(f"{100 * float(quantile):.0f} %", justify="right")
    for name, meaning in meanings.items():
        values = summary["quantiles"][name].values()
        table.add_row(meaning, *(_number(value, ".3g") for value in values))
    return table


def worst_pairs(pairs: pd.DataFrame, predictions: pd.DataFrame, loss: str, count: int) -> pd.DataFrame:
    """The pairs whose chosen log-prob a step of this loss lowers most, worst first."""
    rows = predictions[(predictions["loss"] == loss) & (predictions["change_chosen"] < 0)]
    rows = rows[rows["regime"] != Regime.DEGENERATE].nsmallest(count, "change_chosen")
    return rows.merge(pairs, on="index", how="left", sort=False)


def pair_cards(
    pairs: pd.DataFrame, predictions: pd.DataFrame, texts: pd.DataFrame | None, loss: str, count: int
):
    """The worst pairs as readable blocks: numbers, a sentence, and a snippet of both responses."""
    worst = worst_pairs(pairs, predictions, loss, count)
    if worst.empty:
        return Text(f"No pair's chosen log-prob falls under {loss}.", style="green")
    by_index: dict[Any, Any] = {} if texts is None else texts.set_index("index").to_dict("index")
    cards: list[RenderableType] = [
        Text(f"Worst pairs under {loss} (largest predicted fall of the chosen)", "bold")
    ]
    cards += [
        _card({str(k): v for k, v in row.items()}, by_index.get(row["index"]))
        for row in worst.to_dict("records")
    ]
    return Group(*cards)


def _card(row: Mapping[str, Any], text: Mapping[str, str] | None) -> Panel:
    body = Text(explain(row, row))
    body.append(
        f"\ncosine {row['cosine']:.3f}, change per unit learning rate: chosen {row['change_chosen']:+.3g}, "
        f"rejected {row['change_rejected']:+.3g} nats; {row['length_chosen']:.0f} and "
        f"{row['length_rejected']:.0f} tokens",
        style="dim",
    )
    if text is not None:
        body.append("\n+ ", style="green").append(snippet(text["chosen"]))
        body.append("\n- ", style="red").append(snippet(text["rejected"]))
    return Panel(body, title=Text(f"pair {row['index']}"), title_align="left", border_style="dim")


def snippet(text: str, width: int = 150) -> str:
    """The start of a text on one line, control characters shown as spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def count_line(summary: Mapping[str, Any]) -> str:
    """`450 pairs, 448 scored; 2 truncated`."""
    counts = dict(summary["pairs"])
    total, scored = counts.pop("total"), counts.pop("scored")
    flags = ", ".join(f"{count} {flag.replace('_', '-')}" for flag, count in counts.items() if count)
    return f"{total} pairs, {scored} scored" + (f"; {flags}" if flags else "")


def render(renderable: RenderableType, width: int = 100) -> str:
    """Plain text of a table, for a notebook or a file."""
    console = Console(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class Shown(ABC):
    """A command's result: shown as rich tables in a terminal, as plain text, and in a notebook."""

    @abstractmethod
    def renderable(self) -> RenderableType:
        """The tables as rich objects."""

    def table(self, width: int = 100, **shown: Any) -> str:
        """The tables as plain text; `shown` is passed to `renderable`."""
        return render(self.renderable(**shown), width)

    def _repr_html_(self) -> str:
        return to_html(self.renderable())


def to_html(renderable: RenderableType, width: int = 100) -> str:
    """The same as HTML for a notebook, in colour; everything in it is escaped."""
    console = Console(width=width, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(renderable)
    style = (
        "overflow-x:auto;white-space:pre;line-height:1.25;font-family:ui-monospace,Menlo,Consolas,monospace"
    )
    return console.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')
