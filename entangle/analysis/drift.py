"""The drift that a run has measured, from one look at its pairs to the next, beside the one that was predicted.

    drift = (D_w + D_l) / (2 (D_w - D_l))        D_w, D_l: mean change of the chosen and of the rejected log-prob

is predicted of the next step by the set's block (`entangle.analysis.sets`) or by every pair's own step, and measured by
the mean changes until the next look. Both are nats of both log-probs per nat of margin, so they can stand beside each
other whatever the learning rate is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import torch

from entangle.analysis.geometry import SIDES
from entangle.analysis.jackknife import Estimate, Jackknife
from entangle.analysis.sets import EDGE
from entangle.analysis.statistics import Z

GROUPS = 32
"""Groups of pairs for the jackknife, at most."""


def mean_drift(chosen: np.ndarray, rejected: np.ndarray) -> Estimate:
    """The drift of mean changes, with Fieller's interval over pairs; NaN where no margin is gained.

    Args:
        chosen: `(N,)`, change of the chosen log-prob of every pair, in any unit.
        rejected: `(N,)`, likewise.

    Example:
        >>> found = mean_drift(np.array([-1.0, -1.2, -0.8, -1.0]), np.array([-2.0, -2.1, -1.9, -2.0]))
        >>> print(f"{found.value:.2f} {found.low < -0.5 and found.high < -0.5}")
        -1.50 True
    """
    both = torch.from_numpy(np.stack([(chosen + rejected) / 2, chosen - rejected], 1)).double()
    means = both.mean(0) if len(both) else both.new_full((2,), torch.nan)
    common, margin = means.tolist()
    if not margin > 0:
        return Estimate(math.nan, -math.inf, math.inf, has_meaning=False)
    parts = both.tensor_split(min(GROUPS, len(both)))
    sizes = torch.tensor([len(part) for part in parts])
    sums = torch.stack([part.sum(0) for part in parts])
    replicates = (both.sum(0) - sums) / (len(both) - sizes)[:, None]
    return Jackknife(sizes).ratio(
        common,
        margin,
        replicates,
        target=EDGE + abs(common / margin),
        rules_out=lambda low, high: not low < -EDGE < EDGE < high,
    )


def measured_drifts(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per look but the last: the drift measured until the next one, and that of every pair's own step.

    Columns: step, until; measured, measured_low, measured_high; moved_chosen, moved_rejected and measured_margin, nats
    gained until then; and, where the rows hold predictions, alone, alone_low, alone_high: by the mean changes that one
    step on each pair alone would make. NaN where no margin is gained; infinite ends where nothing is known.

    Args:
        rows: step, index, logps_chosen, logps_rejected, and change_chosen and change_rejected where there are any.
    """
    return pd.DataFrame([_interval(*looks) for looks in following(rows)])


