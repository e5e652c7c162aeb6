"""The ledger of a training run: what each cause contributed to each log-probability's change.

One optimiser step moves the parameters by delta, and a log-prob with score S by <S, delta> to first order. delta is
a sum, so the change is one too: of the gradient's parts (the gradient is sum_j u_j S_j over the batch's rows, with
u_j = d loss / d logp_j the upstream gradient of row j), of momentum, of weight decay. For AdamW in torch's order:

    delta = -M h - b P m - lr wd theta      M = lr (1 - beta1) / (1 - beta1^t) P      b = lr beta1 / (1 - beta1^t)
    P = 1 / (sqrt(v_t / (1 - beta2^t)) + eps)

with h the clipped gradient, m the average of gradients before the step, v_t that of squares after it. M says how far
a unit of gradient moves a parameter in this very step.

SGD at lr 0.1 on a gradient of 2, the momentum buffer at 1:

    >>> step = sgd_step(torch.tensor(5.0), torch.tensor(2.0), torch.tensor(1.0), lr=0.1, momentum=0.9)
    >>> [round(part.item(), 4) for part in (step.fresh, step.momentum, step.delta)]
    [-0.2, -0.09, -0.29]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

PARTS = ("own", "partner", "others", "momentum", "decay", "clipping", "remainder")
"""Causes of a change, nats each; they add up to `measured`."""

MEANINGS = {
    "own": "its own score",
    "partner": "its partner (the other response of its pair)",
    "others": "other pairs of the batches",
    "momentum": "momentum (gradients of earlier steps)",
    "decay": "weight decay",
    "clipping": "clipping of the gradient",
    "remainder": "the remainder beyond first order",
}


@dataclass(frozen=True)
class ParameterStep:
    """One parameter's part of an optimiser step, taken apart: delta = fresh + momentum + decay.

    Every tensor has the parameter's shape, in float32 at least.

    Args:
        metric: M, so that fresh = -M h.
        fresh: what the step's own, clipped gradient does.
        momentum: what gradients of earlier steps do (with coupled decay, decays of earlier steps too).
        decay: what weight decay does.
    """

    metric: Tensor
    fresh: Tensor
    momentum: Tensor
    decay: Tensor

    @property
    def delta(self) -> Tensor:
        """The whole step."""
        return self.fresh + self.momentum + self.decay


def adamw_step(
    theta: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
) -> ParameterStep:
    """A step of torch's AdamW, or of its Adam (`decoupled=False`), whose decay joins the gradient.

    Args:
        theta: the parameter before the step.
        grad: h, after clipping.
        exp_avg: m before the step.
        exp_avg_sq: v before the step.
        step: t, counting this step: 1 is the first one.
        lr: learning rate of this step.
        betas: (beta1, beta2).
        eps: see above.
        weight_decay: wd.
        decoupled: whether decay bypasses the averages.
    """
    theta, grad, exp_avg, exp_avg_sq = (upcast(x) for x in (theta, grad, exp_avg, exp_avg_sq))
    coupled = 0.0 if decoupled else weight_decay * theta
    square = betas[1] * exp_avg_sq + (1 - betas[1]) * (grad + coupled) ** 2
    preconditioner = 1 / ((square / (1 - betas[1] ** step)).sqrt() + eps)
    rate = lr / (1 - betas[0] ** step)
    metric = rate * (1 - betas[0]) * preconditioner
    return ParameterStep(
        metric=metric,
        fresh=-metric * grad,
        momentum=-rate * betas[0] * preconditioner * exp_avg,
        decay=-lr * weight_decay * theta if decoupled else -metric * coupled,
    )


def sgd_step(
    theta: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> ParameterStep:
    """A step of torch's SGD; its decay joins the gradient, and so later momentum.

    Args:
        theta: the parameter before the step.
        grad: h, after clipping.
        buffer: the momentum buffer before the step; None on the first one, which isn't dampened.
        lr: learning rate of this step.
        momentum: mu.
        dampening: as in torch.
        nesterov: as in torch.
        weight_decay: wd.
    """
    theta, grad = upcast(theta), upcast(grad)
    share = 1.0 if buffer is None else 1 - dampening
    rate = lr * (1 + momentum * share if nesterov else share if momentum else 1.0)
    old = torch.zeros_like(theta) if buffer is None else upcast(buffer)
    return ParameterStep(
        metric=torch.full_like(theta, rate),
        fresh=-rate * grad,
        momentum=-lr * momentum * (momentum if nesterov else 1.0) * old,
        decay=-rate * weight_decay * theta,
    )


def upcast(value: Tensor) -> Tensor:
    """Detached, in float32 at least."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


@dataclass(frozen=True)
class Products:
    """First-order products of n pairs' scores with a step; `(n, 2)` each: chosen, rejected.

    Args:
        square: <S, M S> of the response itself.
        inner: `(n,)`, <S_chosen, M S_rejected>.
        fresh: <S, fresh>.
        momentum: <S, momentum>.
        decay: <S, decay>.
    """

    square: Tensor
    inner: Tensor
    fresh: Tensor
    momentum: Tensor
    decay: Tensor


