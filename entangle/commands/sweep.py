"""The probe at every checkpoint of somebody's training run, and the onset of the coupled decrease."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, RenderableType

from entangle.analysis.agreement import drift_agreement, drifts
from entangle.analysis.curves import curve, onset, pair_onsets, set_point, with_changes
from entangle.analysis.geometry import GEOMETRY_COLUMNS, SIDES
from entangle.analysis.predictions import is_scored
from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import share
from entangle.analysis.wording import reference_text
from entangle.commands.across import ACROSS, run_across
from entangle.commands.probe import ProbeResult, run_probe
from entangle.config import AcrossConfig, ProbeConfig, SweepConfig
from entangle.data import hash_pairs
from entangle.errors import ModelError, RunError
from entangle.measure.inputs import load_pairs_of
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted
from entangle.runs.session import Session
from entangle.tables.base import Shown
from entangle.tables.sweep import sweep_tables

OPTIMIZER = "optimizer.pt"

PREDICTED = (*GEOMETRY_COLUMNS, "cosine", "change_chosen", "change_rejected", "regime", "band", "slack")
"""Columns of a pair that depend on the metric."""

CURVE_OF_METRIC = (
    "cosine",
    "cosine_q25",
    "cosine_q75",
    "predicted_chosen",
    "predicted_rejected",
    *map(str, REGIMES),
)
"""Columns of the curve that depend on the metric."""


@dataclass(frozen=True)
class SweepResult(Shown):
    """A finished sweep.

    Args:
        run: its folder, with a probe's run folder per checkpoint.
        steps: one row per checkpoint and scored pair: the probe's numbers, the first loss's prediction, and the
            changes of both log-probs since the start. What depends on the metric is SGD's, and as *_adamw AdamW's
            where it was asked for and a checkpoint has its state.
        curve: one row per checkpoint (see `analysis.curves.curve`), with *_adamw likewise; where the probes have
            measured the set, also what it does under the first loss (see `analysis.curves.set_point`), and AdamW's as
            *_adamw; with `--across`
            also set_chosen and set_rejected with *_error (what the other pairs do to the mean log-probs over an epoch
            of these pairs under that loss, to first order: nats per unit of learning rate / batch size).
        summary: onset and start, and how well the set at each checkpoint foretold the next (`drift_agreement`).
    """

    run: RunFolder
    steps: pd.DataFrame
    curve: pd.DataFrame
    summary: dict[str, Any]

    def renderable(self) -> RenderableType:
        """The table as a rich object."""
        return sweep_tables(self.curve, self.summary)


def run_sweep(config: SweepConfig, console: Console | None = None) -> SweepResult:
    """Probe every checkpoint of a run that isn't probed yet, and put them side by side.

    A log-prob's start is its value under the reference where there is one (DPO's reference is the policy that
    training began from), else at the first checkpoint. Run again, the command probes what is new: checkpoints that
    have been written since, or whose weights have changed.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: there is no checkpoint, or an option, the data or a checkpoint can't be used.
        Interrupted: Ctrl-C; what was finished is kept.
    """
    session = Session.start(config, console)
    folder, console = session.run, session.console
    checkpoints = find_checkpoints(config.run)
    data = hash_pairs(load_pairs_of(config))
    session.claim({"data": data})
    probes: dict[str, dict[int, ProbeResult]] = {metric: {} for metric in config.metrics}
    for number, (step, checkpoint) in enumerate(checkpoints.items(), 1):
        for metric, done in probes.items():
            if metric == "adamw" and not (checkpoint / OPTIMIZER).is_file():
                continue
            probe = config.probe_of(checkpoint, metric)
            if not is_probed(probe, checkpoint, data):
                at = f"Checkpoint {number} of {len(checkpoints)}, {metric.upper()}: {checkpoint}"
                console.print(at, markup=False)
                try:
                    with _stopping(session, number, len(checkpoints)):
                        run_probe(probe, console)
                except ModelError as error:
                    if metric == "sgd":
                        raise
                    session.note(f"left out. {error}")
                    continue
            done[step] = ProbeResult.load(probe.run_path)
            if config.across and metric == "sgd" and not is_measured_across(done[step]):
                with _stopping(session, number, len(checkpoints)):
                    run_across(AcrossConfig(run=str(probe.run_path), plots=False), console)
    result = collect(folder, probes, config.across)
    session.finish(lambda: _write(result, config))
    return result


@contextmanager
def _stopping(session: Session, number: int, checkpoints: int) -> Iterator[None]:
    """Say at which checkpoint Ctrl-C has stopped a part of the sweep, and how to resume the whole."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(
            f"Stopped at checkpoint {number} of {checkpoints}; what is finished is kept. Resume with: "
            f"{session.resume_command}"
        ) from stop


