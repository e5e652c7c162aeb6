"""What-if for a terminal: verdicts, smallest changes, pairs to look at, a recommendation in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy.stats import binomtest

from entangle.analysis.regimes import REGIMES, Regime
from entangle.tables.probe import count_line, percent, snippet
from entangle.tables.probe import heading as probe_heading

if TYPE_CHECKING:
    from entangle.commands.whatif import WhatIf

COLOURS = {
    "ideal": "green",
    "both_up": "yellow",
    "both_down": "red",
    "inverted": "magenta",
    "degenerate": "dim",
}
SHOWN_PAIRS = 5
_HEADERS = {
    "ideal": "ideal", "both_up": "both\nup", "both_down": "both\ndown", "inverted": "in-\nverted",
    "degenerate": "can't\ntell",
}  # fmt: skip


def report(result: WhatIf, rows: int) -> RenderableType:
    """Everything, in the order in which it is read."""
    summary = result.summary
    parts: list[RenderableType] = [heading(summary), verdict_table(result.settings, rows, summary["base"])]
    if summary["changes"]:
        parts.append(change_table(summary))
    parts.append(inseparable_list(result))
    parts += [
        Text(f"\n{summary['recommendation']}", "bold"),
        Text("Limits: " + " ".join(summary["limits"]), "dim"),
    ]
    if summary["refused"]:
        parts.append(
            Text("\nNot judged:\n" + "\n".join(f"  {sentence}" for sentence in summary["refused"]), "dim")
        )
    return Group(*parts)


def heading(summary: Mapping[str, Any]) -> Text:
    """Pairs counted, what they were measured on, and the batches of batch-coupled losses."""
    if summary["provenance"]:
        text = probe_heading(summary, summary["provenance"])
    else:
        text = Text(count_line(summary), "bold").append("\n")
    if summary["batch_coupled"]:
        losses = sorted({label.partition("(")[0] for label in summary["batch_coupled"]})
        text.append(f"Batches of {', '.join(losses)}: {batch_composition(summary)}.\n", style="not bold dim")
    return text


def batch_composition(summary: Mapping[str, Any]) -> str:
    """Which pairs stand in a batch together."""
    return f"{summary['loss_batch_size']} consecutive scored pairs in dataset order"


def verdict_table(settings: pd.DataFrame, rows: int, base: str) -> Table:
    """Shares per regime; losses and settings with the same verdict on every pair stand in one row."""
    shown, total = verdicts(settings, rows, base), settings["verdict"].nunique()
    used = [r for r in REGIMES if (settings[f"{r}_count"] > 0).any()]
    cut = f"; {len(shown)} of {total}" if total > len(shown) else ""
    title = f"Share of pairs per regime, % [95 % interval]; one row per verdict, most ideal first{cut}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), expand=True)
    for regime in used:
        table.add_column(_HEADERS[regime], justify="right", style=COLOURS[regime], no_wrap=True)
    for column in ("rho", "margin\nkept %"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("losses and settings", ratio=1, overflow="fold")
    for group in shown:
        row = group.iloc[0]
        cells = [_cell(row, regime, regime is Regime.IDEAL) for regime in used]
        kept = _percent(row["margin_efficiency_median"])
        table.add_row(*cells, _ratio(group), kept, Text(names(short_labels(group, settings), base)))
    return table


def verdicts(settings: pd.DataFrame, count: int, base: str) -> list[pd.DataFrame]:
    """Settings grouped by equal verdicts, at most `count` groups, most ideal first, the base's among them."""
    groups = sorted(
        (g for _, g in settings.groupby("verdict", sort=False)), key=lambda g: -g["ideal"].iloc[0]
    )
    place = next(i for i, group in enumerate(groups) if (group["label"] == base).any())
    return groups[:count] if place < count else [*groups[: count - 1], groups[place]]


def short_labels(group: pd.DataFrame, settings: pd.DataFrame) -> list[str]:
    """Labels of a verdict; a loss whose every setting has this verdict is named once."""
    labels = {}
    for loss, own in group.groupby("loss", sort=False):
        everything = len(own) == (settings["loss"] == loss).sum() > 1
        labels |= dict.fromkeys([f"{loss} (all {len(own)})"] if everything else own["label"])
    return list(labels)