def following(rows: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Every look of one run at its pairs with the next one, both by index of the pair."""
    looks = [look.set_index("index", drop=False) for _, look in rows.groupby("step", sort=True)]
    yield from zip(looks, looks[1:], strict=False)


def gained(now: pd.DataFrame, later: pd.DataFrame) -> pd.DataFrame:
    """What both log-probs of each pair gained from one look to another, nats; pairs that are in both.

    Args:
        now: the earlier look, by index of the pair, with logps_chosen and logps_rejected.
        later: the later one.
    """
    return pd.DataFrame({side: later[f"logps_{side}"] - now[f"logps_{side}"] for side in SIDES}).dropna()


def of_changes(chosen: float, rejected: float) -> float:
    """The drift of two mean changes; NaN where no margin is gained.

    Args:
        chosen: D_w, in any unit.
        rejected: D_l, in the same.
    """
    return (chosen + rejected) / (2 * (chosen - rejected)) if chosen > rejected else math.nan


def _interval(now: pd.DataFrame, later: pd.DataFrame) -> dict[str, Any]:
    moved = gained(now, later)
    found: dict[str, Any] = {"step": int(now["step"].iloc[0]), "until": int(later["step"].iloc[0])}
    found |= _columns("measured", moved)
    found |= {f"moved_{side}": float(moved[side].mean()) for side in SIDES}
    found["measured_margin"] = found["moved_chosen"] - found["moved_rejected"]
    if {"change_chosen", "change_rejected"} <= set(now):
        alone = pd.DataFrame({side: now[f"change_{side}"].astype(float) for side in SIDES}).dropna()
        if len(alone):
            found |= _columns("alone", alone)
    return found


def _columns(name: str, changes: pd.DataFrame) -> dict[str, float]:
    drift = mean_drift(*(changes[side].to_numpy(dtype=float) for side in SIDES))
    return {name: drift.value, f"{name}_low": drift.low, f"{name}_high": drift.high}


def beside_predicted(
    measured: pd.DataFrame, points: pd.DataFrame | None, metric: str = "sgd"
) -> pd.DataFrame:
    """Rows of `measured_drifts` with the prediction that there is: of the set where measured, else of the pairs alone.

    Columns predicted, predicted_low, predicted_high; `of`, which of the two; agrees, whether the intervals overlap
    (missing where either isn't known at both ends).

    Args:
        measured: of `measured_drifts`.
        points: step, and set_drift with its ends, where the set was measured.
        metric: in which they were.
    """
    table = measured.copy()
    has_set = points is not None and "set_drift" in points and bool(points["set_drift"].notna().any())
    source = table.set_index("step") if not has_set else points.set_index("step").reindex(table["step"])  # pyright: ignore[reportOptionalMemberAccess]
    name = "set_drift" if has_set else "alone"
    if name not in source:
        return table.iloc[:0]
    for ending in ("", "_low", "_high"):
        table[f"predicted{ending}"] = source[f"{name}{ending}"].to_numpy(dtype=float)
    ends = ["predicted_low", "predicted_high", "measured_low", "measured_high"]
    is_known = table[ends].map(math.isfinite).all(axis=1)
    overlap = (table["predicted_low"] <= table["measured_high"]) & (
        table["measured_low"] <= table["predicted_high"]
    )
    agrees = overlap.astype("boolean").where(is_known)
    of = f"the set in {metric.upper()}'s metric" if has_set else "each pair alone"
    return table.assign(of=of, agrees=agrees)


def of_probes(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `entangle.analysis.agreement.drifts` under the names of `beside_predicted`.

    Args:
        table: variant, drift and measured_drift with their ends, of every run and probe.
    """
    names = {"drift": "predicted", "measured_drift": "measured"}
    names |= {f"{ours}{end}": f"{theirs}{end}" for ours, theirs in names.items() for end in ("_low", "_high")}
    return table.rename(columns=names).assign(of="the set")


def of_runs(curves: pd.DataFrame) -> pd.DataFrame:
    """One row per run of a comparison: the drift over the whole run, and the one that its pairs alone predicted.

    Columns: variant, seed, step (the last), predicted (by the sum over the probes but the last of the mean changes that
    a step on each pair alone would make), measured with measured_low and measured_high (Fieller, over pairs), and
    measured_margin. NaN where no margin is gained.

    Args:
        curves: rows of `entangle.analysis.curves.curve` with variant and seed.
    """
    found = []
    for (variant, seed), run in curves.groupby(["variant", "seed"], sort=False):
        run = run.sort_values("step")
        last, sums = run.iloc[-1], run[[f"predicted_{side}" for side in SIDES]].iloc[:-1].sum(min_count=1)
        up, down = sums.to_numpy(dtype=float)
        found.append(
            {"variant": variant, "seed": seed, "step": int(last["step"])}
            | {"predicted": of_changes(up, down)}
            | _of_means(last)
        )
    return pd.DataFrame(found)


def _of_means(point: pd.Series) -> dict[str, float]:
    """The measured drift from mean changes and their standard errors, which give the covariance of both sides."""
    up, down, margin = (float(point[f"moved_{name}"]) for name in ("chosen", "rejected", "margin"))
    chosen, rejected, gained = (
        float(point[f"moved_{name}_error"]) ** 2 for name in ("chosen", "rejected", "margin")
    )
    found = {
        "measured": math.nan,
        "measured_low": -math.inf,
        "measured_high": math.inf,
        "measured_margin": margin,
    }
    if not margin > 0:
        return found
    both = (2 * chosen + 2 * rejected - gained) / 4  # the variance of (chosen + rejected) / 2
    value, with_margin = (up + down) / 2 / margin, (chosen - rejected) / 2
    bottom = margin**2 - Z**2 * gained
    middle = (up + down) / 2 * margin - Z**2 * with_margin
    inner = middle**2 - bottom * (((up + down) / 2) ** 2 - Z**2 * both)
    if bottom > 0 and inner >= 0:
        ends = sorted((middle + sign * inner**0.5) / bottom for sign in (-1, 1))
        found |= {"measured_low": ends[0], "measured_high": ends[1]}
    return found | {"measured": value}


def runs_sentence(table: pd.DataFrame) -> str:
    """Under which losses the drift of a whole run isn't the one that its pairs alone predicted.

    Args:
        table: of `of_runs`.
    """
    known = table[table[["predicted", "measured_low", "measured_high"]].map(math.isfinite).all(axis=1)]
    shrunk = table.loc[~(table["measured_margin"] > 0), "variant"].unique()
    less = f" No margin was gained in runs of {', '.join(map(str, shrunk))}." if len(shrunk) else ""
    if known.empty:
        return f"In no run are both drifts known.{less}"
    expected, found = known["predicted"].map(way), known["measured"].map(way)
    wrong = known[
        (known["predicted"] < known["measured_low"]) | (known["predicted"] > known["measured_high"])
    ]
    ways = int((expected == found).sum())
    said = (
        f"Of {len(known)} runs with a known drift {ways} went the way that each pair alone predicts; in {len(wrong)} "
        "the predicted drift is outside the 95 % interval of the measured one"
    )
    if wrong.empty:
        return f"{said}.{less}"
    row = _farthest(wrong)
    return (
        f"{said}, most so under {row['variant']}: {way(row['predicted'])} ({row['predicted']:+.2g}) was predicted, "
        f"{way(row['measured'])} was measured, {_text(row, 'measured')}.{less}"
    )


def agreement_sentence(table: pd.DataFrame) -> str:
    """In how many intervals the predicted drift was the measured one, and where they part most.

    Args:
        table: of `beside_predicted`.
    """
    known = table[table["agrees"].notna()]
    less = _shrunk(table)
    if known.empty:
        return f"Nowhere are both drifts known well enough to be compared.{less}"
    of = table["of"].iloc[0]
    count = int(known["agrees"].sum())
    said = f"The drift predicted from {of} agrees with the measured one in {count} of {len(known)} comparable intervals"
    apart = known[~known["agrees"].astype(bool)]
    if apart.empty:
        return f"{said} (their 95 % intervals meet).{less}"
    row = _farthest(apart)
    return (
        f"{said}. They disagree most from step {row['step']:.0f} to {row['until']:.0f}: predicted "
        f"{_text(row, 'predicted')}, measured {_text(row, 'measured')}: {_meaning(row)}.{less}"
    )


def _shrunk(table: pd.DataFrame) -> str:
    """In how many intervals no margin was gained, and whether that was predicted."""
    shrunk = table[~(table["measured_margin"] > 0)]
    if shrunk.empty:
        return ""
    both = int(((shrunk["moved_chosen"] < 0) & (shrunk["moved_rejected"] < 0)).sum())
    wrong = int(shrunk["predicted"].notna().sum())
    beside = f" (in {both} of them both log-probs fell)" if both else ""
    against = f", where {table['of'].iloc[0]} predicts a gain in {wrong}" if wrong else ""
    return f" In {len(shrunk)} of {len(table)} intervals the margin shrank{beside}{against}; there is no drift then."


def _farthest(table: pd.DataFrame) -> pd.Series:
    """The row in which prediction and measurement lie farthest apart."""
    return table.iloc[int((table["predicted"] - table["measured"]).abs().to_numpy().argmax())]


def _text(row: pd.Series, name: str) -> str:
    return f"{row[name]:+.2g} ({row[f'{name}_low']:+.2g} to {row[f'{name}_high']:+.2g})"


def _meaning(row: pd.Series) -> str:
    """What a disagreement means for the two log-probs."""
    said = [way(row[name]) for name in ("predicted", "measured")]
    if said[0] == said[1]:
        return f"the same direction ({said[0]}), another amount"
    return f"{said[0]} was predicted, {said[1]} was measured"


def way(drift: float) -> str:
    """What a drift says of the two log-probs.

    >>> way(-2.0), way(0.1), way(0.7)
    ('a fall of both', 'a parting of the two', 'a rise of both')
    """
    if drift > EDGE:
        return "a rise of both"
    return "a fall of both" if drift < -EDGE else "a parting of the two"
