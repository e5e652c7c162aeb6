"""Curves that training would take a probe's pairs through, in function space: on objects, without files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import RenderableType

from entangle.analysis.forecast import HORIZON, Forecast, Momentum, draw_batches, forecast, rate_for_margin
from entangle.analysis.jackknife import assign_groups
from entangle.analysis.predictions import check_labels, incentives_of, logps_of
from entangle.analysis.sets import SetGeometry, SetMove, sums_of_gram
from entangle.commands.whatif.choice import allowed_losses
from entangle.errors import RunError
from entangle.measure.gram import PairGram
from entangle.measure.set_content import move_content
from entangle.measure.sets import GROUPS
from entangle.tables.base import Shown
from entangle.tables.forecast import forecast_tables
from losses import Incentives, PreferenceLoss

SPLITS = ("trained", "held_out")


@dataclass(frozen=True)
class ForecastResult(Shown):
    """Curves that a probe's pairs would go through, with their gradients held as they are.

    Args:
        curves: one row per loss, seed, step (0 is the start) and split (trained, held_out): means over the split's
            pairs of the log-probs since the start, `chosen` and `rejected`, of their difference, `margin` (nats), and
            `both_fell`, the share of pairs where both lie below their start.
        summary: `pairs`, `held_out`, `metric`, `steps`, `batch_size`, `momentum`, and `losses`: by label the
            `learning_rate` and by split the means over seeds at the last step, each with its `low` and `high` over
            seeds, and `chosen_falls_at`, the first step from which the mean chosen log-prob stays below its start;
            `first_step`, what a step on all pairs does to their means (drift with its interval, exact for incentives
            that differ from pair to pair); `holds_to`, the last step at which the trained pairs' means have moved by no
            more than `HORIZON`.
    """

    curves: pd.DataFrame
    summary: dict[str, Any]

    def renderable(self) -> RenderableType:
        """A row per loss: where both mean log-probs end."""
        return forecast_tables(self.summary)


def forecast_pairs(
    gram: PairGram,
    pairs: pd.DataFrame,
    losses: Sequence[PreferenceLoss],
    *,
    metric: str = "sgd",
    learning_rate: float | None = None,
    batch_size: int = 8,
    steps: int = 20,
    momentum: float | None = None,
    eval_share: float = 0.25,
    seeds: Sequence[int] = (0, 1, 2, 3),
) -> ForecastResult:
    """Train in function space, with any losses, from a Gram matrix and a probe's rows; no model.

    Args:
        gram: of N pairs.
        pairs: the probe's rows of the same pairs, in the same order.
        losses: on summed log-probs.
        metric: of the Gram matrix; it says how the optimiser keeps its memory.
        learning_rate: in that metric; None: each loss's own, see `entangle.analysis.forecast.rate_for_margin`.
        batch_size: pairs per step.
        steps: T.
        momentum: SGD's momentum or AdamW's beta1; None: 0 and 0.9.
        eval_share: share of the pairs that is held out, whole prompts.
        seeds: orders of the batches.

    Raises:
        RunError: fewer pairs to train on than a batch holds, or log-probs that grow without bound.
        ConfigError: a loss needs what the rows don't hold.
    """
    logps, trained = logps_of(pairs), ~held_out(pairs, eval_share)
    check_labels(losses)
    allowed_losses(losses, logps, named=True)
    indices = torch.from_numpy(np.flatnonzero(trained))
    if len(indices) < batch_size:
        raise RunError(
            f"{len(indices)} pairs are left to train on, fewer than a batch of {batch_size}. Choose a smaller "
            "--per_device_train_batch_size or --eval_share, or a larger --limit."
        )
    decay = momentum if momentum is not None else (0.9 if metric == "adamw" else 0.0)
    memory = Momentum.adam(decay) if metric == "adamw" else Momentum.sgd(decay)
    curves, ends = [], {}
    for loss in losses:
        rate = learning_rate or rate_for_margin(gram.products, logps, loss, indices, steps, memory)
        runs = {
            seed: forecast(
                gram.products,
                logps,
                loss,
                draw_batches(indices, batch_size, steps, seed),
                learning_rate=rate,
                momentum=memory,
            )
            for seed in seeds
        }
        if not all(run.chosen.isfinite().all() and run.rejected.isfinite().all() for run in runs.values()):
            raise RunError(
                f"Under {loss.label} log-probs grow without bound at learning rate {rate:.3g}: with gradients held as "
                "they are, steps of this length overshoot. Choose a smaller --learning_rate."
            )
        table = pd.concat([_rows(loss, seed, run, trained) for seed, run in runs.items()], ignore_index=True)
        curves.append(table)
        ends[loss.label] = {
            "learning_rate": rate,
            "holds_to": _holds_to(table),
            "first_step": move_content(_first_step(gram, pairs, incentives_of(loss, logps, batch_size))),
        } | {split: _end(part) for split, part in table.groupby("split", sort=False)}
    summary = {
        "pairs": len(pairs),
        "held_out": int((~trained).sum()),
        "metric": metric,
        "steps": steps,
        "batch_size": batch_size,
        "momentum": decay,
        "seeds": list(seeds),
        "horizon": HORIZON,
        "losses": ends,
    }
    return ForecastResult(pd.concat(curves, ignore_index=True), summary)


def held_out(pairs: pd.DataFrame, share: float) -> np.ndarray:
    """Which pairs aren't trained on, `(N,)` bool: whole prompts, in the order of their hashes, up to `share`."""
    wanted, found = int(share * len(pairs)), np.zeros(len(pairs), dtype=bool)
    for _, rows in pairs.reset_index(drop=True).groupby("prompt_hash", sort=True):
        if found.sum() + len(rows) <= wanted:
            found[rows.index] = True
    return found


