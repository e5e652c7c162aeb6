"""The committed tables: no rank breaks its bound, and the summary is that of the runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.interactions.run import summarise, table
from experiments.interactions.separation import SIZES

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results" / "interactions"


def test_no_committed_rank_breaks_the_bound():
    rows = table(RESULTS / "ranks.csv", ())
    assert len(rows) == 270
    for row in rows:
        ranks, cut, walks = (
            [int(rank) for rank in str(row["ranks"]).split()],
            int(row["cut"]),
            int(row["walk_index"]),
        )
        assert ranks[-1] <= int(row["width"]) ** cut and cut <= 2 * walks + (row["prediction"] == "graph")
        assert ranks[:-1] == list(SIZES[: len(ranks) - 1])


def test_committed_summary_is_that_of_the_committed_runs():
    again = [
        {name: str(value) for name, value in row.items()}
        for row in summarise(table(RESULTS / "accuracy.csv", ()))
    ]
    assert again == table(RESULTS / "summary.csv", ())


def test_summary_by_hand():
    """Gains 2, 2, 5 points: mean 3, standard error 1, t quantile of two degrees of freedom 4.303."""
    runs = {"random": (0.5, 0.6, 0.7), "walks_1": (0.52, 0.62, 0.75)}
    rows = [
        {"features": "pixels", "method": method, "removed": "0.5", "seed": seed, "accuracy": value}
        for method, values in runs.items()
        for seed, value in enumerate(values)
    ]
    base, gained = summarise(rows)
    assert float(base["accuracy"]) == 60 and float(base["over_random"]) == 0
    assert float(gained["over_random"]) == pytest.approx(np.mean([2, 2, 5]))
    assert float(gained["over_random_interval"]) == pytest.approx(4.30, abs=0.006)
