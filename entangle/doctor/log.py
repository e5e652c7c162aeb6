"""A training log as two tables, whatever wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd

from entangle.errors import DataError

Family = Literal["preference", "groups"]

TRAINERS: dict[str, Family] = {
    "dpo": "preference", "kto": "preference", "cpo": "preference", "simpo": "preference", "orpo": "preference",
    "grpo": "groups", "rloo": "groups",
}  # fmt: skip
"""Trainers that are told apart, and what they train on: pairs, or groups of sampled answers."""

_STEPS = ("train/global_step", "global_step", "step", "Step", "_step")
"""What a log calls the training step, the surest name first (wandb's `_step` counts its own log calls)."""

_NOT_METRICS = {*_STEPS, "epoch", "total_flos", "_runtime", "_timestamp", "Wall time"}


@dataclass(frozen=True)
class TrainingLog:
    """What a run logged.

    Args:
        path: the file or folder that it was read from.
        kind: its format, in words.
        train: metrics of training by step (index), under TRL's names.
        evaluation: the same of the evaluation set, without `eval_`.
        broken: first step at which a metric wasn't a finite number, by metric.
        trainer: a name of `TRAINERS`, where the run says it.
    """

    path: str
    kind: str
    train: pd.DataFrame
    evaluation: pd.DataFrame
    broken: Mapping[str, int] = field(default_factory=dict)
    trainer: str | None = None

    @classmethod
    def of(
        cls, rows: Iterable[Mapping[str, Any]], *, path: str, kind: str, trainer: str | None = None
    ) -> TrainingLog:
        """From rows of metrics; a row has a step, and a metric may be missing, empty or text.

        Raises:
            DataError: no row has a step and a number.
        """
        train: dict[int, dict[str, float]] = {}
        evaluation: dict[int, dict[str, float]] = {}
        broken: dict[str, int] = {}
        for row in rows:
            step = next((int(v) for name in _STEPS if (v := _number(row.get(name))) is not None), None)
            if step is None:
                continue
            for key, raw in row.items():
                value = None if key in _NOT_METRICS else _number(raw)
                if value is None:
                    continue
                name, is_evaluation = _metric(key)
                if not math.isfinite(value):
                    broken[name] = min(step, broken.get(name, step))
                    continue
                (evaluation if is_evaluation else train).setdefault(step, {})[name] = value
        if not train and not evaluation and not broken:
            raise DataError(
                f"Expected rows with a step and metrics in {path} ({kind}); found none. A log of transformers' "
                "trainer, a CSV with a column `step`, or tensorboard events can be read."
            )
        return cls(path, kind, _frame(train), _frame(evaluation), broken, trainer)

    @property
    def family(self) -> Family:
        """What the run trained on, by its metrics.

        Raises:
            DataError: no metric says so.
        """
        names = {*self.train.columns, *self.evaluation.columns, *self.broken}
        if {"reward", "reward_std", "frac_reward_zero_std"} & names:
            return "groups"
        if {"rewards/chosen", "logps/chosen"} & names:
            return "preference"
        raise DataError(
            "Expected the metrics of a preference run (rewards/chosen, logps/chosen, ...) or of a GRPO or RLOO run "
            f"(reward, reward_std, ...) in {self.path}; found: {', '.join(sorted(names)[:12]) or 'none'}."
        )

    def series(self, metric: str) -> pd.Series:
        """A metric of training by step; empty where it wasn't logged."""
        return _series(self.train, metric)

    def best(self, metric: str, least: int) -> pd.Series:
        """The metric on the evaluation set if it was taken at `least` times, else of training.

        An evaluation set is the same every time; two training batches differ by more than a step changes.
        """
        evaluated = _series(self.evaluation, metric)
        return evaluated if len(evaluated) >= least else self.series(metric)


def _series(frame: pd.DataFrame, metric: str) -> pd.Series:
    return frame[metric].dropna() if metric in frame else pd.Series(dtype=float)


def _frame(rows: Mapping[int, Mapping[str, float]]) -> pd.DataFrame:
    steps = sorted(rows)
    return pd.DataFrame([rows[step] for step in steps], index=pd.Index(steps), dtype=float)


def _number(value: Any) -> float | None:
    """A number, also written as text; None for anything else and for nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _metric(key: str) -> tuple[str, bool]:
    """The metric's name as TRL has it, and whether it is of the evaluation set."""
    for prefix, is_evaluation in (("train/", False), ("eval/", True), ("eval_", True)):
        if key.startswith(prefix):
            return key.removeprefix(prefix), is_evaluation
    return key, False
