"""What isn't finite: which quantity, when, whether it recovered, and whether that ends learning."""

from __future__ import annotations

import json
import math

import pytest

from entangle.cli import main
from entangle.doctor import read_log
from tests.doctor.made import changed, found_in, groups, log_of, pairs, report_of, write_state

NAN, INF = math.nan, math.inf
SIDES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "grad_norm",
)


@pytest.mark.parametrize("at", [1, 12])
def test_a_dead_run_in_float16(at, tmp_path, capsys):
    dead = changed(
        pairs(), lambda row, place: dict.fromkeys(SIDES, NAN) | {"loss": 0.0} if place >= at else {}
    )
    state = write_state(tmp_path, dead)
    assert main(["doctor", str(state)]) == 1
    shown = capsys.readouterr().out
    assert (
        f"From step {7 * (at + 1)} on nothing is learned" in shown
        and "bf16" in shown
        and "isn't success" in shown
    )
    assert "saturation" not in {finding.rule for finding in report_of(dead).findings}


def test_a_loss_scaler_that_settles_is_a_note():
    found = found_in(changed(pairs(), lambda row, place: {"grad_norm": INF if place < 3 else 2.0}))
    assert found["not_finite"].level == "note" and "loss scaler" in found["not_finite"].text
    assert "steps 7 to 21" in found["not_finite"].text and set(found) == {"not_finite"}


def test_logits_alone_are_a_note():
    report = report_of(changed(pairs(), lambda row, place: {"logits/chosen": NAN, "logits/rejected": NAN}))
    assert report.exit_status == 0 and "in all 30 rows" in report.findings[0].text


def test_one_evaluation_is_a_note_and_has_its_name():
    rows = pairs() + [
        {
            "step": step,
            "eval_rewards/chosen": NAN if step == 70 else 0.1,
            "eval_rewards/rejected": -step / 200,
        }
        for step in range(35, 211, 35)
    ]
    report = report_of(rows)
    assert report.exit_status == 0
    text = next(finding.text for finding in report.findings if finding.rule == "not_finite")
    assert "rewards/chosen of the evaluation at step 70, finite after" in text
    last = [row if row["step"] != 210 else row | {"eval_rewards/chosen": NAN} for row in rows]
    assert report_of(last).exit_status == 0  # training goes on well


def test_batches_of_one_kind_are_no_failure():
    """KTO's means of a side that a batch hasn't got are NaN."""

    def one_sided(row, place):
        side = ("chosen", "rejected")[place % 2]
        return {f"rewards/{side}": NAN, f"logps/{side}": NAN, "rewards/margins": NAN} if place % 4 < 2 else {}

    report = report_of(changed(pairs(), one_sided))
    assert report.exit_status == 0
    assert "a batch without such answers" in report.findings[0].text


def test_infinite_rewards_aren_t_missing_answers():
    """Only a NaN is the mean of nothing."""
    far = changed(
        pairs(), lambda row, place: {"rewards/rejected": -INF, "rewards/margins": INF} if place > 24 else {}
    )
    found = found_in(far)["not_finite"]
    assert found.level == "warning" and found.step == 182


def test_a_gap_in_the_middle_is_a_note_and_many_are_not():
    gap = changed(pairs(), lambda row, place: {"loss": NAN, "grad_norm": NAN} if place == 15 else {})
    found = found_in(gap)["not_finite"]
    assert found.level == "note" and found.step == 112 and "finite after" in found.text
    many = changed(pairs(), lambda row, place: {"grad_norm": NAN} if place % 3 == 0 else {})
    assert found_in(many)["not_finite"].level == "warning"


@pytest.mark.parametrize("name", ["grad_norm", "reward", "kl"])
def test_groups_that_end_in_nan(name):
    found = found_in(changed(groups(), lambda row, place: {name: NAN} if place >= 20 else {}))["not_finite"]
    assert found.level == "warning" and found.step == 21 and name in found.text
    assert ("what the reward returns" in found.text) == (name == "reward")
    assert ("float16" in found.text) == (name != "reward")


def test_one_reward_function_without_a_value_is_a_note():
    found = found_in(changed(groups(), lambda row, place: {"rewards/correct/mean": NAN} if place % 2 else {}))
    assert found["not_finite"].level == "note"


def test_nan_in_every_way_that_files_write_it(tmp_path):
    """JSON's NaN, text, and a table's NaN for what a row hasn't got."""
    rows = changed(pairs(), lambda row, place: {"grad_norm": NAN if place == 4 else 2.0})
    as_text = [{key: str(value) for key, value in row.items()} for row in rows]
    assert log_of(rows).not_finite == log_of(as_text).not_finite != ()
    assert json.loads(write_state(tmp_path, rows).read_text())
    evaluations = [{"step": row["step"], "eval_rewards/chosen": 0.1, "eval_loss": 0.6} for row in rows[::5]]
    names = list(dict.fromkeys(key for row in rows + evaluations for key in row))
    for blank in ("NaN", ""):
        lines = [",".join(names)]
        for row in pairs() + evaluations:
            lines.append(",".join(str(row.get(name, blank)) for name in names))
        (tmp_path / "table.csv").write_text("\n".join(lines))
        assert read_log(tmp_path / "table.csv").not_finite == ()


def test_a_dead_run_in_a_table_without_blanks_is_still_dead(tmp_path):
    dead = changed(
        pairs(), lambda row, place: dict.fromkeys(SIDES, NAN) | {"loss": 0.0} if place >= 9 else {}
    )
    lines = [",".join(dead[0]), *(",".join(map(str, row.values())) for row in dead)]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    assert main(["doctor", str(tmp_path / "table.csv")]) == 1
    assert read_log(tmp_path / "table.csv").bad_steps("rewards/chosen") == set(range(70, 211, 7))
