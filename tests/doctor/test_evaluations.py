"""Several evaluation sets are judged apart; of few rows, what few rows can show."""

from __future__ import annotations

import pytest

from entangle.cli import main
from entangle.doctor import examine, names
from entangle.errors import DataError
from tests.doctor.made import changed, found_in, log_of, pairs, report_of, write_state


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("eval_rewards/chosen", ("rewards/chosen", "")),
        ("eval/rewards/chosen", ("rewards/chosen", "")),
        ("eval_helpful_rewards/chosen", ("rewards/chosen", "helpful")),
        ("eval/code_eval_loss", ("loss", "code_eval")),
        ("eval_two_words_logps/rejected", ("logps/rejected", "two_words")),
        ("eval_nll_loss", ("nll_loss", "")),
        ("eval_frac_reward_zero_std", ("frac_reward_zero_std", "")),
        ("eval_set-1_reward_std", ("reward_std", "set-1")),
        ("train/rewards/chosen", ("rewards/chosen", None)),
        ("rewards / chosen", ("rewards/chosen", None)),
        ("train/chosen_reward", ("rewards/chosen", None)),
        ("Training Loss", ("loss", None)),
        ("Validation Loss", ("loss", "")),
        ("eval_bleu", ("bleu", "")),
    ],
)
def test_names_say_their_set(key, expected):
    assert names.metric(key) == expected


def two_sets():
    """Evaluations on two sets: on one both fall, on the other they part as they should."""
    rows = pairs()
    for row in pairs(rows=8, every=26, chosen=-1.5, rejected=-3.0):
        rows.append(
            {f"eval_hard_{key}": value for key, value in row.items() if "/" in key} | {"step": row["step"]}
        )
    for row in pairs(rows=8, every=26, chosen=0.6, rejected=-1.0):
        rows.append(
            {f"eval_easy_{key}": value for key, value in row.items() if "/" in key} | {"step": row["step"]}
        )
    return rows


def test_sets_are_kept_apart(tmp_path, capsys):
    log = log_of(two_sets())
    assert set(log.evaluations) == {"easy", "hard"}
    assert log.on("hard").evaluation["rewards/chosen"].iloc[-1] == pytest.approx(-1.5, abs=0.1)
    (found,) = [finding for finding in examine(log).findings if finding.rule == "coupled_fall"]
    assert found.evaluation == "hard" and found.numbers["change_chosen"] == pytest.approx(-1.4, abs=0.2)
    assert main(["doctor", str(write_state(tmp_path, two_sets()))]) == 1
    shown = capsys.readouterr().out
    assert "coupled_fall (evaluation set hard)" in shown and "8 evaluations of each of easy, hard" in shown


def test_a_finding_of_training_rows_is_said_once():
    rows = changed(two_sets(), lambda row, place: {"grad_norm": 500.0} if place in (27, 28, 29) else {})
    found = [finding for finding in examine(log_of(rows)).findings if finding.rule == "gradient_explodes"]
    assert len(found) == 1 and found[0].evaluation == ""


def test_four_rows_and_all_over(tmp_path, capsys):
    over = [
        {
            "step": step,
            "loss": loss,
            "grad_norm": grad,
            "learning_rate": 1e-3,
            "rewards/chosen": 0.0,
            "rewards/rejected": -margin,
            "rewards/margins": margin,
            "logps/chosen": -30.0,
            "logps/rejected": logps,
        }
        for step, loss, grad, margin, logps in [
            (1, 0.6931, 800.0, 0.0, -200.0),
            (25, 0.0, 0.0, 61.0, -810.0),
            (50, 0.0, 0.0, 75.0, -950.0),
        ]
    ]
    assert main(["doctor", str(write_state(tmp_path, over))]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "the loss is 0.0000" in shown
        and "(lost 750 nats)" in shown
        and "learning rate is far too high (0.001)" in shown
    )


def test_few_training_rows_and_one_evaluation():
    """The evaluation against the reference says what changed on its pairs; the training rows are too few."""
    rows = pairs(rows=4)
    evaluation = {
        "step": 28,
        "eval_rewards/chosen": -0.9,
        "eval_rewards/rejected": -2.0,
        "eval_rewards/margins": 1.1,
    }
    report = report_of([*rows, evaluation])
    (found,) = report.findings
    assert found.rule == "coupled_fall" and found.level == "warning" and "last evaluation" in found.text
    assert report.drift.value == pytest.approx(-2.9 / 2.2)
    well = evaluation | {"eval_rewards/chosen": 0.4, "eval_rewards/margins": 2.4}
    assert report_of([*rows, well]).is_healthy
    with pytest.raises(DataError, match="at least 5 logged rows"):
        report_of(rows)


def test_the_last_of_two_evaluations_counts():
    rows = [
        *pairs(rows=4),
        {"step": 14, "eval_rewards/chosen": -0.9, "eval_rewards/rejected": -2.0},
        {"step": 28, "eval_rewards/chosen": 0.9, "eval_rewards/rejected": -2.0},
    ]
    assert "coupled_fall" not in found_in(rows)
