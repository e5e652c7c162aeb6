"""The probe: every pair's geometry once, then every loss, into a run folder that can be resumed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, RenderableType

from entangle import embedded
from entangle.analysis.predictions import check_labels, may_have_reference, predict_losses, usable_losses
from entangle.analysis.summary import summarise
from entangle.commands.output import Output
from entangle.config import DEFAULT_LOSSES, EMBEDDED, ProbeConfig, build_losses
from entangle.config.hashing import hash_file
from entangle.data import PreferencePair, TokenizedPair, hash_pairs
from entangle.diagnostics import columns_of, resolve, summarise_diagnostics
from entangle.errors import ConfigError
from entangle.measure.estimate import estimate
from entangle.measure.inputs import load_policy_of, read_pairs_of
from entangle.measure.modules import summarise_modules
from entangle.measure.passes import Measurement, column_functions, rows_of_shard
from entangle.measure.plan import Plan, extremes, is_scorable, longest
from entangle.measure.rows import ROW_COLUMNS, texts_of
from entangle.measure.sets import SET_DETAILS, SetSums, set_content
from entangle.measure.verification import summarise_verification, verify_losses
from entangle.models import (
    NoReference,
    Policy,
    check_positions,
    check_reference,
    load_adam_state,
    optimizer_file,
    settle_reference,
)
from entangle.runs.folder import RunFolder
from entangle.runs.progress import progress_bar
from entangle.runs.provenance import environment
from entangle.runs.session import Advance, Session
from entangle.scores import Metric, fast_gemm, make_engine
from entangle.tables.base import Shown
from entangle.tables.probe import probe_tables
from losses import PreferenceLoss


@dataclass(frozen=True)
class ProbeResult(Shown):
    """A finished probe: its rows as data frames, its aggregates, its folder.

    Args:
        run: the run folder.
        pairs: one row per pair.
        predictions: one row per scored pair and loss.
        summary: aggregates of these rows.
    """

    run: RunFolder
    pairs: pd.DataFrame
    predictions: pd.DataFrame
    summary: dict[str, Any]

    @property
    def modules(self) -> pd.DataFrame | None:
        """One row per scored pair and module (see `entangle.measure.modules.module_rows`); None where not asked for."""
        return self.run.table("modules.parquet")

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read a finished run folder.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder.open(path, ProbeConfig.VERB)
        return cls(run, run.pairs(), run.read_table("predictions.parquet"), run.read_json("summary.json"))

    def renderable(self, worst: int = 3) -> RenderableType:
        """The tables as rich objects: regimes, groups, distributions and the `worst` pairs."""
        return probe_tables(
            self.summary,
            self.run.read_json("provenance.json"),
            self.pairs,
            self.predictions,
            self.run.table("texts.parquet"),
            worst,
        )


def run_probe(config: ProbeConfig, console: Console | None = None) -> ProbeResult:
    """Probe a policy on preference pairs: the main job, from options to a finished run folder.

    Computes A, B, c and both gaps of every pair exactly over the probed parameters, log-probs under policy and
    reference, then every loss's incentives, predicted changes and regimes. A run that was broken off is resumed.
    Under `accelerate launch` or `torchrun` the processes share the shards and write one folder.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model or the run folder can't be used.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    session = Session.start(config, console)
    losses = build_losses(config.losses)
    check_labels(losses)  # before the model is loaded, if a name is wrong
    resolve(config.diagnostics)
    data = read_pairs_of(config)
    for note in data.notes:
        session.note(note)
    _check_group(config, data.pairs)
    policy = load_policy_of(config, session.processes)
    taken = policy.tokenize(data.pairs, config.max_length, skip_invalid=config.skip_invalid)
    pairs, tokenized = taken.pairs, taken.tokens
    policy = settle_reference(policy, pairs)
    if isinstance(policy.reference, NoReference):
        _check_named(losses, config, has_reference=False)  # before the passes, which would be in vain
    reach = max(map(longest, filter(is_scorable, tokenized)), default=0)
    notes = [*taken.notes, *policy.notes, *check_positions(policy.model, reach)]
    identity = dict(policy.identity) | {"data": hash_pairs(pairs)}
    metric = None
    if config.optimizer_state is not None:
        metric, sentence = _adam_metric(config.optimizer_state, policy)
        identity["optimizer"] = hash_file(optimizer_file(config.optimizer_state))
        notes.append(sentence)
    if not session.begin(identity):
        return ProbeResult.load(session.run.path)
    for note in notes:
        session.note(note)
    notes = [*data.notes, *notes]
    plan = Plan.make(tokenized, config.shard_size, config.batch_size)
    engine = make_engine(policy.model, policy.parameters, config.engine)
    if plan.first_pass:
        engine.check(policy.collate(extremes(tokenized)))
        check_reference(policy, policy.collate(plan.first_pass[:1]))
    sums = SetSums.of_run(
        session.run, policy.parameters, tokenized, config.group_by, session.processes.process_index
    )
    measurement = Measurement(
        policy, engine, column_functions(config.diagnostics), config.modules, metric, sums
    )

    def tables_of(number: int, advance: Advance) -> dict[str, pd.DataFrame]:
        if sums is not None:
            sums.start(number)
        rows, modules = rows_of_shard(plan, number, measurement, advance)
        found = {"pairs": pd.DataFrame(rows)}
        return found | ({"modules": pd.concat(modules, ignore_index=True)} if modules else {})

    with fast_gemm() if config.fast_matmul else nullcontext():
        session.compute("pairs", plan.sizes, tables_of, further=sums)
    path = session.finish(lambda: _close(session, config, losses, measurement, sums, pairs, tokenized, notes))
    return ProbeResult.load(path)


