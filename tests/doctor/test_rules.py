"""Rules on the logs of real runs, judged by what was measured without the log; and each rule's edges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from entangle.cli import main
from entangle.doctor import RULES, Finding, TrainingLog, examine, read_log
from entangle.doctor.rewards import has_reference
from entangle.doctor.trends import onset, trend
from entangle.errors import ConfigError

LOGS = Path(__file__).parent / "logs"
RUNS = sorted(folder.name for folder in LOGS.iterdir() if folder.is_dir())


def truth_of(run: str) -> dict[str, Any]:
    return json.loads((LOGS / run / "truth.json").read_text())


def found_in(run: str) -> dict[str, Finding]:
    return {finding.rule: finding for finding in examine(read_log(LOGS / run)).findings}


def dead_share(groups: list[list[float]]) -> float:
    last = groups[-(len(groups) // 5) :]
    return sum(max(group) == min(group) for group in last) / len(last)


@pytest.mark.parametrize("run", [run for run in RUNS if "change_chosen" in truth_of(run)])
def test_preference_verdicts_agree_with_what_was_measured(run):
    """Measured: mean change of both log-probs of every training pair, from before to after the run."""
    truth, found = truth_of(run), found_in(run)
    chosen, rejected = truth["change_chosen"], truth["change_rejected"]
    fell = chosen < -1 and rejected < -1 and -chosen > 0.1 * (chosen - rejected)
    assert ("coupled_fall" in found) == fell
    if "coupled_rise" in found:
        assert chosen > 0 and rejected > 0
    elif truth["trainer"] == "preference":  # without a reference the log's noise hides it
        assert not (chosen > 1 and rejected > max(1, 0.1 * chosen))
    if "chosen_collapse" in found:
        assert chosen / truth["before_chosen"] > 0.25
    stood_still = "no_margin" in found and found["no_margin"].level == "warning"
    assert stood_still == (abs(chosen - rejected) < 0.1)


@pytest.mark.parametrize("run", [run for run in RUNS if "groups" in truth_of(run)])
def test_group_verdicts_agree_with_the_rewards_themselves(run):
    """Measured: the rewards of every group sampled, before any KL is mixed in."""
    truth, found = truth_of(run), found_in(run)
    dead = dead_share(truth["groups"])
    if truth["trainer"] == "grpo":
        assert ("dead_groups" in found) == (dead > 0.5)
    else:  # RLOO's own metric hides ties: the rule says so wherever there were some
        assert "dead_groups" not in found
        first = truth["groups"][:8]
        assert ("ties_broken" in found) == any(max(group) == min(group) for group in first)


def changed(run: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Finding]:
    """Findings of a run's log with every row changed."""
    history = json.loads((LOGS / run / "trainer_state.json").read_text())["log_history"]
    log = TrainingLog.of((change(dict(row)) for row in history), path="here", kind="trainer state")
    return {finding.rule: finding for finding in examine(log).findings}


def test_swapped_sides_are_a_margin_that_shrinks():
    swap = {"rewards/chosen": "rewards/rejected", "rewards/rejected": "rewards/chosen"}

    def change(row: dict[str, Any]) -> dict[str, Any]:
        row = {swap.get(key, key): value for key, value in row.items()}
        return row | {"rewards/margins": -row.get("rewards/margins", 0.0)}

    assert "against their labels" in changed("dpo-saturated-0", change)["no_margin"].text


def test_a_coupled_rise_is_a_note_with_its_share():
    def change(row: dict[str, Any]) -> dict[str, Any]:
        step, noise = row["step"], 0.01 * math.sin(7 * row["step"])
        return row | {"rewards/chosen": step / 10 + noise, "rewards/rejected": step / 20 + noise}

    found = changed("dpo-saturated-0", change)
    assert found["coupled_rise"].level == "note" and "gains 0.50 of" in found["coupled_rise"].text
    assert "coupled_fall" not in found

    def apart(row: dict[str, Any]) -> dict[str, Any]:
        return change(row) | {"rewards/rejected": row["step"] / 200 + 0.001 * math.sin(row["step"])}

    assert "coupled_rise" not in changed("dpo-saturated-0", apart)


