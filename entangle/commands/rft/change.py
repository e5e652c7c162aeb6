"""Before and after a fine-tuning: which prompts' rewards changed, against the spread that they had at first.

    two finished runs of `entangle rft` -> changes.parquet, summary.json, change.png

The paper's finding (arXiv 2310.20703): inputs with a small reward std under the pretrained policy change
little.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from rich.console import RenderableType

from entangle.analysis.statistics import bootstrap_mean, rank_correlation
from entangle.commands.rft.run import RftResult
from entangle.config import RftConfig
from entangle.errors import RunError
from entangle.measure.prompts import measured_rows
from entangle.rewards.history import prompt_state, transitions
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown
from entangle.tables.rft import change_tables

BINS = 4
"""Groups of prompts by initial std, of one size."""


@dataclass(frozen=True)
class RewardChange(Shown):
    """A finished comparison.

    Args:
        run: its folder.
        changes: one row per prompt that both runs measured.
        summary: aggregates of these rows.
    """

    run: RunFolder
    changes: pd.DataFrame
    summary: dict[str, Any]

    def renderable(self) -> RenderableType:
        """The table as a rich object."""
        return change_tables(self.summary)


def run_change(config: RftConfig) -> RewardChange:
    """Compare the runs `config.before` and `config.after`, prompt by prompt.

    Raises:
        RunError: one isn't a finished run, their rewards or sampling differ, or they share no prompt.
    """
    assert config.before is not None and config.after is not None
    before, after = RftResult.load(config.before), RftResult.load(config.after)
    _check_alike(before, after)
    changes = reward_changes(before.prompts, after.prompts)
    if changes.empty:
        raise RunError(
            f"{config.before} and {config.after} have no measured prompt in common, by prompt_hash."
        )
    run = RunFolder(config.run_path)
    identities = {
        name: side.run.read_json("identity.json") for name, side in (("before", before), ("after", after))
    }
    run.begin(config, identities, replaces=config.replaces)
    summary = summarise_changes(changes) | {
        "transitions": state_changes(changes, before.summary["thresholds"]["mean"])
    }
    run.write_table("changes.parquet", changes)
    if config.plots:
        from entangle.figures import rewards
        from entangle.figures.style import new_axes, save

        save(rewards.change(new_axes(), changes, summary), run.path / "change.png")
    run.write_json("summary.json", summary)
    return RewardChange(run, changes, summary)


def _check_alike(before: RftResult, after: RftResult) -> None:
    sides = [side.run.read_json("provenance.json") for side in (before, after)]
    for name in ("reward", "sampling"):
        first, second = ({k: v for k, v in (side[name] or {}).items() if k != "seed"} for side in sides)
        if first != second:
            raise RunError(
                f"Expected two runs with the same {name}; before: {first}, after: {second}. Run both with the same "
                "options."
            )


def reward_changes(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """One row per prompt that both tables measured.

    `change` is the difference of mean rewards and `change_error` its standard error, sqrt(s^2/K + s'^2/K').
    Initial std and initial mean come from the same answers, so for skewed rewards their errors are related; a
    few hundred prompts, not one, carry a conclusion.
    """
    columns = ["reward_mean", "reward_std", "reward_variance", "answers"]
    first, second = (measured_rows(side) for side in (before, after))
    both = first[["index", "prompt_hash", "grad_norm", *columns]].merge(
        second[["prompt_hash", *columns]], on="prompt_hash", suffixes=("_before", "_after")
    )
    variance = sum(both[f"reward_variance_{side}"] / both[f"answers_{side}"] for side in ("before", "after"))
    change = both["reward_mean_after"] - both["reward_mean_before"]
    return both.assign(change=change, change_error=np.sqrt(variance))


def summarise_changes(changes: pd.DataFrame) -> dict[str, Any]:
    """Mean change over all prompts and by initial std, with bootstrap intervals, and rank correlations."""
    std, change = changes["reward_std_before"], changes["change"]
    order = np.array_split(np.argsort(std.to_numpy(), kind="stable"), min(BINS, len(changes)))
    groups = []
    for rows in order:
        values = change.to_numpy()[rows]
        low, high = bootstrap_mean(values)
        stds = std.to_numpy()[rows]
        groups.append(
            {"prompts": len(rows), "std_low": float(stds.min()), "std_high": float(stds.max())}
            | {"change": float(values.mean()), "low": low, "high": high}
            | {"absolute_change": float(np.abs(values).mean())}
        )
    noise = math.sqrt(float((changes["change_error"] ** 2).mean()))
    return {
        "prompts": len(changes),
        "change": float(change.mean()),
        "typical_error": noise,
        "groups": groups,
        "std_and_change": rank_correlation(std, change),
        "std_and_absolute_change": rank_correlation(std, change.abs()),
    }


def state_changes(changes: pd.DataFrame, threshold: float) -> dict[str, dict[str, dict[str, float]]]:
    """How many prompts went from dead, mixed or solved to which of these (`entangle.rewards.history.transitions`).

    Args:
        changes: of `reward_changes`.
        threshold: from this mean reward on a prompt whose answers tie is solved, below it is dead.
    """
    states = (
        [
            prompt_state(mean, std, threshold)
            for mean, std in zip(changes[f"reward_mean_{side}"], changes[f"reward_std_{side}"], strict=True)
        ]
        for side in ("before", "after")
    )
    return transitions(*states)
