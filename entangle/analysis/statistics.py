"""Every interval, error, correlation and quantile that is reported, with the fewest values each is given for.

Intervals are two-sided, at `LEVEL`. What can't be said is NaN, never a guess; each function
names its smallest n and why.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]

LEVEL = 0.95
"""Confidence of every interval."""

Z = 1.959963984540054
"""Standard errors of a normal interval at `LEVEL`: the 97.5 % quantile of N(0, 1)."""

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""What a summary tells of a distribution."""


def quantiles(values: pd.Series) -> dict[str, float]:
    """`QUANTILES` of the values that aren't NaN, linear between neighbours; NaN where there is none.

    Examples:
        >>> quantiles(pd.Series([1.0, 2.0, 3.0]))["0.25"]
        1.5
    """
    found = values.quantile(list(QUANTILES)).tolist()
    return {f"{q:g}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


# --- shares -------------------------------------------------------------------------------------------------


def share(count: int, total: int) -> dict[str, float]:
    """A share with its Wilson interval: {count, share, low, high}.

    From one observation on, since the interval is right for few; NaN where `total` is 0.

    Args:
        count: things counted.
        total: of how many.

    Examples:
        >>> found = share(8, 10)
        >>> round(found["low"], 3), round(found["high"], 3)
        (0.49, 0.943)
    """
    if total == 0:
        return {"count": 0, "share": math.nan, "low": math.nan, "high": math.nan}
    low, high = wilson(np.array(count), np.array(total))
    return {"count": count, "share": count / total, "low": float(low), "high": float(high)}


def wilson(counts: np.ndarray, totals: np.ndarray, z: float = Z) -> tuple[np.ndarray, np.ndarray]:
    """Wilson intervals of many shares at once, (low, high) in the arguments' shape.

    (f + z^2/2n -+ z sqrt(f (1-f)/n + z^2/4n^2)) / (1 + z^2/n); 0 and 1 are kept where all or none are counted.

    Args:
        counts: things counted.
        totals: of how many, at least 1 each; in a shape that goes with that of `counts`.
        z: standard errors.
    """
    shares, spread = counts / totals, z * z / totals
    centre = shares + spread / 2
    half = np.sqrt(spread * (shares * (1 - shares) + spread / 4))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return np.where(counts == 0, 0.0, low), np.where(counts == totals, 1.0, high)


def exact_share(count: int, total: int) -> tuple[float, float]:
    """The Clopper-Pearson interval of a share: it holds the truth with probability `LEVEL` at least, for every n >= 1.

    Args:
        count: things counted.
        total: of how many.

    Examples:
        >>> low, high = exact_share(0, 10)
        >>> low, round(high, 4)  # 1 - 0.025^(1/10)
        (0.0, 0.3085)
    """
    found = stats.binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return float(found.low), float(found.high)


# --- means --------------------------------------------------------------------------------------------------


def mean_and_error(values: Array | pd.Series) -> tuple[float, float]:
    """The mean and its standard error s / sqrt(n), s with n - 1; values that are NaN are left out.

    The error needs 2 values, since one has no spread; the mean needs 1. Else NaN.

    Examples:
        >>> mean_and_error(np.array([1.0, 3.0]))
        (2.0, 1.0)
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    mean = float(known.mean()) if len(known) else math.nan
    return mean, float(known.std(ddof=1)) / math.sqrt(len(known)) if len(known) > 1 else math.nan


def jackknife_error(left_out: Array) -> float:
    """Standard error sqrt((n-1)/n sum (U_(-i) - mean)^2) of a statistic U, from U without each observation in turn.

    Its square is biased upwards (Efron and Stein 1981). It needs 2 values; NaN for fewer.

    Args:
        left_out: `(n,)`, the statistic of all observations but the i-th.

    Examples:
        >>> jackknife_error(np.array([3.0, 1.0]))  # of a mean: its standard error
        1.0
    """
    count = len(left_out)
    if count < 2:
        return math.nan
    return math.sqrt((count - 1) / count * float(((left_out - left_out.mean()) ** 2).sum()))


def bootstrap(
    statistic: Callable[..., NDArray[np.float64]], *columns: np.ndarray, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic, observations drawn with replacement (by scipy.stats.bootstrap).

    It needs 2 observations: from one, every draw is the same. Draws without a number (a ratio over 0) are left out;
    NaN where they are more than one in twenty.

    Args:
        statistic: `(columns..., axis)` -> the statistic along that axis, vectorised; as scipy wants it.
        columns: `(n,)` each, drawn together.
        draws: resamples.
        seed: of the draws.

    Examples:
        >>> low, high = bootstrap(np.mean, np.array([0.0, 1.0] * 50))
        >>> round(low, 2), round(high, 2)  # 0.5 -+ 1.96 * 0.05
        (0.4, 0.6)
    """
    count = len(columns[0])
    if count < 2:
        return math.nan, math.nan
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # draws that are all one value, or not a number, are dealt with below
        found = stats.bootstrap(
            columns,
            statistic,
            n_resamples=draws,
            batch=max(1, MOST_DRAWN // count),
            paired=len(columns) > 1,
            vectorized=True,
            method="percentile",
            random_state=np.random.default_rng(seed),  # pyright: ignore[reportCallIssue] (`rng` from scipy 1.15 on)
        ).bootstrap_distribution
    known = found[np.isfinite(found)]
    if len(known) < LEVEL * draws:
        return math.nan, math.nan
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


MOST_DRAWN = 2**23
"""Numbers that a bootstrap holds at once."""


def bootstrap_mean(values: Array, *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of a mean (of a share, where the values are 0 and 1); NaN for fewer than 2 values.

    Args:
        values: `(n,)`.
        draws: resamples.
        seed: of the draws.
    """
    return bootstrap(np.mean, np.asarray(values, dtype=np.float64), draws=draws, seed=seed)


# --- standard deviations ------------------------------------------------------------------------------------


def std_interval(values: Array) -> tuple[float, float]:
    """An interval for a standard deviation that doesn't take the values for normal (Bonett 2006).

    ln(c s^2) -+ t c sqrt((g4 - (n-3)/n) / (n-1)), c = n / (n - z), g4 = n sum (x - m)^4 / (sum (x - mean)^2)^2, m the
    mean trimmed by 1 / (2 sqrt(n-4)) at each end, z the normal quantile; Student's t with n - 1 degrees of freedom in
    place of the source's normal quantile, which is too short for few values.

    Of 3000 samples of 4 to 64, the interval held the truth in 95 to 99.9 % of normal ones, 89 to 99 % of exponential
    ones, 91 to 99 % of those with 70 to 90 % zeros and 92 to 98 % of beta(0.5, 3) ones. For a tail as heavy as a
    lognormal's (sigma = 1) it was 74 to 98 %: where rare values are very large, no interval from a few values holds.

    Returns:
        (low, high). It needs 4 values (g4 of 3 is one and the same number, 1.5, whatever the values); NaN for fewer,
        and for values that are all equal, of which the variance's error can't be told.

    Examples:
        >>> low, high = std_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
        >>> round(low, 2), round(high, 2)  # s = 1.58
        (0.55, 7.45)
    """
    count, centred = len(values), values - values.mean()
    total = float((centred**2).sum())
    if count < 4 or total == 0:
        return math.nan, math.nan
    middle = stats.trim_mean(values, 1 / (2 * math.sqrt(count - 4))) if count > 4 else values.mean()
    kurtosis = count * float(((values - middle) ** 4).sum()) / total**2
    correction = count / (count - Z)
    error = correction * math.sqrt(max(kurtosis - (count - 3) / count, 0.0) / (count - 1))
    centre = math.sqrt(correction * total / (count - 1))
    factor = math.exp(float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * error / 2)
    return centre / factor, centre * factor


# --- rank correlation ---------------------------------------------------------------------------------------


def rank_correlation(first: pd.Series, second: pd.Series) -> dict[str, float]:
    """Spearman's rho of two columns over the rows where both are finite: {pairs, rho, low, high}.

    The interval is Fisher's, tanh(atanh rho -+ z sqrt((1 + rho^2 / 2) / (n - 3))), with the variance of Bonett and
    Wright (Psychometrika 65, 2000). NaN where a column is constant, or for fewer than 4 rows, where n - 3 isn't
    positive; a perfect correlation is its own interval.

    Args:
        first: one number per row.
        second: another one, of the same rows.

    Examples:
        >>> found = rank_correlation(pd.Series(range(20)), pd.Series([*range(10, 20), *range(10)]))
        >>> {name: round(value, 2) for name, value in found.items()}
        {'pairs': 20, 'rho': -0.5, 'low': -0.79, 'high': -0.05}
    """
    both = pd.DataFrame({"a": first, "b": second}).replace([np.inf, -np.inf], np.nan).dropna()
    count = len(both)
    if count < 4 or both["a"].nunique() == 1 or both["b"].nunique() == 1:
        return {"pairs": count, "rho": math.nan, "low": math.nan, "high": math.nan}
    rho = float(np.clip(both["a"].rank().corr(both["b"].rank()), -1.0, 1.0))
    if abs(rho) == 1.0:
        return {"pairs": count, "rho": rho, "low": rho, "high": rho}
    half = Z * math.sqrt((1 + rho**2 / 2) / (count - 3))
    return {
        "pairs": count,
        "rho": rho,
        "low": math.tanh(math.atanh(rho) - half),
        "high": math.tanh(math.atanh(rho) + half),
    }
