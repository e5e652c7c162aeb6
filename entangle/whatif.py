"""What if: other losses and settings on a finished probe's rows, without the model.

A pair's Gram block doesn't depend on the loss, and its six scalars give every loss's incentives: each loss at
each setting is judged from the rows alone. On top of that, for every knob of `entangle.knobs`, the exact
interval of settings that makes each pair ideal, and the smallest change that brings a wanted share there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor

from entangle.config import WhatIfConfig, build_losses, parse_loss
from entangle.errors import ConfigError, RunError
from entangle.geometry import RESOLUTION, PairGeometry
from entangle.knobs import (
    DEFAULT_KNOBS,
    KNOBS,
    Knob,
    Reach,
    best_change,
    default_base,
    ideal_interval,
    readable,
    smallest_change,
)
from entangle.knobs import Path as KnobPath
from entangle.predictions import coefficients_of, geometry_of, is_scored, logps_of, usable_losses
from entangle.regimes import REGIMES, Regime, predict
from entangle.report.tables import InNotebooks
from entangle.runs import RunFolder
from entangle.summary import share, wilson
from losses import (
    CATALOGUE,
    Coefficients,
    MissingReference,
    MissingTokens,
    PairLogps,
    PreferenceLoss,
    TokenLogps,
)

if TYPE_CHECKING:
    from entangle.probe import ProbeResult

CURVE_POINTS = 160
"""Settings at which a knob's curve of regime shares is drawn."""


PROVENANCE = (
    "model_name_or_path", "adapter_name_or_path", "probed_parameters", "probed_kind", "score_dtype", "metric",
    "reference",
)  # fmt: skip
"""What a result repeats of the probe's provenance."""


@dataclass(frozen=True)
class WhatIf(InNotebooks):
    """Every loss and setting judged on one probe's pairs.

    Args:
        pairs: the scored rows that were judged, in dataset order.
        settings: one row per loss and setting: regime shares with 95 % Wilson intervals, margin growth, rho.
        regimes: one row per pair, one column per loss and setting (its label): the regime.
        critical: one row per pair: for each knob the interval of settings that makes it ideal (NaN: none),
            and why no loss can move it as wanted, where that is so.
        curves: one row per knob and setting of a grid: regime shares along the knob.
        summary: what was judged, the smallest changes, refusals, limits, the recommendation.
        texts: texts of the pairs, where the probe kept them.
    """

    pairs: pd.DataFrame
    settings: pd.DataFrame
    regimes: pd.DataFrame
    critical: pd.DataFrame
    curves: pd.DataFrame
    summary: dict[str, Any]
    texts: pd.DataFrame | None = None

    def renderable(self, rows: int = 12):
        """The tables and the recommendation as a rich object."""
        from entangle.report.whatif_tables import report

        return report(self, rows)

    def table(self, rows: int = 12, width: int = 110) -> str:
        """The same as plain text, for a notebook or a file."""
        from entangle.report.tables import render

        return render(self.renderable(rows), width)


