"""A log's findings for a terminal. Names from a log are untrusted: controls are escaped, markup is switched off."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.tables.text import visible

_STYLES = {"warning": "bold red", "note": "yellow"}


def findings_text(content: Mapping[str, Any]) -> RenderableType:
    """What was read, the findings with what to run next, the traps in the names, and what no log can say.

    Args:
        content: what a log says, as `entangle doctor --json` prints it.
    """
    parts: list[RenderableType] = [
        _text(_head(content), "bold"),
        *(_text(note, "yellow") for note in content["notes"]),
    ]
    parts += [_finding(finding) for finding in content["findings"]]
    parts += [_verdict(content), *_drift(content["drift"]), *_unasked(content["unasked"])]
    parts += _list("What the names mean here", content["meanings"])
    parts += _list("What a log can't say, and what can", content["unknowable"])
    return Group(*parts)


def _head(content: Mapping[str, Any]) -> str:
    sets = [visible(name) for name in content["evaluation_sets"] if name]
    evaluations = f"{content['evaluations']} evaluations" + (f" of each of {', '.join(sets)}" if sets else "")
    return (
        f"{content['log']} ({content['kind']}): {content['rows']} rows of training, {evaluations}, steps "
        f"{content['first_step']} to {content['last_step']}; "
        + ("preference pairs" if content["family"] == "preference" else "groups of sampled answers")
        + (f", {content['trainer']}" if content["trainer"] else "")
    )


def _finding(finding: Mapping[str, Any]) -> Text:
    of = f" (evaluation set {visible(finding['evaluation'])})" if finding["evaluation"] else ""
    return Text.assemble(
        (f"\n{finding['level']} ", _STYLES[finding["level"]]),
        (f"{finding['rule']}{of}", "bold"),
        f"\n  {visible(finding['text'], None)}\n",
        (f"  threshold {finding['threshold']:g}: {finding['meaning']}\n", "dim"),
        f"  Ask: {visible(finding['ask'], None)}",
    )


def _verdict(content: Mapping[str, Any]) -> Text:
    asked, unasked = len(content["rules"]), len(content["unasked"])
    of = f"{asked} rules" if not unasked else f"the {asked} of {asked + unasked} rules that could be asked"
    if content["healthy"]:
        return Text(f"\nNo warning from {of}.", "green" if not unasked else "yellow")
    warnings = sum(finding["level"] == "warning" for finding in content["findings"])
    return Text(f"\n{warnings} warning{'s' * (warnings > 1)} from {of}.", "bold")


def _drift(drift: Mapping[str, Any] | str | None) -> list[RenderableType]:
    """The drift that the log measures, or why it can't be told."""
    if isinstance(drift, Mapping):
        return [_text(f"Measured drift {drift['value']:+.2g} ({drift['source']}): {drift['meaning']}.")]
    return [_text(f"Drift can't be told: {drift}.")] if drift else []


def _unasked(unasked: Mapping[str, Iterable[str]]) -> list[RenderableType]:
    """Rules that couldn't be asked, by what the log lacks for them."""
    by_lack: dict[str, list[str]] = {}
    for name, lacking in unasked.items():
        by_lack.setdefault(", ".join(lacking), []).append(name)
    lines = [f"{', '.join(rules)} (needs {lacking})" for lacking, rules in by_lack.items()]
    return [_text(f"Not asked, since the log lacks it: {'; '.join(lines)}.", "dim")] if lines else []


def _list(title: str, sentences: Iterable[str]) -> list[RenderableType]:
    lines: list[RenderableType] = [_text(f"- {sentence}") for sentence in sentences]
    return [Text(f"\n{title}", "bold"), *lines] if lines else []


def _text(text: str, style: str = "") -> Text:
    return Text(visible(text, None), style)


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
