"""The set of pairs as one pair, through its mean scores: what a run on all of them does, as opposed to each pair alone.

With S_wi, S_li the scores of pair i, means over pairs i and j of *different* prompts

    U_ww = mean <S_wi, S_wj>        U_wl = mean <S_wi, S_lj>        U_ll = mean <S_li, S_lj>

are unbiased for the products of the mean scores, and what is said of a pair's (A, c, B) holds of them: a step on the
set with incentives (d_w, d_l) moves the mean log-probs, per unit of learning rate, by

    chosen  D_w = d_w U_ww - d_l U_wl        rejected  D_l = d_w U_wl - d_l U_ll

and it is ideal iff U_wl / U_ww < d_w / d_l < U_ll / U_wl (for U_wl > 0 and positive incentives; arXiv 2410.13828,
section 3, with mean gradients). The **drift** is what both log-probs do in common while the margin grows by a nat:

    drift = (D_w + D_l) / (2 (D_w - D_l))       > 1/2 both rise     within (-1/2, 1/2) ideal      < -1/2 both fall

An epoch over the very pairs that were measured adds each pair's own terms, M = ((N - 1) U + own) / N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from entangle.analysis.geometry import RESOLUTION
from entangle.analysis.jackknife import Estimate, Jackknife, clipped
from entangle.analysis.regimes import Prediction, Regime

EDGE = 0.5
"""|drift| below which the set is ideal."""


class Sums(Protocol):
    """Products of group sums of scores, see `entangle.scores.sums.SumGram`."""

    @property
    def products(self) -> Tensor:
        """`(G, D, G, D)`: <T_d[g], P T_e[h]>; direction 0 sums chosen scores, 1 rejected ones."""
        ...

    @property
    def own(self) -> Tensor:
        """`(G, D, D)`: the part of a group's product with itself that is of one prompt; NaN where unknown."""
        ...

    @property
    def pairs(self) -> Tensor:
        """`(G,)`."""
        ...

    @property
    def squares(self) -> Tensor:
        """`(G,)`: sum over a group's prompts of the square of their number of pairs."""
        ...

    @property
    def prompts(self) -> Tensor:
        """`(G,)`."""
        ...


@dataclass(frozen=True)
class SetMove:
    """What a step on the set does to its mean log-probs, per unit of learning rate.

    Args:
        chosen: D_w, nats; its interval has a meaning if it tells the sign.
        rejected: D_l, likewise.
        margin: D_w - D_l, likewise.
        drift: (D_w + D_l) / (2 (D_w - D_l)), nats of both per nat of margin; NaN where no margin is gained. Its
            interval has a meaning if it is finite and doesn't reach from `both rise` to `both fall`.
        regime: by the values of `chosen` and `rejected`; `degenerate` where float32 sums can't tell a sign.
        is_certain: whether both signs are outside their intervals.
    """

    chosen: Estimate
    rejected: Estimate
    margin: Estimate
    drift: Estimate
    regime: Regime
    is_certain: bool


