"""`entangle report`: finished run folders as one HTML page, as a section of a README, or their figures as files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from entangle.commands.output import Output
from entangle.commands.whatif import what_if
from entangle.config import ReportConfig
from entangle.errors import ConfigError
from entangle.report.remedy import sampled, with_remedy
from entangle.report.source import Source, WhatIfTables, read_source


def command(config: ReportConfig, console: Console | None = None) -> Output:
    """`entangle report`."""
    if not any(config.runs):
        raise ConfigError("expected one or more run folders: entangle report RUN [RUN2 ...]. Got none.")
    return Output("\n".join(map(str, run_report(config))))


def run_report(config: ReportConfig) -> list[Path]:
    """Write what the options ask for.

    Returns:
        The files that were written.

    Raises:
        UserError: a run isn't there or isn't finished, a library is missing, or the output can't be written.
    """
    sources = load_sources(config.runs)
    if config.format == "html":
        from entangle.report.page import write_page

        return [write_page(sources, config.output_path)]
    if config.format == "card":
        from entangle.report.card import write_card

        return write_card(sources, config.output_path)
    from entangle.report.files import write_figures

    return write_figures(sources, config.output_path, config.format)


def load_sources(runs: Sequence[str | Path]) -> list[Source]:
    """Read run folders; a probe without a what-if is given one, on its rows alone.

    Raises:
        RunError: a folder holds no finished run.
    """
    sources = [with_remedy(_with_what_if(read_source(run), run), run) for run in runs]
    names = [source.name for source in sources]
    folders = [Path(run).resolve().parent.name for run in runs]
    return [
        replace(source, name=f"{folder}/{source.name}") if names.count(source.name) > 1 else source
        for source, folder in zip(sources, folders, strict=True)
    ]


def _with_what_if(source: Source, run: str | Path) -> Source:
    if source.pairs is None or source.what_if is not None or source.scored.empty:
        return source
    result = what_if(sampled(run))
    tables = WhatIfTables(result.settings, result.curves, result.summary, len(source.scored))
    return replace(source, what_if=tables)
