"""A training log as tables, whatever wrote it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pandas as pd

from entangle.doctor import names
from entangle.doctor.numbers import number, step_number
from entangle.doctor.runs import last_run
from entangle.doctor.trends import LEAST_ROWS
from entangle.errors import DataError

Family = Literal["preference", "groups"]

TRAINERS: dict[str, Family] = {
    "dpo": "preference",
    "kto": "preference",
    "cpo": "preference",
    "simpo": "preference",
    "orpo": "preference",
    "grpo": "groups",
    "rloo": "groups",
}
"""Trainers that are told apart, and what they train on: pairs, or groups of sampled answers."""


INFINITE = 1e38
"""What is larger is infinite in float32, whatever wrote it."""


@dataclass(frozen=True)
class NotFinite:
    """A metric that was NaN or infinite in some rows.

    Args:
        metric: its name.
        split: the evaluation set ("" for a nameless one), None for training.
        steps: the steps at which it wasn't finite.
        rows: in how many rows it was logged at all.
        recovered: it was finite again afterwards.
        infinite: it was infinite at least once, rather than not a number.
    """

    metric: str
    split: str | None
    steps: tuple[int, ...]
    rows: int
    recovered: bool
    infinite: bool = False


@dataclass(frozen=True)
class Origin:
    """What the folder of a log says of the run.

    Args:
        trainer: a name of `TRAINERS`.
        trl: TRL's version.
        model: options that name the run's model on the command line; empty if unknown.
        data: the data set's name; empty if unknown.
    """

    trainer: str | None = None
    trl: tuple[int, ...] | None = None
    model: str = ""
    data: str = ""


@dataclass(frozen=True)
class TrainingLog:
    """What a run logged.

    Args:
        path: the file or folder that it was read from.
        kind: its format, in words.
        train: metrics of training by step (index), under TRL's names.
        evaluations: the same of each evaluation set, by its name; "" for a nameless one.
        not_finite: metrics that weren't finite, and when.
        epochs: the epoch by step, where it was logged.
        has_old_names: it has names that only TRL of early 2025 wrote.
        origin: what the folder says of the run.
        notes: what a reader must know of how it was read.
        judged: the evaluation set that rules look at.
    """

    path: str
    kind: str
    train: pd.DataFrame
    evaluations: Mapping[str, pd.DataFrame]
    not_finite: tuple[NotFinite, ...] = ()
    epochs: pd.Series = field(default_factory=lambda: pd.Series(dtype=float))
    has_old_names: bool = False
    origin: Origin = Origin()
    notes: tuple[str, ...] = ()
    judged: str = ""

    @classmethod
    def of(
        cls,
        rows: Iterable[Mapping[str, Any]],
        *,
        path: str,
        kind: str,
        origin: Origin | None = None,
        notes: tuple[str, ...] = (),
    ) -> TrainingLog:
        """From rows of metrics; a row has a step, and a metric may be missing, empty or text.

        Raises:
            DataError: no row has a step and a number.
        """
        raw = [names.unfolded(row) for row in rows]
        keys = {key for row in raw for key in row}
        stepped = _with_steps(raw, keys)
        counted = (
            ("The rows have no steps: they are counted, 1, 2, 3, ...",)
            if names.step_name(keys) is None
            else ()
        )
        ordered, note = last_run([(step, _metrics(row)) for step, row in stepped])
        tables = _tables(ordered)
        if not any(len(frame.columns) for frame in tables.frames.values()) and not tables.not_finite:
            raise DataError(
                f"Expected rows with a step and metrics in {path} ({kind}); found none. A log of transformers' "
                "trainer, a table with a column `step`, printed rows, or tensorboard events can be read."
            )
        frames = {split: _complete(frame) for split, frame in tables.frames.items()}
        train = frames.pop(None, pd.DataFrame())
        sets = {name: frame for name, frame in frames.items() if name is not None}
        judgeable = {name: frame for name, frame in sets.items() if set(names.JUDGED) & set(frame.columns)}
        sets = dict(sorted((judgeable or sets).items()))
        return cls(
            path,
            kind,
            train,
            sets,
            tables.not_finite,
            _epochs(stepped, ordered),
            names.old_names(keys),
            origin or Origin(),
            (*notes, *counted, *filter(None, [note])),
            min(sets, default=""),
        )

    @property
    def trainer(self) -> str | None:
        """A name of `TRAINERS`, where the run says it."""
        return self.origin.trainer

    @property
    def evaluation(self) -> pd.DataFrame:
        """Metrics of the evaluation set that rules look at."""
        return self.evaluations.get(self.judged, pd.DataFrame())

    @property
    def metrics(self) -> set[str]:
        """Every metric that it has, of training or of the judged set, finite or not."""
        broken = {gap.metric for gap in self.not_finite if gap.split in (None, self.judged)}
        return {*self.train.columns, *self.evaluation.columns, *broken}

    @property
    def family(self) -> Family:
        """What the run trained on, by its metrics.

        Raises:
            DataError: no metric says so.
        """
        found = self.metrics
        if {"reward", "reward_std", "frac_reward_zero_std"} & found:
            return "groups"
        if {
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
        } & found:
            return "preference"
        raise DataError(
            "Expected the metrics of a preference run (rewards/chosen, logps/chosen, ...) or of a GRPO or RLOO run "
            f"(reward, reward_std, ...) in {self.path}; found: {', '.join(sorted(found)[:12]) or 'none'}."
        )

    def on(self, name: str) -> TrainingLog:
        """The same log, judged by another evaluation set."""
        return replace(self, judged=name)

    def series(self, metric: str) -> pd.Series:
        """A metric of training by step; empty where it wasn't logged."""
        return _series(self.train, metric)

    def evaluated(self, metric: str) -> pd.Series:
        """A metric of the judged evaluation set by step; empty where it wasn't logged."""
        return _series(self.evaluation, metric)

    def is_evaluated(self, *metrics: str, least: int = LEAST_ROWS) -> bool:
        """Whether the evaluation set has all of these metrics at `least` times."""
        return all(len(self.evaluated(metric)) >= least for metric in metrics)

    def best(self, *metrics: str, least: int = LEAST_ROWS) -> list[pd.Series]:
        """Metrics on the evaluation set if all were taken at `least` times, else all of training.

        An evaluation set is the same every time; two training batches differ by more than a step changes.
        """
        read = self.evaluated if self.is_evaluated(*metrics, least=least) else self.series
        return [read(metric) for metric in metrics]

    def bad_steps(self, *metrics: str) -> set[int]:
        """Steps of training at which one of the metrics wasn't finite."""
        return {
            step
            for gap in self.not_finite
            if gap.split is None and gap.metric in metrics
            for step in gap.steps
        }


