"""How far the numbers of a probe are off, measured: some of its pairs once more, in float64 where that can be had.

Float32 arithmetic leaves some 1e-7 of a dot product of two scores in one model and 1e-4 in another, so no constant
tells which signs may be believed. The pairs are measured again alone (in the probe they went through the model beside
others), with their responses in the other order, and with the model's weights and arithmetic in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.geometry import COARSE, PairGeometry
from entangle.analysis.predictions import geometry_of, is_scored
from entangle.data import TokenizedPair
from entangle.measure.plan import longest
from entangle.models import Policy
from entangle.scores import Engine, Metric, make_engine
from entangle.scores.float64 import in_float64

EngineKind = Literal["auto", "factored", "autograd"]

PAIRS = 4
"""Pairs that are measured again: evenly spread over the lengths of rows, so that the longest is among them."""

MARGIN = 10.0
"""What is believed, over the worst of the sample. Errors have a heavy tail: on the 72 pairs of the package the worst
of all was up to 9 times the worst of four (in 95 of 100 samples)."""


@dataclass(frozen=True)
class Resolution:
    """Error of dot products of two scores, relative to the product of their norms.

    Args:
        believed: the error that verdicts allow for: a change closer to zero than that has no sign.
        nominal: the least that is believed in this precision, whatever the sample says (`RESOLUTION`).
        pairs: that were measured again; 0 where nothing was.
        against: what they were compared with: `float64`, or `other order` where the model can't be had in float64.
        median: error of the pairs measured again; None without any.
        worst: the largest of them.
    """

    believed: float
    nominal: float
    pairs: int = 0
    against: str = "nothing"
    median: float | None = None
    worst: float | None = None

    @property
    def content(self) -> dict[str, Any]:
        """As plain values, for a summary."""
        return asdict(self)

    @property
    def note(self) -> str | None:
        """The sentence for whoever reads the numbers; None where nothing was measured."""
        if not self.pairs:
            return None
        how = "in float64" if self.against == "float64" else "alone and in the other order"
        return (
            f"Error of the products of scores, measured by computing {self.pairs} pairs again {how}: "
            f"{self.median:.1g} of their size in the median, {self.worst:.1g} at worst. A predicted change smaller "
            f"than {self.believed:.1g} of its parts has no sign here."
        )


def measure_resolution(
    policy: Policy,
    engine: Engine,
    rows: pd.DataFrame,
    pairs: Mapping[int, TokenizedPair],
    metric: Metric | None = None,
    kind: EngineKind = "auto",
) -> Resolution:
    """Measure some pairs again, and say how far the probe's numbers are from these.

    In 16 bits `RESOLUTION` stands, which was measured once for all: another 16-bit pass has most of the first one's
    errors. The model is left bit for bit as it was.

    Args:
        policy: the policy.
        engine: what measured the rows.
        rows: the probe's rows.
        pairs: its pairs by index.
        metric: the optimiser's.
        kind: of the engine, as in the options.
    """
    nominal = engine.resolution
    sample = _sample(rows, pairs)
    if nominal >= COARSE or not sample:
        return Resolution(nominal, nominal)
    known = rows.set_index("index").loc[[pair.index for pair in sample]]
    first = geometry_of(known, nominal)
    try:
        with in_float64(policy.model) as is_exact:
            second = _again(policy, sample, metric, kind)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        is_exact, second = False, _again(policy, sample, metric, kind)
    errors = relative_errors(first, second)
    errors = errors[errors.isfinite()]
    if not len(errors):
        return Resolution(nominal, nominal)
    worst = float(errors.max())
    return Resolution(
        believed=max(nominal, MARGIN * worst),
        nominal=nominal,
        pairs=len(errors),
        against="float64" if is_exact else "other order",
        median=float(errors.median()),
        worst=worst,
    )


def relative_errors(found: PairGeometry, true: PairGeometry) -> Tensor:
    """Largest error among a pair's products, `(B,)`, each over what a floor of its sign is a multiple of.

    |dA| / A, |dB| / B, |dc| / sqrt(AB), and of the gaps |d(A - c)| / (A + sqrt(AB)) (see `regimes.predict`).

    Args:
        found: Gram blocks.
        true: the same pairs', from better arithmetic.
    """
    norms = (true.sq_chosen * true.sq_rejected).sqrt()
    scales = {
        "sq_chosen": true.sq_chosen,
        "sq_rejected": true.sq_rejected,
        "inner": norms,
        "gap_chosen": true.sq_chosen + norms,
        "gap_rejected": true.sq_rejected + norms,
    }
    parts = [(getattr(found, name) - getattr(true, name)).abs() / scale for name, scale in scales.items()]
    return torch.stack(parts).amax(0)


def _sample(rows: pd.DataFrame, pairs: Mapping[int, TokenizedPair]) -> list[TokenizedPair]:
    """Some of the scored pairs, evenly spread over the lengths of rows."""
    scored = sorted(
        (pairs[index] for index in rows.loc[is_scored(rows), "index"].tolist()),
        key=lambda pair: (longest(pair), pair.index),
    )
    places = np.linspace(0, len(scored) - 1, min(PAIRS, len(scored))).round().astype(int)
    return [scored[place] for place in places]


def _again(
    policy: Policy, sample: list[TokenizedPair], metric: Metric | None, kind: EngineKind
) -> PairGeometry:
    """Blocks of the pairs, each alone and with its responses exchanged (and named as they were)."""
    engine = make_engine(policy.model, policy.parameters, kind)
    engine.take_as_checked()
    found = []
    for pair in sample:
        turned = replace(pair, chosen_ids=pair.rejected_ids, rejected_ids=pair.chosen_ids)
        found.append(engine.pairs(policy.collate([turned]), metric=metric).geometry)

    def column(name: str) -> Tensor:
        return torch.cat([getattr(block, name).cpu() for block in found])

    return PairGeometry(
        sq_chosen=column("sq_rejected"),
        sq_rejected=column("sq_chosen"),
        inner=column("inner"),
        gap_chosen=column("gap_rejected"),
        gap_rejected=column("gap_chosen"),
        resolution=engine.resolution,
    )
