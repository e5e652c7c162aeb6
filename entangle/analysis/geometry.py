"""The 2 x 2 Gram block of a pair's two scores, and what follows from it alone.

A score is the gradient of a response's summed log-prob in the probed parameters. With g_w, g_l the scores of
chosen and rejected:

    sq_chosen A = |g_w|^2   sq_rejected B = |g_l|^2   inner c = <g_w, g_l>
    gap_chosen A - c = <g_w, g_w - g_l>               gap_rejected B - c = <g_l, g_l - g_w>

The gaps are inputs, not derived: for nearly parallel scores `A - c` by subtraction loses every digit.
The block doesn't depend on the loss, so one of them answers for every loss.

Scores (3, 0) and (2, 1): A = 9, B = 5, c = 6, so the chosen gap is 3 and the rejected one -1.

    >>> block = PairGeometry.from_scores(torch.tensor([[3.0, 0.0]]), torch.tensor([[2.0, 1.0]]))
    >>> block.gap_chosen.item(), block.gap_rejected.item()
    (3.0, -1.0)
    >>> [round(ratio.item(), 3) for ratio in block.critical_ratio]  # ideal for c/A < d_w / d_l < B/c
    [0.667, 0.833]
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

SIDES = ("chosen", "rejected")
"""The two responses of a pair, as columns end: `sq_chosen`, `sq_rejected`."""

COARSE = 1e-3
"""From this resolution on arithmetic is that of 16 bits; in float32 models come up to 1e-4."""

RESOLUTION = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}
"""Error that is believed at least of a dot product of two scores, relative to the product of their norms, by the
precision of the passes; a probe measures its model's (`entangle.measure.resolution`). In 16 bits three of its rounding
units (2^-8, 2^-11). It is no bound on a norm, most of whose error is common to the three products and turns no sign:
`experiments/precision` saw norms off by ten times as much, and no wrong sign from half of it on.
"""


def logp_resolution(resolution: float) -> float:
    """Relative error of a log-prob where dot products carry `resolution`: in 16 bits one rounding unit, a third."""
    return resolution / 3 if resolution >= COARSE else min(resolution, RESOLUTION[torch.float32])


@dataclass(frozen=True)
class PairGeometry:
    """Gram blocks of a batch of pairs; every field `(B,)`, float64, units 1/parameter^2.

    Args:
        sq_chosen: A = |g_w|^2.
        sq_rejected: B = |g_l|^2.
        inner: c = <g_w, g_l>.
        gap_chosen: A - c, computed as <g_w, g_w - g_l>.
        gap_rejected: B - c, computed as <g_l, g_l - g_w>.
        resolution: relative error of the dot products (see `RESOLUTION`); signs below it are not believed.

    Raises:
        ValueError: the fields don't share one shape `(B,)`.
    """

    sq_chosen: Tensor
    sq_rejected: Tensor
    inner: Tensor
    gap_chosen: Tensor
    gap_rejected: Tensor
    resolution: float = RESOLUTION[torch.float32]

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in GEOMETRY_COLUMNS}
        if len(set(shapes.values())) != 1 or self.inner.ndim != 1:
            raise ValueError(f"PairGeometry fields must share one shape (B,); got {shapes}.")
        for name in GEOMETRY_COLUMNS:
            object.__setattr__(self, name, getattr(self, name).to(torch.float64))

    @classmethod
    def from_scores(cls, chosen: Tensor, rejected: Tensor) -> PairGeometry:
        """From the scores themselves, `(B, P)` each. Dots are taken in float64.

        Args:
            chosen: `(B, P)`, a chosen score per row, nats per unit of parameter.
            rejected: `(B, P)`, the rejected scores, in the same precision.
        """
        resolution = RESOLUTION[chosen.dtype]
        chosen, rejected = chosen.double(), rejected.double()
        difference = chosen - rejected
        return cls(
            sq_chosen=(chosen * chosen).sum(-1),
            sq_rejected=(rejected * rejected).sum(-1),
            inner=(chosen * rejected).sum(-1),
            gap_chosen=(chosen * difference).sum(-1),
            gap_rejected=-(rejected * difference).sum(-1),
            resolution=resolution,
        )

    @property
    def cosine(self) -> Tensor:
        """The cosine c / sqrt(A B), in [-1, 1]; NaN where a score is zero."""
        return (self.inner / (self.sq_chosen * self.sq_rejected).sqrt()).clamp(-1.0, 1.0)

    @property
    def norm_ratio(self) -> Tensor:
        """r* = |g_l| / |g_w| = sqrt(B / A): the incentive ratio at the centre of the ideal band."""
        return (self.sq_rejected / self.sq_chosen).sqrt()

    @property
    def log_band(self) -> tuple[Tensor, Tensor]:
        """(ln(c/A), ln(B/c)): the open interval of ln rho in which a pair with c > 0 is ideal.

        (-inf, inf) where c <= 0. Formed from the gaps, so it keeps its digits when cos is close to 1. Law: it
        is centred on ln r* and its half-width is -ln cos; empty iff cos = 1 (arXiv 2604.18239's band).
        """
        lower = torch.log1p(-self.gap_chosen / self.sq_chosen)
        upper = -torch.log1p(-self.gap_rejected / self.sq_rejected)
        infinite = torch.full_like(lower, torch.inf)
        positive = self.inner > 0
        return torch.where(positive, lower, -infinite), torch.where(positive, upper, infinite)

    @property
    def critical_ratio(self) -> tuple[Tensor, Tensor]:
        """(c/A, B/c): incentive ratios rho between which a pair is ideal; (0, inf) where c <= 0."""
        lower, upper = self.log_band
        return lower.exp(), upper.exp()

    @property
    def is_finite(self) -> Tensor:
        """`(B,)` bool: every entry of the block is a finite number."""
        return torch.stack([getattr(self, name) for name in GEOMETRY_COLUMNS]).isfinite().all(0)

    @property
    def is_parallel(self) -> Tensor:
        """`(B,)` bool: the band is narrower than the arithmetic, so no loss can be said to disentangle."""
        lower, upper = self.log_band
        return (upper - lower) <= 4 * self.resolution

    def __getitem__(self, rows: slice | Tensor) -> PairGeometry:
        """The pairs selected by a slice or an index tensor."""
        chosen = {name: getattr(self, name)[rows] for name in GEOMETRY_COLUMNS}
        return PairGeometry(**chosen, resolution=self.resolution)


GEOMETRY_COLUMNS = tuple(f.name for f in fields(PairGeometry) if f.name != "resolution")
"""The five columns that a run folder stores for a pair."""