def products(scores: Mapping[str, Tensor], step: Mapping[str, ParameterStep]) -> Products:
    """From scores written out, `(2n, numel)` by parameter: n chosen rows, then n rejected ones. Sums in float64.

    Args:
        scores: `(2n, numel)` by parameter name: n chosen rows, then n rejected ones, nats per unit of parameter.
        step: the coming step of every parameter, by the same names.
    """
    square = inner = fresh = momentum = decay = torch.zeros((), dtype=torch.float64)
    for name, part in step.items():
        rows = scores[name]
        weighted = rows * part.metric.ravel()
        square = square + (weighted * rows).sum(1, dtype=torch.float64).cpu()
        chosen, rejected = weighted.chunk(2)[0], rows.chunk(2)[1]
        inner = inner + (chosen * rejected).sum(1, dtype=torch.float64).cpu()
        fresh, momentum, decay = (
            total + (rows.double() @ direction.ravel().double()).cpu()
            for total, direction in ((fresh, part.fresh), (momentum, part.momentum), (decay, part.decay))
        )
    by_pair = (value.view(2, -1).T for value in (square, fresh, momentum, decay))
    square, fresh, momentum, decay = by_pair
    return Products(square, inner, fresh, momentum, decay)


def account(found: Products, upstream: Tensor, clip: float, measured: Tensor) -> dict[str, Tensor]:
    """Split measured changes into `PARTS`, `(n, 2)` each (chosen, rejected), nats. They add up exactly.

    own = -u_q <S_q, M S_q> and partner = -u_p <S_q, M S_p> are zero for a pair that isn't in the batch; others is
    the rest of the unclipped gradient's effect, of which clipping takes back the share 1 - clip (in the metric that the
    clipped gradient made). remainder = measured - everything else: second order, and rounding.

    Args:
        found: products of the pairs' scores with the step.
        upstream: `(n, 2)`, u = d loss / d logp of both rows, summed over the step's micro-batches and averaged over
            processes as the gradient is; 0 for a pair that isn't in the batch.
        clip: s, by which clipping multiplied the gradient; 1 without.
        measured: `(n, 2)`, change of the log-probs over the step.
    """
    unclipped = found.fresh / clip
    own = -upstream * found.square
    partner = -upstream.flip(1) * found.inner[:, None]
    parts = {
        "own": own,
        "partner": partner,
        "others": unclipped - own - partner,
        "momentum": found.momentum,
        "decay": found.decay,
        "clipping": found.fresh - unclipped,
    }
    return parts | {"remainder": measured - sum(parts.values())}


def cumulate(ledger: pd.DataFrame) -> pd.DataFrame:
    """The ledger summed over steps: one row per pair and side, in nats.

    Columns: index, side, steps (accounted for), in_batch (steps that trained on the pair), total (the log-prob after
    the last accounted step minus that before the first), unaccounted (total minus the accounted steps: 0 unless steps
    were skipped), measured and `PARTS`, which add up to measured.

    Args:
        ledger: rows of a run, as the callback writes them.
    """
    ordered = ledger.sort_values("step")
    groups = ordered.groupby(["index", "side"], sort=True)
    sums = groups[["measured", *PARTS]].sum()
    ends = ordered.assign(after=ordered["logps"] + ordered["measured"]).groupby(["index", "side"], sort=True)
    total = ends["after"].last() - ends["logps"].first()
    facts = pd.DataFrame(
        {
            "steps": groups["step"].nunique(),
            "in_batch": groups["in_batch"].sum(),
            "total": total,
            "unaccounted": total - sums["measured"],
        }
    )
    return facts.join(sums).reset_index()


def over_time(ledger: pd.DataFrame, side: str) -> pd.DataFrame:
    """Running sums of `PARTS` and of measured, as means over pairs, one row per step (the index); one side.

    Args:
        ledger: rows of a run; those of one pair for that pair's own curves.
        side: `chosen` or `rejected`.
    """
    rows = ledger[ledger["side"] == side]
    return rows.groupby("step")[[*PARTS, "measured"]].mean().cumsum()


def describe_change(ledger: pd.DataFrame, side: str = "chosen") -> str:
    """Why a log-prob has moved, in one sentence: causes by their size; means over the ledger's pairs.

    Args:
        ledger: rows of a run; those of one pair for that pair alone.
        side: `chosen` or `rejected`.
    """
    sums = cumulate(ledger)
    rows = sums[sums["side"] == side]
    mean = rows[["measured", "unaccounted", *PARTS]].mean()
    causes = sorted(PARTS, key=lambda part: -abs(mean[part]))
    listed = [f"{mean[part]:+.3g} from {MEANINGS[part]}" for part in causes if abs(mean[part]) >= SMALLEST]
    who = f"pair {rows['index'].iloc[0]}" if len(rows) == 1 else f"{len(rows)} pairs, on average"
    moved = "fell" if mean["measured"] < 0 else "rose"
    sentence = (
        f"The {side} log-prob ({who}) {moved} by {abs(mean['measured']):.3g} nats in {int(rows['steps'].max())} steps"
        f"{': ' if listed else ''}{', '.join(listed)}."
    )
    if abs(mean["unaccounted"]) >= SMALLEST:
        sentence += f" In steps that the ledger doesn't cover it moved by {mean['unaccounted']:+.3g} nats."
    return sentence


SMALLEST = 0.0005
"""Nats below which `describe_change` leaves a cause out."""
