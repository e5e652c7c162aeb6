"""Rank correlations of columns of pairs as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from entangle.analysis.wording import spoken
from entangle.figures.heat import heat_map

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def correlation_map(axes: Axes, found: pd.DataFrame) -> Axes:
    """Spearman's rank correlations.

    Args:
        axes: where to draw.
        found: one row and one column per column of pairs.
    """
    rows, columns = ([spoken(str(name)) for name in names] for names in (found.index, found.columns))
    heat_map(axes, found.to_numpy(dtype=float), rows, columns, 1.0, "rank correlation")
    return axes