def what_if(
    run: ProbeResult | RunFolder | str | Path | pd.DataFrame,
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
        run: a probe's result, its run folder, the folder's path, or rows of pairs with its columns.
        losses: what `losses.build` takes; none means every loss of the catalogue that the rows can judge.
        grid: `loss.field=1,2,3`, or `field=1,2,3` for every judged loss that has the field.
        base: the loss that the knobs start from; DPO, or without a reference CPO with no NLL term.
        target: share of the scored pairs that the smallest change must make ideal, in (0, 1].
        knobs: names of `entangle.knobs.KNOBS`.
        loss_batch_size: pairs per batch for batch-coupled losses, in dataset order; the probe's, or 8.
        resolution: relative error of the rows' dot products; the probe's, or that of float32.

    Raises:
        RunError: the run isn't there, isn't finished, or has no scored pair.
        ConfigError: a loss, a grid or a knob isn't known, or the rows can't judge a loss named here.
    """
    source = _read(run)
    rows = source.pairs[is_scored(source.pairs)].reset_index(drop=True)
    if rows.empty:
        raise RunError(
            f"Expected pairs with scores; none of the {len(source.pairs)} pairs of this run has any."
        )
    resolution = float(resolution or source.provenance.get("resolution") or RESOLUTION[torch.float32])
    batch_size = loss_batch_size or source.config.get("loss_batch_size") or 8
    geometry, logps = geometry_of(rows, resolution), logps_of(rows)
    start = _base(base, logps)
    judged, refused = _judgeable(_build_all(losses), logps, named=bool(losses))
    judged = apply_grid(judged, grid)
    if start.label not in {loss.label for loss in judged}:
        judged = [start, *judged]
    bench = Bench(geometry, logps, batch_size)
    settings, regimes = bench.judge(judged, rows["index"])
    turned, idle = _usable_knobs(knobs, logps)
    changes, curves, intervals = [], [], {}
    for knob in turned:
        lower, upper = bench.interval(knob, start)
        intervals |= {f"{knob.name}_lower": lower.numpy(), f"{knob.name}_upper": upper.numpy()}
        changes.append(bench.change(knob, start, lower, upper, target))
        curves.append(bench.curve(knob, start, changes[-1], lower, upper))
    critical = _critical(rows, geometry, regimes, start, intervals)
    summary = {
        "pairs": {"total": len(source.pairs), "scored": len(rows)},
        "base": start.label, "target": target, "loss_batch_size": batch_size, "resolution": resolution,
        "metric": source.provenance.get("metric", "sgd"),
        "provenance": {key: source.provenance[key] for key in PROVENANCE if key in source.provenance},
        "regimes": _shares_of(settings, start.label),
        "changes": changes, "refused": refused + idle,
        "batch_coupled": [loss.label for loss in judged if loss.is_batch_coupled],
        "inseparable": _inseparable(critical),
        "best": _best(settings),
        "grid": list(grid),
    }  # fmt: skip
    from entangle.report.whatif_tables import limits, recommendation

    summary |= {"recommendation": recommendation(summary), "limits": limits(summary)}
    curves = pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()
    return WhatIf(rows, settings, regimes, critical, curves, summary, source.texts)


@dataclass(frozen=True)
class Bench:
    """What losses are judged on: geometry and scalars of the scored pairs, and the batch composition."""

    geometry: PairGeometry
    logps: PairLogps
    batch_size: int

    def coefficients(self, loss: PreferenceLoss) -> Coefficients:
        """A loss's incentives on these pairs."""
        return coefficients_of(loss, self.logps, self.batch_size)

    def judge(self, losses: Sequence[PreferenceLoss], index: pd.Series) -> tuple[pd.DataFrame, pd.DataFrame]:
        """One row per loss, and the regime of every pair under it; equal verdicts share a number."""
        rows, columns, verdicts = [], {"index": index.to_numpy()}, {}
        names = [str(regime) for regime in REGIMES]
        for loss in losses:
            coefficients = self.coefficients(loss)
            codes = predict(self.geometry, coefficients).regime_codes.numpy()
            verdict = verdicts.setdefault(codes.tobytes(), len(verdicts))
            columns[loss.label] = pd.Categorical.from_codes(codes, dtype=pd.CategoricalDtype(names))
            rows.append({
                "label": loss.label, "loss": loss.name, "setting": _setting_json(loss), "verdict": verdict,
                "is_batch_coupled": loss.is_batch_coupled, "pairs": len(codes),
                **dict(zip(names, np.bincount(codes, minlength=len(names)), strict=True)),
                **_ratio(coefficients), **margin_growth(self.geometry, coefficients),
            })  # fmt: skip
        return with_intervals(pd.DataFrame(rows)), pd.DataFrame(columns)

    def shares(self, coefficients: Coefficients) -> dict[str, int]:
        """Pairs per regime."""
        codes = predict(self.geometry, coefficients).regime_codes
        return dict(
            zip(map(str, REGIMES), torch.bincount(codes, minlength=len(REGIMES)).tolist(), strict=True)
        )

    def interval(self, knob: Knob, base: PreferenceLoss) -> tuple[Tensor, Tensor]:
        """Settings of a knob that make each pair ideal, `(B,)` each; NaN for none."""
        return ideal_interval(self.geometry, knob.path(base, self.logps, self.batch_size))

    def change(
        self, knob: Knob, base: PreferenceLoss, lower: Tensor, upper: Tensor, target: float
    ) -> dict[str, Any]:
        """The smallest setting that makes `target` of the pairs ideal, else the best there is; its cost."""
        total = len(lower)
        needed = max(1, int(np.ceil(target * total - 1e-9)))
        reach = smallest_change(lower, upper, needed, knob.start, knob.end)
        best = best_change(lower, upper, knob.start, knob.end)
        chosen = reach or best
        setting = readable(chosen, knob.start)
        path = knob.path(base, self.logps, self.batch_size)
        before, after = (self._is_ideal(loss) for loss in (knob.origin(base), knob.loss(base, setting)))
        return {
            "knob": knob.name, "title": knob.title, "idle": knob.idle, "start": knob.start, "needed": needed,
            "reaches": reach is not None, "acts_on": int(path.acts.sum()),
            "possible": int((~lower.isnan()).sum()),
            "exact": chosen.nearest, "until": chosen.until,
            "overshoots_into": self._past(path, chosen, knob), "setting": setting,
            "loss": knob.loss(base, setting).label,
            "gained": int((after & ~before).sum()), "lost": int((before & ~after).sum()),
            "best": readable(best, knob.start), "best_count": best.count,
            "at_start": self._state(knob.origin(base)), "at_setting": self._state(knob.loss(base, setting)),
        }  # fmt: skip

    def _past(self, path: KnobPath, reach: Reach, knob: Knob) -> str | None:
        """The regime that gains most pairs where a stretch ends; None where the knob itself ends there."""
        if reach.until == knob.end or not np.isfinite(reach.until):
            return None
        inside = self.shares(path.at(reach.nearest))
        past = self.shares(path.at(reach.until + 0.02 * (reach.until - knob.start)))
        wrong = (Regime.BOTH_UP, Regime.BOTH_DOWN, Regime.INVERTED)
        return str(max(wrong, key=lambda name: past[name] - inside[name]))

    def _is_ideal(self, loss: PreferenceLoss) -> Tensor:
        return predict(self.geometry, self.coefficients(loss)).regime_codes == REGIMES.index(Regime.IDEAL)

    def _state(self, loss: PreferenceLoss) -> dict[str, Any]:
        coefficients = self.coefficients(loss)
        counts = self.shares(coefficients)
        regimes = {name: share(count, len(self.logps.chosen)) for name, count in counts.items()}
        return {"label": loss.label, "regimes": regimes, **margin_growth(self.geometry, coefficients)}

    def curve(
        self, knob: Knob, base: PreferenceLoss, change: Mapping[str, Any], lower: Tensor, upper: Tensor
    ) -> pd.DataFrame:
        """Pairs per regime along a knob, at settings that show where the shares change."""
        path = knob.path(base, self.logps, self.batch_size)
        points = _curve_points(knob, change, torch.cat([lower, upper]))
        rows = [{"knob": knob.name, "setting": x, **self.shares(path.at(x))} for x in points]
        return pd.DataFrame(rows)


def margin_growth(geometry: PairGeometry, coefficients: Coefficients) -> dict[str, float]:
    """What a loss does to the margin log pi(chosen) - log pi(rejected), over the pairs.

    margin_change (mean and median): first-order change per unit of SGD learning rate on the pair's own loss,
    in nats. It scales with the loss, so across losses it compares scales more than anything else.

    margin_efficiency (mean and median): the same at equal length of the step, free of the loss's scale. With
    g the gradient of the pair's loss, it is margin_change / (|g| |g_w - g_l|): the cosine of the step and the
    direction in which the margin grows fastest. Laws: in [-1, 1]; 1 for every loss with rho = 1; the cost of
    making a pair ideal by another rho is 1 minus it. Pairs on which a loss doesn't act (g = 0) are left out.
    """
    prediction = predict(geometry, coefficients)
    d_w, d_l = coefficients.chosen.double(), coefficients.rejected.double()
    squared = (d_w * prediction.chosen_change - d_l * prediction.rejected_change).clamp(min=0)  # |g|^2
    steepest = (geometry.chosen_gap + geometry.rejected_gap).clamp(min=0)  # |g_w - g_l|^2
    efficiency = (prediction.margin_change / (squared * steepest).sqrt()).clamp(-1, 1)
    return {
        f"{name}_{kind}": _aggregate(values, kind)
        for name, values in (("margin_change", prediction.margin_change), ("margin_efficiency", efficiency))
        for kind in ("mean", "median")
    }


def _aggregate(values: Tensor, kind: str) -> float:
    known = values[values.isfinite()].numpy()
    return float("nan") if len(known) == 0 else float(np.mean(known) if kind == "mean" else np.median(known))


def with_intervals(settings: pd.DataFrame) -> pd.DataFrame:
    """Counts per regime as shares: `ideal`, `ideal_low`, `ideal_high` (95 % Wilson), `ideal_count`, etc."""
    columns: dict[str, Any] = {}
    for name in settings.columns:
        if name not in {str(regime) for regime in REGIMES}:
            columns[name] = settings[name]
            continue
        low, high = wilson(settings[name].to_numpy(), settings["pairs"].to_numpy())
        columns |= {f"{name}_count": settings[name], name: settings[name] / settings["pairs"]}
        columns |= {f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(columns)


def apply_grid(losses: Sequence[PreferenceLoss], grid: Sequence[str]) -> list[PreferenceLoss]:
    """Losses with the settings of a grid, each label once; losses that no entry names stay as they are.

    Several entries for one loss are combined (their product).

    Raises:
        ConfigError: an entry can't be read, or names a loss or a hyper-parameter that isn't there.

    Examples:
        >>> from losses import DPO
        >>> [loss.label for loss in apply_grid([DPO()], ["dpo.beta=0.05,0.1"])]
        ['dpo(beta=0.05)', 'dpo']
    """
    entries = [_grid_entry(str(text), losses) for text in grid]
    settings: dict[str, PreferenceLoss] = {}
    for loss in losses:
        own: dict[str, list[Any]] = {}
        for name, field, values in entries:
            if name in (None, loss.name) and field in {f.name for f in fields(loss)}:
                own.setdefault(field, []).extend(values)
        for values in itertools.product(*own.values()):
            variant = _replace(loss, dict(zip(own, values, strict=True)))
            settings[variant.label] = variant
    return list(settings.values())


def _grid_entry(text: str, losses: Sequence[PreferenceLoss]) -> tuple[str | None, str, list[Any]]:
    key, equals, values = text.partition("=")
    name, dot, field = key.strip().rpartition(".")
    words = [word for word in values.split(",") if word.strip()]
    if not equals or not field or not words or (dot and not name):
        raise ConfigError(
            "A grid is given as loss.field=value,value,... or field=value,value,... (for instance "
            f"dpop.penalty=1,5,50); got {text!r}."
        )
    known = {f.name for loss in losses if name in ("", loss.name) for f in fields(loss)}
    if name and name not in {loss.name for loss in losses}:
        given = ", ".join(sorted({loss.name for loss in losses}))
        raise ConfigError(f"Grid {text!r} names the loss {name!r}, which isn't judged here. Judged: {given}.")
    if field not in known:
        owner = f"The loss {name!r} has" if name else "The judged losses have"
        raise ConfigError(
            f"Grid {text!r}: {owner} no hyper-parameter {field!r}. "
            f"Known: {', '.join(sorted(known)) or 'none'}."
        )
    return name or None, field, [_number(word, text) for word in words]


def _number(word: str, text: str) -> float | int:
    value = yaml.safe_load(word)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"Grid {text!r}: expected numbers separated by commas; got {word.strip()!r}.")
    return value


def _replace(loss: PreferenceLoss, values: Mapping[str, Any]) -> PreferenceLoss:
    try:
        return dataclasses.replace(loss, **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{error} Name the loss in the grid (loss.field=...) to set only that one."
        ) from error


def token_requirements(loss: PreferenceLoss) -> list[str]:
    """Per-token columns (fields of `losses.TokenLogps`) that a token-weighted loss reads: asked of itself."""
    one = torch.full((1, 2), -1.0)
    needed: dict[str, Tensor] = {}
    mask = torch.ones(1, 2, dtype=torch.bool)
    optional = [f.name for f in fields(TokenLogps) if f.default is None]
    while True:
        try:
            loss.per_pair(TokenLogps(one, one, mask, mask, **needed).pairs())
        except (MissingTokens, MissingReference) as error:
            missing = [name for name in optional if name not in needed and name in _words(str(error))]
            if not missing:
                raise
            sides = [
                name.replace(*swap)
                for name in missing
                for swap in (("rejected", "chosen"), ("chosen", "rejected"))
            ]
            needed |= dict.fromkeys(sides, one)
        else:
            return list(needed)


def _words(text: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in text).split())


