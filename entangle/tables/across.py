"""Tables of `entangle across` for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.across import PARTS
from entangle.analysis.findings import epoch_sentence, ratio_text, set_sentence
from entangle.analysis.statistics import Z
from entangle.tables.base import percent, plain_table


def across_tables(summary: Mapping[str, Any]) -> RenderableType:
    """The set as one pair, a row per loss, and what it says of the first loss."""
    return Group(Text(set_sentence(summary) + "\n"), parts_table(summary), Text(epoch_sentence(summary)))


def parts_table(summary: Mapping[str, Any]) -> Table:
    """What acts on the mean chosen log-prob over an epoch, where both log-probs go, and pairs that lose both."""
    table = plain_table("Over an epoch of SGD, first order: % of all that acts on the log-prob", padding=0)
    table.add_column("loss", overflow="fold")
    for column in ("rho", *PARTS, "chosen", "rejected", "both down,\nalone", "both down,\nepoch"):
        table.add_column(column, justify="right", no_wrap=True)
    for loss, row in summary["losses"].items():
        whole = {
            side: sum(abs(row[side][part]) for part in PARTS) / 100 or 1.0 for side in ("chosen", "rejected")
        }
        table.add_row(
            Text(loss),
            ratio_text(row["rho"]),
            *(f"{row['chosen'][part] / whole['chosen']:+.0f}" for part in PARTS),
            *(
                f"{row[side]['change'] / size:+.0f} ±{Z * row[side]['error'] / size:.0f}"
                for side, size in whole.items()
            ),
            *(percent(row[f"regimes_{which}"]["both_down"]) for which in ("alone", "epoch")),
        )
    table.caption = (
        "Acting on the chosen log-prob: own, its own score; partner, the other response of its pair; pull and push, "
        "chosen and rejected responses of all other pairs. chosen, rejected: the sums, ± 95 %. both down: % of pairs."
    )
    return table
