"""A log under every rule of its family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from entangle.doctor.common import COMMON_RULES
from entangle.doctor.groups import GROUP_RULES
from entangle.doctor.log import Family, TrainingLog
from entangle.doctor.meanings import meanings, unknowable
from entangle.doctor.policy import POLICY_RULES
from entangle.doctor.preference import PREFERENCE_RULES
from entangle.doctor.rewards import Drift, drift_of, has_reference
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.trends import LEAST_ROWS
from entangle.errors import ConfigError, DataError

RULES: dict[str, Rule] = {
    rule.name: rule for rule in (*COMMON_RULES, *PREFERENCE_RULES, *GROUP_RULES, *POLICY_RULES)
}
"""Every rule by name, in the order in which they are reported."""


@dataclass(frozen=True)
class Report:
    """What a log says.

    Args:
        log: the log.
        family: what the run trained on.
        findings: what rules found, in the order of the rules.
        asked: the rules that were asked, with their thresholds.
        unasked: rules that couldn't be asked, and the metrics that the log lacks for them.
        drift: the drift that it measures, or why it can't be told; None for a run without pairs.
        meanings: traps in the names of the log's metrics.
        unknowable: what the log can't say, and the command that can.
    """

    log: TrainingLog
    family: Family
    findings: tuple[Finding, ...]
    asked: tuple[Rule, ...]
    unasked: Mapping[str, tuple[str, ...]]
    drift: Drift | str | None
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
        frames = (self.log.train, *self.log.evaluations.values())
        steps = [int(step) for frame in frames for step in frame.index]
        return {
            "log": self.log.path,
            "kind": self.log.kind,
            "trainer": self.log.trainer,
            "family": self.family,
            "rows": len(self.log.train),
            "evaluations": len(self.log.evaluation),
            "evaluation_sets": list(self.log.evaluations),
            "first_step": min(steps, default=None),
            "last_step": max(steps, default=None),
            "healthy": self.is_healthy,
            "notes": list(self.log.notes),
            "findings": [
                asdict(finding)
                | {"numbers": {name: _finite(value) for name, value in finding.numbers.items()}}
                | {
                    key: getattr(self.rule(finding.rule), key)
                    for key in ("threshold", "meaning", "reason", "ask")
                }
                for finding in self.findings
            ],
            "drift": asdict(self.drift) | {"meaning": self.drift.meaning}
            if isinstance(self.drift, Drift)
            else self.drift,
            "rules": [rule.name for rule in self.asked],
            "unasked": {name: list(missing) for name, missing in self.unasked.items()},
            "meanings": list(self.meanings),
            "unknowable": list(self.unknowable),
        }


def examine(log: TrainingLog, rules: Sequence[str] = ()) -> Report:
    """Ask every rule of the log's family, or those named.

    Of several evaluation sets each is judged apart.

    Args:
        log: the log.
        rules: names, or name=threshold; none stands for all.

    Raises:
        ConfigError: there is no such rule in the log's family, or a threshold isn't a number.
        DataError: the log is of neither family, or too short to say anything, or no rule can be asked of it.
    """
    family = log.family
    wanted = _wanted([rule for rule in RULES.values() if rule.family in (family, "both")], rules)
    missing = {rule.name: lacking for rule in wanted if (lacking := rule.missing(log))}
    asked = tuple(_filled(rule, log) for rule in wanted if rule.name not in missing)
    if not asked or all(not rule.needs for rule in asked):
        lacks = "; ".join(f"{name} needs {', '.join(metrics)}" for name, metrics in missing.items())
        raise DataError(f"No rule can be asked of {log.path}: {lacks}.")
    findings = tuple(_findings(log, asked))
    if not findings:
        _refuse_short(log)
    drift = drift_of(log) if family == "preference" and not _is_still(log, asked) else None
    said = [_named(sentence, log) for sentence in unknowable(family)]
    return Report(log, family, findings, asked, missing, drift, tuple(meanings(log)), tuple(said))


def _finite(value: float) -> float | None:
    """A number as JSON has it: none for what isn't finite."""
    return value if math.isfinite(value) else None


def _findings(log: TrainingLog, rules: Sequence[Rule]) -> list[Finding]:
    """What the rules find, in their order, by every evaluation set; what all sets share is of the training rows."""
    by_set = {name: _found(log.on(name), rules) for name in log.evaluations or ("",)}
    found: list[Finding] = []
    for name, findings in by_set.items():
        for finding in findings:
            is_shared = all(finding in others for others in by_set.values())
            finding = finding if is_shared else replace(finding, evaluation=name)
            if finding not in found:
                found.append(finding)
    order = [rule.name for rule in rules]
    return sorted(found, key=lambda finding: order.index(finding.rule))


def _found(log: TrainingLog, rules: Sequence[Rule]) -> list[Finding]:
    still = _is_still(log, rules)
    judged = ((rule, rule.judge(log, rule.threshold)) for rule in rules if not (still and rule.of_motion))
    return [replace(finding, rule=rule.name) for rule, finding in judged if finding is not None]


def _is_still(log: TrainingLog, rules: Sequence[Rule]) -> bool:
    """Whether nothing trains: asked even where only other rules are wanted, which are void then."""
    rule = {rule.name: rule for rule in (RULES["nothing_trains"], *rules)}["nothing_trains"]
    return not rule.missing(log) and rule.judge(log, rule.threshold) is not None


def _refuse_short(log: TrainingLog) -> None:
    """Refuse to call a log healthy that is too short to say so.

    Raises:
        DataError: it has too few rows.
    """
    metrics = (
        ("reward", "reward_std")
        if log.family == "groups"
        else ("rewards/chosen", "rewards/margins", "logps/chosen")
    )
    rows = {name: len(log.best(name)[0]) for name in metrics}
    if log.family == "preference" and len(log.evaluated("rewards/chosen")) and has_reference(log):
        return  # against the reference, one evaluation is enough
    most = max(rows, key=lambda name: rows[name])
    if rows[most] < LEAST_ROWS:
        raise DataError(
            f"Expected at least {LEAST_ROWS} logged rows of {most} in {log.path}; it has {rows[most]}, and they show "
            "nothing that few rows can show. Lower logging_steps for the next run, or give the log of a "
            "later checkpoint."
        )


def _wanted(known: list[Rule], wanted: Sequence[str]) -> list[Rule]:
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


def _filled(rule: Rule, log: TrainingLog) -> Rule:
    return replace(rule, ask=_named(rule.ask, log))


def _named(sentence: str, log: TrainingLog) -> str:
    """A sentence with the run's own model and data for the words that stand for them, where they are known."""
    if log.origin.model:
        sentence = sentence.replace("--model_name_or_path MODEL", log.origin.model)
    if log.origin.data:
        for word in ("DATA", "PROMPTS"):
            sentence = sentence.replace(f"--dataset_name {word}", f"--dataset_name {log.origin.data}")
    return sentence
