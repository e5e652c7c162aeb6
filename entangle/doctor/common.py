"""Rules for every run: numbers that aren't finite, runs in which nothing trains, gradients that explode."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from entangle.doctor.log import NotFinite, TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS, highest, since, trend

SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_CORE = (*SIDES, "loss", "grad_norm", "rewards/margins", "reward", "reward_std", "kl", "entropy")
"""Metrics without which nothing is learned; any other may be NaN and all be well."""

SPIKE = 100.0
"""Factor over the rows around at which a single row is worth a note."""

_AT_ONCE = 0.1
"""A loss scaler settles within the first tenth of the rows (three at least)."""


def not_finite(log: TrainingLog, threshold: float) -> Finding | None:
    """A metric isn't a finite number: which, when, and whether it recovered."""
    gaps = [gap for gap in log.not_finite if gap.split in (None, log.judged)]
    if not gaps:
        return None
    ends = [gap for gap in gaps if _is_the_end(log, gap, threshold)]
    said = _said(log, ends or gaps)
    step = min(gap.steps[0] for gap in ends or gaps)
    numbers = {gap.metric: float(len(gap.steps)) for gap in ends or gaps}
    if ends:
        step = min(gap.steps[_last_stretch(log, gap)] for gap in ends)
        zero = log.series("loss")
        zero = zero[(zero.index >= step) & (zero == 0)]
        advice = (
            " A loss of 0.0 from there on isn't success: it is what is logged for a loss that isn't a number."
            if len(zero)
            else ""
        )
        return Finding(
            f"From step {step} on nothing is learned: {'; '.join(said)}.{advice} In float16 this is "
            "overflow: bf16 has the "
            f"range. The last good checkpoint is before step {step}.",
            step,
            numbers,
        )
    return Finding(f"Not finite, and no harm seen from it: {'; '.join(said)}.", step, numbers, "note")


def _is_the_end(log: TrainingLog, gap: NotFinite, threshold: float) -> bool:
    """Whether a metric of training that learning depends on ended not finite, or was so in too many rows."""
    if gap.split is not None or gap.metric not in _CORE or _is_one_sided(log, gap):
        return False
    return not gap.recovered or len(gap.steps) > threshold * gap.rows


def _is_one_sided(log: TrainingLog, gap: NotFinite) -> bool:
    """Whether, wherever it wasn't finite, the other side or nothing but the margin was: batches of one kind (KTO)."""
    if gap.metric not in (*SIDES, "rewards/margins", "logits/chosen", "logits/rejected"):
        return False
    sides = [log.bad_steps(f"rewards/{side}", f"logps/{side}") for side in ("chosen", "rejected")]
    learns = log.bad_steps("loss", "grad_norm")
    return not (sides[0] & sides[1]) and not (set(gap.steps) & learns) and any(sides)


def _last_stretch(log: TrainingLog, gap: NotFinite) -> int:
    """Where in a metric's steps its last unbroken stretch begins."""
    finite = log.series(gap.metric)
    before = int(finite.index[-1]) if len(finite) and not gap.recovered else -1
    return next((place for place, step in enumerate(gap.steps) if step > before), 0)


def _said(log: TrainingLog, gaps: Sequence[NotFinite]) -> list[str]:
    """What wasn't finite, and when; metrics of the same rows in one breath."""
    by_when: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for gap in sorted(gaps, key=lambda gap: (gap.steps, gap.metric)):
        by_when.setdefault((gap.steps, _when(log, gap)), []).append(gap.metric)
    return [f"{', '.join(metrics)}{when}" for (_, when), metrics in by_when.items()]


def _when(log: TrainingLog, gap: NotFinite) -> str:
    where = "" if gap.split is None else f" of the evaluation{f' {gap.split}' * bool(gap.split)}"
    if len(gap.steps) == gap.rows:
        when = f"in all {gap.rows} rows" if gap.rows > 1 else f"at step {gap.steps[0]}"
    elif len(gap.steps) == 1:
        when = f"at step {gap.steps[0]}"
    else:
        when = f"in {len(gap.steps)} of {gap.rows} rows, steps {gap.steps[0]} to {gap.steps[-1]}"
    return f"{where} {when}{_why(log, gap)}"