@dataclass(frozen=True)
class _Tables:
    frames: Mapping[str | None, pd.DataFrame]
    not_finite: tuple[NotFinite, ...]


def _with_steps(rows: list[Mapping[str, Any]], keys: set[str]) -> list[tuple[int, Mapping[str, Any]]]:
    """Each row's step. All rows count in one unit: rows without that step are left out."""
    name = names.step_name(keys)
    if name is None:
        known = {names.metric(key)[0] for key in keys} & {*names.JUDGED, "rewards/margins", "loss"}
        return _counted(rows) if known else []
    found: list[tuple[int, Mapping[str, Any]]] = []
    for row in rows:
        step = step_number(row.get(name))
        if step is None and found and names.step_name(set(row) - {name}) is not None:
            step = found[-1][0]  # logged at that step, without saying so in the same words
        if step is not None:
            found.append((step, row))
    return found


def _counted(rows: list[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Rows of a training that have no steps, counted; from 1 again where the epoch goes back: another run."""
    found, count, before = [], 0, -math.inf
    for row in rows:
        is_training = any(names.metric(key)[1] is None for key in row if names.is_metric(key))
        epoch = next((value for name in names.EPOCHS if (value := number(row.get(name))) is not None), before)
        if is_training:
            count = 1 if epoch < before else count + 1
            before = epoch
        found.append((max(count, 1), row))
    return found


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    values = {key: number(raw) for key, raw in row.items() if names.is_metric(key)}
    return {key: value for key, value in values.items() if value is not None}


def _tables(rows: Iterable[tuple[int, Mapping[str, float]]]) -> _Tables:
    """A table per set of data, and what wasn't finite in it."""
    finite: dict[str | None, dict[int, dict[str, float]]] = {}
    broken: dict[tuple[str | None, str], set[int]] = {}
    infinite: set[tuple[str | None, str]] = set()
    for step, row in rows:
        for key, value in row.items():
            name, split = names.metric(key)
            if abs(value) < INFINITE:
                finite.setdefault(split, {}).setdefault(step, {})[name] = value
                broken.get((split, name), set()).discard(step)
            elif name not in finite.get(split, {}).get(step, {}):
                broken.setdefault((split, name), set()).add(step)
                infinite |= set() if math.isnan(value) else {(split, name)}
    frames = {split: _frame(steps) for split, steps in finite.items()}
    gaps = [
        replace(
            _gap(name, split, steps, _series(frames.get(split, pd.DataFrame()), name)),
            infinite=(split, name) in infinite,
        )
        for (split, name), steps in sorted(broken.items(), key=str)
        if steps
    ]
    return _Tables(frames, tuple(gaps))


def _gap(name: str, split: str | None, steps: set[int], finite: pd.Series) -> NotFinite:
    recovered = len(finite) > 0 and int(finite.index[-1]) > max(steps)
    return NotFinite(name, split, tuple(sorted(steps)), len(steps) + len(finite), recovered)


def _complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Of chosen, rejected and margin, the third where two were logged."""
    chosen, rejected, margins = "rewards/chosen", "rewards/rejected", "rewards/margins"
    have = set(frame.columns)
    if {chosen, margins} <= have and rejected not in have:
        return frame.assign(**{rejected: frame[chosen] - frame[margins]})
    if {rejected, margins} <= have and chosen not in have:
        return frame.assign(**{chosen: frame[rejected] + frame[margins]})
    if {chosen, rejected} <= have and margins not in have:
        return frame.assign(**{margins: frame[chosen] - frame[rejected]})
    return frame


def _epochs(
    stepped: Iterable[tuple[int, Mapping[str, Any]]], kept: Iterable[tuple[int, Mapping[str, Any]]]
) -> pd.Series:
    steps = {step for step, _ in kept}
    found = {
        step: value
        for step, row in stepped
        for name in names.EPOCHS
        if step in steps and (value := number(row.get(name))) is not None and math.isfinite(value)
    }
    return pd.Series(found, dtype=float).sort_index()


def _series(frame: pd.DataFrame, metric: str) -> pd.Series:
    return frame[metric].dropna() if metric in frame else pd.Series(dtype=float)


def _frame(rows: Mapping[int, Mapping[str, float]]) -> pd.DataFrame:
    steps = sorted(rows)
    return pd.DataFrame([rows[step] for step in steps], index=pd.Index(steps), dtype=float)
