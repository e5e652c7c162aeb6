"""A log's findings for a terminal. Names from a log are untrusted: printed with markup switched off."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.doctor import Report, Rule

_STYLES = {"warning": "bold red", "note": "yellow"}


def report_text(report: Report) -> RenderableType:
    """What was read, the findings with what to run next, the traps in the names, and what no log can tell."""
    content = report.content
    parts: list[RenderableType] = [
        Text(
            f"{content['log']} ({content['kind']}): {content['rows']} rows of training, {content['evaluations']} "
            f"evaluations, steps {content['first_step']} to {content['last_step']}; "
            + ("preference pairs" if report.family == "preference" else "groups of sampled answers")
            + (f", {report.log.trainer}" if report.log.trainer else ""),
            "bold",
        )
    ]
    for finding in report.findings:
        rule = report.rule(finding.rule)
        parts.append(Text.assemble(
            (f"\n{finding.level} ", _STYLES[finding.level]), (finding.rule, "bold"), f"\n  {finding.text}\n",
            (f"  threshold {rule.threshold:g}: {rule.meaning}\n", "dim"), f"  Ask: {rule.ask}",
        ))  # fmt: skip
    if report.is_healthy:
        parts.append(Text(f"\nNo warning from {len(report.asked)} rules.", "green"))
    parts += _list("What the names mean here", report.meanings)
    parts += _list("What a log can't tell, and what can", report.unknowable)
    return Group(*parts)


def _list(title: str, sentences: Iterable[str]) -> list[RenderableType]:
    return [Text(f"\n{title}", "bold"), *(Text(f"- {sentence}") for sentence in sentences)]


def rule_table(rules: Iterable[Rule]) -> Table:
    """Every rule: whom it is asked of, its threshold, and why that."""
    table = Table(title="Rules of `entangle doctor`", title_justify="left")
    for column in ("rule", "runs", "threshold", "of what", "why"):
        table.add_column(column, no_wrap=column == "rule")
    for rule in rules:
        row = (rule.name, rule.family, f"{rule.threshold:g}", rule.meaning, rule.reason)
        table.add_row(*map(Text, row))
    return table
