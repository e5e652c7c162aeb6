"""Rows of pairs -> rows of predictions: what every loss would do to every pair, without a model.

The probe calls this at its end; `whatif` calls it on a finished run with other losses.

A pair with A = 9, B = 5, c = 6, before the first step: DPO's d is beta / 2 on both sides, so both rise.

    >>> pair = {"index": 0, "sq_chosen": 9.0, "sq_rejected": 5.0, "inner": 6.0, "gap_chosen": 3.0, "gap_rejected": -1.0}
    >>> pair |= {f"{what}_{side}": -8.0 for what in ("logps", "ref_logps") for side in ("chosen", "rejected")}
    >>> pair |= {"length_chosen": 4, "length_rejected": 4} | dict.fromkeys(FLAGS, False)
    >>> from losses import DPO
    >>> found = predict_losses(pd.DataFrame([pair]), [DPO(beta=0.1)], resolution=1e-6, batch_size=8)
    >>> found[["incentive_chosen", "change_chosen", "change_rejected", "regime"]].round(3).to_dict("records")
    [{'incentive_chosen': 0.05, 'change_chosen': 0.15, 'change_rejected': 0.05, 'regime': 'both_up'}]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.func import grad, vmap

from entangle.analysis.geometry import COARSE, GEOMETRY_COLUMNS, PairGeometry, logp_resolution
from entangle.analysis.regimes import REGIMES, Regime, predict
from entangle.errors import ConfigError
from losses import Incentives, PairLogps, PreferenceLoss

FLAGS = ("truncated", "identical", "dropped", "empty", "non_finite")
"""Columns of a pair that say what is wrong with it."""


def is_scored(pairs: pd.DataFrame) -> pd.Series:
    """Which pairs have scores: not dropped, not empty, every number finite."""
    return ~(pairs["dropped"] | pairs["empty"] | pairs["non_finite"])


def geometry_of(pairs: pd.DataFrame, resolution: float) -> PairGeometry:
    """The Gram blocks that rows of a run folder hold.

    Args:
        pairs: rows with `GEOMETRY_COLUMNS`.
        resolution: relative error of their dot products.
    """
    return PairGeometry(*(_column(pairs, name) for name in GEOMETRY_COLUMNS), resolution=resolution)


def may_have_reference(pairs: pd.DataFrame) -> bool:
    """Whether rows hold reference log-probs; without a scored row nothing speaks against it."""
    return bool(pairs["ref_logps_chosen"].notna().any()) or not is_scored(pairs).any()


def logps_of(pairs: pd.DataFrame) -> PairLogps:
    """The six scalars per pair that rows of a run folder hold; without reference where its columns are empty."""
    has_reference = may_have_reference(pairs)
    return PairLogps(
        chosen=_column(pairs, "logps_chosen"),
        rejected=_column(pairs, "logps_rejected"),
        length_chosen=_column(pairs, "length_chosen"),
        length_rejected=_column(pairs, "length_rejected"),
        ref_chosen=_column(pairs, "ref_logps_chosen") if has_reference else None,
        ref_rejected=_column(pairs, "ref_logps_rejected") if has_reference else None,
    )


def incentives_of(loss: PreferenceLoss, logps: PairLogps, batch_size: int) -> Incentives:
    """A loss's incentives; a batch-coupled loss sees consecutive batches of `batch_size` pairs.

    Args:
        loss: any loss that reads summed log-probs.
        logps: its pairs, `(B,)` each, nats.
        batch_size: pairs per batch of a batch-coupled loss.
    """
    if not loss.is_batch_coupled:
        return loss.incentives(logps)
    whole = len(logps.chosen) // batch_size * batch_size
    parts = [_whole_batches(loss, logps[:whole], batch_size)] if whole else []
    if whole < len(logps.chosen) or not parts:
        parts.append(loss.incentives(logps[whole:]))
    return Incentives(torch.cat([p.chosen for p in parts]), torch.cat([p.rejected for p in parts]))


def _whole_batches(loss: PreferenceLoss, logps: PairLogps, batch_size: int) -> Incentives:
    """Incentives of a batch-coupled loss on pairs that divide into batches: all batches at once (vmap)."""
    columns = {f.name: getattr(logps, f.name) for f in fields(logps)}
    batches = {name: c.view(-1, batch_size) for name, c in columns.items() if isinstance(c, Tensor)}
    chosen, rejected = batches.pop("chosen"), batches.pop("rejected")

    def total(chosen: Tensor, rejected: Tensor, rest: dict[str, Tensor]) -> Tensor:
        batch: dict[str, Any] = dict(rest)  # six columns by their field names
        return loss.per_pair(PairLogps(chosen, rejected, **batch)).sum()

    by_chosen, by_rejected = vmap(grad(total, argnums=(0, 1)))(chosen, rejected, batches)
    return Incentives(0.0 - by_chosen.flatten(), by_rejected.flatten())  # 0 - x: no negative zeros


def check_labels(losses: Sequence[PreferenceLoss]) -> None:
    """Raise ConfigError where two losses have the same label."""
    labels = [loss.label for loss in losses]
    if len(set(labels)) != len(labels):
        raise ConfigError(f"Each loss must be given once; got {', '.join(labels)}.")


def usable_losses(
    losses: Iterable[PreferenceLoss], *, has_reference: bool
) -> tuple[list[PreferenceLoss], list[str]]:
    """Losses that a probe's rows can judge, and for each of the others a sentence that says why not.

    Args:
        losses: those asked for.
        has_reference: whether the rows hold reference log-probs.
    """
    usable, refused = [], []
    for loss in losses:
        if loss.needs_tokens:
            refused.append(
                f"{loss.label} weighs tokens: it needs token-level log-probs, which the rows don't hold. Leave it out; "
                "`entangle train` trains with it."
            )
        elif loss.needs_reference and not has_reference:
            refused.append(f"{loss.label} needs a reference policy, and this run has none.")
        else:
            usable.append(loss)
    return usable, refused


def predict_losses(
    pairs: pd.DataFrame, losses: Sequence[PreferenceLoss], *, resolution: float, batch_size: int
) -> pd.DataFrame:
    """One row per scored pair and loss, in the order of `losses`, then of `pairs`.

    Columns: index, loss, incentive_chosen and incentive_rejected (d_w, d_l per nat), change_chosen and
    change_rejected (first-order change of the log-prob in nats per unit of SGD learning rate on the pair's own
    loss), regime (`degenerate` where the arithmetic can't tell), band (tau), slack.

    Args:
        pairs: rows of a run folder; those that are not scored are left out.
        losses: what is judged; labels differ.
        resolution: relative error of the dot products.
        batch_size: pairs per batch of a batch-coupled loss.

    Raises:
        ConfigError: two losses have the same label.
    """
    check_labels(losses)
    scored = pairs[is_scored(pairs)]
    geometry, logps = geometry_of(scored, resolution), logps_of(scored)
    return pd.concat(
        [_predict_one(loss, scored, geometry, logps, batch_size) for loss in losses], ignore_index=True
    )


def _predict_one(
    loss: PreferenceLoss, scored: pd.DataFrame, geometry: PairGeometry, logps: PairLogps, batch_size: int
) -> pd.DataFrame:
    incentives = incentives_of(loss, logps, batch_size)
    prediction = predict(geometry, incentives)
    codes = believed_codes(loss, geometry, logps, batch_size, prediction.regime_codes)
    return pd.DataFrame(
        {
            "index": scored["index"].to_numpy(),
            "loss": loss.label,
            "incentive_chosen": incentives.chosen.numpy(),
            "incentive_rejected": incentives.rejected.numpy(),
            "change_chosen": prediction.change_chosen.numpy(),
            "change_rejected": prediction.change_rejected.numpy(),
            "regime": [str(REGIMES[code]) for code in codes.tolist()],
            "band": prediction.band.numpy(),
            "slack": prediction.slack.numpy(),
        }
    )


def believed_codes(
    loss: PreferenceLoss, geometry: PairGeometry, logps: PairLogps, batch_size: int, codes: Tensor
) -> Tensor:
    """Regimes `codes` (indices into `REGIMES`), `degenerate` where the log-probs' own error could change one.

    Args:
        loss: the loss.
        geometry: the pairs' Gram blocks, `(B,)`.
        logps: their log-probs, `(B,)` each, nats.
        batch_size: pairs per batch of a batch-coupled loss.
        codes: `(B,)` int64, what is predicted at these log-probs.
    """
    for ends in _ends_of_error(logps, geometry.resolution):
        there = predict(geometry, incentives_of(loss, ends, batch_size)).regime_codes
        codes = torch.where(there == codes, codes, REGIMES.index(Regime.DEGENERATE))
    return codes


def _ends_of_error(logps: PairLogps, resolution: float) -> Iterator[PairLogps]:
    """The log-probs with the largest and the smallest margin that 16-bit arithmetic leaves open; none if it was finer.

    An incentive may change at a point, as DPOP's does where the policy falls below the reference: a verdict is
    believed if it is the same at both ends. A log-prob that equals its reference's is known to (a fresh LoRA).
    """
    if resolution < COARSE:
        return
    share = logp_resolution(resolution)
    chosen = _error(logps.chosen, logps.ref_chosen, share)
    rejected = _error(logps.rejected, logps.ref_rejected, share)
    for sign in (1, -1):
        yield replace(logps, chosen=logps.chosen + sign * chosen, rejected=logps.rejected - sign * rejected)


def _error(logps: Tensor, reference: Tensor | None, share: float) -> Tensor:
    error = share * logps.abs()
    return error if reference is None else torch.where(logps == reference, 0.0, error)


def _column(rows: pd.DataFrame, name: str) -> Tensor:
    return torch.from_numpy(rows[name].to_numpy(dtype="float64", copy=True))
