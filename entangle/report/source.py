"""What a report shows of one run: everything that its folder holds, read once. Files that aren't there are None."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from entangle.analysis.curves import curve, with_changes
from entangle.analysis.predictions import is_scored
from entangle.errors import RunError
from entangle.runs.folder import RunFolder


@dataclass(frozen=True)
class WhatIfTables:
    """The parts of a what-if that are drawn: its settings, its curves, its summary; `of`: pairs that it was given."""

    settings: pd.DataFrame
    curves: pd.DataFrame
    summary: Mapping[str, Any]
    of: int = 0

    @property
    def is_sampled(self) -> bool:
        """Whether there were more pairs than it judged."""
        return self.of > self.summary["pairs"]["scored"]


@dataclass(frozen=True)
class Source:
    """A run, as its folder holds it.

    Args:
        name: how the report calls it.
        summary: its aggregates.
        provenance: what the numbers were computed from and on.
        config: the options that it was made with.
        path: its folder, as it was named.
        finished: the day on which it was, as 2026-01-31.
        pairs: one row per pair.
        predictions: one row per scored pair and loss.
        texts: texts of the pairs.
        verification: predicted and measured changes of real steps.
        tokens: one row per token of the pairs that were taken apart.
        modules: one row per pair and module.
        steps: one row per training step, or per step and pair.
        curve: one row per checkpoint of a sweep.
        ledger: one row per training step and pair: what the measured changes came from.
        prompts: one row per prompt of a reward run or of a joint run.
        changes: one row per prompt of two reward runs, before and after a fine-tuning.
        curves: one row per run and probe of a comparison.
        drifts: one row per run and probe of a comparison that measured the set: foretold and measured drift.
        variants: one row per loss and setting of a comparison: its last point, over seeds.
        causes: one row per run and side of a comparison: what the mean change came from, where it kept ledgers.
        set: what set.json holds: the set of pairs as one pair.
        sets: one row per probe of a training run and metric: the set at that step.
        across: what the other pairs do to each pair: the aggregates of `entangle across`.
        epochs: one row per pair and loss: what an epoch does to it, by `entangle across`.
        what_if: other losses and settings on the same pairs.
        answers: of `entangle why`: question, line, paste and details of each.
        remedy: what would stop a fall, where it was looked for: words, and paste with (trainer, line).
    """

    name: str
    summary: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    path: str = ""
    finished: str = ""
    pairs: pd.DataFrame | None = None
    predictions: pd.DataFrame | None = None
    texts: pd.DataFrame | None = None
    verification: pd.DataFrame | None = None
    tokens: pd.DataFrame | None = None
    modules: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    curve: pd.DataFrame | None = None
    ledger: pd.DataFrame | None = None
    prompts: pd.DataFrame | None = None
    changes: pd.DataFrame | None = None
    curves: pd.DataFrame | None = None
    drifts: pd.DataFrame | None = None
    variants: pd.DataFrame | None = None
    causes: pd.DataFrame | None = None
    set: Mapping[str, Any] | None = None
    sets: pd.DataFrame | None = None
    across: Mapping[str, Any] | None = None
    epochs: pd.DataFrame | None = None
    what_if: WhatIfTables | None = None
    answers: Sequence[Mapping[str, Any]] = ()
    remedy: Mapping[str, Any] | None = None

    @cached_property
    def losses(self) -> list[str]:
        """Labels of the judged losses, in their order."""
        return [] if self.predictions is None else self.predictions["loss"].unique().tolist()

    @cached_property
    def scored(self) -> pd.DataFrame:
        """The scored rows of the pairs."""
        assert self.pairs is not None
        return self.pairs[is_scored(self.pairs)]

    def judged(self, loss: str) -> pd.DataFrame:
        """The scored pairs with their predictions under one loss, in dataset order."""
        assert self.predictions is not None
        return self.scored.merge(self.predictions[self.predictions["loss"] == loss], on="index")


def read_source(path: str | Path) -> Source:
    """Read a finished run folder of any command.

    Raises:
        RunError: there is none at `path`, it isn't finished, or it holds nothing that a report can show.
    """
    run = RunFolder.open(path)
    if run.verb == "why":
        return _answers(run)
    known = [*run.path.glob("provenance.json"), *sorted(run.path.glob("runs/*/provenance.json"))]
    provenance = RunFolder(known[0].parent).read_json(known[0].name) if known else {}
    parts: dict[str, Any] = {
        name: _parts(run, name)
        for name in (
            "predictions",
            "texts",
            "verification",
            "tokens",
            "modules",
            "steps",
            "curve",
            "ledger",
            "prompts",
            "changes",
            "curves",
            "drifts",
            "variants",
        )
    }
    parts |= {"sets": _parts(run, "set"), "epochs": run.table("across.parquet")}
    if (
        parts["variants"] is not None
    ):  # a comparison's ledger has a row per run, and none where its runs kept none
        ledger = parts.pop("ledger")
        parts |= {"ledger": None, "causes": None if ledger is None or ledger.empty else ledger}
    if parts["prompts"] is not None and parts["texts"] is None:
        parts["texts"] = _prompt_texts(run)
    parts["pairs"] = run.pairs() if run.shards_of("pairs") and parts["predictions"] is not None else None
    if all(parts[name] is None for name in ("pairs", "steps", "ledger", "prompts", "changes", "variants")):
        raise RunError(
            f"Expected pairs, prompts, training steps or a comparison in the run folder {run.path}; it holds "
            f"{', '.join(sorted(file.name for file in run.path.iterdir()))}."
        )
    return Source(
        name=run.path.resolve().name,
        summary=run.read_json("summary.json"),
        provenance=provenance,
        path=str(path),
        config=run.config if (run.path / "config.yaml").is_file() else {},
        finished=date.fromtimestamp((run.path / "summary.json").stat().st_mtime).isoformat(),
        what_if=_what_if(run),
        set=_json(run, "set.json"),
        across=_json(run, "across.json"),
        **parts,
    )


def _answers(run: RunFolder) -> Source:
    """The five answers with the probe that they show pair by pair, and the course over checkpoints."""
    summary = run.read_json("summary.json")
    if not summary.get("probe"):
        raise RunError(
            f"{run.path} was answered from the log alone, so it has no page: entangle doctor shows a log."
        )
    shown = read_source(run.path / summary["probe"])
    return replace(
        shown,
        name=f"{run.path.resolve().parent.name}/{run.path.name}",
        summary={**shown.summary} | {"missing": summary["evidence"]["missing"], "loss": summary["loss"]},
        steps=run.table("steps.parquet"),
        curve=run.table("curve.parquet"),
        answers=summary["answers"],
    )


def _parts(run: RunFolder, name: str) -> pd.DataFrame | None:
    """A table of the folder: one file, or the shards of a sub-folder."""
    whole = run.table(f"{name}.parquet")
    files = sorted((run.path / name).glob("[0-9]*.parquet"))
    if whole is not None or not files:
        return whole
    return pd.concat([run.read_table(f"{name}/{file.name}") for file in files], ignore_index=True)


def _json(run: RunFolder, name: str) -> Mapping[str, Any] | None:
    return run.read_json(name) if (run.path / name).is_file() else None


def _prompt_texts(run: RunFolder) -> pd.DataFrame | None:
    """Index and text of the prompts of a reward run, which stand beside their answers."""
    answers = run.read_shards("answers")
    return answers[["index", "prompt"]] if "prompt" in answers else None


def _what_if(run: RunFolder) -> WhatIfTables | None:
    folder = RunFolder(run.path / "whatif")
    settings, curves = folder.table("whatif.parquet"), folder.table("curves.parquet")
    if not folder.is_complete or settings is None or curves is None:
        return None
    return WhatIfTables(settings, curves, folder.read_json("summary.json"))


def module_shares(modules: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame | None:
    """What every kind of module adds to the mean cosine in every layer: layer, kind, share; None without its columns.

    share is the mean over pairs of c_m / sqrt(A B), relative to the mean cosine; shares sum to 1. What is outside the
    layers has the layer -1.
    """
    if not {"index", "layer", "kind", "inner"} <= set(modules):
        return None
    whole = pairs.set_index("index")
    scale = (whole["sq_chosen"] * whole["sq_rejected"]) ** 0.5
    parts = (
        pd.DataFrame(
            {
                "layer": modules["layer"].astype("Int64").fillna(-1).astype(int),
                "kind": modules["kind"].astype(str),
                "share": modules["inner"] / modules["index"].map(scale),
            }
        )
        .groupby(["layer", "kind"], sort=False, as_index=False)["share"]
        .sum()
    )
    return parts.assign(share=parts["share"] / (whole["inner"] / scale).sum())


def set_course(source: Source, metric: str = "sgd") -> pd.DataFrame | None:
    """The set over the steps of a sweep or a training run, in one metric; None where it wasn't measured."""
    if source.curve is not None and "set_drift" in source.curve:
        return source.curve if metric == "sgd" else None
    if source.sets is None or "set_drift" not in source.sets:
        return None
    rows = source.sets[source.sets["metric"] == metric].drop_duplicates("step", keep="last")
    return None if rows.empty else rows.sort_values("step", ignore_index=True)


def step_table(steps: pd.DataFrame) -> pd.DataFrame | None:
    """Per training step, `entangle.analysis.curves.curve` of rows of steps and pairs; None without its columns.

    Changes count from the start that the rows name, else from their first step.
    """
    if not {"step", "index", "logps_chosen", "logps_rejected"} <= set(steps):
        return None
    if not {"moved_chosen", "moved_rejected"} <= set(steps):
        steps = with_changes(steps, steps[steps["step"] == steps["step"].min()])
    return curve(steps)
