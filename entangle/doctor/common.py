"""Rules for every run: numbers that aren't finite, runs in which nothing trains, gradients that explode."""

from __future__ import annotations

import pandas as pd

from entangle.doctor.finite import not_finite
from entangle.doctor.log import TrainingLog
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.still import nothing_trains
from entangle.doctor.trends import LEAST_ROWS, highest, since

SPIKE = 100.0
"""Factor over the rows around at which a single row is worth a note."""


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
