"""`entangle why`: one command from a training folder and its pairs to five answers.

    RUN/why/plan.json                   pairs and checkpoints that fit the minutes, and the pace they were chosen by
    RUN/why/pairs-N/checkpoint-K/       a probe's run folder per checkpoint, with across.json at the first
    RUN/why/steps.parquet, curve.parquet    the probes side by side, as a sweep's
    RUN/why/summary.json                the evidence and the five answers

Whatever is missing of log, checkpoints, model and pairs is said, and the answers are what the rest allows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType

from entangle.analysis.why import Answer, answers, exit_status
from entangle.commands.probe import ProbeResult
from entangle.commands.sweep import SweepResult
from entangle.commands.why.asked import ask
from entangle.commands.why.logged import evidence_of
from entangle.commands.why.measuring import measure
from entangle.commands.why.training import read_training
from entangle.config import WhyConfig
from entangle.data import hash_pairs
from entangle.errors import ConfigError, RunError, UserError
from entangle.runs.folder import RunFolder
from entangle.runs.session import Session
from entangle.tables.base import Shown
from entangle.tables.why import why_text


@dataclass(frozen=True)
class WhyResult(Shown):
    """The five answers.

    Args:
        run: the run folder.
        answers: in the order in which they are asked.
        evidence: what they rest on, as plain values.
        sweep: the probes side by side; None where nothing could be measured.
        probe: the one that the page shows pair by pair, likewise.
    """

    run: RunFolder
    answers: Sequence[Answer]
    evidence: dict[str, Any]
    sweep: SweepResult | None = None
    probe: ProbeResult | None = None

    @property
    def exit_status(self) -> int:
        """0 the chosen log-prob didn't fall, 1 it did, 2 it can't be told."""
        return exit_status(self.answers)

    def renderable(self) -> RenderableType:
        """The five lines, then what each rests on."""
        return why_text([answer.content for answer in self.answers], self.evidence["missing"])


def run_why(config: WhyConfig, console: Console | None = None) -> WhyResult:
    """Answer the five questions on a training folder.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: there is no such folder, or neither its log nor its checkpoints can be read.
        Interrupted: Ctrl-C; what was finished is kept.
    """
    if not config.run:
        raise ConfigError("expected the output folder of a training run: entangle why OUTPUT_DIR. Got none.")
    started = time.monotonic()
    training = read_training(config.run)
    session = Session.start(config, console)
    missing = list(training.notes)
    evidence: dict[str, Any] = {"missing": missing}
    try:
        evidence["log"] = evidence_of(training)
        missing += evidence["log"]["notes"]
    except UserError as error:
        missing.append(f"No log: {error}")
    sweep, first, asked = None, None, None
    try:
        asked = ask(config, training, missing, started)
    except UserError as error:
        missing.append(f"No pairs measured: {error}")
    if asked is not None or "log" in evidence:
        session.claim({"data": hash_pairs(asked.pairs) if asked is not None else ""})
    if asked is not None:
        try:
            sweep, first = measure(session, asked, evidence)
        except UserError as error:
            missing.append(f"No pairs measured: {error}")
    if sweep is None and "log" not in evidence:
        raise RunError("Nothing to answer from.\n" + "\n".join(f"- {sentence}" for sentence in missing))
    result = WhyResult(session.run, answers(evidence), evidence, sweep, first)
    session.finish(lambda: _write(result))
    return result


def _write(result: WhyResult) -> None:
    run = result.run
    if result.sweep is not None:
        run.write_table("steps.parquet", result.sweep.steps)
        run.write_table("curve.parquet", result.sweep.curve)
    shown = None if result.probe is None else str(result.probe.folder.path.relative_to(run.path))
    summary = result.sweep.summary if result.sweep is not None else {}
    content = {name: value for name, value in result.evidence.items()}
    run.write_json(
        "summary.json",
        summary
        | {"answers": [answer.content for answer in result.answers], "evidence": content, "probe": shown},
    )
