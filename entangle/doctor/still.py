"""The rule for runs in which nothing trains."""

from __future__ import annotations

import math

import pandas as pd

from entangle.doctor.finite import SIDES
from entangle.doctor.log import TrainingLog
from entangle.doctor.rewards import has_reference
from entangle.doctor.rules import Finding
from entangle.doctor.trends import LEAST_ROWS, SIGMAS, is_zero, trend


def nothing_trains(log: TrainingLog, threshold: float) -> Finding | None:
    """No gradient in any row, or rewards that never leave the rounding: the run trains nothing."""
    return _still_groups(log) if log.family == "groups" else _still_pairs(log, threshold)


def _still_groups(log: TrainingLog) -> Finding | None:
    gradient, kl = log.series("grad_norm"), log.series("kl")
    spread, dead = log.series("reward_std"), log.series("frac_reward_zero_std")
    if is_zero(spread, 1) or (len(dead) and bool((dead == 1).all())):
        return None  # no group has any spread: that is what stops the gradient
    no_gradient, no_kl = is_zero(gradient), is_zero(kl)
    moves = len(kl) > 0 and not no_kl
    if not (no_gradient and not moves) and not (gradient.empty and no_kl and len(kl) >= LEAST_ROWS):
        return None
    names = " and ".join(name for name, zero in (("grad_norm", no_gradient), ("kl", no_kl)) if zero)
    alive = " although groups have spread" if len(spread) or len(dead) else ""
    return Finding(
        f"Nothing trains: {names} {'are' if ' and ' in names else 'is'} exactly 0 in all {max(len(gradient), len(kl))} "
        f"rows{alive}: no parameter is trained (a frozen adapter, is_trainable=False, or an optimiser that never "
        "steps).",
        int((gradient if no_gradient else kl).index[0]),
        {"rows": float(max(len(gradient), len(kl)))},
    )


def _still_pairs(log: TrainingLog, threshold: float) -> Finding | None:
    sides = [log.series(f"rewards/{side}") for side in ("chosen", "rejected")]
    gradient, logged = log.series("grad_norm"), [side for side in sides if len(side) >= 2]
    no_gradient = is_zero(gradient)
    largest = max((float(side.abs().max()) for side in logged), default=math.nan)
    if logged and min(map(len, logged)) >= 3 and largest <= threshold and not _bad_anywhere(log):
        return Finding(
            f"Nothing trains: the rewards stay {_size(largest)} in all {len(logged[0])} rows{_loss(log)}. "
            f"{_cause(log, gradient)}",
            int(logged[0].index[0]),
            {"largest_reward": largest},
        )
    if moves(log) or not (no_gradient or _is_at_its_end(log, threshold)):
        return None
    offset = logged[0].iloc[0] if logged else 0.0
    margin = trend(log.series("rewards/margins"))
    same = (
        ""
        if margin is None
        else (
            f" and nothing changed between the first rows and the last (margin {margin.start:.3g}, then "
            f"{margin.end:.3g})"
        )
    )
    off = (
        f" The rewards' offset ({offset:.3g} for the chosen) is there from the first row: the reference "
        "isn't where the "
        "policy started, so rewards and accuracy are of that difference, not of this run."
        if abs(offset) > threshold
        else ""
    )
    numbers = {"rows": float(len(log.train)), "first_reward": float(offset)}
    if not no_gradient:
        cause = _cause(log, gradient)
        return Finding(
            f"Nothing trains{same.replace(' and', ':', 1)}. {cause}{off}", int(log.train.index[0]), numbers
        )
    return Finding(
        f"Nothing trains: grad_norm is exactly 0 in all {len(gradient)} rows{same}: no parameter is trained "
        "(an adapter "
        f"that was loaded frozen, is_trainable=False).{off}",
        int(gradient.index[0]),
        numbers,
    )


def _is_at_its_end(log: TrainingLog, threshold: float) -> bool:
    """Whether the margin's first row already is where its last ones are, away from 0: an offset, nothing learned."""
    margin = log.series("rewards/margins")
    ends = trend(margin)
    if ends is None or not has_reference(log) or _bad_anywhere(log):
        return False
    of_a_row = float(margin.diff().std()) / 2**0.5
    is_off = abs(ends.end) > max(threshold, 2 * SIGMAS * ends.error)
    return is_off and all(abs(float(row) - ends.end) <= 2 * of_a_row + 1e-12 for row in margin.iloc[:2])


def _bad_anywhere(log: TrainingLog) -> bool:
    return bool(log.bad_steps(*SIDES))


def moves(log: TrainingLog) -> bool:
    """Whether margin, rewards or KL moved since the first rows by more than noise."""
    names = ("rewards/margins", "rewards/chosen", "rewards/rejected", "kl")
    found = [ends for name in names if (ends := trend(log.series(name))) is not None]
    return any(ends.has_risen or ends.has_fallen for ends in found)


def _size(largest: float) -> str:
    return "exactly 0" if largest == 0 else f"within rounding of 0 (at most {largest:.1g})"


def _loss(log: TrainingLog) -> str:
    loss = log.series("loss")
    if loss.empty or float((loss - math.log(2)).abs().max()) > 1e-3:
        return ""
    return ", and the loss at ln 2 = 0.6931, its value before any learning"


def _cause(log: TrainingLog, gradient: pd.Series) -> str:
    logps = [log.series(f"logps/{side}") for side in ("chosen", "rejected")]
    if any(is_zero(side) for side in logps):
        return (
            "The log-probs are 0 too: no token of the answers is scored (cut away by the length limits, or masked), so "
            "there is nothing to learn from."
        )
    rate = log.series("learning_rate")
    if is_zero(rate):
        return "The learning rate is 0 in every row."
    if gradient.empty:
        return (
            "Policy and reference are one model, nothing is trainable, or the learning rate is far too small."
        )
    largest = float(gradient.max())
    if largest < 1e-5:
        return (
            f"grad_norm is {'0' if largest == 0 else f'at most {largest:.1g}'}: policy and reference are one model, or "
            "nothing is trainable."
        )
    return (
        f"grad_norm is as large as {largest:.2g}, so there are gradients: the learning rate"
        + (f" ({rate.max():.2g} at most)" if len(rate) else "")
        + " is far too small, or steps aren't applied, or the reference moves with the policy."
    )
