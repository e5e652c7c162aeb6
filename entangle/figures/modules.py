"""A figure of a run's modules: what every layer adds to the cosine of a pair's two gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

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
    axes.bar(
        places, column("cosine_part"), color="#c8382e", alpha=0.85, width=0.7, label="adds to the mean cosine"
    )
    axes.errorbar(
        places,
        median,
        yerr=reach,
        fmt="o",
        ms=3.5,
        lw=1,
        color="#333333",
        label="cosine of this layer alone (5 to 95 %)",
    )
    axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    step = max(1, len(rows) // 24)
    axes.set_xticks(places[::step], list(rows)[::step], rotation=90 if any(map(str.isalpha, rows)) else 0)
    axes.set_xlabel("layer")
    axes.set_ylabel("cosine of the two gradients")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2)
    return axes
