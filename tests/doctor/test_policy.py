"""GRPO's own illnesses, each alone in a run that is healthy otherwise."""

from __future__ import annotations

import math

import pytest

from tests.doctor.made import changed, found_in, groups, report_of

START = 30
"""The place of the row from which the runs below go wrong; its step is one more."""


def late(**values):
    """A change of the rows from START on."""
    return lambda row, place: values if place >= START else {}


def test_kl_that_explodes_is_found_from_where_it_left_its_usual_size():
    def explode(row, place):
        return {"kl": row["kl"] * 4.0 ** (place - START + 1)} if place >= START else {}

    found = found_in(changed(groups(), explode))["kl_explodes"]
    assert found.level == "warning" and abs(found.step - (START + 1)) <= 1
    assert f"before step {found.step}" in found.text


def test_a_spike_of_kl_is_a_note():
    spike = changed(groups(), lambda row, place: {"kl": 300.0} if place == START else {})
    found = found_in(spike)
    assert found["kl_explodes"].level == "note" and found["kl_explodes"].step == START + 1


def test_a_reward_that_falls():
    def fall(row, place):
        return {"reward": row["reward"] - 0.05 * (place - START)} if place >= START else {}

    found = found_in(changed(groups(), fall))
    assert (
        "all that was gained and more" in found["reward_falls"].text
        and abs(found["reward_falls"].step - START) < 4
    )
    assert "no_gain" not in found  # said once
    sinking = changed(groups(), lambda row, place: {"reward": 0.8 - 0.2 * place / 50 + 0.01 * (-1) ** place})
    assert found_in(sinking)["reward_falls"].level == "warning"


def test_a_reward_that_stands_still_is_a_note():
    still = changed(groups(), lambda row, place: {"reward": 0.3 + 0.03 * math.sin(place * place)})
    assert found_in(still)["no_gain"].level == "note"


@pytest.mark.parametrize(
    ("end", "level", "words"),
    [
        (0.03, "warning", "collapsed"),
        (6.0, "warning", "come apart"),
        (0.5, None, ""),
    ],
)
def test_entropy(end, level, words):
    found = found_in(changed(groups(), late(entropy=end))).get("entropy_drift")
    assert (found.level if found else None) == level and words in (found.text if found else "")


def test_an_entropy_that_grows_from_little_is_a_note():
    small = changed(groups(), lambda row, place: {"entropy": 0.05 if place < START else 0.4})
    assert found_in(small)["entropy_drift"].level == "note"


def test_gradients_that_explode_and_gradients_that_spike():
    found = found_in(changed(groups(), late(grad_norm=90.0)))["gradient_explodes"]
    assert found.level == "warning" and found.step in (START, START + 1)
    spike = changed(groups(), lambda row, place: {"grad_norm": 90.0} if place == START else {})
    found = found_in(spike)["gradient_explodes"]
    assert found.level == "note" and found.step == START + 1
    fading = changed(groups(), lambda row, place: {"grad_norm": 0.3 * 0.7**place})
    assert "gradient_explodes" not in found_in(fading)


@pytest.mark.parametrize("name", ["clip_ratio/region_mean", "clip_ratio"])
def test_clipped_ratios(name):
    rows = [{key: value for key, value in row.items() if key != "clip_ratio/region_mean"} for row in groups()]
    found = found_in(
        changed(rows, late(**{name: 0.45}))
        if name == "clip_ratio"
        else changed(groups(), late(**{name: 0.45}))
    )
    assert "45 % of the tokens are clipped" in found["clipped_ratios"].text


def test_tools_and_sampler():
    found = found_in(
        changed(
            groups(),
            lambda row, place: {
                "tools/failure_frequency": 0.2 + 0.015 * place,
                "sampling/sampling_logp_difference/mean": 0.02 + 0.01 * place,
                "sampling/importance_sampling_ratio/mean": 0.7,
            },
        )
    )
    assert "tool calls fail" in found["tool_failures"].text
    assert (
        "differ from the trainer's" in found["sampler_mismatch"].text
        and "0.7" in found["sampler_mismatch"].text
    )
    by_ratio = changed(groups(), lambda row, place: {"sampling/importance_sampling_ratio/mean": 0.4})
    assert "importance ratio" in found_in(by_ratio)["sampler_mismatch"].text
    well = {"tools/failure_frequency": 0.05, "sampling/sampling_logp_difference/mean": 0.02}
    assert not found_in(changed(groups(), lambda row, place: well))


@pytest.mark.parametrize("name", ["completion_length", "completions/mean_length", "mean_completion_length"])
@pytest.mark.parametrize(("factor", "level"), [(0.75, "note"), (2.5, "warning"), (1.05, None)])
def test_lengths_under_old_and_new_names(name, factor, level):
    rows = [
        {key: value for key, value in row.items() if key != "completions/mean_length"} for row in groups()
    ]
    lengths = changed(
        rows, lambda row, place: {name: (400 * factor if place >= START else 400) + (-1) ** place}
    )
    found = found_in(lengths).get("length_drift")
    assert (found.level if found else None) == level


OLD = (
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "clip_ratio/region_mean",
    "rewards/correct/mean",
    "rewards/correct/std",
)


def old_rows():
    """The same run as TRL of early 2025 writes it."""
    kept = [{key: value for key, value in row.items() if key not in OLD} for row in groups()]
    return changed(kept, lambda row, place: {"completion_length": 210.0, "rewards/correct": row["reward"]})


def test_rows_of_reward_std_0_are_dead_groups_where_their_share_wasn_t_logged():
    from_then = found_in(changed(old_rows(), late(reward_std=0.0, reward=0.0, grad_norm=0.0)))["dead_groups"]
    assert from_then.step == START + 1 and "out of reach" in from_then.text
    often = changed(old_rows(), lambda row, place: {"reward_std": 0.0} if place % 3 else {})
    assert "In 66 % of the rows" in found_in(often)["dead_groups"].text
    seldom = changed(old_rows(), lambda row, place: {"reward_std": 0.0} if place % 3 == 0 else {})
    assert "dead_groups" not in found_in(seldom)


def test_the_spread_of_one_value_is_no_spread_that_shrank():
    report = report_of(changed(groups(), lambda row, place: {"reward_std": 0.0, "frac_reward_zero_std": 1.0}))
    assert {finding.rule for finding in report.findings} == {"dead_groups"}
