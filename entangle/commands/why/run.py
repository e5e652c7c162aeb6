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
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, RenderableType

from entangle.analysis.why import Answer, answers, exit_status
from entangle.commands.across import AcrossResult, run_across
from entangle.commands.probe import ProbeResult, probe, run_probe
from entangle.commands.sweep import SweepResult, collect, is_measured_across, is_probed
from entangle.commands.tokens import run_tokens
from entangle.commands.why.logged import evidence_of
from entangle.commands.why.measured import culprits, entangled_tokens, moved, stopping
from entangle.commands.why.size import FEWEST, MOST, Pace, Size, fit
from entangle.commands.why.training import Training, read_training
from entangle.config import AcrossConfig, SweepConfig, TokensConfig, WhyConfig, build_losses
from entangle.config.specs import spec_text, to_spec
from entangle.data import PreferencePair, hash_pairs
from entangle.errors import ConfigError, RunError, UserError
from entangle.measure.inputs import load_policy_of, read_pairs_of
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.runs.session import Session
from entangle.tables.base import Shown
from entangle.tables.why import why_text

PILOT = 8
"""Pairs of the pass that is timed."""

PLAN = "plan.json"


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


@dataclass(frozen=True)
class Asked:
    """What is measured, where, and with which loss.

    Args:
        config: the options.
        training: the training folder.
        base: the model that training began from; empty: what an adapter names.
        losses: the training's first.
        pairs: the data, up to a number that is more than enough.
        started: when, by the monotonic clock.
    """

    config: WhyConfig
    training: Training
    base: str
    losses: tuple[Any, ...]
    pairs: Sequence[PreferencePair]
    started: float

    def sweep(self, pairs: int | None) -> SweepConfig:
        """The sweep whose probes are made."""
        return self.config.sweep_of(self.training.folder, self.base, self.losses, pairs)

    @property
    def left(self) -> float:
        """Seconds of the minutes given."""
        return 60 * self.config.minutes - (time.monotonic() - self.started)


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
        asked = _ask(config, training, missing, started)
    except UserError as error:
        missing.append(f"No pairs measured: {error}")
    if asked is not None or "log" in evidence:
        session.claim({"data": hash_pairs(asked.pairs) if asked is not None else ""})
    if asked is not None:
        try:
            sweep, first = _measure(session, asked, evidence)
        except UserError as error:
            missing.append(f"No pairs measured: {error}")
    if sweep is None and "log" not in evidence:
        raise RunError("Nothing to answer from.\n" + "\n".join(f"- {sentence}" for sentence in missing))
    result = WhyResult(session.run, answers(evidence), evidence, sweep, first)
    session.finish(lambda: _write(result))
    return result


def _ask(config: WhyConfig, training: Training, missing: list[str], started: float) -> Asked:
    """What is to be measured, with a sentence on everything that had to be assumed.

    Raises:
        UserError: there are no checkpoints, no pairs, or the model that they stand on isn't here.
    """
    if not training.checkpoints:
        raise RunError(
            f"no checkpoint is in {training.folder} (checkpoint-* with config.json or adapter_config.json, or a final "
            "model). Train with save_steps to have some."
        )
    name = config.dataset_name or training.data
    if not name:
        raise ConfigError("the run's pairs aren't named. Name them: --dataset_name PAIRS.")
    if not config.dataset_name:
        config = _with(config, dataset_name=name)
        missing.append(f"The pairs are those that the run's files name: {name}.")
    pairs = read_pairs_of(_with(config, limit=config.limit or 2 * MOST)).pairs
    base = config.model_name_or_path or training.base
    if not base and not training.is_adapter and config.ref_model_name_or_path is None:
        missing.append(
            "The model that training began from isn't named in the folder or isn't here, so changes are counted from "
            "the first checkpoint: --model_name_or_path MODEL mends that."
        )
    return Asked(config, training, base, _losses(config, training, missing), pairs, started)


def _with(config: WhyConfig, **changed: Any) -> WhyConfig:
    return replace(config, **changed)


def _losses(config: WhyConfig, training: Training, missing: list[str]) -> tuple[Any, ...]:
    """The training's loss: named, else what the folder says, else dpo; which it is, is said."""
    if config.losses:
        return config.losses
    spec, source = training.loss
    if spec is not None:
        missing.append(f"Loss: {spec_text(to_spec(spec))}, by {source}.")
        return (to_spec(spec),)
    said = f" ({source})" if source else ""
    missing.append(
        f"Loss: dpo with beta 0.1 is assumed; the folder doesn't say{said}: --loss dpo:beta=... does."
    )
    return ("dpo",)


def _measure(session: Session, asked: Asked, evidence: dict[str, Any]) -> tuple[SweepResult, ProbeResult]:
    """Probe, attribute, turn knobs; fills the evidence."""
    size = _size(session, asked)
    probes = _probes(session, asked, size)
    sweep = collect(session.run, {"sgd": probes})
    step, first = next(iter(probes.items()))
    evidence["measured"] = moved(sweep, _sample(asked, size))
    count = evidence["measured"]["pairs"]
    if count < FEWEST:
        evidence["missing"].append(
            f"Only {count} pairs could be measured; below {FEWEST} hardly anything can be told."
        )
    evidence["change"] = stopping(first, asked.losses[0])
    if asked.left > 0 or is_measured_across(first):
        try:
            evidence["responsible"] = _responsible(session, asked, first, sweep, step)
        except UserError as error:
            evidence["missing"].append(f"Which pairs do it isn't measured: {error}")
    else:
        evidence["missing"].append(
            "Which pairs do it isn't measured: the time is over (--minutes, and run it again)."
        )
    return sweep, ProbeResult.load(first.folder.path)


