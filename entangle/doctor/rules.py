"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from entangle.doctor.log import Family, TrainingLog

Level = Literal["warning", "note"]
"""A warning makes the command exit with status 1; a note is worth knowing."""


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Args:
        text: the finding in a sentence, with its numbers.
        step: where it begins, if it has a beginning.
        numbers: what it rests on.
        level: see `Level`.
        rule: the rule's name; filled in by `examine`.
        evaluation: the evaluation set that it is of, where a log has several; filled in by `examine`.
    """

    text: str
    step: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    level: Level = "warning"
    rule: str = ""
    evaluation: str = ""


@dataclass(frozen=True)
class Rule:
    """A question that a log can answer.

    Args:
        name: what it is called by.
        family: the runs that it is asked of; `both` stands for all.
        threshold: the number that decides.
        meaning: what the threshold is a threshold of.
        reason: why it is what it is.
        judge: a log and the threshold -> the finding, or None.
        ask: what to run to learn what the log can't say.
        needs: metrics without which it can't be asked; of a group in brackets, one is enough.
        of_motion: it speaks of how a run moved, and is void where nothing trains.
    """

    name: str
    family: Family | Literal["both"]
    threshold: float
    meaning: str
    reason: str
    judge: Callable[[TrainingLog, float], Finding | None]
    ask: str
    needs: tuple[str | tuple[str, ...], ...] = ()
    of_motion: bool = True

    def missing(self, log: TrainingLog) -> tuple[str, ...]:
        """Metrics that it needs and the log lacks."""
        have = log.metrics
        groups = ((need,) if isinstance(need, str) else need for need in self.needs)
        return tuple(" or ".join(group) for group in groups if not have & set(group))
