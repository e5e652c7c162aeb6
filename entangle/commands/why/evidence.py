"""What the probes of a run's checkpoints say, as evidence for the five answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.hyperparameters import KNOBS
from entangle.analysis.set_verdict import IDEAL, finding
from entangle.analysis.statistics import Z, bootstrap, bootstrap_mean, share
from entangle.analysis.trl_lines import trl_lines
from entangle.analysis.verdict import cheapest_change, is_good
from entangle.analysis.why import TURNED, fall_since, own_steps, verdict_on_changes
from entangle.analysis.wording import visible
from entangle.commands.across import AcrossResult
from entangle.commands.probe import ProbeResult
from entangle.commands.sweep import SweepResult
from entangle.commands.whatif import run_whatif, what_if
from entangle.config import WhatIfConfig, build_losses
from entangle.config.specs import spec_text, to_spec

TENTH = 0.1
"""Share of the pairs that is looked at for a part of the data that does it all."""


def moved(sweep: SweepResult, sample: str) -> dict[str, Any]:
    """How far the pairs' log-probs have moved by the last checkpoint, and between which checkpoints it began.

    Args:
        sweep: the probes side by side.
        sample: which pairs these are, in words.
    """
    steps = sweep.steps
    last = steps[steps["step"] == steps["step"].max()].dropna(subset=["moved_chosen", "moved_rejected"])
    point = sweep.curve.iloc[-1]
    per_token = last["moved_chosen"] / last["length_chosen"]
    start = last["logps_chosen"] - last["moved_chosen"]
    before, began = fall_since(sweep.curve)
    both, grew = (
        (last["moved_chosen"] < 0) & (last["moved_rejected"] < 0),
        last["moved_chosen"] > last["moved_rejected"],
    )
    return {
        "pairs": len(last),
        "sample": sample,
        "start": sweep.summary["start"],
        "steps": [int(step) for step in sweep.curve["step"]],
        "chosen": _normal(point, "moved_chosen"),
        "rejected": _normal(point, "moved_rejected"),
        "per_token": _with_ends(float(per_token.mean()), bootstrap_mean(per_token.to_numpy())),
        "lost": _with_ends(
            float(last["moved_chosen"].sum() / start.sum()),
            bootstrap(_ratio, last["moved_chosen"].to_numpy(), start.to_numpy()),
        ),
        "both_fell": share(int(both.sum()), len(last)),
        "grew": share(int(grew.sum()), len(last)),
        "since": {"before": before, "from": began},
    }


def _ratio(above: np.ndarray, below: np.ndarray, axis: int) -> np.ndarray:
    return above.sum(axis) / below.sum(axis)


def _normal(point: Mapping[str, Any] | pd.Series, name: str) -> dict[str, float]:
    value, spread = float(point[name]), Z * float(point[f"{name}_error"])
    return _with_ends(value, (value - spread, value + spread))


def _with_ends(value: float, ends: tuple[float, float]) -> dict[str, float]:
    return {"value": value, "low": ends[0], "high": ends[1]}


def culprits(across: AcrossResult, sweep: SweepResult, step: int) -> dict[str, Any]:
    """The tenth of the pairs whose steps lower the others' chosen log-probs most, and its share of all lowering.

    Args:
        across: of the pairs at a checkpoint, under the training's loss.
        sweep: the probes side by side, for what became of each pair.
        step: the checkpoint's.
    """
    loss = next(iter(across.summary["losses"]))
    rows = across.rows[across.rows["loss"] == loss].sort_values("exerted_chosen")
    lowering = -rows["exerted_chosen"].clip(upper=0).to_numpy()
    count = max(1, round(TENTH * len(rows)))
    worst = rows[rows["exerted_chosen"] < 0]["index"].tolist()[:count]
    whole = lowering.sum()
    value = float(np.sort(lowering)[-count:].sum() / whole) if whole > 0 else 0.0

    def top(values: np.ndarray, axis: int) -> np.ndarray:
        ordered = np.sort(np.moveaxis(values, axis, -1), -1)
        return ordered[..., -count:].sum(-1) / ordered.sum(-1)

    column, kinds = _kinds(sweep)
    regimes = across.summary["losses"][loss]["regimes_alone"]
    return {
        "pairs": [int(index) for index in worst],
        "of": len(rows),
        "share": _with_ends(value, bootstrap(top, lowering)),
        "step": step,
        "alone": own_steps(regimes, len(rows)),
        "column": column,
        "kinds": kinds,
        "tokens": None,
    }


def _kinds(sweep: SweepResult) -> tuple[str, list[tuple[str, dict[str, float], int]]]:
    """The chosen's change by kind of pair, most fallen first, where the data has a column of a few kinds."""
    last = sweep.steps[sweep.steps["step"] == sweep.steps["step"].max()]
    if "kind" not in last or not 2 <= last["kind"].nunique() <= 12:
        return "", []
    groups = [(str(name), group["moved_chosen"]) for name, group in last.groupby("kind") if len(group) > 1]
    found = [
        (visible(name), _with_ends(float(values.mean()), bootstrap_mean(values.to_numpy())), len(values))
        for name, values in groups
    ]
    return "kind", sorted(found, key=lambda item: item[1]["value"])


