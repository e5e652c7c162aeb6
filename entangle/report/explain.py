"""One plain sentence per pair and loss: what is going on, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entangle.regimes import Regime


def explain(pair: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    """Say what one step of a loss does to a pair, why, and which incentive ratio would be ideal.

    Args:
        pair: a row of the pairs of a run folder.
        prediction: the row of its predictions for this pair and one loss.
    """
    if pair["identical"]:
        return "Chosen and rejected are the same text: no loss can separate them."
    loss, regime = prediction["loss"], Regime(prediction["regime"])
    return f"{_what_happens(pair, loss, regime)} {_what_would_help(pair, prediction, regime)}".strip()


def _what_happens(pair: Mapping[str, Any], loss: str, regime: Regime) -> str:
    on_chosen, on_rejected = pair["inner"] / pair["chosen_sq"], pair["inner"] / pair["rejected_sq"]
    match regime:
        case Regime.IDEAL:
            return f"Under {loss} the chosen rises and the rejected falls."
        case Regime.BOTH_DOWN:
            return (
                f"Under {loss} both fall: pushing the rejected response down drags the chosen one along "
                f"(their gradients' product is {on_chosen:.2f} of the chosen's own square)."
            )
        case Regime.BOTH_UP:
            return (
                f"Under {loss} both rise: pulling the chosen response up lifts the rejected one "
                f"(their gradients' product is {on_rejected:.2f} of the rejected's own square)."
            )
        case Regime.INVERTED:
            return f"Under {loss} the chosen falls and the rejected rises: its incentives point the wrong way here."
        case Regime.DEGENERATE:
            return f"Under {loss} a change is too small for its sign to be told in this precision."


def _what_would_help(pair: Mapping[str, Any], prediction: Mapping[str, Any], regime: Regime) -> str:
    d_w, d_l = prediction["coefficient_chosen"], prediction["coefficient_rejected"]
    if regime not in (Regime.BOTH_DOWN, Regime.BOTH_UP) or pair["inner"] <= 0:
        return ""
    if not (d_w > 0 and d_l > 0):
        return f"It pushes with d_w = {d_w:.3g} and d_l = {d_l:.3g}."
    lower, upper = pair["inner"] / pair["chosen_sq"], pair["rejected_sq"] / pair["inner"]
    if not lower < upper:
        return "The gradients are parallel to within the precision: no loss separates them."
    rho = d_w / d_l
    advice = "more weight on the chosen side" if rho < lower else "less weight on the chosen side"
    room = f"between {lower:.3g} and {upper:.3g}"
    if math.log(upper / lower) < 0.05:
        room += ", a narrow band"
    return (
        f"It would be ideal for an incentive ratio {room}; {loss_ratio(prediction['loss'], rho)}: {advice}."
    )


def loss_ratio(loss: str, rho: float) -> str:
    """`dpo has 1.00`."""
    return f"{loss} has {rho:.3g}"
