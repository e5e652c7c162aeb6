"""Tables of `entangle across` for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.statistics import Z
from entangle.tables.probe import percent

PARTS = ("own", "partner", "pull", "push")


def report(summary: Mapping[str, Any]) -> RenderableType:
    """The set as one pair, a row per loss, and what it says of the first loss."""
    return Group(Text(set_sentence(summary) + "\n"), loss_table(summary), Text(verdict(summary)))


def set_sentence(summary: Mapping[str, Any]) -> str:
    """The set's own geometry in words."""
    block, others = summary["set"], summary["epoch_pairs"] - 1
    between = block["sq_chosen"] / block["alone"]["sq_chosen"]
    sentence = (
        f"{summary['pairs']} pairs, {summary['metric'].upper()} metric. The inner product of two different pairs' "
        f"chosen scores is {100 * between:.2g} % of a score's squared norm on average; {others} other pairs of an "
        f"epoch make it {others * between:.3g} times a pair's own."
    )
    if not is_known(block["cosine"]):
        return f"{sentence} Different pairs' scores have no direction in common, so the set has no band."
    return (
        f"{sentence} Mean scores have cosine {block['cosine']:.3f} and norm ratio {block['norm_ratio']:.3f}: the set "
        f"is ideal for rho between {ratio(block['band'][0])} and {ratio(block['band'][1])}."
    )


def is_known(value: float | None) -> bool:
    """Whether a number is there: JSON has neither NaN nor infinity, which are written as null."""
    return value is not None and value == value


def ratio(value: float | None) -> str:
    """An incentive ratio, which may be infinite."""
    return "inf" if value is None else f"{value:.3g}"


def loss_table(summary: Mapping[str, Any]) -> Table:
    """What acts on the mean chosen log-prob over an epoch, where both log-probs go, and pairs that lose both."""
    table = Table(
        title="Over an epoch of SGD, first order: % of all that acts on the log-prob", title_justify="left",
        box=box.SIMPLE_HEAD, padding=0,
    )  # fmt: skip
    table.add_column("loss", overflow="fold")
    for column in ("rho", *PARTS, "chosen", "rejected", "both down,\nalone", "both down,\nepoch"):
        table.add_column(column, justify="right", no_wrap=True)
    for loss, row in summary["losses"].items():
        whole = {
            side: sum(abs(row[side][part]) for part in PARTS) / 100 or 1.0 for side in ("chosen", "rejected")
        }
        table.add_row(
            Text(loss), ratio(row["rho"]), *(f"{row['chosen'][part] / whole['chosen']:+.0f}" for part in PARTS),
            *(
                f"{row[side]['change'] / size:+.0f} ±{Z * row[side]['error'] / size:.0f}"
                for side, size in whole.items()
            ),
            *(percent(row[f"regimes_{which}"]["both_down"]) for which in ("alone", "epoch")),
        )  # fmt: skip
    table.caption = (
        "Acting on the chosen log-prob: own, its own score; partner, the other response of its pair; pull and push, "
        "chosen and rejected responses of all other pairs. chosen, rejected: the sums, ± 95 %. both down: % of pairs."
    )
    return table


def verdict(summary: Mapping[str, Any]) -> str:
    """Where an epoch takes the mean log-probs under the first loss, and how sure that is."""
    loss, row = next(iter(summary["losses"].items()))
    moves = []
    for side in ("chosen", "rejected"):
        change, error = row[side]["change"], row[side]["error"]
        doubt = "" if abs(change) > Z * error else " (not told from no change by these pairs)"
        moves.append(f"the mean {side} log-prob {'rises' if change > 0 else 'falls'}{doubt}")
    return f"Under {loss} an epoch's first-order effect: {' and '.join(moves)}."
