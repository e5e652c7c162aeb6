"""The ledgers of a comparison for a terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from entangle.analysis.ledger import PARTS
from entangle.tables.base import plain_table

CAPTION = (
    "own: the response's own score; partner: the other response of its pair; others: the other pairs of the batches; "
    "momentum: gradients of earlier steps; remainder: beyond first order. They add up to the change."
)


def ledger_tables(ledger: pd.DataFrame) -> RenderableType:
    """Where the changes of the accounted log-probs came from: a table per side, one row per loss and setting.

    Args:
        ledger: one row per run and side of a comparison; means over seeds are shown. A cause that never had a part is
            left out.
    """
    means = ledger.groupby(["side", "variant"], sort=False)[["measured", *PARTS]].mean()
    causes = [part for part in PARTS if means[part].abs().max() >= 0.005]
    parts: list[RenderableType] = []
    for side in ("chosen", "rejected"):
        table = plain_table(
            f"Ledger: what moved the {side} log-prob of the probed pairs, nats", padding=(0, 1, 0, 0)
        )
        table.add_column("", overflow="fold")
        for head in ("change", *causes):
            table.add_column(head, justify="right", no_wrap=True)
        for variant, values in means.loc[side, ["measured", *causes]].iterrows():
            table.add_row(Text(str(variant)), *(f"{value:+.2f}" for value in values))
        parts.append(table)
    return Group(*parts, Text(CAPTION, "italic"))