@dataclass(frozen=True)
class SetGeometry:
    """Mean products of scores over pairs of different prompts, and what follows from them, with intervals.

    Args:
        products: `(D, D)` float64, U: mean over i, j of <S_id, P S_je>, with S_i0 the chosen and S_i1 the rejected
            score; further directions as they were summed. NaN where there are no two prompts.
        own: `(D, D)`, the same within prompts: per pair, the sum over the pairs j of its own prompt, itself included;
            for prompts with one pair each the means of A, c and B. NaN where unknown.
        replicates: `(R, 2, D, D)`, both in each replicate of the jackknife.
        jackknife: the groups.
        pairs: N.
        prompts: different prompts.
        pairs_per_prompt: over pairs the mean number of pairs that their prompt has; 1 if all prompts differ.
    """

    products: Tensor
    own: Tensor
    replicates: Tensor
    jackknife: Jackknife
    pairs: int
    prompts: int
    pairs_per_prompt: float

    @classmethod
    def from_sums(
        cls, sums: Sums, kinds: Sequence[str] = (), *, of: str | None = None, by: str | None = None
    ) -> SetGeometry:
        """From the Gram matrix of group sums.

        A group whose own terms are unknown takes part in products with other groups only.

        Args:
            sums: the products.
            kinds: kind of each group.
            of: take i from pairs of this kind alone.
            by: take j from pairs of this kind alone: what a step on these does to those.
        """
        left, right = (
            torch.tensor(
                [1.0 if kind is None else float(k == kind) for k in kinds or [""] * len(sums.pairs)]
            ).double()
            for kind in (of, by)
        )
        used = ((left + right) > 0).long()
        jackknife = Jackknife(sums.pairs * used, tuple(kinds))
        everything = torch.ones(1, len(sums.pairs), dtype=torch.float64)
        values = torch.stack(
            [
                _means(sums, left * weights, right * weights)
                for weights in torch.cat([everything, jackknife.weights])
            ]
        )
        pairs = int((sums.pairs * left).sum())
        return cls(
            products=values[0, 0],
            own=values[0, 1],
            replicates=values[1:],
            jackknife=jackknife,
            pairs=pairs,
            prompts=int((sums.prompts * left).sum()),
            pairs_per_prompt=float((sums.squares * left).sum()) / max(pairs, 1),
        )

    @classmethod
    def from_batches(cls, blocks: Tensor, pairs: Tensor) -> SetGeometry:
        """From one block per training batch, as if each batch were a group of the jackknife: their mean over pairs.

        Args:
            blocks: `(T, 2, 2)`, products of a batch's mean chosen and mean rejected score (rows) with two directions
                that are independent of the batch (columns).
            pairs: `(T,)` int64, pairs in each batch.
        """
        jackknife = Jackknife(pairs)
        weights = torch.cat([torch.ones(1, len(pairs), dtype=torch.float64), jackknife.weights]) * pairs
        values = torch.einsum("rt,tij->rij", weights / weights.sum(1, keepdim=True), blocks.double())
        nothing = torch.full_like(values, torch.nan)
        return cls(
            products=values[0],
            own=nothing[0],
            replicates=torch.stack([values, nothing], 1)[1:],
            jackknife=jackknife,
            pairs=int(pairs.sum()),
            prompts=int(pairs.sum()),
            pairs_per_prompt=1.0,
        )

    @property
    def sq_chosen(self) -> Estimate:
        """U_ww = |mean chosen score|^2, unbiased; its interval has a meaning if it tells the sign."""
        return self._product(0, 0)

    @property
    def inner(self) -> Estimate:
        """U_wl, likewise."""
        return self._product(0, 1)

    @property
    def sq_rejected(self) -> Estimate:
        """U_ll, likewise."""
        return self._product(1, 1)

    @property
    def cosine(self) -> Estimate:
        """U_wl / sqrt(U_ww U_ll), cut to [-1, 1]; its interval has a meaning if it is less than all of that.

        U are unbiased and so may break Cauchy's inequality: see `may_be_parallel`.
        """
        return clipped(self._cosine, -1.0, 1.0)

    @property
    def may_be_parallel(self) -> bool:
        """Whether the mean scores can't be told from parallel: cosine 1, an empty band, no loss that disentangles."""
        return not self._cosine.high < 1.0

    @property
    def norm_ratio(self) -> Estimate:
        """sqrt(U_ll / U_ww), |mean rejected score| / |mean chosen score|: the incentive ratio at the band's centre."""
        return clipped(self._ratio((1, 1), (0, 0)), 0.0, math.inf, math.sqrt)

    @property
    def band(self) -> tuple[Estimate, Estimate]:
        """(U_wl / U_ww, U_ll / U_lw): incentive ratios between which the set is ideal; (0, inf) where U_wl <= 0.

        U_lw = U_wl but for products of two sorts of pairs. Where `may_be_parallel`, the ends may come out in the wrong
        order: then too the band may be empty, or not.
        """
        lower, upper = self._ratio((0, 1), (0, 0)), self._ratio((1, 1), (1, 0))
        if self.products[1, 0] <= 0:
            is_known = self._product(1, 0).high < 0
            upper = replace(upper, value=math.inf, low=math.inf if is_known else 0.0, high=math.inf)
        return clipped(lower, 0.0, math.inf), clipped(upper, 0.0, math.inf)

    def move(self, incentive_chosen: float, incentive_rejected: float) -> SetMove:
        """What one step does under incentives that are the same for all pairs.

        Where they differ from pair to pair this takes mean incentives on mean scores. What that neglects is, for either
        side, the covariance over pairs j between j's incentive and the product of j's score with the mean score of that
        side. `move_along` neglects nothing.

        Args:
            incentive_chosen: d_w, or its mean over pairs.
            incentive_rejected: d_l, likewise.
        """
        weights = self.products.new_zeros(len(self.products))
        weights[0], weights[1] = incentive_chosen, -incentive_rejected
        return self._move(weights)

    def move_along(self, direction: int) -> SetMove:
        """What one step along a further direction does: exact for incentives that differ from pair to pair.

        The direction is the sum of d_wj S_wj - d_lj S_lj; D_w is the mean over pairs i and j of different prompts of
        <S_wi, d_wj S_wj - d_lj S_lj>.
        """
        return self._move(
            self.products.new_zeros(len(self.products)).index_fill_(0, torch.tensor([direction]), 1.0)
        )

    def epoch(self, pairs: int | None = None) -> SetGeometry:
        """M = ((N - k) U + own) / N in the place of U: what an epoch over N pairs does to these very pairs, per step.

        k is `pairs_per_prompt`, 1 where all prompts differ. For N = all pairs that were summed M is |T|^2 / N^2, the
        plain mean of the Gram matrix. The interval is that of an epoch over other pairs like these.
        """
        n, k = pairs or self.pairs, self.pairs_per_prompt
        return replace(
            self,
            products=((n - k) * self.products + self.own) / n,
            replicates=torch.stack(
                [((n - k) * self.replicates[:, 0] + self.replicates[:, 1]) / n, self.replicates[:, 1]], 1
            ),
        )

    @property
    def _cosine(self) -> Estimate:
        value, replicates = _cosine(self.products), _cosine(self.replicates[:, 0])
        return self.jackknife.number(float(value), replicates, target=1.0)

    def _product(self, left: int, right: int) -> Estimate:
        return self.jackknife.number(float(self.products[left, right]), self.replicates[:, 0, left, right])

    def _ratio(self, top: tuple[int, int], bottom: tuple[int, int]) -> Estimate:
        replicates = torch.stack([self.replicates[:, 0, i, j] for i, j in (top, bottom)], 1)
        return self.jackknife.ratio(float(self.products[top]), float(self.products[bottom]), replicates)

    def _move(self, weights: Tensor) -> SetMove:
        """Of mean log-probs along a combination of directions, `(D,)`."""
        values, replicates = self.products[:2] @ weights, self.replicates[:, 0, :2] @ weights
        (up, down), (ups, downs) = values.tolist(), replicates.unbind(1)
        number, common, gain = self.jackknife.number, (up + down) / 2, up - down
        chosen, rejected, margin = number(up, ups), number(down, downs), number(gain, ups - downs)
        drift = self.jackknife.ratio(
            common,
            gain,
            torch.stack([(ups + downs) / 2, ups - downs], 1),
            target=EDGE + abs(common / gain) if gain else EDGE,
            rules_out=lambda low, high: not low < -EDGE < EDGE < high,
        )
        if not gain > 0:
            drift = Estimate(
                math.nan, -math.inf, math.inf, has_meaning=False, pairs_needed=margin.pairs_needed
            )
        floor = RESOLUTION[torch.float32] * self.products[:2].abs() @ weights.abs()
        nothing = torch.full((1,), torch.nan)
        prediction = Prediction(values[:1], values[1:], floor[:1], floor[1:], nothing, nothing)
        is_certain = chosen.excludes_zero and rejected.excludes_zero
        return SetMove(chosen, rejected, margin, drift, prediction.regimes[0], is_certain)