def _judgeable(
    losses: Sequence[PreferenceLoss], logps: PairLogps, *, named: bool
) -> tuple[list[PreferenceLoss], list[str]]:
    """Losses that the rows can judge, and sentences on the others; an error where one was named."""
    usable, refused = usable_losses(
        [loss for loss in losses if not loss.needs_tokens], has_reference=logps.has_reference
    )
    refused += [_token_refusal(loss) for loss in losses if loss.needs_tokens]
    if named and refused:
        raise ConfigError(" ".join(refused))
    return usable, refused


def _token_refusal(loss: PreferenceLoss) -> str:
    columns = ", ".join(["chosen", "rejected", *token_requirements(loss)])
    return (
        f"{loss.label} weighs tokens: a probe must record {columns} per token, and the products of the "
        "scores of its token groups."
    )


def _build_all(specs: Sequence[Any]) -> list[PreferenceLoss]:
    return list({loss.label: loss for loss in build_losses(specs or CATALOGUE)}.values())


def _base(spec: Any, logps: PairLogps) -> PreferenceLoss:
    if spec is None:
        return default_base(logps.has_reference)
    (loss,) = _build_all([spec])
    _judgeable([loss], logps, named=True)
    return loss


def _usable_knobs(names: Sequence[str], logps: PairLogps) -> tuple[list[Knob], list[str]]:
    unknown = [name for name in names if name not in KNOBS]
    if unknown:
        raise ConfigError(f"Unknown knob {', '.join(map(repr, unknown))}. Known knobs: {', '.join(KNOBS)}.")
    knobs = [KNOBS[name] for name in dict.fromkeys(names)]
    usable = [knob for knob in knobs if logps.has_reference or not knob.needs_reference]
    refused = [
        f"The knob {knob.name} ({knob.title}) needs a reference policy, and this run has none."
        for knob in knobs
        if knob not in usable
    ]
    return usable, refused


