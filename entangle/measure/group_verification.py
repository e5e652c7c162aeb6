"""Predictions for groups against real steps: a loss on tokens as a trainer writes it, one SGD step, log-probs again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.groups import AnswerMoves
from entangle.analysis.real_steps import STEP, summarise_steps
from entangle.measure.verification import step_changes
from entangle.models import Policy
from entangle.rewards.groups import PromptGroup
from entangle.rewards.rollouts import Rollout
from entangle.rewards.steps import Batch, Group, GroupStep
from entangle.scores.float64 import in_float64

STEP_COLUMNS = ["index", "step", "answer", "learning_rate", "predicted", "measured", "measured_half", "floor"]


def group_loss(tokens: Tensor, scored: Tensor, group: Group, step: GroupStep, batch: Batch) -> Tensor:
    """The loss of one group, from its token log-probs: ratios, advantages, masks and means as TRL computes them.

    Written on tokens and ratios, so it shares nothing with `GroupStep.weights` but the advantages.

    Args:
        tokens: `(K, T - 1)` log-probs with a gradient, 0 where nothing is scored.
        scored: `(K, T - 1)` bool.
        group: the answers.
        step: which loss.
        batch: the group alone (`GroupStep.batch_of`).
    """
    advantages = torch.from_numpy(step.advantages(group, batch)).to(tokens)
    advantages = torch.where(advantages < 0, step.negative_weight * advantages, advantages)
    mask = scored.to(tokens)
    if step.mask_truncated:
        mask = mask * torch.from_numpy(group.finished).to(tokens)[:, None]
    if step.loss_type == "rloo":
        summed = (tokens * mask).sum(1)
        return -((summed - summed.detach()).exp() * advantages).mean()
    losses = -(tokens - tokens.detach()).exp() * advantages[:, None] * mask
    if step.loss_type == "grpo":
        return (losses.sum(1) / mask.sum(1).clamp(min=1.0)).mean()
    if step.loss_type == "dr_grpo":
        return losses.sum() / (len(losses) * batch.max_completion_length)
    return losses.sum() / mask.sum().clamp(min=1.0)


def verify_groups(
    policy: Policy,
    prompts: Iterable[tuple[PromptGroup, Rollout]],
    steps: Mapping[str, GroupStep],
    max_completion_length: int,
    resolution: float,
    advance: Callable[[int], None] = lambda count: None,
) -> pd.DataFrame:
    """Real SGD steps on groups, one at a time: a row per prompt, step and answer.

    A step that moves nothing (all its answers masked) isn't taken.

    Args:
        policy: the policy; its parameters are left as they were.
        prompts: mixed groups with their answers.
        steps: by label.
        max_completion_length: the longest answer that is allowed, in tokens.
        resolution: relative error of the Gram matrix.
        advance: told of every finished prompt and step.
    """
    found: list[dict[str, Any]] = []
    with in_float64(policy.model):
        for prompt, rollout in prompts:
            for name, step in steps.items():
                found += _verify_one(policy, prompt, rollout, name, step, max_completion_length, resolution)
                advance(1)
    return pd.DataFrame(found, columns=STEP_COLUMNS)


def _verify_one(
    policy: Policy,
    prompt: PromptGroup,
    rollout: Rollout,
    name: str,
    step: GroupStep,
    max_completion_length: int,
    resolution: float,
) -> list[dict[str, Any]]:
    alone = step.batch_of([prompt.group], max_completion_length)
    weights = step.weights(prompt.group, alone)
    predicted = AnswerMoves.of(prompt.gram, weights, prompt.sides).change
    largest = float(abs(predicted).max())
    if not largest > 0:
        return []
    rate = STEP / largest
    batch = rollout.collate(policy.pad_id).to(policy.device)
    full, half = step_changes(
        policy.model,
        policy.parameters,
        batch,
        lambda tokens: group_loss(tokens, batch.scored, prompt.group, step, alone),
        [rate, rate / 2],
    ).tolist()
    floors = resolution * (abs(prompt.gram) @ abs(weights))
    return [
        {
            "index": prompt.index,
            "step": name,
            "answer": answer,
            "learning_rate": rate,
            "predicted": rate * predicted[answer],
            "measured": full[answer],
            "measured_half": half[answer],
            "floor": rate * floors[answer] + STEP * STEP,
        }
        for answer in range(len(predicted))
    ]


def summarise_groups(steps: pd.DataFrame) -> dict[str, Any]:
    """By step, and over all under `all`: prompts, and `entangle.analysis.real_steps.summarise_steps`."""
    by_step = {str(name): _summarised(rows) for name, rows in steps.groupby("step", sort=False)}
    return by_step | {"all": _summarised(steps)}


def _summarised(rows: pd.DataFrame) -> dict[str, Any]:
    found = summarise_steps(rows)
    return found | {"prompts": found.pop("pairs"), "steps": len(rows[["index", "step"]].drop_duplicates())}
