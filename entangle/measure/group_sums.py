"""Sums over prompts of what their groups of answers have: mean correct score, mean incorrect score, and each step.

Gathered while the answers are measured, they tell what a batch of prompts does to the answers to *other* prompts
(`entangle.analysis.sets`, with correct for chosen and incorrect for rejected). Only prompts with answers on both sides
take part: the others give no step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from entangle.analysis.groups import Sides
from entangle.analysis.jackknife import assign_groups
from entangle.analysis.statistics import Array
from entangle.measure.sets import MEMORY as SUMS_MEMORY
from entangle.measure.sets import Grouping, RunSums, affordable_groups
from entangle.models import Policy
from entangle.rewards.rollouts import Prompt
from entangle.rewards.steps import Batch, Group, GroupStep
from entangle.runs.folder import RunFolder
from entangle.scores import Engine
from entangle.scores.directions import Directions
from entangle.scores.gram import MEMORY, row_bytes
from entangle.scores.rows import RowBatch

UNIT = Batch(reward_std=1.0, tokens=1.0, max_completion_length=1)
"""What a step knows of its batch while the batch isn't known yet: enough up to one factor for all prompts."""


NO_SUMS = (
    "What a batch of prompts does to the answers of others isn't measured: that takes two prompts with rewards that "
    "differ, and memory for sums of scores (at least 4 groups x (2 + loss types) x 4 bytes per probed parameter)."
)
"""What is said where there are no sums."""


class PromptSums:
    """Sums of one run, filled prompt by prompt.

    Args:
        sums: what is filled.
        engine: whose scores.
        steps: by label.
    """

    def __init__(self, sums: RunSums, engine: Engine, steps: Mapping[str, GroupStep]) -> None:
        self.sums, self._engine, self._steps = sums, engine, steps

    @classmethod
    def over(
        cls,
        run: RunFolder,
        policy: Policy,
        engine: Engine,
        prompts: Sequence[Prompt],
        steps: Mapping[str, GroupStep],
        *,
        process: int = 0,
        table: str = "answers",
    ) -> PromptSums | None:
        """For a run over these prompts; None where there is one, or memory allows no groups.

        Args:
            run: the run folder.
            policy: the policy.
            engine: whose scores.
            prompts: all prompts.
            steps: by label.
            process: number of this process.
            table: folder of the shards.
        """
        directions = 2 + len(steps)
        groups = affordable_groups(policy.parameters, SUMS_MEMORY, directions)
        if len(prompts) < 2 or not groups:
            return None
        assigned, kinds = assign_groups([prompt.hash for prompt in prompts], groups)
        by_index = {prompt.index: g for prompt, g in zip(prompts, assigned.tolist(), strict=True)}
        sums = RunSums(
            run, policy.parameters, Grouping(by_index, kinds), process, directions=directions, table=table
        )
        return cls(sums, engine, steps)

    def add(self, prompt: Prompt, batch: RowBatch, group: Group) -> None:
        """Add a prompt's answers, if there are some on both sides and their scores are finite.

        Args:
            prompt: the prompt.
            batch: its answers as rows.
            group: their rewards and lengths.
        """
        weights = direction_weights(group, self._steps)
        if weights is None:
            return
        parts = Directions()
        for rows, chunk in _chunks(batch, max(1, MEMORY // row_bytes(self._engine))):
            parts.add(self._engine.scores(chunk), torch.from_numpy(weights[:, rows]))
        if all(bool(part.isfinite().all()) for part in parts.sums.values()):
            self.sums.add(prompt.index, prompt.hash, parts.sums)


def direction_weights(group: Group, steps: Mapping[str, GroupStep]) -> Array | None:
    """`(2 + L, K)`: of the mean correct score, the mean incorrect score, and each step up to a factor; None if tied."""
    sides = Sides.of(np.asarray(group.rewards))
    if not sides.is_mixed:
        return None
    means = [side / side.sum() for side in sides.both]
    return np.stack([*means, *(step.weights(group, UNIT) for step in steps.values())])


def step_scale(step: GroupStep, batch: Batch) -> float:
    """Weights of a step in its batch over those in `UNIT`: the same for every group.

    Args:
        step: the step.
        batch: the batch.
    """
    group = Group(np.array([0.0, 1.0]), np.ones(2), np.ones(2, dtype=bool))
    return float(step.weights(group, batch)[1] / step.weights(group, UNIT)[1])


def _chunks(batch: RowBatch, size: int) -> Iterator[tuple[slice, RowBatch]]:
    """The rows of one prompt, at most so many at a time."""
    for start in range(0, len(batch.input_ids), size):
        rows = slice(start, start + size)
        ids, attention, completion = (
            tensor[rows] for tensor in (batch.input_ids, batch.attention_mask, batch.completion_mask)
        )
        yield rows, RowBatch(ids, attention, completion, batch.prompt_length, group_size=len(ids))


def scaled(products: Tensor, factors: Sequence[float]) -> Tensor:
    """Products `(..., D, ..., D)` of `SumGram` with the factors of the steps, direction 2 + l times factor l.

    Args:
        products: `(G, D, G, D)`, or `(G, D, D)`.
        factors: of each step.
    """
    scale = torch.tensor([1.0, 1.0, *factors], dtype=torch.float64)
    shape = (-1, 1, 1) if products.ndim == 4 else (-1, 1)
    return products * scale.view(shape) * scale