def _size(session: Session, asked: Asked) -> Size:
    """What fits the minutes: as planned before for the same time and checkpoints, else by a pass that is timed."""
    steps, minutes, run = list(asked.training.checkpoints), asked.config.minutes, session.run
    if (run.path / PLAN).is_file():
        plan = run.read_json(PLAN)
        if plan["minutes"] == minutes and plan["of"] == steps:
            return Size(plan["pairs"], tuple(plan["steps"]), plan["seconds"])
    pace = _pace(session, asked)
    size = fit(len(asked.pairs), steps, pace, asked.left)
    if asked.config.limit is not None:
        size = Size(min(asked.config.limit, len(asked.pairs)), size.steps, size.seconds)
    over = " That is more than was given: fewer tell hardly anything." if size.seconds > asked.left else ""
    named = " and ".join(filter(None, [", ".join(map(str, size.steps[:-1])), str(size.steps[-1])]))
    at = f"checkpoint{'s' * (len(size.steps) > 1)} {named}" if size.steps[-1] else "the final model"
    session.note(
        f"{size.pairs} pairs{_sample(asked, size)} at {at}: about {max(1, round(size.seconds / 60))} min "
        f"({pace.per_pair:.2g} s per pair, {pace.loading:.2g} s to load).{over}"
    )
    run.write_json(
        PLAN,
        {"minutes": minutes, "of": steps, "pairs": size.pairs, "steps": size.steps, "seconds": size.seconds},
    )
    return size


def _pace(session: Session, asked: Asked) -> Pace:
    """Load the last checkpoint and probe a few pairs in memory; a slow machine's first two will do."""
    options = asked.sweep(None).probe_of(asked.training.last)
    began = time.monotonic()
    policy = load_policy_of(options, session.processes)
    loading = time.monotonic() - began
    ordered = sorted(asked.pairs, key=lambda pair: len(str(pair.prompt)) + len(str(pair.chosen)))
    places = [round(k * (len(ordered) - 1) / (PILOT - 1)) for k in range(PILOT)]
    spread = [ordered[place] for place in dict.fromkeys(places)]
    quiet = Console(quiet=True)

    def timed(pairs: list[PreferencePair]) -> float:
        began = time.monotonic()
        probe(
            policy,
            pairs,
            list(asked.losses),
            max_length=options.max_length,
            skip_invalid=True,
            batch_size=options.batch_size,
            console=quiet,
        )
        return (time.monotonic() - began) / len(pairs)

    per_pair = timed(spread[len(spread) // 2 :][:2])
    if per_pair * PILOT < 0.1 * asked.left:
        per_pair = timed(spread)
    return Pace(per_pair, loading)


def _probes(session: Session, asked: Asked, size: Size) -> dict[int, ProbeResult]:
    """The probes of the chosen checkpoints, those made before left as they are."""
    sweep = asked.sweep(size.pairs)
    data = hash_pairs(read_pairs_of(sweep).pairs)
    done: dict[int, ProbeResult] = {}
    for number, step in enumerate(size.steps, 1):
        checkpoint = asked.training.checkpoints[step]
        options = sweep.probe_of(checkpoint)
        if not is_probed(options, checkpoint, data):
            session.console.print(f"Checkpoint {number} of {len(size.steps)}: {checkpoint}", markup=False)
            try:
                run_probe(options, session.console)
            except Interrupted as stop:
                raise Interrupted(
                    f"Stopped at checkpoint {number} of {len(size.steps)}; what is finished is kept. Resume with: "
                    f"{session.resume_command}"
                ) from stop
        done[step] = ProbeResult.load(options.run_path)
    return done


def _sample(asked: Asked, size: Size) -> str:
    """Which part of the data the pairs are, in words."""
    total = len(asked.pairs)
    if asked.config.limit is not None or size.pairs >= total:
        return ""
    return f", a random sample of {'at least ' if total >= 2 * MOST else ''}{total}"


def _responsible(
    session: Session, asked: Asked, first: ProbeResult, sweep: SweepResult, step: int
) -> dict[str, Any]:
    """Which pairs' steps lower the others' chosen log-probs, and the tokens of the worst whose own step does, too."""
    path = str(first.folder.path)
    label = build_losses(asked.losses)[0].label
    if not is_measured_across(first):
        run_across(AcrossConfig(run=path, plots=False), session.console)
    found = culprits(AcrossResult.load(path), sweep, step)
    own = first.predictions[first.predictions["loss"] == label].set_index("index")["regime"]
    falling = [index for index in found["pairs"] if own.get(index) == "both_down"]
    if falling and asked.left > 0:
        tokens = run_tokens(TokensConfig(run=path, pairs=(falling[0],)), Console(quiet=True)).tokens
        found["tokens"] = entangled_tokens(tokens, falling[0])
    return found


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