def names(labels: Sequence[str], base: str, shown: int = 8, width: int = 60) -> str:
    """The first labels, the base before all, then the shorter ones, and how many more there are."""
    first = base.partition("(")[0]
    ordered = sorted(labels, key=lambda label: (label.partition("(")[0].strip() != first, len(label)))
    cut = [label if len(label) <= width else f"{label[: width - 1]}…" for label in ordered[:shown]]
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(cut) + more


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
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = (
        "knob",
        "setting",
        "up to",
        "ideal %",
        "both\nup",
        "both\ndown",
        "margin\nper lr",
        "margin\nkept %",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "knob" else "right", no_wrap=True)
    for change in summary["changes"]:
        before, after = change["at_start"], change["at_setting"]
        table.add_row(
            change["knob"], setting_text(change), until_text(change),
            percent(after["regimes"]["ideal"]),
            *(percent(after["regimes"][name], interval=False) for name in ("both_up", "both_down")),
            _times(after["margin_change_median"], before["margin_change_median"]),
            _percent(after["margin_efficiency_median"]),
        )  # fmt: skip
    lines = [f"{change['knob']}: {change['title']}." for change in summary["changes"]]
    lines.append(
        "setting: the smallest that reaches the target, or (most) the one with the most ideal pairs. "
        "margin per lr: growth of the margin per unit of learning rate, as a multiple of the start's (median "
        "pair). "
        "margin kept: how fast a step of this loss widens the margin, in % of the fastest that a step of the "
        "same length can (median pair; every loss with rho = 1 has 100)."
    )
    return Group(table, Text("\n".join(lines) + "\n", "dim"))


def setting_text(change: Mapping[str, Any]) -> str:
    """The setting of a smallest change, or why there is none."""
    if change["setting"] == change["start"]:
        return "none needed" if change["reaches"] else "none helps"
    return f"{_number(change['setting'])}{'' if change['reaches'] else ' (most)'}"


def until_text(change: Mapping[str, Any]) -> str:
    """The setting from which on a smallest change overshoots."""
    if change["setting"] == change["start"]:
        return "-"
    return _number(change["until"]) if change["overshoots_into"] else "its end"


def _times(value: float, start: float) -> str:
    return f"x {value / start:.3g}" if start and value / start == value / start else "-"


def _number(value: float) -> str:
    return "no end" if value == float("inf") else f"{value:.4g}"


def _percent(value: float) -> str:
    return "-" if value != value else f"{100 * value:.0f}"


def inseparable_list(result: WhatIf) -> RenderableType:
    """The pairs that no loss can disentangle, with the start of their texts."""
    found = result.summary["inseparable"]
    if not found["count"]:
        return Text("Every pair has a band of incentive ratios in which it is ideal.")
    rows = result.critical[result.critical["inseparable"] != ""].head(SHOWN_PAIRS)
    text = Text(f"No loss can disentangle {_pairs(found['count'])}", "bold")
    text.append(f" ({_reasons(found['reasons'])}); to look at:", style="not bold")
    by_index = {} if result.texts is None else result.texts.set_index("index").to_dict("index")
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


def recommendation(summary: Mapping[str, Any]) -> str:
    """What to do, with the numbers that say so: no change, the cheapest change, or why none is enough."""
    sentences = [_where_it_stands(summary)]
    needed = _needed(summary)
    if summary["regimes"]["ideal"]["count"] >= needed:
        return " ".join([*sentences, f"That is the {_target(summary)} asked for: no change is needed."])
    reaching = [change for change in summary["changes"] if change["reaches"]]
    if reaching:
        sentences += _what_to_turn(max(reaching, key=_worth), reaching)
    else:
        sentences += _nothing_reaches(summary)
    sentences += _better_loss(
        summary, [c["at_setting"]["regimes"]["ideal"]["count"] for c in summary["changes"]]
    )
    return " ".join([*sentences, *_ceiling(summary, needed)])


def _needed(summary: Mapping[str, Any]) -> float:
    return summary["target"] * summary["pairs"]["scored"] - 1e-9


def _target(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['target']:g} %"


def _worth(change: Mapping[str, Any]) -> tuple[float, int]:
    kept = change["at_setting"]["margin_efficiency_median"]
    return (kept if kept == kept else -1.0, change["at_setting"]["regimes"]["ideal"]["count"])


def _where_it_stands(summary: Mapping[str, Any]) -> str:
    regimes = summary["regimes"]
    others = {
        "both_down": "both responses fall on", "both_up": "both rise on",
        "inverted": "the chosen falls and the rejected rises on",
        "degenerate": "the sign of a change can't be told on",
    }  # fmt: skip
    parts = [f"{words} {_portion(regimes[name])}" for name, words in others.items() if regimes[name]["count"]]
    tail = f"; {', '.join(parts)}" if parts else ""
    return (
        f"Under {summary['base']}, one small step raises the chosen and lowers the rejected response on "
        f"{percent(regimes['ideal'])} % of the {summary['pairs']['scored']} pairs{tail}."
    )


def _portion(share: Mapping[str, float]) -> str:
    """`31 %`, or the count where that would round to nothing."""
    return f"{100 * share['share']:.0f} %" if share["share"] >= 0.005 else _pairs(int(share["count"]))


