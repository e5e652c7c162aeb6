"""Figures of a run's modules: what every layer and every kind of module adds to the cosine of a pair's gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from entangle.figures.heat import heat_map, layer_name
from entangle.figures.style import FAINT, INK, RED, figure_of, legend_below

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layers(axes: Axes, summary: Mapping[str, Mapping[str, Any]]) -> Axes:
    """Per layer: a bar for what it adds to the mean cosine, and the cosine that it would have alone (5 to 95 %).

    Args:
        axes: where to draw.
        summary: `summary["modules"]` of a run.
    """
    rows = summary["layers"]
    places = np.arange(len(rows))

    def column(name: str) -> np.ndarray:
        return np.array([np.nan if row[name] is None else row[name] for row in rows.values()], dtype=float)

    median = column("cosine")
    reach = np.stack([median - column("low"), column("high") - median])
    axes.bar(places, column("cosine_part"), color=RED, alpha=0.85, width=0.7, label="adds to the mean cosine")
    axes.errorbar(
        places,
        median,
        yerr=reach,
        fmt="o",
        ms=3.5,
        lw=1,
        color=INK,
        label="cosine of this layer alone (5 to 95 %)",
    )
    axes.axhline(0, color=FAINT, lw=0.8, zorder=0)
    step = max(1, len(rows) // 24)
    axes.set_xticks(places[::step], list(rows)[::step], rotation=90 if any(map(str.isalpha, rows)) else 0)
    axes.set_xlabel("layer")
    axes.set_ylabel("cosine of the two gradients")
    legend_below(figure_of(axes))
    return axes


def module_grid(shares: pd.DataFrame) -> pd.DataFrame:
    """Shares in %, kinds of modules as rows and layers as columns.

    Args:
        shares: what every kind of module adds to the mean cosine in every layer: layer (-1: outside), kind, share.
    """
    grid = 100 * shares.pivot(index="kind", columns="layer", values="share")
    return grid.loc[list(dict.fromkeys(shares["kind"])), sorted(grid.columns)]


def module_map(axes: Axes, shares: pd.DataFrame) -> Axes:
    """What every kind of module adds to the mean cosine in every layer, %.

    Args:
        axes: where to draw.
        shares: layer, kind, share.
    """
    grid = module_grid(shares)
    bound = float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0
    columns = [layer_name(int(layer)) for layer in grid.columns]
    heat_map(axes, grid.to_numpy(), list(map(str, grid.index)), columns, bound, "% of the mean cosine")
    axes.set_xlabel("layer")
    return axes
