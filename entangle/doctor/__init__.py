"""Findings from the log that a past training run left: no model, no data, no torch.

    examine(read_log("runs/my-dpo"))  ->  Report(findings, drift, meanings, open questions)

`RULES` holds every rule with its threshold and the reason for it; `sources` a reader per kind of file.
"""

from entangle.doctor.examine import RULES, Report, examine
from entangle.doctor.log import Origin, TrainingLog
from entangle.doctor.rewards import Drift, drift_of
from entangle.doctor.rules import Finding, Rule
from entangle.doctor.sources import read_log

__all__ = [
    "RULES",
    "Drift",
    "Finding",
    "Origin",
    "Report",
    "Rule",
    "TrainingLog",
    "drift_of",
    "examine",
    "read_log",
]
