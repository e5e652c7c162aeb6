"""Drift from a log: by hand, by invariance, and against what was measured without the log."""

from __future__ import annotations

import pytest

from entangle.doctor import Drift, drift_of, read_log
from tests.doctor.made import changed, log_of, pairs
from tests.doctor.test_rules import LOGS, RUNS, truth_of


def test_by_hand():
    """Noise-free lines from 0: the changes' ratio is that of the slopes, (c + r) / (2 (c - r))."""
    for chosen, rejected in ((0.4, -1.1), (-2.0, -3.0), (3.0, 2.5)):
        found = drift_of(log_of(pairs(chosen=chosen, rejected=rejected, noise=0.0)))
        assert found.value == pytest.approx((chosen + rejected) / (2 * (chosen - rejected)))


def test_beta_cancels():
    rows = pairs(chosen=-2.0, rejected=-3.0)
    scaled = changed(
        rows,
        lambda row, place: {
            key: 7 * row[key] for key in row if key.startswith("rewards/") and "acc" not in key
        },
    )
    one, other = drift_of(log_of(rows)), drift_of(log_of(scaled))
    assert one.value == pytest.approx(other.value) and one.error == pytest.approx(other.error)


def test_rows_of_one_side_each_still_have_an_error():
    """KTO logs only the sides that a batch has."""
    rows = pairs(rows=60)
    sides = ("rewards/chosen", "rewards/rejected")
    one_sided = [
        {key: value for key, value in row.items() if key not in (sides[place % 2], "rewards/margins")}
        for place, row in enumerate(rows)
    ]
    whole, found = drift_of(log_of(rows)), drift_of(log_of(one_sided))
    assert abs(found.value - whole.value) < 4 * found.error and 0 < found.error < 0.1


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [
        (-2.0, -3.0, "both fall"),
        (3.0, 2.0, "both rise"),
        (1.0, -1.1, "the chosen rises and the rejected falls"),
        (0.0, -1.0, "can't be told"),
    ],
)
def test_meaning(chosen, rejected, words):
    assert words in drift_of(log_of(pairs(chosen=chosen, rejected=rejected))).meaning


@pytest.mark.parametrize(("chosen", "rejected"), [(-1.0, -1.0), (-2.0, -1.0), (0.0, -0.02)])
def test_without_a_margin_that_grew_it_can_t_be_told(chosen, rejected):
    found = drift_of(log_of(pairs(chosen=chosen, rejected=rejected, noise=0.1)))
    assert isinstance(found, str) and "margin hasn't grown clearly above its noise" in found


@pytest.mark.parametrize("run", [run for run in RUNS if "change_chosen" in truth_of(run)])
def test_agrees_with_the_measured_changes_of_the_training_pairs(run):
    """Within three standard errors, wherever it is told; held-out pairs drift otherwise than those trained on."""
    truth, found = truth_of(run), drift_of(read_log(LOGS / run))
    if isinstance(found, str) or found.source != "training rows":
        return
    chosen, rejected = truth["change_chosen"], truth["change_rejected"]
    assert found.value == pytest.approx((chosen + rejected) / (2 * (chosen - rejected)), abs=3 * found.error)
    assert isinstance(found, Drift) and found.error < 0.6