def _setting_json(loss: PreferenceLoss) -> str:
    config = loss.config
    config.pop("name")
    return json.dumps(config)


def _ratio(coefficients: Coefficients) -> dict[str, float]:
    """Median of rho = d_w / d_l, and whether every pair has the same."""
    rho = (coefficients.chosen / coefficients.rejected).double().numpy()
    known = rho[~np.isnan(rho)]
    if len(known) == 0:
        return {"rho": float("nan"), "rho_spread": float("nan")}
    finite = known[np.isfinite(known)]
    spread = float(finite.max() - finite.min()) if len(finite) == len(known) else float("inf")
    return {"rho": float(np.median(known)), "rho_spread": spread}


def _curve_points(knob: Knob, change: Mapping[str, Any], ends: Tensor) -> list[float]:
    """Settings along a knob: evenly over a bounded one, else from well below to well above the ends."""
    if np.isfinite(knob.end):
        points = np.linspace(knob.start, knob.end, CURVE_POINTS)
        return [float(x) for x in points if x > 0 or knob.start == 0]
    positive = ends[ends.isfinite() & (ends > 0)].numpy()
    marks = [value for value in (change["setting"], change["best"]) if value > 0]
    low, high = np.quantile(positive, [0.02, 0.98]) if len(positive) else (0.1, 10.0)
    low, high = min([low, *marks]) / 3, max([high, *marks]) * 3
    points = np.geomspace(low, high, CURVE_POINTS - 1 - len(marks))
    return [0.0, *sorted([*points.tolist(), *marks])]