def _adam_metric(state_path: str, policy: Policy) -> tuple[Metric, str]:
    """The diagonal metric of an optimiser's state, and what it means for the numbers."""
    state = load_adam_state(state_path, policy.model, policy.trained)
    return state.metric(policy.parameters), (
        "Scores are compared, and changes predicted to first order, under AdamW's preconditioner frozen after "
        f"{state.step} updates; a change is per unit of learning rate, without momentum and weight decay."
    )


def _close(
    session: Session,
    config: ProbeConfig,
    losses: Sequence[PreferenceLoss],
    measurement: Measurement,
    sums: SetSums | None,
    pairs: Sequence[PreferencePair],
    tokenized: Sequence[TokenizedPair],
    notes: Sequence[str],
) -> None:
    """Judge every loss on the finished rows, verify if asked, and write what closes a run, its summary last."""
    run, policy, engine = session.run, measurement.policy, measurement.engine
    seconds, notes = session.seconds, [*notes, *engine.notes]
    for note in engine.notes:
        session.note(note)
    rows = run.pairs()
    usable = _usable(losses, rows, config, session)
    predictions = predict_losses(
        rows, usable, resolution=engine.resolution, batch_size=config.loss_batch_size
    )
    summary = summarise(rows, predictions, config.group_by)
    if config.verify:
        by_index = {pair.index: pair for pair in tokenized}
        with progress_bar(session.console, "real steps", config.verify * len(usable), 0) as advance:
            steps = verify_losses(
                policy, by_index, rows, predictions, usable, config.verify, engine.resolution, advance
            )
        run.write_table("verification.parquet", steps)
        summary["verification"] = summarise_verification(steps)
    if config.modules and len(modules := run.read_shards("modules")):
        run.write_table("modules.parquet", modules)
        summary["modules"] = summarise_modules(modules, rows)
    grams = None if sums is None else sums.joined(measurement.metric)
    if sums is not None and grams is not None and len(predictions):
        content = set_content(grams, sums.grouping, predictions, config.metric)
        run.write_json("set.json", content)
        summary["set"] = {name: value for name, value in content.items() if name not in SET_DETAILS}
    if config.diagnostics:
        columns = columns_of(config.diagnostics)
        summary["diagnostics"] = summarise_diagnostics(rows, predictions, columns)
    if config.save_text:
        run.write_table("texts.parquet", texts_of(pairs))
    run.write_table("predictions.parquet", predictions)
    facts = {
        "resolution": engine.resolution,
        "metric": config.metric,
        "engine": config.engine,
        "seconds": seconds,
        "notes": notes,
    }
    own = {str(embedded.POLICY), str(embedded.ADAPTER)}  # not the place where this installation keeps them
    described = {name: EMBEDDED if value in own else value for name, value in policy.description.items()}
    run.write_json("provenance.json", environment() | described | facts)
    run.write_json("summary.json", summary)
    shutil.rmtree(run.path / "modules", ignore_errors=True)  # what its shards hold is in modules.parquet
    if sums is not None:
        sums.remove()


def command(config: ProbeConfig, console: Console | None = None) -> ProbeResult | Output:
    """`entangle probe`: the run, or with --dry_run what it would cost."""
    return Output(estimate(config)) if config.dry_run else run_probe(config, console)


def _check_group(config: ProbeConfig, pairs: Sequence[PreferencePair]) -> None:
    """Refuse to group by a column that nothing has; the default one may be absent."""
    there = {name for pair in pairs for name in pair.extra}
    if config.group_by not in {*there, *ROW_COLUMNS, ProbeConfig.group_by}:
        raise ConfigError(
            f"Expected a column {config.group_by!r} in the data, to group by; its further columns are: "
            f"{', '.join(sorted(there)) or 'none'}."
        )


def _usable(
    losses: Sequence[PreferenceLoss], rows: pd.DataFrame, config: ProbeConfig, session: Session
) -> list[PreferenceLoss]:
    """The losses that the rows can judge. One that can't be judged is an error if the user named it."""
    usable, refused = _check_named(losses, config, has_reference=may_have_reference(rows))
    for sentence in refused:
        session.note(sentence)
    return usable


def _check_named(
    losses: Sequence[PreferenceLoss], config: ProbeConfig, *, has_reference: bool
) -> tuple[list[PreferenceLoss], list[str]]:
    """The losses that can be judged, and why the others can't: an error if the user named one of them."""
    usable, refused = usable_losses(losses, has_reference=has_reference)
    if refused and tuple(config.losses) != DEFAULT_LOSSES:
        raise ConfigError(" ".join(refused))
    return usable, refused
