"""The catalogue of losses for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from entangle.catalogue import LossRow


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
