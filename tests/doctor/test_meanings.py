"""What names mean depends on the trainer and its version: known from the card, from old names, or from the rows."""

from __future__ import annotations

import math

import pytest

from entangle.doctor import Origin, read_log
from entangle.doctor.preference import loss_of, summed_over
from tests.doctor.made import changed, found_in, groups, log_of, pairs, report_of, write_state


def meaning(rows, word, **given):
    """The one sentence that begins with a metric's name."""
    (sentence,) = [text for text in report_of(rows, **given).meanings if text.startswith(word)]
    return sentence


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ((0, 26), "within groups here"),
        ((0, 27), "whole batch, not within prompts"),
        ((1, 16), "whole batch, not within prompts"),
        (None, "before TRL 0.27, and the std over the whole batch since"),
    ],
)
def test_reward_std_by_version(version, words):
    assert words in meaning(groups(), "reward_std", origin=Origin(trl=version))


def test_reward_std_by_what_the_rows_show():
    """0 beside a function's std that isn't: per group. Above 0 beside groups that are all dead: of the batch."""
    per_group = changed(groups(), lambda row, place: {"reward_std": 0.0, "rewards/correct/std": 3.3})
    assert "of up to 3.3, which is of the batch, shows it" in meaning(per_group, "reward_std")
    of_batch = changed(groups(), lambda row, place: {"frac_reward_zero_std": 1.0} if place == 9 else {})
    assert "whole batch, not within" in meaning(of_batch, "reward_std")
    old = changed(groups(), lambda row, place: {"completion_length": 99.0})
    assert "within groups here" in meaning(old, "reward_std")


def test_the_card_beside_the_log_says_the_version(tmp_path):
    write_state(tmp_path / "checkpoint-9", groups())
    (tmp_path / "README.md").write_text(
        "---\ntags:\n- grpo\n---\n# Mine\n\n### Framework versions\n\n- TRL: 0.19.1\n- Transformers: 4.53\n"
    )
    log = read_log(tmp_path)
    assert log.origin.trl == (0, 19) and log.trainer == "grpo"


def test_small_std_says_of_the_batch_only_where_that_is_known():
    def shrinks(row, place):
        return {"reward_std": 0.4 * 0.9**place}

    assert "whole batch" not in found_in(changed(groups(), shrinks))["small_std"].text
    known = found_in(changed(groups(), shrinks), origin=Origin(trl=(1, 2)))
    assert "whole batch" in known["small_std"].text


def test_a_grpo_loss_near_0_says_nothing():
    report = report_of(changed(groups(), lambda row, place: {"loss": 0.0}))
    assert report.exit_status == 0 and any("loss near 0 is normal" in text for text in report.meanings)


@pytest.mark.parametrize("times", [2, 8, 16])
def test_a_loss_that_is_summed_over_accumulation(times):
    rows = pairs(chosen=2.0, rejected=-3.0)
    summed = log_of(changed(rows, lambda row, place: {"loss": times * row["loss"]}))
    assert summed_over(summed) == times
    assert loss_of(summed).tolist() == pytest.approx(loss_of(log_of(rows)).tolist())
    assert any(
        f"{times} times ln 2" in text
        for text in report_of(rows=changed(rows, lambda row, place: {"loss": times * row["loss"]})).meanings
    )
    assert summed_over(log_of(rows)) == 1


@pytest.mark.parametrize("beta", [0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_another_loss_isn_t_taken_for_a_sum(beta):
    """IPO starts at 1/(4 beta^2)."""
    ipo = changed(pairs(), lambda row, place: {"loss": (row["rewards/margins"] / beta - 1 / (2 * beta)) ** 2})
    assert summed_over(log_of(ipo)) == 1


def test_saturation_is_read_off_a_summed_loss_too():
    hot = pairs(rows=60, chosen=6.0, rejected=-9.0)
    plain, summed = found_in(hot), found_in(changed(hot, lambda row, place: {"loss": 4 * row["loss"]}))
    assert plain["saturation"].numbers == pytest.approx(summed["saturation"].numbers)


def test_rows_of_the_first_epoch_are_of_pairs_not_trained_on_yet():
    assert any("All training rows are of the first epoch" in text for text in report_of(pairs()).meanings)
    three = changed(pairs(), lambda row, place: {"epoch": 3 * (place + 1) / 30})
    (text,) = [text for text in report_of(three).meanings if "first epoch" in text]
    assert "up to step 70" in text and "seen before" in text


def test_orpo_of_other_trainers_is_per_token_and_without_reference():
    def orpo(row, place):
        chosen = -0.9 * math.exp(-place / 6) - 0.03
        rejected = chosen - 0.02 - 0.001 * place
        return {
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "rewards/chosen": 0.1 * chosen,
            "rewards/rejected": 0.1 * rejected,
            "rewards/margins": 0.1 * (chosen - rejected),
            "sft_loss": -chosen,
            "odds_ratio_loss": 0.68 - 0.002 * place,
            "loss": -chosen + 0.07,
        }

    report = report_of(changed(pairs(), orpo))
    found = {finding.rule: finding for finding in report.findings}
    assert (
        "next to nothing beside the SFT term" in found["coupled_rise"].text
        and found["coupled_rise"].level == "note"
    )
    said = " ".join(report.meanings)
    assert "a run without reference" in said and "means over a response's tokens" in said
    assert report.drift.value > 5