def find_checkpoints(run: str | Path) -> dict[int, Path]:
    """Checkpoints of a run by step, in order: folders checkpoint-N with a model or an adapter.

    Raises:
        RunError: there is none.
    """
    found = {
        int(number): path
        for path in Path(run).glob("checkpoint-*")
        if (number := path.name.removeprefix("checkpoint-")).isdecimal()
        and any((path / name).is_file() for name in ("adapter_config.json", "config.json"))
    }
    if not found:
        raise RunError(
            f"Expected checkpoint-* folders (each with config.json or adapter_config.json) in {run or '(nothing)'}; "
            "found none. Give the output_dir of a training run that has saved some (save_steps)."
        )
    return dict(sorted(found.items()))


def is_probed(probe: ProbeConfig, checkpoint: Path, data: str) -> bool:
    """Whether a checkpoint's probe is finished, of these options and data, and newer than the checkpoint's weights.

    It answers without loading a model; where it says no, the probe itself decides by hashes what is to be done.
    """
    run = RunFolder(probe.run_path)
    if not run.is_complete or run.changed_options(probe):
        return False
    written = (run.path / "summary.json").stat().st_mtime
    files = [*checkpoint.rglob("*.safetensors"), *checkpoint.glob(OPTIMIZER)]
    is_newer = all(file.stat().st_mtime < written for file in files)
    return is_newer and run.read_json("identity.json").get("data") == data


def is_measured_across(probe: ProbeResult) -> bool:
    """Whether all pairs of a probe are measured against each other, under all of its losses, and since it was made."""
    file, made = probe.folder.path / ACROSS, probe.folder.path / "summary.json"
    if not file.is_file() or file.stat().st_mtime < made.stat().st_mtime:
        return False
    measured = probe.folder.read_json(ACROSS)
    of_losses = [measured["losses"].get(loss, {}).get("chosen", {}) for loss in probe.summary["regimes"]]
    is_whole = measured["pairs"] == probe.summary["pairs"]["scored"]
    return is_whole and all("others" in chosen for chosen in of_losses)