def _critical(
    rows: pd.DataFrame, geometry: PairGeometry, regimes: pd.DataFrame, base: PreferenceLoss,
    intervals: Mapping[str, np.ndarray],
) -> pd.DataFrame:  # fmt: skip
    """Per pair: its band, its regime under the base, the knobs' intervals, and why nothing can help."""
    lower, upper = geometry.critical_ratio
    nothing = (geometry.chosen_sq <= 0) | (geometry.rejected_sq <= 0)
    reasons = [
        (rows["identical"].to_numpy(dtype=bool), "identical"),
        (nothing.numpy(), "no gradient"),
        (geometry.is_parallel.numpy(), "parallel"),
    ]
    ideal = (regimes.drop(columns="index") == str(Regime.IDEAL)).sum(axis=1)
    return pd.DataFrame({
        "index": rows["index"].to_numpy(), "inseparable": np.select(*zip(*reasons, strict=True), default=""),
        "cosine": geometry.cosine.numpy(), "norm_ratio": geometry.norm_ratio.numpy(),
        "band_lower": lower.numpy(), "band_upper": upper.numpy(),
        "regime": regimes[base.label].astype(str), "ideal_settings": ideal.to_numpy(), **intervals,
    })  # fmt: skip


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


@dataclass(frozen=True)
class _Source:
    """What is read of a run."""

    pairs: pd.DataFrame
    config: dict[str, Any]
    provenance: dict[str, Any]
    texts: pd.DataFrame | None


