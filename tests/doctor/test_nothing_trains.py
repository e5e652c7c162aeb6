"""Runs in which nothing trains are never healthy, whatever their other numbers look like."""

from __future__ import annotations

import pytest

from entangle.doctor import examine
from entangle.doctor.rewards import has_reference
from entangle.doctor.still import moves
from tests.doctor.made import changed, found_in, groups, log_of, pairs, report_of

ZERO = {"rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0, "loss": 0.6931}


def test_made_runs_are_healthy():
    assert not found_in(pairs()) and not found_in(groups())


@pytest.mark.parametrize("rows", [3, 30])
def test_rewards_of_0_are_a_run_that_trains_nothing_and_has_a_reference(rows):
    made = changed(pairs(rows), lambda row, place: ZERO | {"grad_norm": 0.0})
    found = found_in(made)["nothing_trains"]
    assert found.level == "warning" and "exactly 0" in found.text and "one model" in found.text
    assert has_reference(log_of(made))
    assert "without reference" not in " ".join(report_of(made).meanings)


def test_no_scored_token_is_told_from_log_probs_of_0():
    made = changed(pairs(), lambda row, place: ZERO | {"logps/chosen": 0.0, "logps/rejected": 0.0})
    assert "no token of the answers is scored" in found_in(made)["nothing_trains"].text


def test_rounding_is_no_movement():
    def rounding(row, place):
        return {
            "rewards/chosen": 2e-4 * (-1) ** place,
            "rewards/rejected": 1e-4,
            "rewards/margins": 1e-4,
            "loss": 0.6931,
        }

    found = found_in(changed(pairs(), rounding))["nothing_trains"]
    assert "within rounding of 0" in found.text and "there are gradients" in found.text
    no_gradient = changed(pairs(), lambda row, place: rounding(row, place) | {"grad_norm": 4e-8})
    assert "nothing is trainable" in found_in(no_gradient)["nothing_trains"].text
    no_rate = changed(pairs(), lambda row, place: rounding(row, place) | {"learning_rate": 0.0})
    assert "learning rate is 0" in found_in(no_rate)["nothing_trains"].text


def test_a_frozen_adapter_on_another_reference_looks_fine_and_is_not():
    """Rewards of an adapter that doesn't move against its bare base: an offset that the batches repeat."""
    still = pairs(chosen=0.0, rejected=0.0, noise=0.03)
    offset = changed(
        still,
        lambda row, place: {
            "grad_norm": 0.0,
            "rewards/chosen": row["rewards/chosen"] + 0.6,
            "rewards/rejected": row["rewards/rejected"] + 0.2,
            "rewards/margins": row["rewards/margins"] + 0.4,
            "rewards/accuracies": 1.0,
        },
    )
    report = report_of(offset)
    assert [finding.rule for finding in report.findings] == ["nothing_trains"] and report.exit_status == 1
    assert "there from the first row" in report.findings[0].text and report.drift is None
    assert not any("isn't computed" in sentence for sentence in report.meanings)
    # also where other rules are asked alone
    assert not examine(log_of(offset), ["coupled_rise", "coupled_fall"]).findings


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_an_offset_that_is_there_from_the_first_row_was_not_learned(noise):
    """A table without grad_norm: rewards of an adapter that doesn't move, against its bare base."""
    still = [
        {key: value for key, value in row.items() if key != "grad_norm"}
        | {"rewards/chosen": row["rewards/chosen"] + 0.6, "rewards/margins": row["rewards/margins"] + 0.6}
        for row in pairs(chosen=0.0, rejected=0.0, noise=noise)
    ]
    report = report_of(still)
    assert [finding.rule for finding in report.findings] == ["nothing_trains"] and report.exit_status == 1
    assert "nothing changed between the first rows and the last" in report.findings[0].text
    assert report.drift is None


def test_a_margin_that_was_learned_at_once_and_stays_is_no_offset():
    """It began at 0 all the same, though its first fifth is where its last is, within noise."""

    def early(row, place):
        chosen = row["rewards/chosen"] + min(place, 1)
        return {"rewards/chosen": chosen, "rewards/margins": chosen - row["rewards/rejected"]}

    rows = changed(pairs(rows=60, chosen=0.0, rejected=0.0, noise=0.15, seed=4), early)
    assert not moves(log_of(rows)) and "nothing_trains" not in found_in(rows)


def test_a_gradient_that_isn_t_logged_is_not_one_of_0():
    """DeepSpeed can log 0 while all goes well: the rewards move."""
    report = report_of(changed(pairs(), lambda row, place: {"grad_norm": 0.0}))
    assert report.is_healthy and any("isn't computed here" in sentence for sentence in report.meanings)


def test_groups_with_spread_and_no_gradient():
    found = found_in(changed(groups(), lambda row, place: {"grad_norm": 0, "kl": 0.0}))
    assert (
        "grad_norm and kl are exactly 0 in all 50 rows although groups have spread"
        in found["nothing_trains"].text
    )
    assert "reward_falls" not in found
    without = [
        {key: value for key, value in row.items() if key != "grad_norm"} | {"kl": 0.0} for row in groups()
    ]
    assert "nothing_trains" in found_in(without)
    without_kl = [
        {key: value for key, value in row.items() if key != "kl"} | {"grad_norm": 0.0} for row in groups()
    ]
    assert "nothing_trains" in found_in(without_kl)


def test_groups_without_spread_are_dead_rather_than_frozen():
    dead = {"grad_norm": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0}
    found = found_in(changed(groups(), lambda row, place: dead))
    assert "nothing_trains" not in found and "nothing is learned" in found["dead_groups"].text
