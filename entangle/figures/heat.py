"""Heat maps of numbers that have a sign, drawn as shapes: they scale, and are read on any page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from entangle.figures.style import BLUE, RED, SMALL, figure_of, names_beside, safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEPS = 20
"""Shades of either sign."""


def heat_map(
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    bound: float,
    unit: str,
    *,
    is_red_below: bool = False,
) -> None:
    """A cell per number: red above 0, blue below, the stronger the larger; nothing where a number is missing.

    Args:
        axes: where to draw.
        values: `(rows, columns)`.
        rows: names, from the top.
        columns: names, from the left.
        bound: size of the strongest shade.
        unit: what the shades stand for.
        is_red_below: red below 0 and blue above, for numbers of which falls are the bad news.
    """
    from matplotlib.colors import ListedColormap, to_rgba

    strength = np.arange(STEPS, 0, -1) / STEPS
    below, above = (RED, BLUE) if is_red_below else (BLUE, RED)
    shades = [*(to_rgba(below, a) for a in strength), *(to_rgba(above, a) for a in strength[::-1])]
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=ListedColormap(shades), vmin=-bound, vmax=bound, antialiased=False
    )
    axes.set_yticks(np.arange(len(rows)) + 0.5, names_beside(axes, rows))
    every = max(1, len(columns) // 24)
    axes.set_xticks(np.arange(len(columns))[::every] + 0.5, [safe(column, 22) for column in columns[::every]])
    if max(map(len, columns), default=0) > 3:
        axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    bar = figure_of(axes).colorbar(mesh, ax=axes, shrink=0.9, aspect=18)
    bar.set_label(unit, fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)


def layer_name(number: int) -> str:
    """`outside` for what is in no layer (-1)."""
    return "outside" if number < 0 else str(number)
