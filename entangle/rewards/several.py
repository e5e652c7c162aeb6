"""Several reward functions on the same answers: which of them varies within a prompt, and which of them agree.

A reward teaches only by its differences within a prompt. How long a policy takes to gain from it grows as its variance
there falls (about as the power -1/3 of the mean variance), and a reward that ranks a prompt's answers well teaches
slowly where it hardly tells them apart: what went with the true gain best was variance times accuracy (arXiv
2503.15477, by notes on the paper).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from entangle.analysis.statistics import Array, bootstrap, mean_and_error, share


def compare_rewards(rewards: Mapping[str, Sequence[Array]], main: str) -> dict[str, Any]:
    """Every function's spread within prompts, and the correlation and agreement of each two.

    Args:
        rewards: by function `(K,)` for each prompt, NaN where one gave none.
        main: the function whose order of a prompt's answers counts as right.

    Returns:
        `functions`: by name the mean within-prompt variance with its error, `std` (its root), `dead` (prompts whose
        answers all tie), `share` (of the variance of the main one that is its covariance with this one), `accuracy`
        (see `pair_accuracy`) and `teacher` = variance x accuracy; `correlations`: of each two, within prompts.
    """
    functions = {}
    for name, values in rewards.items():
        spread = np.array([_variance(own) for own in values])
        mean, error = mean_and_error(spread[np.isfinite(spread)])
        tied = [len(np.unique(own[np.isfinite(own)])) == 1 for own in values if np.isfinite(own).sum() > 1]
        accuracy = pair_accuracy(values, rewards[main])
        functions[name] = {
            "variance": mean,
            "variance_error": error,
            "std": math.sqrt(mean) if mean == mean else math.nan,
            "dead": share(sum(tied), len(tied)),
            "share": _regression(rewards[main], values),
            "accuracy": accuracy,
            "teacher": mean * accuracy["value"],
        }
    pairs = itertools.combinations(rewards, 2)
    return {
        "main": main,
        "functions": functions,
        "correlations": [
            {"first": a, "second": b} | within_correlation(rewards[a], rewards[b]) for a, b in pairs
        ],
    }


def within_correlation(first: Sequence[Array], second: Sequence[Array]) -> dict[str, float]:
    """Correlation of two rewards within prompts, both centred at the prompt's mean, with a bootstrap over prompts.

    Args:
        first: `(K,)` for each prompt, NaN where one gave none.
        second: likewise.
    """
    sums = np.array([_moments(a, b) for a, b in zip(first, second, strict=True)]).reshape(-1, 3)
    own, other, both = sums.T
    low, high = bootstrap(_correlation, own, other, both)
    return {"rho": float(_correlation(own, other, both)), "low": low, "high": high}


def _correlation(own: Array, other: Array, both: Array, axis: int = -1) -> Array:
    with np.errstate(all="ignore"):
        return both.sum(axis) / np.sqrt(own.sum(axis) * other.sum(axis))


def pair_accuracy(rewards: Sequence[Array], truth: Sequence[Array]) -> dict[str, float]:
    """Share of the pairs of a prompt's answers that differ in truth which a reward orders as the truth does.

    A tie of the reward counts half. Mean over prompts with such pairs, and its error.

    Args:
        rewards: `(K,)` for each prompt, NaN where one gave none.
        truth: likewise.

    Examples:
        >>> pair_accuracy([np.array([0.1, 0.9, 0.9])], [np.array([0.0, 1.0, 0.0])])["value"]
        0.75
    """
    found = []
    for own, right in zip(rewards, truth, strict=True):
        known = np.isfinite(own) & np.isfinite(right)
        better = np.sign(right[known][:, None] - right[known])
        ordered = np.sign(own[known][:, None] - own[known])[better > 0]
        if len(ordered):
            found.append(float((ordered + 1).mean() / 2))
    value, error = mean_and_error(np.array(found))
    return {"value": value, "error": error, "prompts": len(found)}


def _variance(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.var(ddof=1)) if len(known) > 1 else math.nan


def _moments(first: Array, second: Array) -> tuple[float, float, float]:
    """Sums of squares of both and of their product, centred, over answers that have both."""
    known = np.isfinite(first) & np.isfinite(second)
    if known.sum() < 2:
        return 0.0, 0.0, 0.0
    a, b = first[known] - first[known].mean(), second[known] - second[known].mean()
    return float(a @ a), float(b @ b), float(a @ b)


def _regression(main: Sequence[Array], other: Sequence[Array]) -> float:
    """Covariance of two rewards within prompts over the main one's variance: shares of a sum's parts add up to 1."""
    own, _, both = np.sum([_moments(a, b) for a, b in zip(main, other, strict=True)], 0)
    return float(both / own) if own > 0 else math.nan
