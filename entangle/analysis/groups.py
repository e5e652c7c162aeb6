"""A group of answers to one prompt under a step that raises some and lowers others, from their scores' Gram matrix.

A step eta sum_j w_j S_j changes each answer's log-prob by eta sum_j w_j K_ij, K_ij = <S_i, S_j>: its own part, that of
the other correct answers and that of the incorrect ones. With mean scores S+ of the correct and S- of the incorrect

    K++ = |S+|^2        K+- = <S+, S->        K-- = |S-|^2

are what (A, c, B) are for a preference pair (`entangle.analysis.geometry`): for rewards in {0, 1}, whatever share p of
the answers is correct, advantages divided by their std make the step

    sum_j A_j S_j = G sqrt(p (1-p)) (S+ - S-)      (std with ddof 0)

that is the incentive ratio rho = 1. So the mean correct answer's log-prob falls iff K+- > K++, and weighing incorrect
answers by lambda gives rho = 1/lambda: the largest lambda under which it doesn't fall is K++ / K+- [derived].

Of the very answers in the group, own terms included, this is exact (arXiv 2505.18830 calls the mean change of the
correct ones Delta(x), and a prompt displaced where it is negative). For **further** answers of the same prompt, means
over different answers i != j are unbiased.

Two correct answers with short scores beside a long incorrect one: K++ = 1, K+- = 2, so correct answers fall.

    >>> scores = np.array([[1.0, 0.0], [1.0, 0.0], [2.0, 3.0]])
    >>> sides = Sides.of(np.array([1.0, 1.0, 0.0]))
    >>> block = Block.of(scores @ scores.T, sides, itself=True)
    >>> block.sq_correct, block.inner, block.sq_incorrect, block.enough
    (1.0, 2.0, 13.0, 0.5)
    >>> weights = np.array([0.5, 0.5, -1.0])
    >>> means = AnswerMoves.of(scores @ scores.T, weights, sides).means(sides)
    >>> means["change_correct"], means["change_incorrect"], enough_negatives(means)
    (-1.0, -11.0, 0.5)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from entangle.analysis.jackknife import Estimate, Jackknife, assign_groups
from entangle.analysis.regimes import Prediction, Regime
from entangle.analysis.sets import SetGeometry
from entangle.analysis.statistics import Array

GROUPS = 16
"""Groups of prompts for the jackknife."""

CORRECT, INCORRECT = 0, 1
"""Rows of what is given for both sides."""


@dataclass(frozen=True)
class Sides:
    """Which answers of a group count as correct and which as incorrect.

    Args:
        correct: `(K,)` bool.
        incorrect: `(K,)` bool; an answer may be neither.
    """

    correct: NDArray[np.bool_]
    incorrect: NDArray[np.bool_]

    @classmethod
    def of(cls, rewards: Array, high: float | None = None) -> Sides:
        """By the advantage's sign, above and below the group's mean; by the reward alone where it is binary.

        The two agree wherever rewards differ; where they tie, no answer is on a side unless rewards are binary.

        Args:
            rewards: `(K,)`.
            high: the reward of a correct answer, where rewards are binary.
        """
        if high is not None:
            return cls(rewards == high, rewards != high)
        mean = rewards.mean() if (rewards != rewards[0]).any() else rewards[0]
        return cls(rewards > mean, rewards < mean)

    @property
    def both(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Correct, incorrect."""
        return self.correct, self.incorrect

    @property
    def counts(self) -> tuple[int, int]:
        """Correct and incorrect answers."""
        return int(self.correct.sum()), int(self.incorrect.sum())

    @property
    def is_mixed(self) -> bool:
        """Whether there are answers on both sides: only then there is a step."""
        return all(self.counts)


