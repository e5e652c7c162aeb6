"""What would stop a fall of the chosen log-probs, with the lines that do it in TRL, LLaMA-Factory and here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from entangle.analysis.decision import HARMLESS, number
from entangle.analysis.hyperparameters import KNOBS
from entangle.analysis.predictions import is_scored
from entangle.analysis.trl_lines import trl_lines
from entangle.commands.whatif import what_if
from entangle.commands.whatif.source import ProbedRows
from entangle.config import build_losses
from entangle.config.specs import spec_text, to_spec
from entangle.errors import UserError
from entangle.report.source import Source
from entangle.report.verdict import probe_decision
from entangle.runs.folder import RunFolder
from losses import DPO, PreferenceLoss

TERMS = {"nll": "LLaMA-Factory", "nll_batch": "TRL"}
"""NLL terms with each trainer's normaliser: per chosen token of the pair, and of the batch."""


MOST = 10_000
"""Pairs on which the page asks what would change them; of more it takes a random sample, and says so."""


def sampled(run: str | Path) -> ProbedRows:
    """A probe's rows, at most `MOST` of the scored ones; the set's block is that of all."""
    found = ProbedRows.of_run(run)
    scored = found.pairs[is_scored(found.pairs)]
    if len(scored) <= MOST:
        return found
    return replace(found, pairs=scored.sample(MOST, random_state=0).sort_index())


def with_remedy(source: Source, run: str | Path) -> Source:
    """A run of pairs with what would stop the fall of its chosen log-probs, where they may fall.

    `entangle why` has said it already.
    """
    if source.answers or source.pairs is None or source.what_if is None or source.remedy is not None:
        return source
    if probe_decision(source).verdict == HARMLESS:
        return source
    base = _first_loss(run, source.losses[0])
    return source if base is None else replace(source, remedy=remedy_of(sampled(run), base))


def _first_loss(run: str | Path, label: str) -> PreferenceLoss | None:
    """The loss of a label among those that the run was configured with."""
    try:
        named = build_losses(RunFolder(run).config.get("losses") or [label])
    except UserError:  # code of the user's own that isn't here
        return None
    return next((loss for loss in named if loss.label == label), None)


def remedy_of(probe: ProbedRows, base: PreferenceLoss) -> dict[str, Any]:
    """Words and lines for the smallest weight of an NLL term that stops the fall, by the set where it was measured.

    Args:
        probe: rows of a finished probe.
        base: the loss that was trained or is to be trained.
    """
    found = what_if(probe, [base], base=base, knobs=tuple(TERMS)).summary
    settings = {name: _setting(found, name) for name in TERMS}
    weights = {name: rounded_up(setting) for name, setting in settings.items() if setting}
    if not weights:
        tried = "No weight of an NLL term on the chosen response stops it."
        steady = any(setting == 0.0 for setting in settings.values())
        return {"words": "" if steady else tried, "paste": []}
    turned = {name: KNOBS[name].loss(base, weight) for name, weight in weights.items()}
    judged = what_if(probe, [base, *turned.values()], base=base, knobs=()).summary
    best = next(iter(turned))
    return {
        "words": _words(judged, base.label, turned[best].label, weights[best]),
        "paste": [line for name, loss in turned.items() for line in _lines(name, base, loss, weights[name])],
    }


def rounded_up(weight: float) -> float:
    """A weight to two digits, upwards.

    >>> rounded_up(0.2414), rounded_up(3.01)
    (0.25, 3.1)
    """
    unit = 10.0 ** (math.floor(math.log10(weight)) - 1)
    return float(f"{math.ceil(weight / unit - 1e-9) * unit:.2g}")


def _setting(found: Mapping[str, Any], knob: str) -> float | None:
    """The smallest weight at which the set parts, else at which its chosen rises; without a set, that of the pairs."""
    if "set" in found:
        change = next(c for c in found["set"]["changes"] if c["knob"] == knob)
        return change["setting"] if change["setting"] is not None else change["stops"]
    change = next(c for c in found["changes"] if c["knob"] == knob)
    return change["setting"] if change["reaches"] else None


def _words(judged: Mapping[str, Any], before: str, after: str, weight: float) -> str:
    start = f"The smallest weight of an NLL term on the chosen response that stops a fall is {weight:.3g}"
    if "set" not in judged:
        return f"{start}: by one step on each pair alone."
    old, new = (judged["set"]["losses"][label] for label in (before, after))
    moved = [number(tuple(new["chosen"][end] for end in ("value", "low", "high")))]
    gain = [number(tuple(move["margin"][end] for end in ("value", "low", "high"))) for move in (new, old)]
    doubt = "" if (new["chosen"]["low"] or -1) > 0 else ", by these pairs' means and without certainty"
    return (
        f"{start}{doubt}: the mean chosen log-prob then changes by {moved[0]} nats in a step of learning rate 1. Its "
        f"price: the mean margin grows by {gain[0]} instead of {gain[1]}."
    )


def _lines(name: str, base: PreferenceLoss, loss: PreferenceLoss, weight: float) -> list[tuple[str, str]]:
    """The lines of one trainer's file; those of this project beside TRL's."""
    if name == "nll":
        if not isinstance(base, DPO):
            return []
        return [("LLaMA-Factory", f"pref_loss: sigmoid\npref_beta: {base.beta:g}\npref_ftx: {weight:.3g}")]
    lines = trl_lines(loss)
    own = ("entangle train", f"--loss '{spec_text(to_spec(loss))}'")
    return [*([("TRL", "\n".join(lines))] if lines else []), own]
