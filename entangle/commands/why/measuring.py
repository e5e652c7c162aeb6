"""The measuring part of `entangle why`: size by a timed pass, probes, which pairs do it, what would stop it."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console

from entangle.analysis.regimes import Regime
from entangle.commands.across import AcrossResult, run_across
from entangle.commands.probe import ProbeResult, probe, run_probe
from entangle.commands.sweep import SweepResult, collect, is_measured_across, is_probed
from entangle.commands.tokens import run_tokens
from entangle.commands.why.asked import Asked
from entangle.commands.why.evidence import culprits, entangled_tokens, moved, stopping
from entangle.commands.why.size import FEWEST, Pace, Size, fit
from entangle.config import AcrossConfig, TokensConfig, build_losses
from entangle.data import PreferencePair, hash_pairs
from entangle.errors import UserError
from entangle.measure.inputs import load_policy_of, read_pairs_of
from entangle.runs.progress import Interrupted
from entangle.runs.session import Session

PILOT = 8
"""Pairs of the pass that is timed."""

PLAN = "plan.json"


def measure(session: Session, asked: Asked, evidence: dict[str, Any]) -> tuple[SweepResult, ProbeResult]:
    """Probe, attribute, turn knobs; fills the evidence."""
    size = _size(session, asked)
    probes = _probes(session, asked, size)
    sweep = collect(session.run, {"sgd": probes})
    step, first = next(iter(probes.items()))
    evidence["measured"] = moved(sweep, asked.sample(size))
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
        f"{size.pairs} pairs{asked.sample(size)} at {at}: about {max(1, round(size.seconds / 60))} min "
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
    falling = [index for index in found["pairs"] if own.get(index) == Regime.BOTH_DOWN]
    if falling and asked.left > 0:
        tokens = run_tokens(TokensConfig(run=path, pairs=(falling[0],)), Console(quiet=True)).tokens
        found["tokens"] = entangled_tokens(tokens, falling[0])
    return found
