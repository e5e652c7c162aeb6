"""A finished probe: its rows, predictions and aggregates, from memory or from a run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import RenderableType

from entangle.analysis.predictions import is_scored
from entangle.commands.forecast.curves import ForecastResult, forecast_pairs
from entangle.commands.whatif.run import WhatIf, what_if
from entangle.commands.whatif.source import ProbedRows
from entangle.config import ProbeConfig, build_losses
from entangle.errors import RunError
from entangle.measure.gram import PairGram
from entangle.measure.measured_set import MeasuredSet
from entangle.measure.sets import NO_SET
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown
from entangle.tables.probe import probe_tables


@dataclass(frozen=True)
class ProbeResult(Shown):
    """A finished probe; a notebook shows its tables.

    Args:
        pairs: one row per pair: texts' lengths and flags, log-probs, the Gram block, cosine and band.
        predictions: one row per scored pair and loss: incentives, predicted changes, regime.
        summary: aggregates of these rows.
        provenance: what the numbers were computed from and on, and what their reader should know (`notes`).
        texts: prompt, chosen and rejected by index, where they were kept.
        modules: one row per scored pair and module (see `entangle.measure.modules.module_rows`), where asked for.
        steps: one row per pair, loss and response of the real steps that checked the predictions, where asked for.
        set_content: the set's block as plain values; `set` is made to be read.
        loss_batch_size: pairs per batch under batch-coupled losses.
        run: the run folder; None for a probe in memory.
    """

    pairs: pd.DataFrame
    predictions: pd.DataFrame
    summary: dict[str, Any]
    provenance: Mapping[str, Any]
    texts: pd.DataFrame | None = None
    modules: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    set_content: Mapping[str, Any] | None = None
    loss_batch_size: int = ProbeConfig.loss_batch_size
    run: RunFolder | None = None

    @classmethod
    def load(cls, path: str | Path) -> ProbeResult:
        """Read a finished run folder.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder.open(path, ProbeConfig.VERB)
        read = ProbedRows.of_run(path)
        return cls(
            pairs=read.pairs,
            predictions=run.read_table("predictions.parquet"),
            summary=run.read_json("summary.json"),
            provenance=read.provenance,
            texts=read.texts,
            modules=run.table("modules.parquet"),
            steps=run.table("verification.parquet"),
            set_content=read.set_content,
            loss_batch_size=read.loss_batch_size,
            run=run,
        )

    @property
    def folder(self) -> RunFolder:
        """The run folder.

        Raises:
            RunError: the probe was made in memory and has none.
        """
        if self.run is None:
            raise RunError(
                "This probe was made in memory, and what was asked for needs its run folder. Make the probe with "
                "run_probe(ProbeConfig(...)) or `entangle probe`."
            )
        return self.run

    @property
    def first_loss(self) -> str:
        """Label of the first loss that was judged.

        Raises:
            RunError: none was, since no pair could be scored.
        """
        if self.predictions.empty:
            raise RunError("No pair of this probe could be scored, so no loss was judged.")
        return str(self.predictions["loss"].iloc[0])

    def scored(self, limit: int | None, least: int) -> pd.DataFrame:
        """Rows of the scored pairs, `limit` of them evenly spread where there are more.

        Raises:
            RunError: there are fewer than `least`.
        """
        rows = self.pairs[is_scored(self.pairs)]
        if len(rows) < least:
            raise RunError(f"Expected at least {least} scored pairs; this probe has {len(rows)}.")
        count = min(limit or len(rows), len(rows))
        return rows.iloc[np.linspace(0, len(rows) - 1, count).round().astype(int)].reset_index(drop=True)

    @property
    def set(self) -> MeasuredSet:
        """All pairs as one, through their mean scores: drift, cosine, band, with intervals.

        Raises:
            RunError: the probe has no such block: fewer than two prompts were scored, or memory didn't allow it.
        """
        if self.set_content is None:
            raise RunError(NO_SET)
        return MeasuredSet(self.set_content)

    def what_if(
        self,
        losses: Sequence[Any] = (),
        grid: Sequence[str] = (),
        **options: Any,
    ) -> WhatIf:
        """Judge other losses and settings on these pairs, without the model.

        Args:
            losses: loss objects, names, or `name:key=value,...`; none: every loss that the rows can judge.
            grid: see `entangle.what_if`.
            options: further ones of `entangle.what_if`: base, target, knobs.

        Raises:
            UserError: as `entangle.what_if`.
        """
        return what_if(self, losses, grid, **options)

    def forecast(self, losses: Sequence[Any] = (), **options: Any) -> ForecastResult:
        """Training curves of these pairs under any loss, without the model; `run_forecast` measures what it needs once.

        Args:
            losses: loss objects, names, or `name:key=value,...`; none: the probe's first.
            options: further ones of `entangle.commands.forecast.curves.forecast_pairs`.

        Raises:
            RunError: the run folder holds no Gram matrix, or as `forecast_pairs`.
        """
        gram = PairGram.load(self.folder)
        if gram is None:
            raise RunError(
                f"{self.folder.path} holds no Gram matrix of its pairs. Measure it once: entangle forecast "
                f"{self.folder.path}"
            )
        rows = self.pairs.set_index("index", drop=False).loc[list(gram.indices)].reset_index(drop=True)
        names = losses or (self.first_loss,)
        return forecast_pairs(
            gram, rows, build_losses(names), metric=str(self.provenance["metric"]), **options
        )

    def renderable(self, worst: int = 3) -> RenderableType:
        """The tables as rich objects: regimes, groups, distributions and the `worst` pairs."""
        return probe_tables(self.summary, self.provenance, self.pairs, self.predictions, self.texts, worst)
