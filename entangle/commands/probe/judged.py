"""What a probe says once its pairs are measured: every loss judged on the rows, and the aggregates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.console import Console

from entangle import embedded
from entangle.analysis.predictions import may_have_reference, predict_losses
from entangle.analysis.real_steps import summarise_verification
from entangle.analysis.summary import summarise
from entangle.commands.probe.prepared import Prepared, judgeable
from entangle.config import EMBEDDED
from entangle.diagnostics import columns_of, summarise_diagnostics
from entangle.measure.modules import summarise_modules
from entangle.measure.resolution import Resolution, measure_resolution
from entangle.measure.set_content import SET_DETAILS, set_content
from entangle.measure.sets import NO_SET, Grouping
from entangle.measure.verification import verify_losses
from entangle.runs.progress import progress_bar
from entangle.runs.provenance import environment
from entangle.scores import Engine
from entangle.scores.sums import SumGram


@dataclass(frozen=True)
class Judged:
    """What follows from a probe's rows.

    Args:
        predictions: one row per scored pair and loss.
        summary: the aggregates.
        set: the set's block (see `set_content`); None where it couldn't be had.
        steps: rows of the real steps, where these were asked for.
        resolution: error of the products, which verdicts allow for.
        left_out: what wasn't judged or measured, and why: losses that nobody named, the set.
    """

    predictions: pd.DataFrame
    summary: dict[str, Any]
    set: dict[str, Any] | None
    steps: pd.DataFrame | None
    resolution: Resolution
    left_out: list[str]


def judge(
    prepared: Prepared,
    engine: Engine,
    rows: pd.DataFrame,
    modules: pd.DataFrame,
    sums: tuple[Mapping[str, SumGram], Grouping] | None,
    console: Console,
) -> Judged:
    """Judge every loss on the finished rows; with the option `verify`, take real steps too.

    Args:
        prepared: what was measured.
        engine: what measured it.
        rows: one per pair.
        modules: one per pair and module; empty where these weren't asked for.
        sums: products of group sums by module, and the groups; None without the set's block.
        console: where the progress of real steps goes.

    Raises:
        ConfigError: a named loss can't be judged on these rows.
    """
    options = prepared.options
    by_index = {pair.index: pair for pair in prepared.tokens}
    measured = measure_resolution(prepared.policy, engine, rows, by_index, prepared.metric, options.engine)
    resolution = measured.believed
    usable, left_out = judgeable(prepared.losses, prepared.are_named, has_reference=may_have_reference(rows))
    predictions = predict_losses(rows, usable, resolution=resolution, batch_size=options.loss_batch_size)
    summary = summarise(rows, predictions, options.group_by) | {"resolution": measured.content}
    steps = whole = None
    if options.verify:
        with progress_bar(console, "real steps", options.verify * len(usable), 0) as advance:
            steps = verify_losses(
                prepared.policy, by_index, rows, predictions, usable, options.verify, resolution, advance
            )
        summary["verification"] = summarise_verification(steps)
    if len(modules):
        summary["modules"] = summarise_modules(modules, rows)
    if sums is not None and len(predictions):
        grams, grouping = sums
        whole = set_content(grams, grouping, predictions, prepared.metric_name)
        summary["set"] = {name: value for name, value in whole.items() if name not in SET_DETAILS}
    else:
        left_out = [*left_out, NO_SET]
    if options.diagnostics:
        summary["diagnostics"] = summarise_diagnostics(rows, predictions, columns_of(options.diagnostics))
    return Judged(predictions, summary, whole, steps, measured, left_out)


def provenance_of(
    prepared: Prepared, judged: Judged, seconds: float, notes: tuple[str, ...], dataset_name: str | None
) -> dict[str, Any]:
    """What the numbers were computed from and on.

    Args:
        prepared: what was measured.
        judged: what was found.
        seconds: that it took.
        notes: all that the reader should know.
        dataset_name: of the pairs; None for pairs in memory.
    """
    own = {str(embedded.POLICY), str(embedded.ADAPTER)}  # not the place where this installation keeps them
    described = {
        name: EMBEDDED if value in own else value for name, value in prepared.policy.description.items()
    }
    return (
        environment()
        | described
        | {
            "dataset_name": dataset_name,
            "resolution": judged.resolution.believed,
            "metric": prepared.metric_name,
            "engine": prepared.options.engine,
            "seconds": seconds,
            "notes": [*notes, *filter(None, [judged.resolution.note])],
        }
    )
