"""How far a logged metric has moved, and whether that is more than its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

SIGMAS = 3.0
"""Standard errors that a change must exceed to count: one false alarm in about 700 for a metric that stands still."""

LEAST_ROWS = 5
"""Fewer logged rows than this say nothing about a trend."""


@dataclass(frozen=True)
class Trend:
    """A metric's move over a run.

    Args:
        start: mean of its first rows, or the value that it is known to start from.
        end: mean of its last rows.
        error: standard error of `end - start`, from the differences of neighbouring rows.
    """

    start: float
    end: float
    error: float

    @property
    def change(self) -> float:
        """By how much it has moved."""
        return self.end - self.start

    @property
    def has_risen(self) -> bool:
        """It ended above its start by more than noise."""
        return self.change > SIGMAS * self.error

    @property
    def has_fallen(self) -> bool:
        """It ended below its start by more than noise."""
        return self.change < -SIGMAS * self.error


def trend(series: pd.Series, start: float | None = None) -> Trend | None:
    """A series' trend between its first and its last fifth (three rows at least); None for fewer than `LEAST_ROWS`.

    The noise of a row is the standard deviation of differences of neighbouring rows over sqrt(2), so that a steady
    drift counts little.

    Args:
        series: values by step.
        start: the value before the first step, where it is known.
    """
    if len(series) < LEAST_ROWS:
        return None
    values = series.to_numpy(float)
    rows = _rows(values)
    noise = float(np.diff(values).std(ddof=1)) / 2**0.5 / rows**0.5
    if start is not None:
        return Trend(start, float(values[-rows:].mean()), noise)
    return Trend(float(values[:rows].mean()), float(values[-rows:].mean()), noise * 2**0.5)


def smooth(series: pd.Series) -> pd.Series:
    """Means over three neighbouring rows."""
    return series.rolling(3, center=True, min_periods=2).mean()


def onset(series: pd.Series, level: float) -> int | None:
    """The first step from which the smoothed series stays below `level` to the end; None if it doesn't end there."""
    return since(smooth(series) < level)


def since(is_so: pd.Series) -> int | None:
    """The first step from which something is so to the end; None if it isn't at the end, or nothing was logged."""
    values = is_so.to_numpy(bool)
    if not len(values) or not values[-1]:
        return None
    otherwise = np.flatnonzero(~values)
    return int(is_so.index[otherwise[-1] + 1 if len(otherwise) else 0])


def is_zero(series: pd.Series, least: int = 3) -> bool:
    """Whether a metric is exactly 0 in every row, of which there are some."""
    return len(series) >= least and bool((series == 0).all())


def highest(series: pd.Series) -> int:
    """The step of a series' largest value."""
    return int(series.index[int(series.to_numpy(float).argmax())])


def _rows(values: np.ndarray) -> int:
    return max(3, len(values) // 5)
