"""Findings from the log that a past training run left: no model, no data, no torch.

    examine(read_log("runs/my-dpo"))  ->  Report(findings, meanings, open questions)

`RULES` holds every rule with its threshold and the reason for it.
"""

from entangle.doctor.examine import Report, examine
from entangle.doctor.groups import GROUP_RULES
from entangle.doctor.log import TrainingLog
from entangle.doctor.preference import PREFERENCE_RULES
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.sources import read_log

RULES: dict[str, Rule] = {rule.name: rule for rule in (*PREFERENCE_RULES, *GROUP_RULES)}
"""Every rule by name."""

__all__ = ["RULES", "Finding", "Report", "Rule", "TrainingLog", "examine", "read_log"]
