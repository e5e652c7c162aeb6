"""What if: other losses and settings on a finished probe's rows, without the model.

A pair's Gram block doesn't depend on the loss, and its six scalars give every loss's incentives: each loss at
each setting is judged from the rows alone. On top of that, for every knob of `entangle.analysis.hyperparameters`, the
exact interval of settings that makes each pair ideal, and the smallest change that brings a wanted share there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from entangle.analysis.geometry import RESOLUTION, PairGeometry
from entangle.analysis.hyperparameters import DEFAULT_KNOBS
from entangle.analysis.predictions import geometry_of, is_scored, logps_of
from entangle.analysis.regimes import REGIMES, Regime
from entangle.analysis.statistics import share
from entangle.analysis.verdict import limits, recommendation
from entangle.commands.output import Output
from entangle.commands.whatif.choice import allowed_losses, base_of, build_all, usable_knobs
from entangle.commands.whatif.grid import apply_grid
from entangle.commands.whatif.paste import lines_to_paste
from entangle.commands.whatif.scored import ScoredPairs
from entangle.commands.whatif.set import ScoredSet
from entangle.commands.whatif.source import Probed, read_probe
from entangle.config import WhatIfConfig
from entangle.errors import RunError
from entangle.measure.set_content import geometry_of_content
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown
from entangle.tables.whatif import whatif_tables
from losses import PreferenceLoss

PROVENANCE = (
    "dataset_name",
    "model_name_or_path",
    "adapter_name_or_path",
    "probed_parameters",
    "probed_kind",
    "score_dtype",
    "metric",
    "reference",
)
"""What a result repeats of the probe's provenance."""


@dataclass(frozen=True)
class WhatIf(Shown):
    """Every loss and setting judged on one probe's pairs.

    Args:
        pairs: the scored rows that were judged, in dataset order.
        settings: one row per loss and setting: regime shares with 95 % Wilson intervals, margin growth, rho.
        regimes: one row per pair, one column per loss and setting (its label): the regime.
        critical: one row per pair: for each knob the interval of settings that makes it ideal (NaN: none),
            and why no loss can move it as wanted, where that is so.
        curves: one row per knob and setting of a grid: regime shares along the knob.
        summary: what was judged, the smallest changes, refusals, limits, the recommendation, its lines to paste.
        texts: texts of the pairs, where the probe kept them.
    """

    pairs: pd.DataFrame
    settings: pd.DataFrame
    regimes: pd.DataFrame
    critical: pd.DataFrame
    curves: pd.DataFrame
    summary: dict[str, Any]
    texts: pd.DataFrame | None = None

    @property
    def recommendation(self) -> str:
        """What to do, in a few sentences."""
        return self.summary["recommendation"]

    def renderable(self, rows: int = 12):
        """The tables and the recommendation as a rich object."""
        return whatif_tables(self.settings, self.critical, self.summary, self.texts, rows)