def drift(incentive_chosen: Tensor, incentive_rejected: Tensor, block: Tensor) -> Tensor:
    """(D_w + D_l) / (2 (D_w - D_l)): nats of both log-probs per nat of margin gained; NaN where none is.

    Law: for equal incentives (U_ww - U_ll) / (2 (U_ww - 2 U_wl + U_ll)), so its sign tells whose mean score is longer.

    Args:
        incentive_chosen: d_w, of any shape.
        incentive_rejected: d_l, of that shape.
        block: (U_ww, U_wl, U_ll), `(..., 3)`.

    Examples:
        >>> one = torch.tensor(1.0)
        >>> float(drift(one, one, torch.tensor([3.0, 2.0, 1.5])))  # both rise by 1.5 nats per nat of margin
        1.5
        >>> float(drift(one, 3 * one, torch.tensor([4.0, 1.0, 1.0])))  # the chosen rises, the rejected falls
        -0.1666666716337204
    """
    sq_chosen, inner, sq_rejected = block.unbind(-1)
    up = incentive_chosen * sq_chosen - incentive_rejected * inner
    down = incentive_chosen * inner - incentive_rejected * sq_rejected
    return torch.where(up > down, (up + down) / (2 * (up - down)), torch.nan)


def by_kind(sums: Sums, kinds: Sequence[str]) -> dict[tuple[str, str], SetGeometry]:
    """For every (a, b): mean products of a's scores with b's, that is what a step on kind b does to kind a.

    Args:
        sums: products of group sums.
        kinds: kind of each group.
    """
    names = sorted(set(kinds))
    return {(a, b): SetGeometry.from_sums(sums, kinds, of=a, by=b) for a in names for b in names}


