"""Predicted against measured changes of real steps: how well they agree, and whether that is well enough.

A prediction is exact to first order, so its error falls by four when the step is halved:

    >>> predicted = np.array([0.02, -0.01])
    >>> measured, half = predicted + 3 * predicted**2, predicted / 2 + 3 * (predicted / 2) ** 2
    >>> steps = pd.DataFrame({"index": 0, "predicted": predicted, "measured": measured, "measured_half": half})
    >>> found = summarise_steps(steps.assign(floor=STEP**2))
    >>> round(found["error_ratio"], 3), round(found["slope_first_order"], 3), found["fails"]
    (4.0, 1.0, [])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

STEP = 0.02
"""Predicted change, in nats, of the response that moves more: small enough for first order to rule, large enough
for the second-order remainder (about STEP squared) to stand above the rounding of a log-prob in float64."""

FEWEST_SIGNS = 0.99
"""Share of the signs that must agree. Only changes beyond both errors are compared, so all of them should."""

SLOPE_ERROR = 0.02
"""How far the slope of the measured first-order change may be from 1. Third order, which halving a step leaves in it,
is some STEP squared of the change: 0.0004 of it. An incentive that is off by a factor puts all of that factor here."""

LEAST_RATIO = 3.0
"""Least ratio of a step's error to half a step's. It is 4 where the prediction is the first-order change, more where
second order happens to vanish, and 2 where the prediction is another number."""

_MEANINGS = {
    "signs": "{signs_agree} of {signs_compared} signs agree, and at least "
    f"{100 * FEWEST_SIGNS:g} % must: a response goes the other way than is said of it",
    "slope": "the measured changes are {slope_first_order:.3g} times the predicted ones, and must be "
    f"{1 - SLOPE_ERROR:g} to {1 + SLOPE_ERROR:g} times: regimes, drift and margin growth are of another loss than "
    "the one that is trained",
    "error_ratio": "halving a step divides its error by {error_ratio:.3g}, and must by at least "
    f"{LEAST_RATIO:g}: the prediction isn't the first-order change: its error doesn't vanish with the learning rate",
}
"""What is wrong where a limit is broken, and why that matters."""


def summarise_verification(steps: pd.DataFrame) -> dict[str, Any]:
    """`summarise_steps` per loss, and over all of them under `all`.

    Args:
        steps: rows of `entangle.measure.verification.STEP_COLUMNS`.
    """
    by_loss = {str(loss): summarise_steps(rows) for loss, rows in steps.groupby("loss", sort=False)}
    return by_loss | {"all": summarise_steps(steps)}


def summarise_steps(rows: pd.DataFrame) -> dict[str, Any]:
    """Sign agreement, slope and R^2 of measured on predicted change, the error's ratio on halving the step, failures.

    The first-order part of a measured change is 4 x (half step) - (full step): second order cancels. Its signs are
    compared where the predicted change stands above the noise floor: what the arithmetic can tell, plus step^2 nats
    for second order. `error_ratio` is the root mean square error of the full steps over that of the half steps: 4 for
    a prediction that is exact to first order. It isn't judged where half steps err by less than the arithmetic does.

    Args:
        rows: predicted, measured and measured_half in nats, floor, and the index of the pair.

    Returns:
        pairs, steps, signs_compared, signs_agree, sign_agreement, slope, slope_first_order, r_squared, error_ratio,
        step_nats; `fails`, the names of the limits that are broken: signs, slope, error_ratio.
    """
    if rows.empty:
        return {"pairs": 0, "steps": 0, "signs_compared": 0, "signs_agree": 0, "fails": []} | dict.fromkeys(
            ("sign_agreement", "slope", "slope_first_order", "r_squared", "error_ratio"), float("nan")
        )
    predicted, measured, half = (
        rows[name].to_numpy(float) for name in ("predicted", "measured", "measured_half")
    )
    floor = rows["floor"].to_numpy(float)
    first_order = 4 * half - measured
    told = np.abs(predicted) > floor
    agree = np.sign(predicted[told]) == np.sign(first_order[told])
    slope, square = float(predicted @ measured / (predicted @ predicted)), predicted @ predicted
    residual, spread = measured - slope * predicted, measured - measured.mean()
    error, half_error = np.linalg.norm(measured - predicted), np.linalg.norm(half - predicted / 2)
    found = {
        "pairs": int(rows["index"].nunique()),
        "steps": len(rows) // 2,
        "signs_compared": int(told.sum()),
        "signs_agree": int(agree.sum()),
        "sign_agreement": float(agree.mean()) if told.any() else float("nan"),
        "slope": slope,
        "slope_first_order": float(predicted @ first_order / square),
        "r_squared": float(1 - (residual @ residual) / (spread @ spread)),
        "error_ratio": float(error / half_error),
        "step_nats": STEP,
    }
    arithmetic = np.linalg.norm(floor - STEP**2)
    doubt = float(5 * arithmetic / np.sqrt(square))
    return found | {"fails": _broken(found, doubt, may_judge_error=bool(half_error > arithmetic))}


def _broken(found: Mapping[str, Any], doubt: float, *, may_judge_error: bool) -> list[str]:
    """Which limits are broken; a number that isn't finite breaks its own.

    Args:
        found: of `summarise_steps`.
        doubt: what the arithmetic may add to the slope's error (four half steps less a whole one).
        may_judge_error: whether the errors are larger than the arithmetic's.
    """
    holds = {
        "signs": not found["signs_compared"] or found["sign_agreement"] >= FEWEST_SIGNS,
        "slope": abs(found["slope_first_order"] - 1) <= SLOPE_ERROR + doubt,
        "error_ratio": not may_judge_error or found["error_ratio"] >= LEAST_RATIO,
    }
    return [name for name, is_kept in holds.items() if not is_kept]


def is_refuted(verification: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether real steps contradict the predictions under any loss.

    Args:
        verification: of a probe's summary.
    """
    return any(row["fails"] for row in verification.values())


def verification_sentences(verification: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Whether real steps confirm the predictions; if not, under which losses, which limits are broken, and what for.

    Args:
        verification: of a probe's summary.
    """
    if not verification["all"]["steps"]:
        return [
            "No real step was taken: no loss moves any of the pairs that were drawn. Nothing is verified."
        ]
    failing = {loss: row for loss, row in verification.items() if row["fails"] and loss != "all"}
    if not failing and verification["all"]["fails"]:
        failing = {"all losses": verification["all"]}
    if not failing and not verification["all"]["signs_compared"]:
        return ["Nothing is verified: no change of a real step stands above the errors of this arithmetic."]
    if not failing:
        return [f"Real steps confirm the predictions: all {verification['all']['steps']} went as they say."]
    return [
        f"VERIFICATION FAILED under {loss}: {'; '.join(_MEANINGS[name].format(**row) for name in row['fails'])}. "
        "Don't trust what is said of it."
        for loss, row in failing.items()
    ]
