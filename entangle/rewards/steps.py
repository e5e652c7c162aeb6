"""Steps on a group of answers: the weight that GRPO, its kin and RLOO give each answer's score, as TRL computes it.

A step moves the parameters by eta sum_j w_j S_j, with S_j = grad log pi(y_j), advantages A_j, n_j scored tokens and G
answers:

    grpo           w_j = A_j / (G n_j)               every answer's mean over its tokens, then over answers
    dapo, bnpo     w_j = A_j / (tokens of a group)   one count of tokens for the whole batch (dapo counts all processes)
    dr_grpo        w_j = A_j / (G L)                 L the longest answer that is allowed
    rloo           w_j = A_j / G                     A_j = r_j - mean of the other rewards

for the first step on fresh answers: there ratios of probabilities are 1, nothing is clipped, and TRL's `cispo` is
`dapo`, its `sapo` `grpo`. KL's part (beta) is left out. Papers: 2402.03300 (grpo), 2503.14476 (dapo), 2503.20783
(dr_grpo), 2402.14740 (rloo).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from entangle.analysis.statistics import Array
from entangle.config.rft import LossType, ScaleRewards
from entangle.rewards.gradients import TRL_EPSILON
from entangle.rewards.statistics import checked

LOSS_TYPES: tuple[LossType, ...] = get_args(LossType)
"""TRL's `loss_type`s that are known, and `rloo`, its other trainer."""


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, as a step sees them.

    Args:
        rewards: `(K,)`.
        lengths: `(K,)` scored tokens.
        finished: `(K,)` bool, whether an answer ended by itself; the others are truncated.
    """

    rewards: Array
    lengths: Array
    finished: NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {checked(self.rewards).shape, np.shape(self.lengths), np.shape(self.finished)}
        if len(shapes) != 1:
            raise ValueError(f"Expected a reward, a length and a flag for every answer; got shapes {shapes}.")


@dataclass(frozen=True)
class Batch:
    """What a step knows of the batch that a group is in.

    Args:
        reward_std: of all its rewards, with ddof 1; for scale_rewards `batch`.
        tokens: of a group in the mean, truncated answers left out where they are masked; for dapo and bnpo.
        max_completion_length: L, for dr_grpo.
    """

    reward_std: float
    tokens: float
    max_completion_length: int


@dataclass(frozen=True)
class GroupStep:
    """One step on groups of answers, per unit of learning rate.

    Args:
        loss_type: see above.
        scale_rewards: what advantages are divided by: the std (+ 1e-4) of the group's rewards, of the batch's, or
            nothing. RLOO's aren't.
        mask_truncated: answers that didn't end count for the baseline only (TRL's `mask_truncated_completions`).
        negative_weight: factor on the weights of answers with a negative advantage; 0 leaves the positive ones only.
    """

    loss_type: LossType = "grpo"
    scale_rewards: ScaleRewards = "group"
    mask_truncated: bool = False
    negative_weight: float = 1.0

    def batch_of(self, groups: Sequence[Group], max_completion_length: int) -> Batch:
        """The batch of all these groups.

        Args:
            groups: their answers.
            max_completion_length: the longest answer that is allowed, in tokens.
        """
        rewards = np.concatenate([group.rewards for group in groups])
        tokens = [float(np.asarray(group.lengths)[self._counts(group)].sum()) for group in groups]
        std = float(rewards.std(ddof=1)) if len(rewards) > 1 else 0.0
        return Batch(std, max(float(np.mean(tokens)), 1.0 / len(groups)), max_completion_length)

    def advantages(self, group: Group, batch: Batch) -> Array:
        """A, `(K,)`: rewards less their baseline; exactly 0 for a group that ties.

        Args:
            group: the answers.
            batch: what they are in.
        """
        rewards = checked(group.rewards)
        if (rewards == rewards[0]).all():
            return np.zeros_like(rewards)
        centred = rewards - rewards.mean()
        if self.loss_type == "rloo":
            return centred * len(rewards) / (len(rewards) - 1)
        if self.scale_rewards == "none":
            return centred
        std = float(rewards.std(ddof=1)) if self.scale_rewards == "group" else batch.reward_std
        return centred / (std + TRL_EPSILON)

    def weights(self, group: Group, batch: Batch) -> Array:
        """w, `(K,)`: the step is sum_j w_j S_j; of a batch of B groups, 1/B of the sum over all of them.

        Law: sum_j w_j n_j = 0 for grpo, sum_j w_j = 0 for the others, unless negatives are damped or answers masked.

        Args:
            group: the answers.
            batch: what they are in.
        """
        advantages, size = self.advantages(group, batch), len(group.rewards)
        lengths = np.asarray(group.lengths, dtype=np.float64)
        scale = {
            "grpo": size * np.maximum(lengths, 1.0),
            "dapo": batch.tokens,
            "bnpo": batch.tokens,
            "dr_grpo": float(size * batch.max_completion_length),
            "rloo": float(size),
        }[self.loss_type]
        damped = np.where(advantages < 0, self.negative_weight * advantages, advantages)
        return np.where(self._counts(group), damped / scale, 0.0)

    def _counts(self, group: Group) -> NDArray[np.bool_]:
        finished = np.asarray(group.finished, dtype=bool)
        return finished if self.mask_truncated else np.ones_like(finished)
