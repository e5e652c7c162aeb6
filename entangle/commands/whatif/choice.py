"""What a run's rows can judge: which losses and knobs, and a sentence on each of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from entangle.analysis.hyperparameters import KNOBS, Knob, default_base
from entangle.analysis.predictions import usable_losses
from entangle.config import build_losses
from entangle.errors import ConfigError
from losses import CATALOGUE, MissingReference, MissingTokens, PairLogps, PreferenceLoss, TokenLogps


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


def allowed_losses(
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


def build_all(specs: Sequence[Any]) -> list[PreferenceLoss]:
    """The named losses, each label once; none named: the whole catalogue."""
    return list({loss.label: loss for loss in build_losses(specs or CATALOGUE)}.values())


def base_of(spec: Any, logps: PairLogps) -> PreferenceLoss:
    """The loss that knobs start from: the named one, else the default one that the rows can judge."""
    if spec is None:
        return default_base(logps.has_reference)
    (loss,) = build_all([spec])
    allowed_losses([loss], logps, named=True)
    return loss


def usable_knobs(names: Sequence[str], logps: PairLogps) -> tuple[list[Knob], list[str]]:
    """The named knobs that can be turned on these rows, and a sentence on each of the others."""
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