def test_a_rise_that_is_lost_again_is_found_before_it_is_a_fall():
    def change(row: dict[str, Any]) -> dict[str, Any]:
        step = row["step"]
        noise = 0.01 * math.sin(7 * step)
        return row | {
            "rewards/chosen": 2 - abs(step - 16) / 10 + noise,
            "rewards/rejected": -step / 10 + noise,
        }

    found = changed("dpo-saturated-0", change)
    assert "coupled_fall" not in found and found["rise_then_fall"].step in (14, 16, 18)


def test_start_off_the_reference():
    def change(row: dict[str, Any]) -> dict[str, Any]:
        return row | {"step": row["step"] - 1, "rewards/chosen": row.get("rewards/chosen", 0.0) - 3}

    assert "start_off_reference" in changed("dpo-0", change)
    assert "start_off_reference" not in found_in("dpo-0")


def test_broken_numbers_are_named_with_their_step():
    found = changed("dpo-0", lambda row: row | ({"grad_norm": math.nan} if row["step"] >= 20 else {}))
    assert "grad_norm" in found["not_finite"].text and found["not_finite"].step == 20


def test_group_rules_on_a_changed_log():
    def shrinking(row: dict[str, Any]) -> dict[str, Any]:
        fade = math.exp(-row["step"] / 5)
        return row | {
            "reward_std": 0.4 * fade,
            "completions/mean_length": 20 / fade**0.2,
            "frac_reward_zero_std": float(row["step"] > 9),
        }

    found = changed("grpo-dead-0", shrinking)
    assert {"small_std", "length_drift", "batchwise_std", "dead_groups"} <= set(found)
    assert found["batchwise_std"].level == "note"


def test_rewards_without_reference_are_told_from_the_log():
    """Without a reference rewards are beta times the log-prob, in every row."""
    for run in RUNS:
        if "change_chosen" in truth_of(run):
            expected = truth_of(run)["trainer"] == "preference"
            assert has_reference(read_log(LOGS / run)) == expected, run


def test_trend_by_hand():
    """Rows 0..9: means of the first and last three; every difference is 1, so the noise is 0."""
    line = pd.Series(range(10), index=range(0, 20, 2), dtype=float)
    found = trend(line)
    assert found is not None and (found.start, found.end, found.error) == (1.0, 8.0, 0.0)
    assert trend(line, start=0.0).start == 0.0  # pyright: ignore[reportOptionalMemberAccess]
    assert trend(line[:4]) is None
    assert onset(-line, -3.5) == 8 and onset(line, -1.0) is None and onset(-line, 1.0) == 0


def test_evaluations_are_preferred_where_there_are_enough():
    run = next(run for run in RUNS if run.startswith("dpo-eval"))
    log = read_log(LOGS / run)
    assert len(log.evaluation) >= 5 and log.best("rewards/chosen")[0].equals(log.evaluation["rewards/chosen"])
    assert log.best("rewards/chosen", least=99)[0].equals(log.train["rewards/chosen"])
    # one source for all: a metric of the evaluation isn't set against one of training
    chosen, gradient = log.best("rewards/chosen", "grad_norm")
    assert chosen.equals(log.train["rewards/chosen"]) and gradient.equals(log.train["grad_norm"])


def test_thresholds_can_be_named_and_wrong_names_are_refused(capsys):
    sick = str(LOGS / "dpo-similar-0")
    assert main(["doctor", sick, "--rules", "coupled_fall"]) == 1
    assert main(["doctor", sick, "--rules", "coupled_fall=10"]) == 0
    assert main(["doctor", sick, "--rules", "dead_groups"]) == 2
    message = capsys.readouterr().err
    assert "Unknown rule 'dead_groups' for this log. Known:" in message and "coupled_fall" in message
    with pytest.raises(ConfigError, match="name=number"):
        examine(read_log(sick), ["coupled_fall=much"])


def test_json_holds_everything(capsys):
    assert main(["doctor", str(LOGS / "dpo-similar-0"), "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert content["healthy"] is False and content["family"] == "preference" and content["last_step"] == 40
    finding = content["findings"][0]
    assert (
        finding["rule"] == "coupled_fall"
        and finding["threshold"] == 0.1
        and "entangle probe" in finding["ask"]
    )
    assert content["meanings"] and content["unknowable"]
    assert main(["doctor", str(LOGS / "rpo-0"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["healthy"] is True


def test_every_rule_is_listed_with_its_reason(capsys):
    assert main(["doctor", "--list_rules"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RULES)
    assert all(rule.reason and rule.meaning and rule.ask for rule in RULES.values())