def sums_of_gram(gram: Tensor, groups: Tensor, prompts: Sequence[str], weights: Tensor | None = None) -> Sums:
    """Products of group sums from the Gram matrix of all rows: then any loss is exact afterwards.

    Args:
        gram: `(2N, 2N)`, chosen rows first.
        groups: `(N,)` int64, group of each pair; all pairs of a prompt in one.
        prompts: `(N,)`, what tells prompts apart.
        weights: `(L, 2N)` of further directions, such as incentives (d_w, -d_l).
    """
    n, count, kernel = len(groups), int(groups.max()) + 1, gram.double()
    rows = torch.block_diag(torch.ones(1, n), torch.ones(1, n)).double()
    rows = rows if weights is None else torch.cat([rows, weights.double()])
    is_in = groups == torch.arange(count)[:, None]  # (G, N)
    summed = rows * is_in.double().repeat(1, 2)[:, None]  # (G, D, 2N)
    firsts = {prompt: pair for pair, prompt in reversed(list(enumerate(prompts)))}
    first = torch.tensor([firsts[prompt] for prompt in prompts])
    is_same = first[:, None] == first
    return GramSums(
        products=torch.einsum("gdr,her->gdhe", summed, summed @ kernel),
        own=torch.einsum("gdr,ger->gde", summed, summed @ (kernel * is_same.repeat(2, 2))),
        pairs=is_in.sum(1),
        squares=(is_in * is_same.sum(1)).sum(1),
        prompts=is_in[:, first.unique()].sum(1),
    )


@dataclass(frozen=True)
class GramSums:
    """See `Sums`."""

    products: Tensor
    own: Tensor
    pairs: Tensor
    squares: Tensor
    prompts: Tensor


def _means(sums: Sums, left: Tensor, right: Tensor) -> Tensor:
    """U and own terms `(2, D, D)` of groups weighted by `left` and `right`, `(G,)` each."""
    is_known = sums.own.isfinite().all(-1).all(-1)
    itself = torch.einsum("gdge->gde", sums.products)
    within = torch.where(is_known[:, None, None], sums.own, itself)
    squares = torch.where(is_known, sums.squares, sums.pairs**2).double()
    both, pairs = left * right, sums.pairs.double()
    total = torch.einsum("g,gdhe,h->de", left, sums.products, right) - torch.einsum("g,gde->de", both, within)
    count = (left @ pairs) * (right @ pairs) - both @ squares
    shared = both @ pairs
    own = torch.einsum("g,gde->de", both, sums.own) / shared if shared else torch.zeros_like(total)
    return torch.stack([total / count if count > 0 else torch.full_like(total, torch.nan), own])


def _cosine(products: Tensor) -> Tensor:
    """U_wl / sqrt(U_ww U_ll) of `(..., D, D)`; NaN where a square isn't positive."""
    squares = products[..., 0, 0].clamp(min=0) * products[..., 1, 1].clamp(min=0)
    return torch.where(squares > 0, products[..., 0, 1] / squares.sqrt(), torch.nan)
