"""Entanglement across pairs: what the gradients of all the other pairs do to each pair's log-probs.

A pair's regime is about one step on that pair alone. Training takes steps on batches of other pairs, and a pair is in
one batch of an epoch only. With S_wi, S_li the scores of pair i and d_wj, d_lj the incentives of pair j, N pairs in
batches of b at learning rate lr change its chosen log-prob over an epoch, to first order and with scores held still, by

    (lr / b) [ own + partner + (N - 1) (pull + push) ]

    own  = d_wi |S_wi|^2        partner = -d_li <S_wi, S_li>                                    the pair's own step
    pull = mean over j != i of d_wj <S_wi, S_wj>      push = -mean over j != i of d_lj <S_wi, S_lj>   all others

(rejected: the same with S_li in front). Products between pairs are small, and there are N - 1 of them.

The set is like one pair: with U_ww, U_wl, U_ll the means over i != j of <S_wi, S_wj>, <S_wi, S_lj>, <S_li, S_lj>, the
mean chosen log-prob falls, under equal incentives, iff U_wl > U_ww: the condition of arXiv 2410.13828 (its section 3)
with mean gradients. U are unbiased (no i = j), with standard errors of U-statistics over pairs.

Two pairs, scores along one line: chosen 2 and 1, rejected 1 and 1, incentives 1. Pair 0 gains 2 * 1 from the other's
chosen score and loses 2 * 1 to the other's rejected one.

    >>> chosen, rejected, one = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.ones(2)
    >>> means = torch.stack([torch.stack([side * 1.5, side * 1.0], 1) for side in (chosen, rejected)], 1).double()
    >>> block = torch.stack([chosen**2, chosen * rejected, rejected**2]).double()
    >>> Across("dpo", one, one, block, means, means, 2).parts[:, 0, 0].tolist()
    [4.0, -2.0, 2.0, -2.0]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.geometry import SIDES
from entangle.analysis.regimes import Prediction, Regime

PARTS = ("own", "partner", "pull", "push")
"""What acts on a log-prob over an epoch."""


@dataclass(frozen=True)
class Across:
    """One loss on N pairs.

    Args:
        loss: its label.
        chosen: d_w, `(N,)`.
        rejected: d_l, `(N,)`.
        block: A, c, B of every pair, `(3, N)`.
        moved: `(N, 2, 2)`: products of both scores of every pair (axis 1) with mean_j d_wj S_wj and mean_j d_lj S_lj.
        mean: `(N, 2, 2)`: the same with mean_j S_wj and mean_j S_lj.
        size: pairs of an epoch.
    """

    loss: str
    chosen: Tensor
    rejected: Tensor
    block: Tensor
    moved: Tensor
    mean: Tensor
    size: int

    @property
    def parts(self) -> Tensor:
        """`(4, 2, N)`: `PARTS` by side; pull and push as means over the other pairs."""
        (own_w, inner, own_l), n = self.block, len(self.chosen)
        own = torch.stack([self.chosen * own_w, -self.rejected * own_l])
        partner = torch.stack([-self.rejected * inner, self.chosen * inner])
        itself = torch.stack(
            [torch.stack([own[0], partner[0]], -1), torch.stack([partner[1], own[1]], -1)], 1
        )
        others = (n * self.moved * torch.tensor([1.0, -1.0]) - itself) / (n - 1)  # (N, side, pull or push)
        pull, push = others.permute(2, 1, 0)
        return torch.stack([own, partner, pull, push])

    @property
    def epoch(self) -> Tensor:
        """`(4, 2, N)`: what each part gives over an epoch, nats per unit of learning rate / batch size."""
        return self.parts * torch.tensor([1.0, 1.0, self.size - 1.0, self.size - 1.0]).view(4, 1, 1)

    @property
    def exerted(self) -> Tensor:
        """`(2, N)`: what pair i's step does to the other pairs' log-probs of a side, mean over them."""
        (own_w, inner, own_l), n = self.block, len(self.chosen)
        found = []
        for k, (by_chosen, by_rejected) in enumerate(((own_w, inner), (inner, own_l))):
            done = self.chosen * (n * self.mean[:, 0, k] - by_chosen)
            found.append((done - self.rejected * (n * self.mean[:, 1, k] - by_rejected)) / (n - 1))
        return torch.stack(found)

    def rows(self, resolution: float) -> pd.DataFrame:
        """One row per pair, with the columns of `AcrossResult.rows`."""
        parts, epoch = self.parts, self.epoch
        change, floor = epoch.sum(0), resolution * epoch.abs().sum(0)
        nothing = torch.full_like(change[0], torch.nan)
        prediction = Prediction(change[0], change[1], floor[0], floor[1], nothing, nothing)
        columns = {
            f"{name}_{side}": parts[i, k].numpy()
            for i, name in enumerate(PARTS)
            for k, side in enumerate(SIDES)
        }
        columns |= {f"epoch_{side}": change[k].numpy() for k, side in enumerate(SIDES)}
        columns |= {f"exerted_{side}": self.exerted[k].numpy() for k, side in enumerate(SIDES)}
        return pd.DataFrame(columns | {"epoch_regime": list(map(str, prediction.regimes))})

    def summary(self) -> dict[str, Any]:
        """Means of the parts over an epoch; of their sum, and of what the others do, with errors; the regime."""
        epoch, n = self.epoch, len(self.chosen)
        means = {
            side: {name: float(epoch[i, k].mean()) for i, name in enumerate(PARTS)}
            for k, side in enumerate(SIDES)
        }
        suffered, exerted = self.parts[2:].sum(0), self.exerted  # (side, N): what the others do to pair i
        for k, side in enumerate(SIDES):
            others = (self.size - 1) * (suffered[k] + exerted[k])
            change = others + self.parts[:2, k].sum(0)
            means[side] |= {
                "change": float(epoch[:, k].sum(0).mean()),
                "error": float(change.std() / n**0.5),
                "others": float(epoch[2:, k].sum(0).mean()),
                "others_error": float(others.std() / n**0.5),
            }
        up, down = means["chosen"]["change"] > 0, means["rejected"]["change"] < 0
        regime = Regime.IDEAL if up and down else Regime.BOTH_UP if up else Regime.BOTH_DOWN
        return means | {"regime": str(regime if up or down else Regime.INVERTED), "rho": self._ratio()}

    def _ratio(self) -> float:
        return float((self.chosen / self.rejected).nanmedian())


def set_block(block: Tensor, mean: Tensor) -> dict[str, Any]:
    """The set as one pair: U_ww, U_wl, U_ll with standard errors, and what follows from them.

    Args:
        block: A, c, B of every pair, `(3, N)`.
        mean: `(N, 2, 2)`: products of both scores of every pair with mean_j S_wj and mean_j S_lj.
    """
    n = mean.shape[0]
    # (3, N): pair i's mean products with the others, as the left and as the right one
    first = (n * mean[:, [0, 0, 1], [0, 1, 1]].T - block) / (n - 1)
    second = (n * mean[:, [0, 1, 1], [0, 0, 1]].T - block) / (n - 1)
    value, error = first.mean(1), (first + second).std(1) / n**0.5
    sq_chosen, inner, sq_rejected = value.tolist()
    names = ("sq_chosen", "inner", "sq_rejected")
    is_known = sq_chosen > 0 and sq_rejected > 0
    return {
        **dict(zip(names, value.tolist(), strict=True)),
        **{f"{name}_error": e for name, e in zip(names, error.tolist(), strict=True)},
        "alone": dict(zip(names, block.mean(1).tolist(), strict=True)),
        "cosine": inner / (sq_chosen * sq_rejected) ** 0.5 if is_known else float("nan"),
        "norm_ratio": (sq_rejected / sq_chosen) ** 0.5 if is_known else float("nan"),
        "band": [max(0.0, inner / sq_chosen), sq_rejected / inner if inner > 0 else float("inf")]
        if is_known
        else [float("nan")] * 2,
    }