def _why(log: TrainingLog, gap: NotFinite) -> str:
    if gap.split is None and _is_one_sided(log, gap):
        return " (a batch without such answers has no mean of them, as in KTO)"
    settled = max(3, _AT_ONCE * gap.rows)
    if gap.metric == "grad_norm" and gap.recovered and gap.steps[-1] in _first(log, gap, settled):
        return " (the loss scaler of float16 settles, and skips these steps)"
    if gap.recovered:
        return ", finite after"
    return "" if gap.split is None or len(gap.steps) == gap.rows else ", its last"


def _first(log: TrainingLog, gap: NotFinite, rows: float) -> set[int]:
    steps = sorted({*gap.steps, *log.series(gap.metric).index})
    return set(steps[: int(rows)])


def nothing_trains(log: TrainingLog, threshold: float) -> Finding | None:
    """No gradient in any row, or rewards that never leave the rounding: the run trains nothing."""
    return _still_groups(log) if log.family == "groups" else _still_pairs(log, threshold)


def is_zero(series: pd.Series, least: int = 3) -> bool:
    """Whether a metric is exactly 0 in every row, of which there are some."""
    return len(series) >= least and bool((series == 0).all())


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
    if not no_gradient or moves(log):
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
    return Finding(
        f"Nothing trains: grad_norm is exactly 0 in all {len(gradient)} rows{same}: no parameter is trained "
        "(an adapter "
        f"that was loaded frozen, is_trainable=False).{off}",
        int(gradient.index[0]),
        {"rows": float(len(gradient)), "first_reward": float(offset)},
    )


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


def gradient_explodes(log: TrainingLog, threshold: float) -> Finding | None:
    """The gradient's norm has grown out of all proportion, and stays there."""
    gradient = log.series("grad_norm")
    if len(gradient) < 2 * LEAST_ROWS:
        return None
    usual = float(gradient.iloc[: max(3, len(gradient) // 5)].median())
    last = float(gradient.iloc[-max(3, len(gradient) // 10) :].median())
    if usual <= 0:
        return None
    if last <= threshold * usual:
        return _spike(gradient)
    step = since(gradient > threshold * usual / 2)
    return Finding(
        f"grad_norm goes from {usual:.2g} to {last:.2g}{f', from step {step} on' * (step is not None)}: "
        "clipping keeps the direction of a gradient "
        "that is mostly noise by then. Lower the learning rate, or go back to the checkpoint before.",
        step,
        {"start": usual, "end": last},
    )


def _spike(gradient: pd.Series) -> Finding | None:
    """Single rows far above those around them: clipping keeps their harm small."""
    around = gradient.rolling(7, center=True, min_periods=4).median()
    high = gradient[(gradient > SPIKE * around) & (around > 0)]
    if high.empty:
        return None
    step = highest(high)
    return Finding(
        f"grad_norm jumps to {high.max():.2g} at step {step} (usually {gradient.median():.2g}; {len(high)} "
        "such rows) and "
        "comes back: with clipping (max_grad_norm) one step of little use.",
        step,
        {"peak": float(high.max()), "usual": float(gradient.median())},
        "note",
    )


COMMON_RULES = (
    Rule(
        "not_finite",
        "both",
        0.2,
        "share of rows that may be non-finite and followed by finite ones",
        "one such row is skipped by the optimiser or the loss scaler; a fifth of them is training in name only, and a "
        "run that ends so has stopped learning",
        not_finite,
        "which pairs have no finite score: entangle probe --model_name_or_path MODEL --dataset_name DATA "
        "(column non_finite); of sampled answers, which reward isn't a number: the trainer's table of completions",
        of_motion=False,
    ),
    Rule(
        "nothing_trains",
        "both",
        1e-3,
        "reward that rounding alone can make",
        "a gradient that is exactly 0 in every row moves nothing; nor do rewards below what 16-bit log-probs of a few "
        "hundred nats leave by chance, times beta 0.1",
        nothing_trains,
        "which parameters train: print(model.get_nb_trainable_parameters()), and requires_grad of the adapter",
        needs=(("grad_norm", "rewards/chosen", "rewards/rejected", "kl"),),
        of_motion=False,
    ),
    Rule(
        "gradient_explodes",
        "both",
        20.0,
        "grad_norm at the end over the start",
        "over a healthy run it changes by a factor of a few; twenty times is another regime",
        gradient_explodes,
        "the entries around the step in the data, and the learning rate's schedule",
        needs=("grad_norm",),
    ),
)
"""The rules, in the order in which they are reported."""
