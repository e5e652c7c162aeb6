"""Predictions against real steps: take one SGD step on a pair's loss and measure both log-probs again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from entangle.analysis.geometry import PairGeometry, logp_resolution
from entangle.analysis.predictions import geometry_of, logps_of
from entangle.analysis.real_steps import STEP
from entangle.analysis.regimes import predict
from entangle.data import TokenizedPair
from entangle.models import Policy
from entangle.scores import row_logps, token_logps
from entangle.scores.float64 import in_float64
from entangle.scores.rows import RowBatch
from losses import PairLogps, PreferenceLoss

STEP_COLUMNS = [
    "index",
    "loss",
    "response",
    "learning_rate",
    "predicted",
    "measured",
    "measured_half",
    "floor",
]


def measure_steps(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: RowBatch,
    loss: PreferenceLoss,
    reference: Tensor | None,
    rates: Sequence[float],
) -> Tensor:
    """Changes of both log-probs, `(rates, 2)` nats, by one step of `torch.optim.SGD` on one pair's loss.

    Every step starts from the same parameters, which are restored bit for bit afterwards, their gradients too.

    Args:
        model: the policy, in eval mode.
        parameters: the probed parameters, those that the step moves.
        batch: one pair, two rows.
        loss: the loss stepped on.
        reference: `(2,)` reference log-probs, or None.
        rates: learning rates.
    """

    def of_tokens(tokens: Tensor) -> Tensor:
        return loss.per_pair(pair_logps(batch, tokens.sum(1, dtype=torch.float64), reference)).mean()

    return step_changes(model, parameters, batch, of_tokens, rates)


def step_changes(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: RowBatch,
    loss: Callable[[Tensor], Tensor],
    rates: Sequence[float],
) -> Tensor:
    """Changes of every row's log-prob, `(rates, rows)` nats, by one step of `torch.optim.SGD` on a loss of the rows.

    Every step starts from the same parameters, which are restored bit for bit afterwards, their gradients too.

    Args:
        model: the policy, in eval mode.
        parameters: the probed parameters, those that the step moves.
        batch: the rows.
        loss: from the log-probs of their tokens, `(rows, T - 1)`, 0 where a token isn't scored.
        rates: learning rates.
    """
    saved = {name: p.detach().clone() for name, p in parameters.items()}
    grads = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        tokens = token_logps(model, batch)
        before = tokens.detach().sum(1, dtype=torch.float64)
        loss(tokens).backward()
        changes = []
        for rate in rates:
            torch.optim.SGD(parameters.values(), lr=rate).step()
            changes.append(row_logps(model, batch) - before)
            _copy(saved, parameters)
        return torch.stack(changes)
    finally:
        _copy(saved, parameters)
        for name, p in parameters.items():
            p.grad = grads[name]


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])


def pair_logps(batch: RowBatch, logps: Tensor, reference: Tensor | None) -> PairLogps:
    """Row log-probs `(2n,)` of a batch of pairs as what a loss reads."""
    chosen, rejected = logps.chunk(2)
    length_chosen, length_rejected = batch.lengths.to(logps).chunk(2)
    ref_chosen, ref_rejected = (None, None) if reference is None else reference.to(logps).chunk(2)
    return PairLogps(chosen, rejected, length_chosen, length_rejected, ref_chosen, ref_rejected)


def verify_pair(
    measure: Callable[[Sequence[float]], Tensor],
    predicted: tuple[float, float],
    floor: tuple[float, float],
    noise: tuple[float, float] = (0.0, 0.0),
    step: float = STEP,
) -> list[dict[str, Any]]:
    """One row per response: predicted and measured change of a full and of a half step, in nats.

    Args:
        measure: learning rates -> measured changes `(rates, 2)`.
        predicted: first-order changes per unit learning rate.
        floor: sizes per unit learning rate below which the arithmetic can't tell a sign.
        noise: error of a measured log-prob, nats.
        step: predicted change of the response that moves more; sets the learning rate.
    """
    rate = step / max(abs(value) for value in predicted)
    full, half = measure([rate, rate / 2]).tolist()
    return [
        {
            "response": response,
            "learning_rate": rate,
            "predicted": rate * predicted[i],
            "measured": full[i],
            "measured_half": half[i],
            "floor": rate * floor[i] + noise[i] + step * step,
        }
        for i, response in enumerate(("chosen", "rejected"))
    ]


def sample_indices(indices: Sequence[int], count: int, seed: int = 0) -> list[int]:
    """`count` of the pairs, drawn without replacement, in dataset order."""
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(indices), size=min(count, len(indices)), replace=False)
    return [indices[i] for i in sorted(chosen)]


def verify_losses(
    policy: Policy,
    pairs: Mapping[int, TokenizedPair],
    rows: pd.DataFrame,
    predictions: pd.DataFrame,
    losses: Sequence[PreferenceLoss],
    count: int,
    resolution: float,
    advance: Callable[[int], None],
) -> pd.DataFrame:
    """Real SGD steps for `count` pairs and every loss: one row per pair, loss and response.

    A batch-coupled loss sees the pair alone, in the prediction and in the step. A pair on which a loss does
    nothing (both incentives 0) takes no step.

    Args:
        policy: the policy; its parameters are left as they were.
        pairs: the tokenised pairs by dataset index.
        rows: the probe's rows of the pairs.
        predictions: its rows of predictions, which say which pairs were scored.
        losses: the losses to step on.
        count: number of pairs.
        resolution: relative error of the geometry.
        advance: told of every finished pair and loss.
    """
    indices = sample_indices(sorted(predictions["index"].unique().tolist()), count)
    by_index = rows.set_index("index")
    found: list[dict[str, Any]] = []
    with in_float64(policy.model) as is_exact:
        share = 0.0 if is_exact else logp_resolution(resolution)
        for index in indices:
            row = by_index.loc[[index]]
            batch = policy.collate([pairs[index]])
            reference = policy.reference.logps(batch, [pairs[index]])
            for loss in losses:
                steps = _verify_one(
                    policy, batch, reference, loss, geometry_of(row, resolution), logps_of(row), share
                )
                found += [{"index": index, "loss": loss.label} | step for step in steps]
                advance(1)
    return pd.DataFrame(found, columns=STEP_COLUMNS)


def _verify_one(
    policy: Policy,
    batch: RowBatch,
    reference: Tensor | None,
    loss: PreferenceLoss,
    geometry: PairGeometry,
    logps: PairLogps,
    share: float,
) -> list[dict[str, Any]]:
    prediction = predict(geometry, loss.incentives(logps))
    predicted = prediction.change_chosen.item(), prediction.change_rejected.item()
    if not any(predicted):
        return []
    floor = prediction.floor_chosen.item(), prediction.floor_rejected.item()
    noise = share * abs(logps.chosen.item()), share * abs(logps.rejected.item())
    return verify_pair(
        lambda rates: measure_steps(policy.model, policy.parameters, batch, loss, reference, rates),
        predicted,
        floor,
        noise,
    )