def _pairs(count: int) -> str:
    return f"{count} pair{'' if count == 1 else 's'}"


def _what_to_turn(change: Mapping[str, Any], reaching: Sequence[Mapping[str, Any]]) -> list[str]:
    after = change["at_setting"]["regimes"]
    words = (
        f"The cheapest knob that gets there is {change['knob']} ({change['title']}) = "
        f"{change['setting']:.4g}, that is {change['loss']}: {percent(after['ideal'])} % ideal."
    )
    words += f" {_cost(change)}"
    edge = _edge(change)
    others = [f"{other['knob']} = {other['setting']:.4g}" for other in reaching if other is not change]
    return [
        words,
        _trade(change),
        *edge,
        *([f"It can also be had with {' or '.join(others)}."] if others else []),
    ]


def _cost(change: Mapping[str, Any]) -> str:
    """What a change costs in margin growth, per unit of learning rate and at equal length of the step."""
    before, after = change["at_start"], change["at_setting"]
    return (
        f"The median pair's margin then grows by {after['margin_change_median']:.3g} nats per unit of "
        f"learning rate ({before['label']}: {before['margin_change_median']:.3g}), and at "
        f"{_percent(after['margin_efficiency_median'])} % of the fastest rate for a step of that length."
    )


def _edge(change: Mapping[str, Any]) -> list[str]:
    into = change["overshoots_into"]
    words = {"both_up": "both responses rise", "both_down": "both fall"}
    if into is None:
        return []
    return [f"Beyond {change['until']:.4g} it overshoots: on more pairs {words.get(into, 'it goes wrong')}."]


def _nothing_reaches(summary: Mapping[str, Any]) -> list[str]:
    changes = summary["changes"]
    if not changes:
        return []
    best = max(changes, key=lambda change: (change["best_count"], _worth(change)))
    if best["best_count"] <= summary["regimes"]["ideal"]["count"]:
        return [
            f"No setting of {', '.join(c['knob'] for c in changes)} makes more pairs ideal than that.",
            *_idle(changes),
        ]
    at = best["at_setting"]
    words = (
        f"No setting of {', '.join(c['knob'] for c in changes)} brings {_target(summary)} there. The most is "
        f"{percent(at['regimes']['ideal'])} %, with {best['knob']} = {best['setting']:.4g} ({best['loss']}); "
        f"{percent(at['regimes']['both_up'], interval=False)} % then rise together and "
        f"{percent(at['regimes']['both_down'], interval=False)} % fall together."
    )
    return [words, _trade(best), *_idle(changes)]


def _trade(change: Mapping[str, Any]) -> str:
    """How many pairs change sides, and whether that could be chance (sign test on the same pairs)."""
    gained, lost = change["gained"], change["lost"]
    p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    chance = "" if p < 0.05 else f", a gain that chance could give (sign test p = {p:.2g})"
    return f"{_pairs(gained)} become ideal and {lost} cease to be{chance}."


def _idle(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"The knob {change['knob']} acts on no pair here: {change['idle']}."
        for change in changes
        if change["acts_on"] == 0
    ]


def _better_loss(summary: Mapping[str, Any], counts: Sequence[int]) -> list[str]:
    best = summary["best"]
    ideal = best["regimes"]["ideal"]
    if ideal["count"] <= max([summary["regimes"]["ideal"]["count"], *counts]):
        return []
    kept = _percent(best["margin_efficiency_median"])
    return [
        f"Of the losses judged, {best['label']} does best: {percent(ideal)} % ideal, {kept} % of the fastest "
        "margin growth."
    ]


def _ceiling(summary: Mapping[str, Any], needed: float) -> list[str]:
    found, total = summary["inseparable"], summary["pairs"]["scored"]
    sentences = []
    if found["count"]:
        sentences.append(
            f"{_pairs(found['count'])} can't be made ideal by any loss: look at them, or leave them out."
        )
    if total - found["count"] < needed:
        sentences.append(f"So {_target(summary)} can't be reached on these pairs by any loss.")
    return sentences


def limits(summary: Mapping[str, Any]) -> list[str]:
    """What the numbers leave out."""
    sentences = [
        f"First order, one small {summary['metric'].upper()} step on the pair's own loss: what other pairs "
        "of a batch do to it isn't counted, and training moves the model away from the one state that was "
        "probed.",
        "Settings were chosen on the pairs that they are judged on.",
    ]
    if summary["batch_coupled"]:
        sentences.append(f"Batch-coupled losses were given batches of {batch_composition(summary)}.")
    if summary["resolution"] > 1e-5:
        sentences.append("Scores are in 16-bit precision: signs near zero aren't told.")
    return sentences
