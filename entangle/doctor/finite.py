"""The rule for numbers that aren't finite: which, when, whether they recovered, and whether that ends learning."""

from __future__ import annotations

from collections.abc import Sequence

from entangle.doctor.log import NotFinite, TrainingLog
from entangle.doctor.rules import Finding

SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
"""What is logged per side of a pair."""

_CORE = (*SIDES, "loss", "grad_norm", "rewards/margins", "reward", "reward_std", "kl", "entropy")
"""Metrics without which nothing is learned; any other may be NaN and all be well."""

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
        return Finding(
            f"From step {step} on nothing is learned: {'; '.join(said)}.{_advice(ends, bool(len(zero)))} The last good "
            f"checkpoint is before step {step}.",
            step,
            numbers,
        )
    return Finding(f"Not finite, and no harm seen from it: {'; '.join(said)}.", step, numbers, "note")


def _advice(gaps: Sequence[NotFinite], loss_is_zero: bool) -> str:
    """What is known to make such numbers."""
    metrics = {gap.metric for gap in gaps}
    said = []
    if loss_is_zero:
        said.append(
            " A loss of 0.0 from there on isn't success: it is what is logged for a loss that isn't a number."
        )
    if "reward" in metrics:
        said.append(
            " A reward that isn't a number spoils every advantage of its group: see what the reward returns."
        )
    if metrics - {"reward", "reward_std"}:
        said.append(" In float16 this is overflow: bf16 has the range.")
    return "".join(said)


def _is_the_end(log: TrainingLog, gap: NotFinite, threshold: float) -> bool:
    """Whether a metric of training that learning depends on ended not finite, or was so in too many rows."""
    if gap.split is not None or gap.metric not in _CORE or _is_one_sided(log, gap):
        return False
    return not gap.recovered or len(gap.steps) > threshold * gap.rows


def _is_one_sided(log: TrainingLog, gap: NotFinite) -> bool:
    """Whether, wherever it wasn't finite, the other side or nothing but the margin was: batches of one kind (KTO)."""
    if gap.infinite or gap.metric not in (*SIDES, "rewards/margins", "logits/chosen", "logits/rejected"):
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