def _read(run: ProbeResult | RunFolder | str | Path | pd.DataFrame) -> _Source:
    if isinstance(run, pd.DataFrame):
        return _Source(run, {}, {}, None)
    folder: Any = getattr(run, "run", run)  # a ProbeResult, whose module isn't imported here
    folder = RunFolder.open(folder.path if isinstance(folder, RunFolder) else folder)
    if not folder.shards:
        raise RunError(
            f"Expected a probe's run folder (with pairs/*.parquet) at {folder.path}; it holds no pairs."
        )
    has_provenance = (folder.path / "provenance.json").is_file()
    provenance = folder.read_json("provenance.json") if has_provenance else {}
    return _Source(folder.pairs(), folder.config, provenance, folder.table("texts.parquet"))


def run_whatif(config: WhatIfConfig) -> tuple[WhatIf, RunFolder]:
    """The command: judge what the options name, and write it."""
    result = what_if(
        config.run, [parse_loss(loss) if isinstance(loss, str) else loss for loss in config.losses],
        config.grid, base=None if config.base is None else parse_loss(config.base), target=config.target,
        knobs=config.knobs, loss_batch_size=config.loss_batch_size,
    )  # fmt: skip
    return result, write(result, config.output_path, dataclasses.asdict(config), plots=config.plots)


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
        from entangle.report.whatif_plots import write_figures

        figures = write_figures(result, folder.path)
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