@dataclass(frozen=True)
class Block:
    """K++, K+- and K--, 1/parameter^2; NaN where a side has too few answers.

    Args:
        sq_correct: K++.
        inner: K+-.
        sq_incorrect: K--.
    """

    sq_correct: float
    inner: float
    sq_incorrect: float

    @classmethod
    def of(cls, gram: Array, sides: Sides, *, itself: bool = False) -> Block:
        """From one group.

        Args:
            gram: `(K, K)` dot products of scores.
            sides: of its answers.
            itself: of the very answers, own terms included; else without bias for further answers, from different
                answers: then a side needs two.
        """
        plus, minus = sides.both
        inner = float(gram[np.ix_(plus, minus)].mean()) if sides.is_mixed else math.nan
        return cls(_square(gram, plus, itself), inner, _square(gram, minus, itself))

    @property
    def cosine(self) -> float:
        """K+- / sqrt(K++ K--), cut to [-1, 1]; NaN where a square isn't positive."""
        if not (self.sq_correct > 0 and self.sq_incorrect > 0):
            return math.nan
        return min(max(self.inner / math.sqrt(self.sq_correct * self.sq_incorrect), -1.0), 1.0)

    @property
    def band(self) -> tuple[float, float]:
        """Incentive ratios within which correct answers rise and incorrect ones fall; (0, inf) where K+- <= 0."""
        if not self.inner > 0:
            return (math.nan, math.nan) if math.isnan(self.inner) else (0.0, math.inf)
        lower = self.inner / self.sq_correct if self.sq_correct > 0 else math.inf
        return lower, max(self.sq_incorrect, 0.0) / self.inner

    @property
    def enough(self) -> float:
        """The largest weight on incorrect answers under which the mean correct one doesn't fall; inf: any."""
        if math.isnan(self.inner) or math.isnan(self.sq_correct):
            return math.nan
        return max(self.sq_correct, 0.0) / self.inner if self.inner > 0 else math.inf


def _square(gram: Array, side: NDArray[np.bool_], itself: bool) -> float:
    own, count = gram[np.ix_(side, side)], int(side.sum())
    if itself:
        return float(own.mean()) if count else math.nan
    return float(own.sum() - np.trace(own)) / (count * (count - 1)) if count > 1 else math.nan


@dataclass(frozen=True)
class AnswerMoves:
    """What a step does to every answer of its group, nats per unit of learning rate, and where that comes from.

    Args:
        own: `(K,)` w_i K_ii.
        by_correct: `(K,)` of the other correct answers.
        by_incorrect: `(K,)` of the other incorrect answers.
    """

    own: Array
    by_correct: Array
    by_incorrect: Array

    @classmethod
    def of(cls, gram: Array, weights: Array, sides: Sides) -> AnswerMoves:
        """From one group. Law: the three parts add up to gram @ weights.

        Args:
            gram: `(K, K)`.
            weights: `(K,)` of the step; 0 for an answer on neither side.
            sides: of the answers.
        """
        own = np.diag(gram) * weights
        parts = [gram @ (weights * side) - own * side for side in sides.both]
        return cls(own, *parts)

    @property
    def change(self) -> Array:
        """`(K,)`: own and others' parts together."""
        return self.own + self.by_correct + self.by_incorrect

    def means(self, sides: Sides) -> dict[str, float]:
        """Mean change of either side and its parts: change_correct, that is Delta(x), correct_own, ..."""
        found = {}
        for name, side in zip(("correct", "incorrect"), sides.both, strict=True):
            known = bool(side.any())
            found[f"change_{name}"] = float(self.change[side].mean()) if known else math.nan
            for part in ("own", "by_correct", "by_incorrect"):
                found[f"{name}_{part}"] = float(getattr(self, part)[side].mean()) if known else math.nan
        return found

    def further(self, sides: Sides) -> tuple[float, float]:
        """Mean change of a further correct and a further incorrect answer to the prompt, without bias.

        Own terms left out; a side's part on itself, of which every answer has all but one, is scaled up by n / (n - 1).
        NaN for a side with one answer.
        """
        found = []
        for side, others, across in (
            (sides.correct, self.by_correct, self.by_incorrect),
            (sides.incorrect, self.by_incorrect, self.by_correct),
        ):
            count = int(side.sum())
            if count < 2:
                found.append(math.nan)
            else:
                found.append(float(others[side].mean() * count / (count - 1) + across[side].mean()))
        return found[0], found[1]