def what_if(
    probe: Probed | RunFolder | str | Path | pd.DataFrame,
    losses: Sequence[Any] = (),
    grid: Sequence[str] = (),
    *,
    base: Any = None,
    target: float = 0.9,
    knobs: Sequence[str] = DEFAULT_KNOBS,
    loss_batch_size: int | None = None,
    resolution: float | None = None,
) -> WhatIf:
    """Judge losses, grids of hyper-parameters and knobs on the rows of a finished probe.

    Args:
        probe: a probe's result, its run folder, the folder's path, or rows of pairs with its columns.
        losses: what `losses.build` takes; none means every loss of the catalogue that the rows can judge.
        grid: `loss.field=1,2,3`, or `field=1,2,3` for every judged loss that has the field.
        base: the loss that the knobs start from; DPO, or without a reference CPO with no NLL term.
        target: share of the scored pairs that the smallest change must make ideal, in (0, 1].
        knobs: names of `entangle.analysis.hyperparameters.KNOBS`.
        loss_batch_size: pairs per batch for batch-coupled losses, in dataset order; the probe's, or 8.
        resolution: relative error of the rows' dot products; the probe's, or that of float32.

    Raises:
        RunError: the run isn't there, isn't finished, or has no scored pair.
        ConfigError: a loss, a grid or a knob isn't known, or the rows can't judge a loss named here.
    """
    source = read_probe(probe)
    rows = source.pairs[is_scored(source.pairs)].reset_index(drop=True)
    if rows.empty:
        raise RunError(
            f"Expected pairs with scores; none of the {len(source.pairs)} pairs of this run has any."
        )
    resolution = float(resolution or source.provenance.get("resolution") or RESOLUTION[torch.float32])
    batch_size = loss_batch_size or source.loss_batch_size
    geometry, logps = geometry_of(rows, resolution), logps_of(rows)
    start = base_of(base, logps)
    judged, refused = allowed_losses(build_all(losses), logps, named=bool(losses))
    judged = apply_grid(judged, grid)
    if start.label not in {loss.label for loss in judged}:
        judged = [start, *judged]
    scored = ScoredPairs(geometry, logps, batch_size)
    settings, regimes = scored.verdicts(judged, rows["index"])
    turned, idle = usable_knobs(knobs, logps)
    changes, curves, intervals = [], [], {}
    for knob in turned:
        lower, upper = scored.interval(knob, start)
        intervals |= {f"{knob.name}_lower": lower.numpy(), f"{knob.name}_upper": upper.numpy()}
        changes.append(scored.change(knob, start, lower, upper, target))
        curves.append(scored.curve(knob, start, changes[-1], lower, upper))
    critical = _critical(rows, geometry, regimes, start, intervals)
    summary = {
        "pairs": {"total": len(source.pairs), "scored": len(rows)},
        "base": start.label,
        "target": target,
        "loss_batch_size": batch_size,
        "resolution": resolution,
        "metric": source.provenance.get("metric", "sgd"),
        "provenance": {key: source.provenance[key] for key in PROVENANCE if key in source.provenance},
        "regimes": _shares_of(settings, start.label),
        "falls": scored.falls(start),
        "changes": changes,
        "refused": refused + idle,
        "batch_coupled": [loss.label for loss in judged if loss.is_batch_coupled],
        "inseparable": _inseparable(critical),
        "best": _best(settings),
        "grid": list(grid),
    }
    whole = None
    if source.set_content is not None:
        whole = ScoredSet(geometry_of_content(source.set_content), scored)
        summary["set"] = {name: source.set_content[name] for name in SET_BLOCK} | {
            "losses": whole.content(judged),
            "changes": [whole.smallest_change(knob, start) for knob in turned],
        }
    summary |= {
        "recommendation": recommendation(summary),
        "paste": lines_to_paste(summary, scored, whole, start),
        "limits": limits(summary),
    }
    curves = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
    return WhatIf(rows, settings, regimes, critical, curves, summary, source.texts)


def _critical(
    rows: pd.DataFrame,
    geometry: PairGeometry,
    regimes: pd.DataFrame,
    base: PreferenceLoss,
    intervals: Mapping[str, np.ndarray],
) -> pd.DataFrame:
    """Per pair: its band, its regime under the base, the knobs' intervals, and why nothing can help."""
    lower, upper = geometry.critical_ratio
    nothing = (geometry.sq_chosen <= 0) | (geometry.sq_rejected <= 0)
    reasons = [
        (rows["identical"].to_numpy(dtype=bool), "identical"),
        (nothing.numpy(), "no gradient"),
        (geometry.is_parallel.numpy(), "parallel"),
    ]
    ideal = (regimes.drop(columns="index") == str(Regime.IDEAL)).sum(axis=1)
    return pd.DataFrame(
        {
            "index": rows["index"].to_numpy(),
            "inseparable": np.select(*zip(*reasons, strict=True), default=""),
            "cosine": geometry.cosine.numpy(),
            "norm_ratio": geometry.norm_ratio.numpy(),
            "band_lower": lower.numpy(),
            "band_upper": upper.numpy(),
            "regime": regimes[base.label].astype(str),
            "ideal_settings": ideal.to_numpy(),
            **intervals,
        }
    )


