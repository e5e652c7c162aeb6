"""What `entangle rft` says of groups of answers: tables by prompt and answer, and a summary's `groups`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch

from entangle.analysis.groups import mean_ratio
from entangle.analysis.sets import SetGeometry, SetMove
from entangle.analysis.statistics import share
from entangle.config import RftConfig
from entangle.measure.group_sums import PromptSums, scaled, step_scale
from entangle.rewards.groups import Groups, Means, answer_frame, group_frame, move_frame
from entangle.rewards.steps import GroupStep
from entangle.scores.sums import SumGram


def steps_of(config: RftConfig) -> dict[str, GroupStep]:
    """The steps that the options ask for, by label: loss types."""
    return {
        loss_type: GroupStep(
            loss_type, config.scale_rewards, config.mask_truncated_completions, config.negative_weight
        )
        for loss_type in config.loss_types
    }


@dataclass(frozen=True)
class GroupTables:
    """What is written of groups.

    Args:
        groups: a row per prompt.
        moves: a row per mixed prompt and step.
        answers: a row per answer of a mixed prompt and step.
        summary: what summary.json holds under `groups`.
    """

    groups: pd.DataFrame
    moves: pd.DataFrame
    answers: pd.DataFrame
    summary: dict[str, Any]

    @classmethod
    def of(cls, groups: Groups, sums: PromptSums | None) -> GroupTables:
        """From measured prompts and the sums over them, where there are any."""
        frame, moves, answers = group_frame(groups), move_frame(groups), answer_frame(groups)
        means = Means.of(groups, frame, moves)
        others = None if sums is None or len(groups.mixed) < 2 else across(groups, sums)
        summary: dict[str, Any] = {
            "steps": list(groups.steps),
            "options": {name: asdict(step) for name, step in groups.steps.items()},
            "prompts": counts(frame),
            "displaced": {step: displaced(rows) for step, rows in _by_step(moves)},
            "damping": {step: damping(rows, frame) for step, rows in _by_step(moves)},
            "parts": {step: parts(rows) for step, rows in _by_step(moves)},
            "own": described(means.own, groups),
            "further": described(means.further, groups),
            "others": described(others, groups),
        }
        return cls(frame, moves, answers, summary)


def counts(frame: pd.DataFrame) -> dict[str, int]:
    """Prompts: all, mixed ones, those whose answers are all correct or all incorrect (where that is known)."""
    right, wrong = frame["correct"] > 0, frame["incorrect"] > 0
    return {
        "total": len(frame),
        "mixed": int((right & wrong).sum()),
        "all_correct": int((right & ~wrong).sum()),
        "all_incorrect": int((wrong & ~right).sum()),
        "tied": int((~right & ~wrong).sum()),
    }


def displaced(moves: pd.DataFrame) -> dict[str, Any]:
    """Prompts whose mean correct answer falls by a step on their own group, and the mean share of answers that do."""
    return {
        "prompts": share(int(moves["displaced"].sum()), len(moves)),
        "answers": float(moves["displaced_answers"].mean()),
        "change_correct": float(moves["change_correct"].mean()),
        "change_incorrect": float(moves["change_incorrect"].mean()),
    }


def damping(moves: pd.DataFrame, frame: pd.DataFrame) -> dict[str, Any]:
    """Weights on incorrect answers under which no correct mean falls.

    Returns:
        `least`: in every prompt; `median`: of the displaced prompts, NaN without one; `mean`: for the mean over
        prompts, with its interval (no meaning where incorrect answers don't lower it).
    """
    fallen = moves.loc[moves["displaced"], "enough_negatives"]
    hashes = frame.set_index("index").loc[moves["index"], "prompt_hash"].tolist()
    up = (moves["correct_own"] + moves["correct_by_correct"]).to_numpy()
    return {
        "least": float(moves["enough_negatives"].min()),
        "median": float(fallen.median()),
        "mean": asdict(mean_ratio(hashes, up, -moves["correct_by_incorrect"].to_numpy())),
    }


def parts(moves: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Mean change of either side and where it comes from: own, other correct, incorrect answers."""
    return {
        side: {
            "change": float(moves[f"change_{side}"].mean()),
            **{part: float(moves[f"{side}_{part}"].mean()) for part in ("own", "by_correct", "by_incorrect")},
        }
        for side in ("correct", "incorrect")
    }


def across(groups: Groups, sums: PromptSums) -> SetGeometry | None:
    """What a step on all mixed prompts does to the answers of others, from the sums; None where they were given up."""
    grams = sums.sums.joined()
    if grams is None:
        return None
    factors = [step_scale(step, groups.batches[name]) for name, step in groups.steps.items()]
    total = _added(list(grams.values()), factors)
    return SetGeometry.from_sums(total, sums.sums.grouping.kinds)


def _added(grams: list[SumGram], factors: list[float]) -> SumGram:
    products, own = (
        scaled(torch.stack([getattr(gram, part) for gram in grams]).sum(0), factors)
        for part in ("products", "own")
    )
    return dataclasses.replace(grams[0], products=products, own=own)


def described(geometry: SetGeometry | None, groups: Groups) -> dict[str, Any] | None:
    """A geometry as plain values: K++, K+-, K--, cosine, band, and what each step does; None without a number."""
    if geometry is None or not bool(geometry.products[:2].isfinite().all()):
        return None
    lower, upper = geometry.band
    enough = 1 / lower.value if lower.value > 0 else None
    return {
        "prompts": geometry.prompts,
        "sq_correct": asdict(geometry.sq_chosen),
        "inner": asdict(geometry.inner),
        "sq_incorrect": asdict(geometry.sq_rejected),
        "cosine": asdict(geometry.cosine),
        "may_be_parallel": geometry.may_be_parallel,
        "norm_ratio": asdict(geometry.norm_ratio),
        "band": [asdict(lower), asdict(upper)],
        "enough_negatives": enough,
        "moves": {
            step: move_content(geometry.move_along(2 + number)) for number, step in enumerate(groups.steps)
        },
    }


def move_content(move: SetMove) -> dict[str, Any]:
    """A move as plain values, with correct for chosen and incorrect for rejected."""
    names = {"correct": "chosen", "incorrect": "rejected", "margin": "margin", "drift": "drift"}
    numbers = {ours: asdict(getattr(move, theirs)) for ours, theirs in names.items()}
    return numbers | {"regime": str(move.regime), "is_certain": move.is_certain}


def _by_step(moves: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    if moves.empty:
        return []
    return [(str(step), rows) for step, rows in moves.groupby("step", sort=False)]


def tables_to_write(tables: GroupTables) -> Mapping[str, pd.DataFrame]:
    """By file name."""
    return {
        "groups.parquet": tables.groups,
        "group_moves.parquet": tables.moves,
        "answer_moves.parquet": tables.answers,
    }