def enough_negatives(means: dict[str, float]) -> float:
    """The largest factor on the incorrect answers' weights under which the mean correct answer doesn't fall.

    Its change is P + lambda Q, P of the correct answers (own included), Q of the incorrect ones: P / -Q; inf where Q
    isn't negative: then there is no largest one. For equal weights within each side this is K++ / K+-, own terms
    included.

    Args:
        means: of `AnswerMoves.means`.
    """
    by_correct, by_incorrect = (
        means["correct_own"] + means["correct_by_correct"],
        means["correct_by_incorrect"],
    )
    if math.isnan(by_correct + by_incorrect):
        return math.nan
    return max(by_correct, 0.0) / -by_incorrect if by_incorrect < 0 else math.inf


def regime_of(changes: tuple[float, float], floors: tuple[float, float]) -> Regime:
    """Which way the mean correct and the mean incorrect answer go.

    Args:
        changes: of both.
        floors: sizes below which the arithmetic can't tell their signs.
    """
    correct, incorrect, floor_correct, floor_incorrect = (
        torch.tensor([value], dtype=torch.float64) for value in (*changes, *floors)
    )
    nothing = torch.full((1,), math.nan, dtype=torch.float64)
    return Prediction(correct, incorrect, floor_correct, floor_incorrect, nothing, nothing).regimes[0]


def mean_geometry(prompts: Sequence[str], blocks: Array, changes: Array) -> SetGeometry:
    """Means over prompts, as a set's geometry: the block, and along direction 2 + l the change under step l.

    `geometry.move_along(2 + l)` then gives mean changes, drift and regime with intervals, from groups of prompts.

    Args:
        prompts: `(N,)`, what tells prompts apart.
        blocks: `(N, 3)`: K++, K+-, K-- of each.
        changes: `(N, L, 2)`: of the mean correct and the mean incorrect answer.
    """
    count, steps = changes.shape[:2]
    assigned, kinds = assign_groups(prompts, GROUPS)
    jackknife = Jackknife(assigned.bincount(minlength=len(kinds)), kinds)
    per_prompt = np.zeros((count, 2 + steps, 2 + steps))
    per_prompt[:, CORRECT, CORRECT], per_prompt[:, INCORRECT, INCORRECT] = blocks[:, 0], blocks[:, 2]
    per_prompt[:, CORRECT, INCORRECT] = per_prompt[:, INCORRECT, CORRECT] = blocks[:, 1]
    per_prompt[:, :2, 2:] = changes.transpose(0, 2, 1)
    every = torch.from_numpy(per_prompt)
    weights = torch.cat([torch.ones(1, len(kinds), dtype=torch.float64), jackknife.weights])[:, assigned]
    means = torch.einsum("rn,nde->rde", weights, every) / count  # in each replicate weights add up to N
    both = torch.stack([means, means], 1)
    return SetGeometry(
        products=means[0],
        own=means[0],
        replicates=both[1:],
        jackknife=jackknife,
        pairs=count,
        prompts=count,
        pairs_per_prompt=1.0,
    )


def mean_ratio(prompts: Sequence[str], top: Array, bottom: Array) -> Estimate:
    """Ratio of two means over prompts, with Fieller's interval from groups of prompts.

    Args:
        prompts: `(N,)`, what tells prompts apart.
        top: `(N,)`.
        bottom: `(N,)`.
    """
    assigned, kinds = assign_groups(prompts, GROUPS)
    jackknife = Jackknife(assigned.bincount(minlength=len(kinds)), kinds)
    both = torch.from_numpy(np.stack([top, bottom], 1).astype(np.float64))
    weights = jackknife.weights[:, assigned]
    replicates = weights @ both / len(both)
    return jackknife.ratio(float(top.mean()), float(bottom.mean()), replicates)
