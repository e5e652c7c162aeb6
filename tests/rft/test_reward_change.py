"""Before and after a fine-tuning: the change of reward per prompt against its initial std."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from entangle import cli
from entangle.analysis.statistics import bootstrap_mean
from entangle.commands.rft import run_change
from entangle.commands.rft.change import reward_changes, summarise_changes
from entangle.config import RftConfig
from entangle.errors import ConfigError, RunError
from entangle.measure.prompts import FLAGS
from entangle.runs.folder import RunFolder


def prompts(means, stds, hashes=None) -> pd.DataFrame:
    """Measured rows with 16 answers each."""
    stds = np.asarray(stds, dtype=float)
    count = len(stds)
    return pd.DataFrame(
        {
            "index": range(count),
            "prompt_hash": hashes or [f"{i:04x}" for i in range(count)],
            "reward_mean": means,
            "reward_std": stds,
            "reward_variance": stds**2,
            "answers": 16,
            "grad_norm": stds,
        }
        | dict.fromkeys(FLAGS, False)
    )


def a_run(path, table, reward="rouge_l", **sampling):
    run = RunFolder(path)
    run.begin(RftConfig(reward=reward), {"model": str(path)})
    run.write_table("prompts.parquet", table)
    run.write_json(
        "provenance.json",
        {"reward": {"name": reward}, "sampling": {"temperature": 1.0, "seed": 0} | sampling},
    )
    run.write_json("summary.json", {"thresholds": {"std": 0.05, "mean": 0.5}})
    return str(path)


STDS = np.linspace(0, 0.4, 40)


def test_change_is_the_difference_of_means_by_prompt():
    """Prompts are matched by their hash, whatever their order; a flagged one is left out."""
    before = prompts([0.1, 0.2, 0.3], [0.4, 0.0, 0.2])
    after = prompts([0.6, 0.5, 0.9], [0.0, 0.3, 0.2], ["0001", "0000", "0002"])
    after.loc[2, "empty"] = True
    changes = reward_changes(before, after)
    assert changes["change"].tolist() == pytest.approx([0.4, 0.4])
    assert changes["change_error"].tolist() == pytest.approx([np.sqrt(0.16 + 0.09) / 4, 0.0])


def test_groups_follow_the_initial_std():
    """The change is the std itself: its groups' means rise, and the rank correlation is 1."""
    changes = reward_changes(prompts(np.zeros(40), STDS), prompts(STDS, STDS))
    summary = summarise_changes(changes)
    means = [group["change"] for group in summary["groups"]]
    assert means == pytest.approx([part.mean() for part in np.split(STDS, 4)])
    assert [group["prompts"] for group in summary["groups"]] == [10] * 4
    assert summary["std_and_change"]["rho"] == pytest.approx(1)
    assert all(group["low"] < group["change"] < group["high"] for group in summary["groups"])
    assert (
        summarise_changes(reward_changes(prompts(STDS, STDS), prompts(0 * STDS, STDS)))["std_and_change"][
            "rho"
        ]
        < -0.9
    )
    bowl = (STDS - 0.2) ** 2  # groups are by std, not by change
    groups = summarise_changes(reward_changes(prompts(0 * STDS, STDS), prompts(bowl, STDS)))["groups"]
    assert [group["change"] for group in groups] == pytest.approx([part.mean() for part in np.split(bowl, 4)])


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=900)
    low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / 30
    assert (low, high) == (
        pytest.approx(values.mean() - half, abs=0.02),
        pytest.approx(values.mean() + half, abs=0.02),
    )


def test_two_runs_make_a_run_folder(tmp_path, capsys):
    a, b = (
        a_run(tmp_path / "a", prompts(np.zeros(40), STDS)),
        a_run(tmp_path / "b", prompts(STDS, STDS), seed=3),
    )
    words = ["rft", "--before", a, "--after", b, "--output_dir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert "Change of the reward of 40 prompts" in capsys.readouterr().out
    assert (tmp_path / "out" / "change.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["prompts"] == 40
    assert len(pd.read_parquet(tmp_path / "out" / "changes.parquet")) == 40


def test_runs_that_cant_be_compared_are_refused(tmp_path):
    table = prompts([0.1, 0.2], [0.1, 0.2])
    a, b = a_run(tmp_path / "a", table), a_run(tmp_path / "b", table, reward="chrf")
    c = a_run(tmp_path / "c", table, temperature=0.7)
    d = a_run(tmp_path / "d", prompts([0.1], [0.1], ["ffff"]))
    for other, message in (
        (b, "same reward"),
        (c, "same sampling"),
        (d, "no measured prompt"),
        (str(tmp_path), "Expected a run folder"),
    ):
        with pytest.raises(RunError, match=message):
            run_change(RftConfig(before=a, after=other, output_dir=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="belong together"):
        RftConfig(before=a)
