"""Intervals from groups: delete one group at a time and see how far a number moves (delete-a-group jackknife).

For anything that is computed from sums over independent groups. With kinds of pairs as strata, deleting a group of a
kind gives its weight to that kind's other groups, so that the mixture of kinds stays as it is:

    w_h = n_k / (n_k - n_g) for the other groups of g's kind k, 0 for g, 1 elsewhere
    covariance = sum_g (G_k - 1) / G_k (v_g - v_k)(v_g - v_k)^T,   v_g the numbers without g, v_k their mean over a kind

Intervals use Student's t, with G - 1 degrees of freedom if all are of one kind, else Satterthwaite's, (sum_k V_k)^2 /
sum_k (V_k^2 / (G_k - 1)) for kinds that contribute V_k to the variance. Those of a ratio are Fieller's, which know when
the denominator can't be told from zero: then they are the whole line.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256

import torch
from scipy import stats
from torch import Tensor

LEVEL = 0.95
"""Of every interval."""


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Args:
        value: the number; NaN where the data doesn't determine it.
        low: lower end of the interval, -inf where there is none.
        high: upper end, inf where there is none.
        pairs_needed: about how many pairs would give the interval a meaning; None where it has one, or can't be told.
        has_meaning: whether the interval rules anything out that matters for this number; what that is, the function
            that made it says.
    """

    value: float
    low: float
    high: float
    has_meaning: bool
    pairs_needed: int | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign is known."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Jackknife:
    """Which groups there are, of which kind.

    Args:
        sizes: `(G,)` pairs in each group.
        kinds: kind of each group; all of one kind if left out. Kinds with a single group are taken together.
    """

    sizes: Tensor
    kinds: tuple[str, ...] = ()

    @cached_property
    def strata(self) -> list[Tensor]:
        """The groups of each kind, without empty ones."""
        by_kind: dict[str, list[int]] = defaultdict(list)
        for group in self.sizes.nonzero()[:, 0].tolist():
            kind = self.kinds[group] if self.kinds else ""
            by_kind[kind].append(group)
        strata = [groups for groups in by_kind.values() if len(groups) > 1]
        single = [group for groups in by_kind.values() if len(groups) == 1 for group in groups]
        if len(single) > 1 or (single and not strata):
            strata.append(single)
        elif single:
            strata[0] = strata[0] + single
        return [torch.tensor(groups) for groups in strata]

    @property
    def is_enough(self) -> bool:
        """Whether there are two groups to compare."""
        return len(self.weights) > 1

    @property
    def pairs(self) -> int:
        """N."""
        return int(self.sizes.sum())

    @cached_property
    def weights(self) -> Tensor:
        """`(R, G)` float64: the groups' weights in each replicate."""
        rows = []
        for groups in self.strata:
            total = self.sizes[groups].sum().double()
            for group in groups if len(groups) > 1 else ():
                weights = torch.ones(len(self.sizes), dtype=torch.float64)
                weights[groups] = total / (total - self.sizes[group])
                weights[group] = 0.0
                rows.append(weights)
        return torch.stack(rows) if rows else torch.ones(0, len(self.sizes), dtype=torch.float64)

    def covariances(self, replicates: Tensor) -> Tensor:
        """What each kind contributes to the covariance of m numbers, `(K, m, m)`, from their replicates `(R, m)`."""
        apart = [own - own.mean(0) for own in replicates.split([len(groups) for groups in self.strata])]
        return torch.stack([(len(own) - 1) / len(own) * own.T @ own for own in apart])

    def quantile(self, variances: Tensor) -> float:
        """Student's t for a two-sided interval, given what each kind contributes to the variance, `(K,)`."""
        spread = sum(
            float(v) ** 2 / (len(groups) - 1) for v, groups in zip(variances, self.strata, strict=True)
        )
        freedom = float(variances.sum()) ** 2 / spread if spread else len(self.weights) - len(self.strata)
        return float(stats.t.ppf((1 + LEVEL) / 2, freedom))

    def number(self, value: float, replicates: Tensor, *, target: float | None = None) -> Estimate:
        """A number and t standard errors on either side, from its replicates `(R,)`.

        It has a meaning if the half-width is below `target`, by default |value|: if its sign is known. Else about
        N (half-width / target)^2 pairs would do, since errors fall with the root of N.

        Args:
            value: the number.
            replicates: `(R,)`, the number without each group, in the order of `weights`.
            target: half-width below which the interval has a meaning.

        Examples:
            >>> values = torch.tensor([1.0, 2.0, 3.0, 6.0]).double()
            >>> jackknife = Jackknife(torch.ones(4, dtype=torch.int64))
            >>> mean = jackknife.number(3.0, (values.sum() - values) / 3)
            >>> print(f"{mean.low:.2f} {mean.high:.2f} {mean.has_meaning} {mean.pairs_needed}")
            -0.44 6.44 False 6
        """
        if not (self.is_enough and math.isfinite(value) and bool(replicates.isfinite().all())):
            return Estimate(value, -math.inf, math.inf, has_meaning=False)
        variances = self.covariances(replicates[:, None])[:, 0, 0]
        half = self.quantile(variances) * float(variances.sum()) ** 0.5
        target = abs(value) if target is None else target
        return self._judged(
            value, value - half, value + half, half < target, half / target if target else math.inf
        )

    def ratio(
        self,
        top: float,
        bottom: float,
        replicates: Tensor,
        *,
        target: float = math.inf,
        rules_out: Callable[[float, float], bool] = lambda low, high: True,
    ) -> Estimate:
        """Top / bottom with Fieller's interval, from the replicates of both `(R, 2)`.

        The interval holds every q for which top - q bottom can't be told from zero; it is the whole line if bottom
        can't be. It has a meaning if it is finite and `rules_out(low, high)`. Else about N e^2 pairs would do, with e
        the larger of bottom's half-width over bottom, and the half-width (to first order in errors) over `target`.

        Args:
            top: the numerator.
            bottom: the denominator.
            replicates: `(R, 2)`, both without each group.
            target: half-width that is wanted.
            rules_out: whether a finite interval (low, high) has a meaning.
        """
        value = top / bottom if bottom else math.nan
        if not (self.is_enough and math.isfinite(value) and bool(replicates.isfinite().all())):
            return Estimate(value, -math.inf, math.inf, has_meaning=False)
        covariances = self.covariances(replicates)
        direction = torch.tensor([1.0, -value], dtype=torch.float64)
        t = self.quantile(direction @ covariances @ direction)
        (var_top, cov), (_, var_bottom) = covariances.sum(0).tolist()
        half = t * max(var_top - 2 * value * cov + value**2 * var_bottom, 0.0) ** 0.5 / abs(bottom)
        excess = max(t * var_bottom**0.5 / abs(bottom), half / target)
        a, b, c = bottom**2 - t**2 * var_bottom, top * bottom - t**2 * cov, top**2 - t**2 * var_top
        if a <= 0:
            return self._judged(value, -math.inf, math.inf, False, excess)
        root = max(b * b - a * c, 0.0) ** 0.5
        low, high = (b - root) / a, (b + root) / a
        return self._judged(value, low, high, rules_out(low, high), excess)

    def _judged(self, value: float, low: float, high: float, has_meaning: bool, excess: float) -> Estimate:
        """With the pairs that would do, where the half-width is too large by the factor `excess`."""
        if has_meaning or not math.isfinite(excess):
            return Estimate(value, low, high, has_meaning)
        return Estimate(value, low, high, False, self.pairs + max(1, math.ceil(self.pairs * (excess**2 - 1))))