def entangled_tokens(tokens: pd.DataFrame, pair: int, count: int = 3) -> dict[str, Any]:
    """The tokens of a pair that add most to the product of its two scores, by side.

    Args:
        tokens: rows of `entangle tokens`.
        pair: its index.
        count: tokens per side.
    """
    own = tokens[tokens["index"] == pair]
    sides = {
        side: [visible(text) for text in own[own["side"] == side].nlargest(count, "share")["text"]]
        for side in ("chosen", "rejected")
    }
    return {"pair": pair, **sides}


def stopping(probe: ProbeResult, spec: Any) -> dict[str, Any]:
    """The smallest change of the training's loss under which the mean chosen log-prob wouldn't fall.

    By the set's mean scores where they could be had, else by the pairs one by one. TRL's own NLL term is taken where it
    does, else the knob that keeps most margin.

    Args:
        probe: of the pairs at a checkpoint.
        spec: the training's loss. For the page, every loss of the catalogue is written beside it into the folder.
    """
    (base,) = build_losses([spec])
    names = [name for name in TURNED if not KNOBS[name].needs_reference or base.needs_reference]
    options = WhatIfConfig(run=str(probe.folder.path), base=spec, knobs=tuple(names), plots=False)
    found = run_whatif(options)[0].summary
    content: dict[str, Any] = {"verdict": verdict_on_changes(found), "tried": ", ".join(names), "knob": None}
    whole = found.get("set")
    if whole is None:
        content["is_steady"] = is_good(found["regimes"])
        best = cheapest_change(found["changes"])
        settings = {} if best is None else {best["knob"]: best["setting"]}
    else:
        move = whole["losses"][base.label]
        content["is_steady"] = finding(move) == IDEAL or (move["chosen"]["value"] or 0) > 0
        ideal = {
            change["knob"]: change["setting"] for change in whole["changes"] if change["setting"] is not None
        }
        stops = {
            change["knob"]: change["stops"] for change in whole["changes"] if change["stops"] is not None
        }
        settings = stops | ideal
    starts = {name: KNOBS[name].start for name in settings}
    settings = {
        name: rounded(setting, starts[name]) for name, setting in settings.items() if setting != starts[name]
    }
    if content["is_steady"] or not settings:
        return content
    turned = {name: KNOBS[name].loss(base, setting) for name, setting in settings.items()}
    judged = what_if(probe, [base, *turned.values()], base=base, knobs=()).summary.get("set")
    per_margin = {
        loss.label: _per_margin(judged["losses"][loss.label]) if judged else None
        for loss in (base, *turned.values())
    }
    knob = next((name for name, loss in turned.items() if trl_lines(loss)), next(iter(turned)))
    others = [
        f"{name} = {settings[name]:g} (entangle train --loss '{spec_text(to_spec(loss))}')"
        for name, loss in turned.items()
        if name != knob
    ]
    return content | {
        "knob": knob,
        "setting": settings[knob],
        "loss": turned[knob].label,
        "spec": spec_text(to_spec(turned[knob])),
        "lines": trl_lines(turned[knob]),
        "before": per_margin[base.label],
        "after": per_margin[turned[knob].label],
        "instead": f"So would {' or '.join(others)}." if others else "",
    }


def rounded(setting: float, start: float) -> float:
    """A setting to two digits, away from where its knob starts.

    >>> rounded(0.3941, 0.0), rounded(0.38791, 1.0)
    (0.4, 0.38)
    """
    if setting == 0:
        return setting
    unit = 10.0 ** (math.floor(math.log10(abs(setting))) - 1)
    away = math.ceil if setting > start else math.floor
    return float(f"{away(setting / unit) * unit:.2g}")


def _per_margin(move: Mapping[str, Any]) -> dict[str, Any] | None:
    """Nats by which the mean chosen log-prob moves per nat of margin: the drift, and half a nat."""
    drift = move["drift"]
    if drift["value"] is None:
        return None
    return {name: None if drift[name] is None else drift[name] + 0.5 for name in ("value", "low", "high")}
