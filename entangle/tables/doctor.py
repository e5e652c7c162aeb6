"""A log's findings for a terminal. Names from a log are untrusted: printed with markup switched off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_STYLES = {"warning": "bold red", "note": "yellow"}


def findings_text(content: Mapping[str, Any]) -> RenderableType:
    """What was read, the findings with what to run next, the traps in the names, and what no log can say.

    Args:
        content: what a log says, as `entangle doctor --json` prints it.
    """
    parts: list[RenderableType] = [
        Text(
            f"{content['log']} ({content['kind']}): {content['rows']} rows of training, {content['evaluations']} "
            f"evaluations, steps {content['first_step']} to {content['last_step']}; "
            + ("preference pairs" if content["family"] == "preference" else "groups of sampled answers")
            + (f", {content['trainer']}" if content["trainer"] else ""),
            "bold",
        )
    ]
    for finding in content["findings"]:
        parts.append(
            Text.assemble(
                (f"\n{finding['level']} ", _STYLES[finding["level"]]),
                (finding["rule"], "bold"),
                f"\n  {finding['text']}\n",
                (f"  threshold {finding['threshold']:g}: {finding['meaning']}\n", "dim"),
                f"  Ask: {finding['ask']}",
            )
        )
    if content["healthy"]:
        parts.append(Text(f"\nNo warning from {len(content['rules'])} rules.", "green"))
    parts += _list("What the names mean here", content["meanings"])
    parts += _list("What a log can't say, and what can", content["unknowable"])
    return Group(*parts)


def _list(title: str, sentences: Iterable[str]) -> list[RenderableType]:
    return [Text(f"\n{title}", "bold"), *(Text(f"- {sentence}") for sentence in sentences)]


def rule_table(rules: Iterable[Mapping[str, Any]]) -> Table:
    """Every rule: whom it is asked of, its threshold, and why that.

    Args:
        rules: name, family, threshold, meaning and reason of each.
    """
    table = Table(title="Rules of `entangle doctor`", title_justify="left")
    for column in ("rule", "runs", "threshold", "of what", "why"):
        table.add_column(column, no_wrap=column == "rule")
    for rule in rules:
        cells = (rule["name"], rule["family"], f"{rule['threshold']:g}", rule["meaning"], rule["reason"])
        table.add_row(*map(Text, cells))
    return table
