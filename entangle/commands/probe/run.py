"""The probe as a command: from options to a run folder that can be resumed and shared by several processes."""

from __future__ import annotations

import shutil
from contextlib import nullcontext

import pandas as pd
from rich.console import Console

from entangle.analysis.real_steps import is_refuted
from entangle.commands.output import Output
from entangle.commands.probe.judged import judge, provenance_of
from entangle.commands.probe.prepared import Prepared, check_group, check_request
from entangle.commands.probe.rejudged import JUDGING, check_rejudging, rejudge
from entangle.commands.probe.result import ProbeResult
from entangle.config import DEFAULT_LOSSES, ProbeConfig, build_losses
from entangle.config.hashing import hash_file
from entangle.data import hash_pairs
from entangle.measure.estimate import estimate
from entangle.measure.inputs import load_policy_of, read_pairs_of
from entangle.measure.passes import Measurement, rows_of_shard
from entangle.measure.rows import texts_of
from entangle.measure.sets import RunSums
from entangle.models import load_adam_state, optimizer_file
from entangle.runs.session import Advance, Session
from entangle.scores import fast_gemm


def run_probe(config: ProbeConfig, console: Console | None = None) -> ProbeResult:
    """Probe a policy on preference pairs: the main job, from options to a finished run folder.

    Computes A, B, c and both gaps of every pair exactly over the probed parameters, log-probs under policy and
    reference, then every loss's incentives, predicted changes and regimes. A run that was broken off is resumed; a
    finished one that differs in its losses alone is judged under the new ones, from its stored scores.
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
    are_named = tuple(config.losses) != DEFAULT_LOSSES
    check_request(config, losses, are_named=are_named)
    data = read_pairs_of(config)
    for note in data.notes:
        session.note(note)
    check_group(config.group_by, data.pairs)
    policy = load_policy_of(config, session.processes)
    prepared = Prepared.make(config, losses, are_named, policy, data.pairs)
    identity = dict(policy.identity) | {"data": hash_pairs(prepared.pairs)}
    if config.optimizer_state is not None:
        prepared = prepared.under(load_adam_state(config.optimizer_state, policy.model, policy.trained))
        identity["optimizer"] = hash_file(optimizer_file(config.optimizer_state))
    if session.holds_all_but(JUDGING, identity):
        check_rejudging(session.run, prepared)
        return ProbeResult.load(session.finish(lambda: rejudge(session, prepared)))
    if not session.begin(identity):
        return ProbeResult.load(session.run.path)
    for note in prepared.notes:
        session.note(note)
    plan, process = prepared.plan, session.processes.process_index
    sums = RunSums.over(session.run, policy.parameters, prepared.tokens, config.group_by, process)
    measurement = prepared.measurement(plan, sums)

    def tables_of(number: int, advance: Advance) -> dict[str, pd.DataFrame]:
        if sums is not None:
            sums.start(number)
        rows, modules = rows_of_shard(plan, number, measurement, advance)
        found = {"pairs": pd.DataFrame(rows)}
        return found | ({"modules": pd.concat(modules, ignore_index=True)} if modules else {})

    with fast_gemm() if config.fast_matmul else nullcontext():
        session.compute("pairs", plan.sizes, tables_of, further=sums)
    path = session.finish(lambda: _close(session, prepared, measurement, sums, data.notes))
    return ProbeResult.load(path)


def _close(
    session: Session,
    prepared: Prepared,
    measurement: Measurement,
    sums: RunSums | None,
    notes: tuple[str, ...],
) -> None:
    """Judge every loss on the finished rows, and write what closes a run, its summary last."""
    run, options, engine = session.run, prepared.options, measurement.engine
    seconds = session.seconds
    for note in engine.notes:
        session.note(note)
    modules = run.read_shards("modules") if options.modules else pd.DataFrame()
    grams = None if sums is None else sums.joined(prepared.metric)
    whole = None if sums is None or grams is None else (grams, sums.grouping)
    judged = judge(prepared, engine, run.pairs(), modules, whole, session.console)
    for sentence in (*judged.left_out, *filter(None, [judged.resolution.note])):
        session.note(sentence)
    if judged.steps is not None:
        run.write_table("verification.parquet", judged.steps)
    if len(modules):
        run.write_table("modules.parquet", modules)
    if judged.set is not None:
        run.write_json("set.json", judged.set)
    if options.save_text:
        run.write_table("texts.parquet", texts_of(prepared.pairs))
    run.write_table("predictions.parquet", judged.predictions)
    all_notes = (*notes, *prepared.notes, *engine.notes)
    run.write_json(
        "provenance.json", provenance_of(prepared, judged, seconds, all_notes, options.dataset_name)
    )
    run.write_json("summary.json", judged.summary)
    shutil.rmtree(run.path / "modules", ignore_errors=True)  # what its shards hold is in modules.parquet
    if sums is not None:
        sums.remove()


def command(config: ProbeConfig, console: Console | None = None) -> ProbeResult | Output:
    """`entangle probe`: the run, or with --dry_run what it would cost; status 1 where real steps contradict it."""
    if config.dry_run:
        return Output(estimate(config))
    result = run_probe(config, console)
    if is_refuted(result.summary.get("verification", {})):
        return Output(result.renderable(), f"Run folder: {result.folder.path}", status=1)
    return result