def collect(
    folder: RunFolder, by_metric: Mapping[str, Mapping[int, ProbeResult]], across: bool = False
) -> SweepResult:
    """Finished probes of the same pairs side by side.

    Args:
        folder: of the result.
        by_metric: metric -> step -> probe; `sgd` is there, and has a probe at least.
        across: whether the probes' pairs are measured against each other, too.

    Raises:
        RunError: no pair could be scored.
    """
    probes = by_metric["sgd"]
    loss = next(iter(next(iter(probes.values())).summary["regimes"]), None)
    if loss is None:
        raise RunError(f"No pair could be scored at any checkpoint; see the flags in {folder.path}.")
    rows = pd.concat([_rows(step, probe, loss) for step, probe in probes.items()], ignore_index=True)
    first = rows[rows["step"] == min(probes)]
    provenance = next(iter(probes.values())).provenance
    has_reference = bool(first["ref_logps_chosen"].notna().all()) and provenance["reference"] != "self"
    start = first
    if has_reference:
        start = first[["index"]].assign(
            logps_chosen=first["ref_logps_chosen"], logps_rejected=first["ref_logps_rejected"]
        )
    steps = with_changes(rows, start)
    points, pairs = curve(steps), pair_onsets(steps)
    if adamw := by_metric.get("adamw"):
        other = with_changes(
            pd.concat([_rows(step, probe, loss) for step, probe in adamw.items()], ignore_index=True), start
        )
        steps = steps.merge(_suffixed(other, ["step", "index"], PREDICTED), on=["step", "index"], how="left")
        points = points.merge(_suffixed(curve(other), ["step"], CURVE_OF_METRIC), on="step", how="left")
    sets = {metric: _sets(found, loss) for metric, found in by_metric.items()}
    if len(sets["sgd"]):
        points = points.merge(sets["sgd"].drop(columns="metric"), on="step", how="left")
    if len(of_adamw := sets.get("adamw", pd.DataFrame())):
        numbers = [str(name) for name in of_adamw if name not in ("step", "metric")]
        points = points.merge(_suffixed(of_adamw, ["step"], numbers), on="step", how="left")
    foretold = _foretold(rows, pd.concat(sets.values()), loss)
    if across:
        others = [{"step": step} | _others(probe, loss) for step, probe in probes.items()]
        points = points.merge(pd.DataFrame(others), on="step")
    summary = {
        "loss": loss,
        "start": f"reference ({reference_text(provenance['reference'])})"
        if has_reference
        else f"checkpoint-{min(probes)}",
        "checkpoints": list(probes),
        "onset": onset(points),
        "fallen_pairs": share(int(pairs.notna().sum()), len(pairs)),
        "drift_agreement": foretold,
        "pair_onsets": {str(step): share(int((pairs <= step).sum()), len(pairs)) for step in probes},
    }
    return SweepResult(folder, steps, points, summary)


def _sets(probes: Mapping[int, ProbeResult], loss: str) -> pd.DataFrame:
    """What the set says at every checkpoint where it was measured under a metric."""
    found = {step: probe.summary["set"] for step, probe in probes.items() if "set" in probe.summary}
    return pd.DataFrame(
        [
            {"step": step, "metric": content["metric"]} | set_point(content, loss)
            for step, content in found.items()
        ]
    )


def _foretold(rows: pd.DataFrame, sets: pd.DataFrame, loss: str) -> dict[Any, Any] | None:
    """How well the set at each checkpoint foretold the means at the next one; None where it can't be said."""
    labels = {"variant": loss, "loss": loss, "seed": 0}
    table = drifts(rows.assign(**labels), sets.assign(**labels)) if len(sets) else sets
    return drift_agreement(table).to_dict("records")[0] if len(table) else None


def _others(probe: ProbeResult, loss: str) -> dict[str, float]:
    """What the pairs of a checkpoint's probe do to each other under a loss."""
    own = probe.folder.read_json(ACROSS)["losses"][loss]
    return {
        f"set_{side}{ending}": own[side][f"others{ending}"] for side in SIDES for ending in ("", "_error")
    }


def _rows(step: int, probe: ProbeResult, loss: str) -> pd.DataFrame:
    predictions = probe.predictions[probe.predictions["loss"] == loss]
    scored = probe.pairs[is_scored(probe.pairs)].merge(predictions, on="index")
    return scored.assign(step=step)


def _suffixed(table: pd.DataFrame, keys: list[str], columns: Sequence[str]) -> pd.DataFrame:
    """The columns that depend on the metric, renamed to *_adamw, beside the keys."""
    return table[keys].join(table[list(columns)].add_suffix("_adamw"))


def _write(result: SweepResult, config: SweepConfig) -> None:
    result.run.write_table("steps.parquet", result.steps)
    result.run.write_table("curve.parquet", result.curve)
    result.run.write_json("summary.json", result.summary)
    if config.plots:
        from entangle.figures.curves import trajectory
        from entangle.figures.style import save

        save(trajectory(result.curve, result.summary["onset"]), result.run.path / "sweep.png")
