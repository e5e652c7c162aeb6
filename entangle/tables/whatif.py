"""What-if for a terminal: verdicts, smallest changes, pairs to look at, a recommendation in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.settings import by_verdict, listed, short_labels
from entangle.analysis.verdict import batch_composition, is_idle
from entangle.analysis.wording import counted
from entangle.tables.base import (
    IDEAL_MEANS,
    REGIME_STYLES,
    count_line,
    heading,
    percent,
    plain_table,
    snippet,
)
from entangle.tables.sets import finding_table, geometry_text, set_change_table

SHOWN_PAIRS = 5
_HEADERS = {
    "ideal": "ideal",
    "both_up": "both\nup",
    "both_down": "both\ndown",
    "inverted": "in-\nverted",
    "degenerate": "sign\nunknown",
}


def whatif_tables(
    settings: pd.DataFrame,
    critical: pd.DataFrame,
    summary: Mapping[str, Any],
    texts: pd.DataFrame | None,
    rows: int = 12,
) -> RenderableType:
    """Everything, in the order in which it is read.

    Args:
        settings: one row per loss and setting.
        critical: one row per pair: where it is ideal, and why no loss can move it as wanted.
        summary: what was judged, the smallest changes, the recommendation, limits, refusals.
        texts: texts of the pairs, where the probe kept them.
        rows: verdicts that are shown.
    """
    parts: list[RenderableType] = [_heading(summary)]
    if "set" in summary:
        whole = summary["set"]
        parts += [
            geometry_text(whole),
            finding_table(whole, summary["base"]),
            "",
            set_change_table(whole),
            "",
        ]
    parts.append(verdict_table(settings, rows, summary["base"]))
    if summary["changes"]:
        parts += [change_table(summary), fall_table(summary)]
    parts += [
        inseparable_list(critical, summary["inseparable"], texts),
        Text(f"\n{summary['recommendation']}", "bold"),
        *([] if summary["paste"] is None else [paste_text(summary["paste"])]),
        Text("Limits: " + " ".join(summary["limits"]), "dim"),
    ]
    if summary["refused"]:
        refused = "\n".join(f"  {sentence}" for sentence in summary["refused"])
        parts.append(Text(f"\nNot judged:\n{refused}", "dim"))
    return Group(*parts)


def _heading(summary: Mapping[str, Any]) -> Text:
    """Pairs counted, what they were measured on, and the batches of batch-coupled losses."""
    if summary["provenance"]:
        text = heading(summary, summary["provenance"])
    else:
        text = Text(count_line(summary, {}), "bold").append("\n")
    if summary["batch_coupled"]:
        losses = sorted({label.partition("(")[0] for label in summary["batch_coupled"]})
        text.append(f"Batches of {', '.join(losses)}: {batch_composition(summary)}.\n", style="not bold dim")
    return text


def verdict_table(settings: pd.DataFrame, rows: int, base: str) -> Table:
    """Shares per regime; losses and settings with the same verdict on every pair stand in one row."""
    shown, total = by_verdict(settings, rows, base), settings["verdict"].nunique()
    used = [r for r in REGIMES if (settings[f"{r}_count"] > 0).any()]
    cut = f"; {len(shown)} of {total}" if total > len(shown) else ""
    title = f"Share of pairs per regime, % [95 % interval]; one row per verdict, most ideal first{cut}\n{IDEAL_MEANS}"
    table = plain_table(title, padding=(0, 1, 0, 0), expand=True)
    for regime in used:
        table.add_column(_HEADERS[regime], justify="right", style=REGIME_STYLES[regime], no_wrap=True)
    for column in ("rho", "margin\nkept %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("losses and settings", ratio=1, overflow="fold")
    for group in shown:
        row = group.iloc[0]
        cells = [_cell(row, regime, regime is Regime.IDEAL) for regime in used]
        kept = _percent(row["margin_efficiency_median"])
        table.add_row(*cells, _ratio(group), kept, Text(listed(short_labels(group, settings), base)))
    return table


def _ratio(group: pd.DataFrame) -> str:
    rho, spread = group["rho"].iloc[0], group["rho_spread"].iloc[0]
    if rho != rho:
        return "-"
    if rho == float("inf"):
        return "inf"
    return f"{rho:.3g}" if spread <= 1e-9 * abs(rho) else f"~{rho:.3g}"


def _cell(row: pd.Series, regime: Regime, interval: bool) -> str:
    share = {"count": row[f"{regime}_count"], "share": row[regime]}
    share |= {"low": row[f"{regime}_low"], "high": row[f"{regime}_high"]}
    return percent(share, interval=interval)


def change_table(summary: Mapping[str, Any]) -> RenderableType:
    """One row per knob: the smallest setting that reaches the target, or the best there is, and its cost."""
    title = f"Smallest change that makes {100 * summary['target']:g} % of the pairs ideal"
    table = plain_table(title, padding=(0, 1, 0, 0))
    columns = (
        "knob",
        "setting",
        "up to",
        "ideal %",
        "both\nup",
        "both\ndown",
        "margin\ngrowth",
        "margin\nkept %",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "knob" else "right", no_wrap=True)
    for change in summary["changes"]:
        before, after = change["at_start"], change["at_setting"]
        table.add_row(
            change["knob"],
            setting_text(change),
            until_text(change),
            percent(after["regimes"]["ideal"]),
            *(percent(after["regimes"][name], interval=False) for name in ("both_up", "both_down")),
            _times(after["margin_change_median"], before["margin_change_median"]),
            _percent(after["margin_efficiency_median"]),
        )
    lines = [f"{change['knob']}: {change['title']}." for change in summary["changes"]]
    lines.append(
        "setting: the smallest that reaches the target, or (most) the one with the most ideal pairs. "
        "margin growth: how much the margin grows in one step, as a multiple of what it grows at the start, at the "
        "same learning rate (median pair). "
        "margin kept: how fast a step of this loss widens the margin, in % of the fastest that a step of the "
        "same length can (median pair; every loss with rho = 1 has 100)."
    )
    return Group(table, Text("\n".join(lines) + "\n", "dim"))


def fall_table(summary: Mapping[str, Any]) -> RenderableType:
    """One row per knob: the smallest setting at which the chosen log-prob falls on the fewest pairs, and its price."""
    if not any(change["falls"]["before"]["count"] for change in summary["changes"]):
        return Text(f"Under {summary['base']} no pair's own step lowers its chosen response.\n")
    title = "Smallest change under which the chosen falls on the fewest pairs"
    table = plain_table(title, padding=(0, 1, 0, 0))
    for column in ("knob", "setting", "up to", "chosen falls on", "before", "ideal %", "both\nup"):
        table.add_column(column, justify="left" if column == "knob" else "right", no_wrap=True)
    for change in summary["changes"]:
        found = change["falls"]
        before, after, regimes = found["before"], found["after"], found["at_setting"]["regimes"]
        is_start = found["setting"] == change["start"]
        idle = "none helps" if before["count"] else "none needed"
        table.add_row(
            change["knob"],
            idle if is_start else _number(found["setting"]),
            "-" if is_start else "no limit" if found["until"] is None else _number(found["until"]),
            counted(after["count"]),
            counted(before["count"]),
            percent(regimes["ideal"]),
            percent(regimes["both_up"], interval=False),
        )
    return Group(table, "")


def paste_text(paste: Mapping[str, Any]) -> Text:
    """The recommended change as lines to paste."""
    what = f"{paste['knob']} = {paste['setting']:.4g}, the smallest that {paste['does']}"
    text = Text()
    if paste["lines"] is None:
        text.append(f"\nTRL's DPOTrainer has no such loss ({paste['loss']}).")
    else:
        text.append(f"\nTo paste into the file for trl dpo ({what}):")
        text.append("".join(f"\n  {line}" for line in paste["lines"]), "bold")
    if paste["spec"] is not None:
        text.append("\nTo train with it here: ").append(f"entangle train --loss '{paste['spec']}'", "bold")
    return text.append("\n")


def setting_text(change: Mapping[str, Any]) -> str:
    """The setting of a smallest change, or why there is none."""
    if is_idle(change):
        return "none needed" if change["reaches"] else "none helps"
    return f"{_number(change['setting'])}{'' if change['reaches'] else ' (most)'}"


def until_text(change: Mapping[str, Any]) -> str:
    """The setting from which on a smallest change overshoots."""
    if is_idle(change):
        return "-"
    return _number(change["until"]) if change["overshoots_into"] else "no limit"


def _times(value: float, start: float) -> str:
    return f"x {value / start:.3g}" if start and value / start == value / start else "-"


def _number(value: float) -> str:
    return "no end" if value == float("inf") else f"{value:.4g}"


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.0f}"


def inseparable_list(
    critical: pd.DataFrame, found: Mapping[str, Any], texts: pd.DataFrame | None
) -> RenderableType:
    """The pairs that no loss can disentangle, with the start of their texts.

    Args:
        critical: one row per pair.
        found: how many there are and why, as in a summary's `inseparable`.
        texts: texts of the pairs, where the probe kept them.
    """
    if not found["count"]:
        return Text("Every pair has a band of incentive ratios in which it is ideal.")
    rows = critical[critical["inseparable"] != ""].head(SHOWN_PAIRS)
    text = Text(f"No loss can disentangle {counted(found['count'])}", "bold")
    text.append(f" ({_reasons(found['reasons'])}); to look at:", style="not bold")
    by_index = {} if texts is None else texts.set_index("index").to_dict("index")
    for row in rows.to_dict("records"):
        text.append(
            f"\n  pair {row['index']}: {row['inseparable']}, cosine {row['cosine']:.6f}", style="not bold"
        )
        words = by_index.get(row["index"])
        if words:
            text.append(
                f"\n    + {snippet(words['chosen'], 90)}\n    - {snippet(words['rejected'], 90)}", style="dim"
            )
    if found["count"] > len(rows):
        text.append(f"\n  and {found['count'] - len(rows)} more in critical.parquet", style="not bold")
    return text


_REASONS = {
    "identical": "chosen and rejected are the same tokens",
    "no gradient": "a response has no gradient",
    "parallel": "gradients parallel to within the precision",
}


def _reasons(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count}: {_REASONS[reason]}" for reason, count in counts.items())