def _rows(loss: PreferenceLoss, seed: int, run: Forecast, trained: np.ndarray) -> pd.DataFrame:
    """A row per step and split."""
    moved = torch.stack([run.chosen - run.chosen[0], run.rejected - run.rejected[0]])  # (2, T + 1, N)
    tables = []
    for split, is_in in zip(SPLITS, (trained, ~trained), strict=True):
        if not is_in.any():
            continue
        chosen, rejected = (side[:, torch.from_numpy(is_in)].numpy() for side in moved)
        tables.append(
            pd.DataFrame(
                {
                    "loss": loss.label,
                    "seed": seed,
                    "step": range(len(chosen)),
                    "split": split,
                    "chosen": chosen.mean(1),
                    "rejected": rejected.mean(1),
                    "margin": (chosen - rejected).mean(1),
                    "both_fell": ((chosen < 0) & (rejected < 0)).mean(1),
                }
            )
        )
    return pd.concat(tables)


def _first_step(gram: PairGram, pairs: pd.DataFrame, incentives: Incentives) -> SetMove:
    """What a step on all pairs does to their mean log-probs: exact for incentives that differ from pair to pair."""
    prompts = pairs["prompt_hash"].tolist()
    groups, _ = assign_groups(prompts, GROUPS)
    weights = torch.cat([incentives.chosen, -incentives.rejected])[None]
    return SetGeometry.from_sums(sums_of_gram(gram.products, groups, prompts, weights)).move_along(2)


def _holds_to(table: pd.DataFrame) -> int:
    """The last step up to which the trained pairs' mean log-probs and margin, over seeds, moved at most `HORIZON`."""
    means = table[table["split"] == "trained"].groupby("step")[["chosen", "rejected", "margin"]].mean()
    beyond = np.flatnonzero((means.abs() > HORIZON).any(axis=1))
    return int(beyond[0]) - 1 if len(beyond) else int(means.index.max())


def _end(part: pd.DataFrame) -> dict[str, Any]:
    """Where a split ends, over the seeds."""
    last = part[part["step"] == part["step"].max()]
    ends = {
        name: {
            "mean": float(last[name].mean()),
            "low": float(last[name].min()),
            "high": float(last[name].max()),
        }
        for name in ("chosen", "rejected", "margin", "both_fell")
    }
    course = part.groupby("step")["chosen"].mean()
    above = np.flatnonzero(course.to_numpy() >= 0)
    falls = int(above[-1]) + 1
    return ends | {"chosen_falls_at": falls if falls < len(course) else None}
