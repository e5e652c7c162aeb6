"""`entangle doctor`: what the log of a past run says."""

from __future__ import annotations

import json

from rich.console import Console

from entangle.commands.output import Output
from entangle.config import DoctorConfig
from entangle.doctor import RULES, examine, read_log
from entangle.errors import ConfigError
from entangle.tables.doctor import findings_text, rule_table


def run_doctor(config: DoctorConfig, console: Console | None = None) -> Output:
    """Ask the rules of a log, or list them.

    Raises:
        UserError: there is no log, it can't be judged, or there is no such rule.
    """
    if config.list_rules:
        return Output(rule_table(vars(rule) for rule in RULES.values()))
    if not config.log:
        raise ConfigError("expected the log of a past run: entangle doctor LOG. Got none.")
    report = examine(read_log(config.log, config.trainer), config.rules)
    if config.json:
        return Output(json.dumps(report.content, indent=2, allow_nan=False), status=report.exit_status)
    return Output(findings_text(report.content), status=report.exit_status, wraps=False)