def _inseparable(critical: pd.DataFrame) -> dict[str, Any]:
    rows = critical[critical["inseparable"] != ""]
    return {
        **share(len(rows), len(critical)),
        "reasons": rows["inseparable"].value_counts().to_dict(),
        "indices": rows["index"].tolist(),
        "never_ideal": int((critical["ideal_settings"] == 0).sum()),
    }


def _best(settings: pd.DataFrame) -> dict[str, Any]:
    """The judged setting with the most ideal pairs; of equals the one that keeps most margin growth."""
    row = settings.sort_values(["ideal", "margin_efficiency_median"], ascending=False, kind="stable").iloc[0]
    return {"label": row["label"], "regimes": _shares_of(settings, row["label"])} | {
        name: float(row[name]) for name in row.index if name.startswith("margin_")
    }


def _shares_of(settings: pd.DataFrame, label: str) -> dict[str, dict[str, float]]:
    row = settings[settings["label"] == label].iloc[0]
    return {str(regime): share(int(row[f"{regime}_count"]), int(row["pairs"])) for regime in REGIMES}


SET_BLOCK = ("pairs", "prompts", "groups", "cosine", "may_be_parallel", "norm_ratio", "band")
"""What a result repeats of the probe's set.json."""


def run_whatif(config: WhatIfConfig) -> tuple[WhatIf, RunFolder]:
    """The command: judge what the options name, and write it."""
    result = what_if(
        config.run,
        config.losses,
        config.grid,
        base=config.base,
        target=config.target,
        knobs=config.knobs,
        loss_batch_size=config.loss_batch_size,
    )
    return result, write(result, config.output_path, dataclasses.asdict(config), plots=config.plots)


def command(config: WhatIfConfig, console: Console | None = None) -> Output:
    """`entangle whatif`."""
    result, folder = run_whatif(config)
    return Output(result.renderable(config.rows), f"Run folder: {folder.path}")


def write(result: WhatIf, path: str | Path, config: Mapping[str, Any], *, plots: bool = True) -> RunFolder:
    """Write a result as a folder of its own; an earlier result is replaced, nothing else there is touched.

    Raises:
        RunError: the folder holds something that isn't a what-if, or can't be written.
    """
    folder = RunFolder(path)
    _make_room(folder)
    folder.write_json("identity.json", {"command": "whatif"})
    folder.write_yaml("config.yaml", config)
    folder.write_table("whatif.parquet", result.settings)
    folder.write_table("critical.parquet", result.critical)
    folder.write_table("regimes.parquet", result.regimes)
    folder.write_table("curves.parquet", result.curves)
    figures = []
    if plots:
        from entangle.figures.settings import write_figures

        figures = write_figures(
            result.pairs, result.settings, result.regimes, result.curves, result.summary, folder.path
        )
    folder.write_json("summary.json", result.summary | {"figures": figures})
    return folder


def _make_room(folder: RunFolder) -> None:
    """An empty folder, or one of this command without summary and figures: unfinished until the end."""
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        names = {file.name for file in folder.path.iterdir()}
        is_ours = "identity.json" in names and folder.read_json("identity.json").get("command") == "whatif"
        if names and not is_ours:
            raise RunError(f"{folder.path} isn't empty and holds no what-if. Choose another --output_dir.")
        if "summary.json" in names:
            for figure in folder.read_json("summary.json").get("figures", []):
                (folder.path / Path(figure).name).unlink(missing_ok=True)
            (folder.path / "summary.json").unlink()
    except OSError as error:
        raise RunError(
            f"Can't write {folder.path}: {error.strerror or error}. Choose another --output_dir."
        ) from error
