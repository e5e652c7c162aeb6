"""A log under every rule of its family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from entangle.doctor.groups import GROUP_RULES
from entangle.doctor.log import Family, TrainingLog
from entangle.doctor.meanings import meanings, unknowable
from entangle.doctor.preference import PREFERENCE_RULES
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS
from entangle.errors import ConfigError, DataError


@dataclass(frozen=True)
class Report:
    """What a log says.

    Args:
        log: the log.
        family: what the run trained on.
        findings: what rules found, in the order of the rules.
        asked: the rules that were asked, with their thresholds.
        meanings: traps in the names of the log's metrics.
        unknowable: what the log can't say, and the command that can.
    """

    log: TrainingLog
    family: Family
    findings: tuple[Finding, ...]
    asked: tuple[Rule, ...]
    meanings: tuple[str, ...]
    unknowable: tuple[str, ...]

    @property
    def is_healthy(self) -> bool:
        """No rule warns."""
        return not any(finding.level == "warning" for finding in self.findings)

    @property
    def exit_status(self) -> int:
        """0 healthy, 1 a warning."""
        return 0 if self.is_healthy else 1

    def rule(self, name: str) -> Rule:
        """A rule that was asked, by name."""
        return next(rule for rule in self.asked if rule.name == name)

    @property
    def content(self) -> dict[str, Any]:
        """Everything as plain values, for `--json`."""
        steps = [int(step) for step in (*self.log.train.index, *self.log.evaluation.index)]
        return {
            "log": self.log.path, "kind": self.log.kind, "trainer": self.log.trainer, "family": self.family,
            "rows": len(self.log.train), "evaluations": len(self.log.evaluation),
            "first_step": min(steps, default=None), "last_step": max(steps, default=None),
            "healthy": self.is_healthy,
            "findings": [
                asdict(finding)
                | {key: getattr(self.rule(finding.rule), key) for key in ("threshold", "meaning", "reason", "ask")}
                for finding in self.findings
            ],
            "rules": [rule.name for rule in self.asked],
            "meanings": list(self.meanings), "unknowable": list(self.unknowable),
        }  # fmt: skip


def examine(log: TrainingLog, rules: Sequence[str] = ()) -> Report:
    """Ask every rule of the log's family, or those named.

    Args:
        log: the log.
        rules: names, or name=threshold; none stands for all.

    Raises:
        ConfigError: there is no such rule in the log's family, or a threshold isn't a number.
        DataError: the log is of neither family, or too short to say anything.
    """
    family = log.family
    asked = _asked([rule for rule in (*PREFERENCE_RULES, *GROUP_RULES) if rule.family == family], rules)
    metric = "reward" if family == "groups" else "rewards/chosen"
    rows = max(len(log.best(name, LEAST_ROWS)) for name in (metric, "logps/chosen"))
    if rows < LEAST_ROWS and not log.broken:
        raise DataError(
            f"Expected at least {LEAST_ROWS} logged rows of {metric} in {log.path}; it has {rows}. Lower logging_steps "
            "for the next run, or give the log of a later checkpoint."
        )
    judged = ((rule, rule.judge(log, rule.threshold)) for rule in asked)
    findings = tuple(replace(finding, rule=rule.name) for rule, finding in judged if finding is not None)
    return Report(log, family, findings, tuple(asked), tuple(meanings(log)), tuple(unknowable(family)))


def _asked(known: list[Rule], wanted: Sequence[str]) -> list[Rule]:
    by_name = {rule.name: rule for rule in known}
    chosen = []
    for item in wanted:
        name, equals, threshold = item.partition("=")
        if name not in by_name:
            raise ConfigError(f"Unknown rule {name!r} for this log. Known: {', '.join(by_name)}.")
        try:
            changed = {"threshold": float(threshold)} if equals else {}
        except ValueError:
            raise ConfigError(f"A rule is given as name or name=number; got {item!r}.") from None
        chosen.append(replace(by_name[name], **changed))
    return chosen or known
