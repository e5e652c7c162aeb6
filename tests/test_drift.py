"""The measured drift: mean changes per nat of margin with their interval, and what is said beside a prediction."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from entangle.analysis.curves import curve, with_changes
from entangle.analysis.drift import (
    agreement_sentence,
    beside_predicted,
    mean_drift,
    measured_drifts,
    of_runs,
    runs_sentence,
)


def changes(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Changes of both sides: means -1 and -2, a common part of size 0.5 and an own part of 0.3."""
    draw = np.random.default_rng(seed)
    common = 0.5 * draw.standard_normal(count)
    chosen, rejected = (mean + common + 0.3 * draw.standard_normal(count) for mean in (-1.0, -2.0))
    return chosen, rejected


def looks(*moves: tuple[float, float], pairs: int = 40, predicted: tuple[float, float] | None = None):
    """Rows of steps: between two looks every pair moves by (chosen, rejected) and a little noise."""
    draw, at = np.random.default_rng(0), {"chosen": np.zeros(pairs), "rejected": np.zeros(pairs)}
    tables = []
    for step in range(len(moves) + 1):
        rows = {"step": 10 * step, "index": range(pairs)} | {f"logps_{side}": at[side] for side in at}
        if predicted:
            noise = 0.01 * draw.standard_normal((2, pairs))
            rows |= {
                f"change_{side}": mean + own for side, mean, own in zip(at, predicted, noise, strict=True)
            }
        tables.append(pd.DataFrame(rows))
        if step < len(moves):
            at = {
                side: at[side] + by + 0.1 * draw.standard_normal(pairs)
                for side, by in zip(at, moves[step], strict=True)
            }
    return pd.concat(tables, ignore_index=True)


def test_interval_covers_the_drift_that_there_is():
    """Of 300 samples of 48 pairs about 95 % of the intervals hold the true -1.5."""
    found = [mean_drift(*changes(48, seed)) for seed in range(300)]
    covered = np.mean([estimate.low <= -1.5 <= estimate.high for estimate in found])
    assert 0.9 <= covered <= 0.99


def test_without_a_gain_of_margin_there_is_no_drift():
    chosen, rejected = changes(48)
    found = mean_drift(rejected, chosen)
    assert np.isnan(found.value) and not found.has_meaning and not np.isfinite(found.low)
    assert np.isnan(mean_drift(np.array([]), np.array([])).value)


def test_every_look_is_compared_with_the_next_one():
    table = measured_drifts(looks((-1.0, -2.0), (1.0, -1.0), predicted=(1.0, -1.0)))
    assert table[["step", "until"]].to_numpy().tolist() == [[0, 10], [10, 20]]
    assert table["measured"].tolist() == pytest.approx([-1.5, 0.0], abs=0.15)
    assert table["alone"].tolist() == pytest.approx([0.0, 0.0], abs=0.01)
    assert table["measured_margin"].tolist() == pytest.approx([1.0, 2.0], abs=0.1)


def test_disagreement_is_said_in_words():
    rows = looks((-1.0, -2.0), (1.0, -1.0), predicted=(1.0, -1.0))
    table = beside_predicted(measured_drifts(rows), None)
    said = agreement_sentence(table)
    assert table["agrees"].tolist() == [False, True]
    assert "from each pair alone agrees with the measured one in 1 of 2 comparable intervals" in said
    assert (
        "from step 0 to 10" in said
        and "a parting of the two was predicted, a fall of both was measured" in said
    )


def test_the_set_s_prediction_is_taken_where_it_was_measured():
    """Known at one look with both ends, at the other without: that one isn't compared."""
    points = pd.DataFrame(
        {"step": [0, 10, 20], "set_drift": [-1.5, 0.2, 0.1]}
        | {f"set_drift_{end}": [-1.5 + by, by * np.inf, by] for end, by in (("low", -0.4), ("high", 0.4))}
    )
    table = beside_predicted(measured_drifts(looks((-1.0, -2.0), (1.0, -1.0), predicted=(1.0, -1.0))), points)
    assert table["of"].unique().tolist() == ["the set in SGD's metric"]
    assert table["agrees"].tolist() == [True, pd.NA]
    assert "in 1 of 1 comparable intervals (their 95 % intervals meet)" in agreement_sentence(table)


def test_a_margin_that_shrinks_is_named():
    table = beside_predicted(measured_drifts(looks((-2.0, -1.0), predicted=(1.0, -1.0))), None)
    said = agreement_sentence(table)
    assert "In 1 of 1 intervals the margin shrank (in 1 of them both log-probs fell)" in said
    assert "where each pair alone predicts a gain in 1" in said


def test_runs_without_predictions_have_no_figure():
    assert beside_predicted(measured_drifts(looks((-1.0, -2.0))), None).empty


def test_drift_of_a_whole_run_from_its_curve():
    """The interval from means and their errors is that of the pairs themselves."""
    rows = looks((-0.5, -1.0), (-0.5, -1.0), predicted=(1.0, -1.0)).assign(regime="ideal")
    points = curve(with_changes(rows, rows[rows["step"] == 0])).assign(variant="dpo", seed=0)
    (row,) = of_runs(points).to_dict("records")
    last = rows[rows["step"] == 20].set_index("index")
    exact = mean_drift(last["logps_chosen"].to_numpy(), last["logps_rejected"].to_numpy())
    assert row["predicted"] == pytest.approx(0.0, abs=0.01) and row["measured"] == pytest.approx(exact.value)
    assert (row["measured_low"], row["measured_high"]) == pytest.approx((exact.low, exact.high), rel=0.1)
    said = runs_sentence(of_runs(points))
    assert "Of 1 runs with a known drift 0 went the way" in said and "a fall of both was measured" in said
    shrunk = points.assign(moved_margin=-1.0)
    assert "No margin was gained in runs of dpo." in runs_sentence(of_runs(shrunk))
