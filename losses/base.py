"""What a preference loss is: a function of a pair's log-probs, with its two incentives.

Everything that a loss reads from the model is in `PairLogps` (six numbers per pair) or, for token-weighted
losses, in `TokenLogps`. Everything that a loss says about the next step is in its `Incentives`:

    chosen   d_w = -d loss / d log pi(chosen)      positive: the loss raises the chosen response
    rejected d_l = +d loss / d log pi(rejected)    positive: the loss lowers the rejected response

so that grad loss = -(d_w grad log pi(chosen) - d_l grad log pi(rejected)) for every loss here (Yuan et al.,
arXiv 2410.13828, section 3, without assuming their form of the loss). Incentives come from autograd over
`PreferenceLoss.per_pair`: a loss states its formula once.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, ClassVar, TypeVar, dataclass_transform

import torch
from torch import Tensor

__all__ = [
    "CATALOGUE",
    "Incentives",
    "MissingReference",
    "MissingTokens",
    "PairLogps",
    "PreferenceLoss",
    "TokenLogps",
    "UnknownLoss",
    "build",
    "register",
]

CATALOGUE: dict[str, type[PreferenceLoss]] = {}
"""Every registered loss by its name. The command line, YAML, tables and tests all read this one mapping."""


Loss = TypeVar("Loss", bound="PreferenceLoss")


class MissingReference(ValueError):
    """A loss that compares with a reference policy was given log-probs without one."""


class MissingTokens(ValueError):
    """A token-weighted loss was given no per-token log-probs, or not a statistic that it reads."""


class UnknownLoss(ValueError):
    """No loss of this name, or no such hyper-parameter."""


@dataclass(frozen=True)
class PairLogps:
    """Summed log-probs (nats) and scored-token counts of a batch of pairs, each of shape `(B,)`.

    Args:
        chosen: log pi(chosen | prompt), summed over the scored completion tokens.
        rejected: the same for the rejected response.
        length_chosen: number of scored tokens of the chosen response (end-of-sequence included if scored).
        length_rejected: the same for the rejected response.
        ref_chosen: log-prob of the chosen response under the reference policy; None without a reference.
        ref_rejected: the same for the rejected response.
        score_gap: a judge's score of the chosen minus that of the rejected response, in the judge's units;
            None where the data has no scores. Only losses that say so read it.
        tokens: the same log-probs per token; None unless a token-weighted loss is wanted.

    Raises:
        ValueError: a field isn't one-dimensional, shapes differ, or only one reference field is given.
    """

    chosen: Tensor
    rejected: Tensor
    length_chosen: Tensor
    length_rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    score_gap: Tensor | None = None
    tokens: TokenLogps | None = None

    def __post_init__(self) -> None:
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        shapes = {name: tuple(value.shape) for name, value in columns.items() if isinstance(value, Tensor)}
        if self.tokens is not None:
            shapes["tokens"] = tuple(self.tokens.chosen.shape[:1])
        if len(set(shapes.values())) != 1 or self.chosen.ndim != 1:
            raise ValueError(f"PairLogps fields must share one shape (B,); got {shapes}.")
        if (self.ref_chosen is None) != (self.ref_rejected is None):
            raise ValueError(
                "PairLogps takes both ref_chosen and ref_rejected, or neither; got only "
                f"{'ref_rejected' if self.ref_chosen is None else 'ref_chosen'}."
            )

    @property
    def has_reference(self) -> bool:
        """Whether the reference log-probs are present."""
        return self.ref_chosen is not None

    @property
    def logratio_chosen(self) -> Tensor:
        """r_w = log pi(chosen) - log pi_ref(chosen), `(B,)`, nats."""
        return self.chosen - self._reference(self.ref_chosen)

    @property
    def logratio_rejected(self) -> Tensor:
        """r_l = log pi(rejected) - log pi_ref(rejected), `(B,)`, nats."""
        return self.rejected - self._reference(self.ref_rejected)

    @property
    def logratio_margin(self) -> Tensor:
        """D = r_w - r_l, the margin of DPO before beta, `(B,)`, nats."""
        return self.logratio_chosen - self.logratio_rejected

    @property
    def policy_margin(self) -> Tensor:
        """Policy margin m = log pi(chosen) - log pi(rejected), `(B,)`, nats."""
        return self.chosen - self.rejected

    @property
    def mean_chosen(self) -> Tensor:
        """Mean log pi(chosen) per scored token, `(B,)`, nats per token."""
        return self.chosen / self.length_chosen

    @property
    def mean_rejected(self) -> Tensor:
        """Mean log pi(rejected) per scored token, `(B,)`, nats per token."""
        return self.rejected / self.length_rejected

    @property
    def by_token(self) -> TokenLogps:
        """The per-token part, which must be there."""
        if self.tokens is None:
            raise MissingTokens(
                "This loss weighs tokens one by one and needs PairLogps.tokens; got none. "
                "Build the batch with TokenLogps(...).pairs()."
            )
        return self.tokens

    def __getitem__(self, rows: slice | Tensor) -> PairLogps:
        """The pairs selected by a slice or an index tensor, as a smaller batch."""
        return PairLogps(**_rows(self, rows))

    @staticmethod
    def _reference(value: Tensor | None) -> Tensor:
        if value is None:
            raise MissingReference(
                "This loss needs the reference policy's log-probs (ref_chosen, ref_rejected); got none. "
                "Give a reference model, an adapter to switch off, or precomputed reference columns."
            )
        return value


@dataclass(frozen=True)
class TokenLogps:
    """Per-token log-probs (nats) of a batch of pairs: chosen fields `(B, T)`, rejected fields `(B, U)`.

    Values at masked positions are ignored and become 0, so `.sum(1)` sums over scored tokens. Padding
    may be on either side.

    Args:
        chosen: log pi(token t | prompt, tokens before it) of the chosen response, `(B, T)`.
        rejected: the same for the rejected response, `(B, U)`.
        mask_chosen: 1 (True) on scored tokens, `(B, T)`.
        mask_rejected: the same for the rejected response.
        ref_chosen: log-probs under the reference policy, `(B, T)`; None without a reference.
        ref_rejected: the same for the rejected response.
        log_collision_chosen: ln sum_v pi(v)^2 of the policy's next-token distribution, `(B, T)`; for WPO.
        log_collision_rejected: the same for the rejected response.
        kl_chosen: KL(ref || pi) of the next-token distributions, `(B, T)`, nats; for TDPO.
        kl_rejected: the same for the rejected response.

    Raises:
        ValueError: the fields of one side differ in shape, or the two sides in B.
    """

    chosen: Tensor
    rejected: Tensor
    mask_chosen: Tensor
    mask_rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    log_collision_chosen: Tensor | None = None
    log_collision_rejected: Tensor | None = None
    kl_chosen: Tensor | None = None
    kl_rejected: Tensor | None = None

    def __post_init__(self) -> None:
        for side, shape in (("chosen", self.chosen.shape), ("rejected", self.rejected.shape)):
            columns = {f.name: getattr(self, f.name) for f in fields(self) if side in f.name}
            columns = {name: value for name, value in columns.items() if value is not None}
            shapes = {name: tuple(value.shape) for name, value in columns.items()}
            if len(set(shapes.values())) != 1 or len(shape) != 2:
                raise ValueError(f"TokenLogps fields of one side must share one shape (B, T); got {shapes}.")
            mask = columns.pop(f"mask_{side}").bool()
            for name, value in columns.items():  # also keeps a NaN in the padding from reaching a gradient
                object.__setattr__(self, name, torch.where(mask, value, 0.0))
        if len(self.chosen) != len(self.rejected):
            raise ValueError(
                "TokenLogps needs as many chosen as rejected rows; "
                f"got {len(self.chosen)} and {len(self.rejected)}."
            )

    def pairs(self, score_gap: Tensor | None = None) -> PairLogps:
        """The batch of sums over scored tokens, with these tokens inside; gradients flow to both."""
        return PairLogps(
            chosen=self.chosen.sum(1),
            rejected=self.rejected.sum(1),
            length_chosen=self.mask_chosen.sum(1),
            length_rejected=self.mask_rejected.sum(1),
            ref_chosen=None if self.ref_chosen is None else self.ref_chosen.sum(1),
            ref_rejected=None if self.ref_rejected is None else self.ref_rejected.sum(1),
            score_gap=score_gap,
            tokens=self,
        )

    def statistic(self, name: str) -> Tensor:
        """An optional per-token column by its field name, which must be there."""
        value = getattr(self, name)
        if value is None:
            error = MissingReference if name.startswith("ref_") else MissingTokens
            raise error(f"This loss reads TokenLogps.{name}; got None. Compute it in the forward pass.")
        return value

    def __getitem__(self, rows: slice | Tensor) -> TokenLogps:
        """The pairs selected by a slice or an index tensor, as a smaller batch."""
        return TokenLogps(**_rows(self, rows))


@dataclass(frozen=True)
class Incentives:
    """Incentives of one loss for a batch of pairs, `(B,)` each, in loss units per nat.

    For a token-weighted loss they are `(B, T)`: one incentive per scored token (0 at padding).
    """

    chosen: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class PreferenceLoss(ABC):
    """A loss on preference pairs: hyper-parameters as fields, one method `per_pair`.

    Subclasses are final and declared with `@register`. Class attributes state, once, what everything else
    (command line, tables, tests) reads:

        name             the name used in YAML and on the command line
        paper            arXiv id (or a short citation where there is none)
        is_confirmed     the formula was read in the paper or in its authors' code; False: written from memory
        trl              the name in TRL, or None (the `loss_type` of DPOTrainer where it has one)
        trl_options      TRL's names of hyper-parameters that are called differently here
        ratio            rho = d_w / d_l as a formula
        ideal            when a pair is ideal, where that is more than "c/A < rho < B/c"
        trap             what goes wrong quietly, or None
        needs_reference  reads the reference log-probs
        needs_lengths    reads the token counts
        is_batch_coupled a pair's incentive depends on the other pairs of the batch
        needs_tokens     reads `TokenLogps`, not the six scalars

    The docstring's first line is "Title: formula.", which the tables read too.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    is_confirmed: ClassVar[bool] = True
    trl: ClassVar[str | None] = None
    trl_options: ClassVar[Mapping[str, str]] = {}
    ratio: ClassVar[str]
    ideal: ClassVar[str | None] = None
    trap: ClassVar[str | None] = None
    needs_reference: ClassVar[bool] = True
    needs_lengths: ClassVar[bool] = False
    is_batch_coupled: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False

    @abstractmethod
    def per_pair(self, logps: PairLogps) -> Tensor:
        """Loss of each pair, `(B,)`. The batch loss is its mean."""

    def incentives(self, logps: PairLogps) -> Incentives:
        """Incentives d_w = -dL/dw and d_l = +dL/dl of L = sum of `per_pair`, each `(B,)`, by autograd.

        `(B, T)` and `(B, U)` for a loss that reads tokens; 0 at masked positions. The batch loss is a mean,
        so its incentives are these divided by B. Law: the loss's gradient in any parameters is
        -(d_w grad w - d_l grad l), summed over the batch (and over tokens).
        """
        source = logps.by_token if self.needs_tokens else logps
        chosen = source.chosen.detach().requires_grad_()
        rejected = source.rejected.detach().requires_grad_()
        with torch.enable_grad():
            total = self.per_pair(_moved(logps, chosen, rejected)).sum()
        if not total.requires_grad:  # no pair acts on the policy
            return Incentives(torch.zeros_like(chosen), torch.zeros_like(rejected))
        grads = torch.autograd.grad(total, (chosen, rejected), allow_unused=True, materialize_grads=True)
        return Incentives(chosen=0.0 - grads[0], rejected=grads[1])  # 0 - x: no negative zeros

    @property
    def config(self) -> dict[str, Any]:
        """`{"name": ..., hyper-parameters}`: what `build` turns back into this loss."""
        return {"name": self.name} | {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @property
    def label(self) -> str:
        """Short unique text for tables: the name, and the hyper-parameters that differ from the default."""
        changed = [
            f"{f.name}={_short(getattr(self, f.name))}"
            for f in fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def register(cls: type[Loss]) -> type[Loss]:
    """Make `cls` a frozen dataclass and enter it in `CATALOGUE` under its `name`.

    Raises:
        ValueError: the name is missing, taken, or not lower case with digits, `_` and `-`.
    """
    name = cls.__dict__.get("name", "")
    if not name or name in CATALOGUE or not all(c.islower() or c.isdigit() or c in "_-" for c in name):
        raise ValueError(f"A loss needs a new lower-case name; {cls.__name__} has {name!r}.")
    loss = dataclass(frozen=True)(cls)
    CATALOGUE[name] = loss
    return loss


def build(spec: str | Mapping[str, Any] | PreferenceLoss) -> PreferenceLoss:
    """A loss from its name, from `{"name": "dpo", "beta": 0.1}`, or unchanged if it is one already.

    Raises:
        UnknownLoss: the name isn't in the catalogue (the message lists the known ones), or a hyper-parameter
            isn't one of the loss's (the message lists those).

    Examples:
        >>> from losses import build
        >>> build({"name": "dpo", "beta": 0.5}).beta
        0.5
    """
    if isinstance(spec, PreferenceLoss):
        return spec
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name", None)
    if name not in CATALOGUE:
        close = get_close_matches(str(name), CATALOGUE, 1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise UnknownLoss(f"Unknown loss {name!r}.{guess} Known losses: {', '.join(sorted(CATALOGUE))}.")
    cls = CATALOGUE[name]
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UnknownLoss(
            f"Unknown hyper-parameter {', '.join(map(repr, unknown))} of loss {name!r}. "
            f"It has: {', '.join(known) or 'none'}."
        )
    return cls(**options)


def require(loss: PreferenceLoss, is_valid: bool, expected: str) -> None:
    """For `__post_init__`: refuse hyper-parameters that would pass silently and mean nothing.

    Args:
        loss: the loss that was made.
        is_valid: whether its hyper-parameters are.
        expected: what they should be, in words.

    Raises:
        ValueError: what was expected, and the loss with the values it was given.
    """
    if not is_valid:
        raise ValueError(f"Loss {loss.name!r} expects {expected}; got {loss.label}.")


def _moved(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> PairLogps:
    """The same batch with other policy log-probs: `(B,)` sums, or `(B, T)` tokens from which sums follow."""
    if chosen.ndim == 1:
        return dataclasses.replace(logps, chosen=chosen, rejected=rejected)
    tokens = dataclasses.replace(logps.by_token, chosen=chosen, rejected=rejected)
    return tokens.pairs(score_gap=logps.score_gap)


def _rows(batch: PairLogps | TokenLogps, rows: slice | Tensor) -> dict[str, Any]:
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: None if value is None else value[rows] for name, value in columns.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, PreferenceLoss):
        return value.config
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    if isinstance(value, PreferenceLoss):
        return value.label
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_short, value))})"
    return f"{value:g}" if isinstance(value, float) else str(value)