def clipped(
    estimate: Estimate, low: float, high: float, change: Callable[[float], float] = lambda x: x
) -> Estimate:
    """An increasing function of an estimate, after cutting it to where it can lie.

    Args:
        estimate: the number and its interval.
        low: least value that it can have.
        high: largest value.
        change: the function.
    """

    def moved(value: float) -> float:
        return value if math.isnan(value) else change(min(max(value, low), high))

    return Estimate(
        moved(estimate.value),
        moved(estimate.low),
        moved(estimate.high),
        estimate.has_meaning,
        estimate.pairs_needed,
    )


def assign_groups(
    prompts: Sequence[str], groups: int, kinds: Sequence[str] | None = None
) -> tuple[Tensor, tuple[str, ...]]:
    """Pairs into about equally large groups: `(N,)` int64, and each group's kind.

    By a hash of the prompt: a prompt's pairs stay together, a group is a random sample of its kind, and who goes
    where depends neither on the order of the pairs nor on a seed. Every kind has groups of its own in proportion to
    its pairs, at least two if it has two prompts; so there may be more groups than asked for.

    Args:
        prompts: `(N,)`, what tells prompts apart.
        groups: groups to make of all pairs, or of each prompt one if there are fewer.
        kinds: `(N,)`, kind of each pair; prompts whose pairs differ in it are of the kind `mixed`.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for pair, prompt in enumerate(prompts):
        members[prompt].append(pair)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for prompt, pairs in members.items():
        own = {kinds[pair] for pair in pairs} if kinds is not None else {""}
        by_kind[own.pop() if len(own) == 1 else "mixed"].append(prompt)
    found, names = torch.zeros(len(prompts), dtype=torch.int64), []
    for kind in sorted(by_kind):
        ordered = sorted(by_kind[kind], key=lambda prompt: sha256(prompt.encode()).digest())
        share = sum(len(members[prompt]) for prompt in ordered) / len(prompts)
        count = min(len(ordered), max(2, round(groups * share)))
        sizes = [0] * count
        for prompt in ordered:
            group = sizes.index(min(sizes))
            sizes[group] += len(members[prompt])
            found[members[prompt]] = len(names) + group
        names += [kind] * count
    return found, tuple(names)
