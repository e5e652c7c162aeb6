"""Tables of a run's modules: where the entanglement lives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.tables.base import percent

BAR = 16
"""Characters of a bar that stands for all of c."""


def module_tables(summary: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Layers, then kinds of modules, with what each contributes (`summary["modules"]` of a run)."""
    by_kind = dict(sorted(summary["kinds"].items(), key=lambda item: -(item[1]["inner_share"] or 0.0)))
    layers = _table("Where the entanglement lives, by layer", "layer", summary["layers"])
    kinds = _table("By kind of module, largest share of c first", "module", by_kind)
    kinds.caption = (
        "share of c: of the two gradients' product; norms: of the squared gradients; cosine and falling pairs (chosen "
        "log-prob, equal incentives on both responses) as if nothing else were trained"
    )
    return Group(layers, kinds)


def _table(title: str, first: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for column in (first, "share of c, %", "", "norms, %", "cosine [5-95 % of pairs]", "chosen falls, %"):
        table.add_column(
            column, justify="left" if column in (first, "") else "right", no_wrap=column == first
        )
    for name, row in rows.items():
        table.add_row(
            Text(name),
            _percent(row["inner_share"]),
            _bar(row["inner_share"]),
            _percent(row["norm_share"]),
            _cosine(row),
            percent(row["chosen_falls"]) if row["chosen_falls"]["count"] else "·",
        )
    return table


def _cosine(row: Mapping[str, float | None]) -> str:
    if row["cosine"] is None or row["cosine"] != row["cosine"]:  # a zero score has no direction
        return "-"
    return f"{row['cosine']:.3f} [{row['low']:.2f} to {row['high']:.2f}]"


def _percent(part: float | None) -> str:
    return "-" if part is None or part != part else f"{100 * part:.1f}"


def _bar(part: float | None) -> Text:
    length = 0 if part is None or part != part else round(BAR * min(abs(part), 1.0))
    return Text("█" * length, style="red" if (part or 0.0) > 0 else "green")
