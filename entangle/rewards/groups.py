"""What one step on each prompt's group of answers does to these answers, from the rows that `entangle rft` keeps.

Pure functions of rewards, lengths and Gram matrices: a table by prompt (`group_frame`), one by prompt and step
(`move_frame`), one by answer and step (`answer_frame`), and the means over prompts with intervals (`Means`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.groups import AnswerMoves, Block, Sides, enough_negatives, mean_geometry, regime_of
from entangle.analysis.sets import SetGeometry
from entangle.analysis.statistics import Array
from entangle.rewards.signals import gram_of
from entangle.rewards.statistics import Support
from entangle.rewards.steps import Batch, Group, GroupStep


def correct_reward(rewards: Sequence[Array], support: Support) -> float | None:
    """The reward of a correct answer where rewards are binary, else None.

    Binary are those that say so, and those that take two values at most over all prompts.

    Args:
        rewards: `(K,)` of each prompt.
        support: what is known of them.
    """
    if support.is_binary:
        return support.high
    values = np.unique(np.concatenate(list(rewards))) if len(rewards) else np.empty(0)
    return float(values[1]) if len(values) == 2 else None


@dataclass(frozen=True)
class PromptGroup:
    """One prompt's answers with the Gram matrix of their scores.

    Args:
        index: of the prompt.
        prompt_hash: what tells prompts apart.
        group: rewards, lengths, and whether each ended.
        gram: `(K, K)`.
        sides: correct and incorrect answers.
    """

    index: int
    prompt_hash: str
    group: Group
    gram: Array
    sides: Sides

    @classmethod
    def of(cls, row: Mapping[Any, Any], high: float | None) -> PromptGroup:
        """From a kept row.

        Args:
            row: see `entangle.rewards.signals.measure`.
            high: reward of a correct answer, where rewards are binary.
        """
        rewards = np.asarray(row["rewards"], dtype=np.float64)
        group = Group(
            rewards, np.asarray(row["lengths"], dtype=np.float64), np.asarray(row["finished"], dtype=bool)
        )
        return cls(int(row["index"]), str(row["prompt_hash"]), group, gram_of(row), Sides.of(rewards, high))


@dataclass(frozen=True)
class Groups:
    """All prompts' groups under some steps.

    Args:
        prompts: those that have numbers.
        steps: by label.
        max_completion_length: the longest answer that is allowed, in tokens.
        resolution: relative error of a dot product of scores.
    """

    prompts: Sequence[PromptGroup]
    steps: Mapping[str, GroupStep]
    max_completion_length: int
    resolution: float

    @classmethod
    def of(
        cls,
        rows: pd.DataFrame,
        steps: Mapping[str, GroupStep],
        support: Support,
        max_completion_length: int,
        resolution: float,
    ) -> Groups:
        """From measured rows (see `PromptGroup.of`).

        Args:
            rows: as they are kept, without those that have no numbers.
            steps: by label.
            support: what is known of the rewards.
            max_completion_length: the longest answer that is allowed, in tokens.
            resolution: relative error of a dot product of scores.
        """
        high = correct_reward([np.asarray(entry, dtype=np.float64) for entry in rows["rewards"]], support)
        prompts = [PromptGroup.of(row, high) for row in rows.to_dict("records")]
        return cls(prompts, steps, max_completion_length, resolution)

    @cached_property
    def mixed(self) -> list[PromptGroup]:
        """Prompts with answers on both sides: only those give a step."""
        return [prompt for prompt in self.prompts if prompt.sides.is_mixed]

    @cached_property
    def batches(self) -> dict[str, Batch]:
        """By step: all prompts as one batch."""
        groups = [prompt.group for prompt in self.prompts]
        return {name: step.batch_of(groups, self.max_completion_length) for name, step in self.steps.items()}

    def weights(self, prompt: PromptGroup, step: str) -> Array:
        """`(K,)` of a prompt's answers under a step on all prompts, times their number.

        Args:
            prompt: one of them.
            step: label of the step.
        """
        return self.steps[step].weights(prompt.group, self.batches[step])

    def moves(self, prompt: PromptGroup, step: str) -> AnswerMoves:
        """What a prompt's own part of a step does to its answers.

        Args:
            prompt: one of them.
            step: label of the step.
        """
        return AnswerMoves.of(prompt.gram, self.weights(prompt, step), prompt.sides)


def group_frame(groups: Groups) -> pd.DataFrame:
    """A row per prompt: counts of both sides; K++, K+-, K-- without bias, and of the sample itself; what follows.

    `enough_negatives` is the largest weight on incorrect answers under which a further correct one doesn't fall, for
    weights that are equal within each side.
    """
    rows = []
    for prompt in groups.prompts:
        row: dict[str, Any] = {"index": prompt.index, "prompt_hash": prompt.prompt_hash}
        row["correct"], row["incorrect"] = prompt.sides.counts
        for suffix, itself in (("", False), ("_sample", True)):
            block = Block.of(prompt.gram, prompt.sides, itself=itself)
            low, high = block.band
            row |= {
                f"sq_correct{suffix}": block.sq_correct,
                f"inner{suffix}": block.inner,
                f"sq_incorrect{suffix}": block.sq_incorrect,
                f"cosine{suffix}": block.cosine,
                f"band_low{suffix}": low,
                f"band_high{suffix}": high,
                f"enough_negatives{suffix}": block.enough,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def move_frame(groups: Groups) -> pd.DataFrame:
    """A row per mixed prompt and step: mean changes of both sides and their parts, nats per unit of learning rate.

    Returns:
        index, step; change_correct (Delta(x)) and its parts correct_own, correct_by_correct, correct_by_incorrect;
        the same for the incorrect side; further_correct, further_incorrect (see `AnswerMoves.further`);
        `regime` of the two mean changes; `displaced`: the mean correct answer falls, by more than the arithmetic leaves
        open; `displaced_answers`: share of the correct answers that fall; `enough_negatives` for this step.
    """
    rows = []
    for prompt in groups.mixed:
        for step in groups.steps:
            weights, sides = groups.weights(prompt, step), prompt.sides
            moves = AnswerMoves.of(prompt.gram, weights, sides)
            means, (correct, incorrect) = moves.means(sides), moves.further(sides)
            floors = groups.resolution * (np.abs(prompt.gram) @ np.abs(weights))
            floor_correct, floor_incorrect = (float(floors[side].mean()) for side in sides.both)
            both = means["change_correct"], means["change_incorrect"]
            rows.append(
                {"index": prompt.index, "step": step}
                | means
                | {
                    "further_correct": correct,
                    "further_incorrect": incorrect,
                    "regime": str(regime_of(both, (floor_correct, floor_incorrect))),
                    "displaced": both[0] < -floor_correct,
                    "displaced_answers": float((moves.change < -floors)[sides.correct].mean()),
                    "enough_negatives": enough_negatives(means),
                }
            )
    return pd.DataFrame(rows)


def answer_frame(groups: Groups) -> pd.DataFrame:
    """A row per answer of a mixed prompt and step: reward, advantage, weight, change and its three parts.

    Changes are of the log-prob, in nats per unit of learning rate, by the prompt's own part of a step on all prompts,
    times the number of these.
    """
    tables = []
    for prompt in groups.mixed:
        for name, step in groups.steps.items():
            moves, count = groups.moves(prompt, name), len(prompt.gram)
            tables.append(
                pd.DataFrame(
                    {
                        "index": prompt.index,
                        "step": name,
                        "answer": range(count),
                        "reward": prompt.group.rewards,
                        "side": np.where(
                            prompt.sides.correct,
                            "correct",
                            np.where(prompt.sides.incorrect, "incorrect", "neither"),
                        ),
                        "advantage": step.advantages(prompt.group, groups.batches[name]),
                        "weight": groups.weights(prompt, name),
                        "change": moves.change,
                        "own": moves.own,
                        "by_correct": moves.by_correct,
                        "by_incorrect": moves.by_incorrect,
                    }
                )
            )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


@dataclass(frozen=True)
class Means:
    """Means over prompts with intervals, as geometries of a set (direction 2 + l: the change under step l).

    Args:
        own: of the very answers of the groups, own terms included: exact. None without a mixed prompt.
        further: of further answers to these prompts, without bias; over prompts with two answers on each side. None
            without one.
    """

    own: SetGeometry | None
    further: SetGeometry | None

    @classmethod
    def of(cls, groups: Groups, frame: pd.DataFrame, moves: pd.DataFrame) -> Means:
        """From the tables of all groups.

        Args:
            groups: the groups.
            frame: of `group_frame`.
            moves: of `move_frame`.
        """
        mixed = frame[(frame["correct"] > 0) & (frame["incorrect"] > 0)]
        twice = mixed[(mixed["correct"] > 1) & (mixed["incorrect"] > 1)]
        return cls(
            _geometry(mixed, moves, groups, "_sample", "change"),
            _geometry(twice, moves, groups, "", "further"),
        )


def _geometry(
    prompts: pd.DataFrame, moves: pd.DataFrame, groups: Groups, suffix: str, change: str
) -> SetGeometry | None:
    if prompts.empty:
        return None
    blocks = prompts[[f"{name}{suffix}" for name in ("sq_correct", "inner", "sq_incorrect")]].to_numpy()
    columns = [f"{change}_correct", f"{change}_incorrect"]
    by_step = [
        moves[moves["step"] == step].set_index("index").loc[prompts["index"], columns].to_numpy()
        for step in groups.steps
    ]
    return mean_geometry(prompts["prompt_hash"].tolist(), blocks, np.stack(by_step, 1))
