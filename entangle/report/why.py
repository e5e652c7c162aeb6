"""`entangle why`: the five answers, with their page in the run folder."""

from __future__ import annotations

from rich.console import Console

from entangle.commands.output import Output
from entangle.commands.why import run_why
from entangle.config import ReportConfig, WhyConfig
from entangle.errors import UserError
from entangle.report.command import run_report
from entangle.runs.progress import notes_console, say


def command(config: WhyConfig, console: Console | None = None) -> Output:
    """Answer, write the page where something was measured, and end with the status of the first answer."""
    result = run_why(config, console)
    place = f"Run folder: {result.run.path}"
    if result.sweep is not None:
        try:
            (page,) = run_report(ReportConfig(runs=(str(result.run.path),)))
            place = f"Page: {page}"
        except UserError as error:  # jinja2 or matplotlib isn't there
            say(notes_console(console), str(error))
    return Output(result.renderable(), place, result.exit_status)
