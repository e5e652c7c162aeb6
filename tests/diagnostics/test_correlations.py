"""Rank correlations against scipy, by hand, and by coverage."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr

from entangle.analysis.statistics import rank_correlation
from entangle.diagnostics import rank_correlations


def test_rho_is_spearmans_with_ties_and_rows_without_numbers_left_out():
    draw = np.random.default_rng(0)
    a = pd.Series(draw.integers(0, 9, 80).astype(float))
    b = pd.Series(a + draw.normal(0, 4, 80))
    holes = b.copy()
    holes[[3, 5]] = [np.nan, np.inf]
    found = rank_correlation(a, holes)
    assert found["pairs"] == 78
    assert found["rho"] == pytest.approx(float(spearmanr(a.drop([3, 5]), b.drop([3, 5])).statistic))
    assert found["low"] < found["rho"] < found["high"]


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Bivariate normal with r = 0.5: Spearman's true rho is (6 / pi) asin(r / 2)."""
    draw, truth = np.random.default_rng(1), 6 / np.pi * np.arcsin(0.25)
    hits = 0
    for _ in range(300):
        a, noise = draw.normal(size=(2, 60))
        found = rank_correlation(pd.Series(a), pd.Series(0.5 * a + np.sqrt(0.75) * noise))
        hits += found["low"] <= truth <= found["high"]
    assert 0.91 < hits / 300 < 0.985


def test_what_has_no_rank_has_no_correlation():
    line = pd.Series([1.0, 2.0, 3.0, 4.0])
    assert np.isnan(rank_correlation(line, pd.Series([7.0] * 4))["rho"])
    assert np.isnan(rank_correlation(line[:3], line[:3])["rho"])
    assert rank_correlation(line, -line) == {"pairs": 4, "rho": -1.0, "low": -1.0, "high": -1.0}


def test_every_couple_stands_once():
    rows = pd.DataFrame(np.random.default_rng(2).normal(size=(10, 4)), columns=list("abcd"))
    found = rank_correlations(rows, ["a", "b", "c"], ["d"])
    assert list(zip(found["first"], found["second"], strict=True)) == [
        ("a", "d"),
        ("b", "d"),
        ("c", "d"),
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
