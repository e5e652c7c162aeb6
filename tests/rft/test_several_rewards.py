"""Several reward functions on the same answers, group sizes, and where prompts go between two runs."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from entangle.commands.rft import run_change, run_rft
from entangle.config import RftConfig
from entangle.rewards.functions import FromFile, Function, Length, reward_label
from entangle.rewards.gradients import grpo_weights
from entangle.rewards.group_size import group_sizes
from entangle.rewards.history import prompt_state, transitions
from entangle.rewards.several import compare_rewards, pair_accuracy, within_correlation
from entangle.runs.folder import as_json
from entangle.tables.rft import size_table
from tests.tiny import save_adapter, save_policy

DRAW = np.random.default_rng(1)


def test_shares_of_the_parts_of_a_sum_add_up():
    parts = {name: [DRAW.normal(size=6) * scale for _ in range(5)] for name, scale in (("a", 1), ("b", 3))}
    whole = [a + b for a, b in zip(parts["a"], parts["b"], strict=True)]
    found = compare_rewards({"a+b": whole} | parts, "a+b")["functions"]
    assert found["a"]["share"] + found["b"]["share"] == pytest.approx(1)
    assert found["b"]["variance"] == pytest.approx(np.mean([b.var(ddof=1) for b in parts["b"]]))
    assert found["a+b"]["accuracy"]["value"] == 1 and found["a+b"]["share"] == pytest.approx(1)
    assert found["b"]["teacher"] == pytest.approx(found["b"]["variance"] * found["b"]["accuracy"]["value"])


def test_correlation_is_within_prompts():
    """Means of prompts that go together don't count; an answer without one of the rewards doesn't either."""
    a = [np.array([0.0, 1, 2]), np.array([10.0, 11, 12])]
    b = [np.array([2.0, 1, 0]), np.array([12.0, 11, 10])]
    assert within_correlation(a, b)["rho"] == pytest.approx(-1)
    holed = [np.array([0.0, 1, np.nan]), np.array([np.nan] * 3)]
    assert within_correlation(a, holed)["rho"] == pytest.approx(1)
    many = [DRAW.normal(size=8) for _ in range(30)]
    noisy = [own + DRAW.normal(size=8) for own in many]
    found = within_correlation(many, noisy)
    assert found["low"] < found["rho"] < found["high"] and found["low"] > 0.5
    assert math.isnan(within_correlation([np.ones(3)], [np.ones(3)])["rho"])


def test_accuracy_counts_pairs_that_differ_in_truth():
    truth = [np.array([1.0, 0, 0]), np.array([1.0, 1, 1])]
    rewards = [np.array([0.5, 0.7, 0.1]), np.array([1.0, 2, 3])]
    assert pair_accuracy(rewards, truth) == {
        "value": 0.5,
        "error": pytest.approx(math.nan, nan_ok=True),
        "prompts": 1,
    }


def test_live_groups_and_their_cost_by_enumeration():
    """Of all groups of 2 among 4 answers; the cost is 1 / live; the gradient that of independent groups."""
    rewards = [np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 0, 0]), np.zeros(4)]
    scores = [DRAW.normal(size=(4, 5)) for _ in rewards]
    rows = group_sizes([S @ S.T for S in scores], rewards)
    assert [row["size"] for row in rows] == [2, 4]
    live = [[own[i] != own[j] for i, j in itertools.combinations(range(4), 2)] for own in rewards]
    assert rows[0]["live"] == pytest.approx(np.mean(live))
    assert rows[0]["groups"] == pytest.approx(1 / np.mean(live))
    assert rows[0]["rollouts"] == pytest.approx(2 / np.mean(live))
    assert rows[0]["live_low"] <= rows[0]["live"] <= rows[0]["live_high"]
    assert rows[0]["rollouts_low"] <= rows[0]["rollouts"] <= rows[0]["rollouts_high"]
    assert rows[1]["live"] == pytest.approx(2 / 3) and math.isnan(rows[1]["grad_norm"])
    square = np.mean(
        [
            np.mean(
                [
                    grpo_weights(own[list(g)]) @ S[list(g)] @ S[list(rest)].T @ grpo_weights(own[list(rest)])
                    for g in itertools.combinations(range(4), 2)
                    for rest in [[i for i in range(4) if i not in g]]
                ]
            )
            for own, S in zip(rewards, scores, strict=True)
        ]
    )
    assert rows[0]["grad_norm"] == pytest.approx(math.sqrt(square) if square > 0 else math.nan, nan_ok=True)


def test_no_live_group_costs_infinitely_many():
    (row,) = group_sizes([np.eye(2)], [np.ones(2)])
    assert row["live"] == 0 and row["rollouts"] == math.inf
    assert group_sizes([], []) == []


def test_a_single_prompt_has_a_share_without_an_interval():
    sizes = as_json(group_sizes([np.eye(4)], [np.array([0.0, 1.0, 0.0, 1.0])]))
    assert sizes[0]["live_low"] is None
    cells = list(size_table(sizes).columns[1].cells)
    assert cells[0] == f"{100 * sizes[0]['live']:.0f}"


def test_states_and_where_prompts_go():
    assert [prompt_state(m, s, 0.5) for m, s in ((0, 0), (1, 0), (0.5, 0.1))] == ["dead", "solved", "mixed"]
    found = transitions(["dead", "dead", "mixed", "solved"], ["dead", "mixed", "solved", "solved"])
    assert found["dead"]["mixed"]["count"] == 1 and found["dead"]["mixed"]["share"] == 0.5
    assert found["mixed"]["solved"]["share"] == 1 and found["solved"]["dead"]["count"] == 0


def test_labels_of_functions():
    assert reward_label(Length(most=20)) == "length:most=20" and reward_label(Length()) == "length"
    assert reward_label(FromFile("a+b")) == "a+b"
    assert reward_label(Function("my_rewards:right")) == "my_rewards:right"


# --- in a run -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("several")
    save_policy(path / "policy")
    save_adapter(path / "adapter", str(path / "policy"))
    (path / "my_rewards.py").write_text(
        "def right(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    for name, right in (("before", (1, 0, 0, 1)), ("after", (1, 1, 1, 1))):
        rows = [
            {"prompt": prompt, "completion": text, "right": r, "tone": 0.5 * (k % 2), "style": k / 4}
            for prompt in ("what is the sum?", "she said that")
            for k, (text, r) in enumerate(zip((" four", " the sum is", " cats", " two"), right, strict=True))
        ]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(folder, name, out, **changes) -> RftConfig:
    given = dict(
        model_name_or_path=str(folder / "policy"),
        adapter_name_or_path=str(folder / "adapter"),
        rollouts=str(folder / f"{name}.jsonl"),
        output_dir=str(out),
        plots=False,
    )
    return RftConfig(**(given | changes))


def test_a_run_compares_columns_and_functions(folder, tmp_path):
    config = options(
        folder,
        "before",
        tmp_path / "run",
        reward="file:column=right+tone",
        further_rewards=("file:column=style", "length:most=1"),
    )
    result = run_rft(config)
    found = result.summary["rewards"]
    assert list(found["functions"]) == ["right+tone", "right", "tone", "style", "length:most=1"]
    assert found["functions"]["right"]["variance"] == pytest.approx(1 / 3)
    assert found["functions"]["right"]["share"] + found["functions"]["tone"]["share"] == pytest.approx(1)
    rho = {(row["first"], row["second"]): row["rho"] for row in found["correlations"]}
    assert rho["right", "tone"] == pytest.approx(0) and rho["right+tone", "right"] > 0.8
    assert [row["size"] for row in result.summary["group_sizes"]] == [2, 4]
    words = " ".join(result.table(width=140).split())
    for part in ("length:most=1", "variance x accuracy", "answers per live group", "right and tone"):
        assert part in words, part


def test_two_runs_tell_where_prompts_went(folder, tmp_path):
    for name in ("before", "after"):
        run_rft(options(folder, name, tmp_path / name, reward="file:column=right", reward_range=(0.0, 1.0)))
    config = RftConfig(
        before=str(tmp_path / "before"),
        after=str(tmp_path / "after"),
        output_dir=str(tmp_path / "change"),
        plots=False,
    )
    change = run_change(config)
    assert change.summary["transitions"]["mixed"]["solved"]["count"] == 2
    assert "2: 100 [34-100]" in change.table()
