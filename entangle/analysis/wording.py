"""Numbers in words, and one plain sentence per pair and loss: what is going on, and what would change it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from entangle.analysis.regimes import Regime

_HAPPENS = {
    "identical": "The same tokens are scored on both sides: no loss can separate them.",
    Regime.IDEAL: "Under {loss} the chosen rises and the rejected falls.",
    Regime.BOTH_DOWN: "Under {loss} both fall: lowering the rejected response drags the chosen one along "
    "(their gradients' product is {ratio_chosen:.2f} of the chosen's own square).",
    Regime.BOTH_UP: "Under {loss} both rise: raising the chosen response lifts the rejected one "
    "(their gradients' product is {ratio_rejected:.2f} of the rejected's own square).",
    Regime.INVERTED: "Under {loss} the chosen falls and the rejected rises: its incentives point the wrong way here.",
    Regime.DEGENERATE: "Under {loss} a change is too small for this precision to know its sign.",
}
_BAND = "It would be ideal for an incentive ratio between {lower:.3g} and {upper:.3g}{narrow}; {loss} has {rho:.3g}: "
_HELPS = {
    "": "",
    "signs": "Its incentives are d_w = {d_w:.3g} and d_l = {d_l:.3g}.",
    "parallel": "The gradients are parallel to within the precision: no loss separates them.",
    "more": _BAND.replace("{narrow}", "") + "more weight on the chosen side.",
    "more_narrow": _BAND.replace("{narrow}", ", a narrow band") + "more weight on the chosen side.",
    "less": _BAND.replace("{narrow}", "") + "less weight on the chosen side.",
    "less_narrow": _BAND.replace("{narrow}", ", a narrow band") + "less weight on the chosen side.",
}
_NARROW = 0.05
"""A band narrower than this in log rho is called narrow."""

SENTENCES: tuple[str, ...] = tuple(
    f"{happens} {helps}".strip() for happens in _HAPPENS.values() for helps in _HELPS.values()
)
"""What can be said of a pair, with the names of its numbers; `sentence_codes` says which holds."""


def sentence_codes(rows: pd.DataFrame) -> np.ndarray:
    """Which of `SENTENCES` holds, for every row of pairs merged with predictions, `(n,)` int."""
    happens, helps = list(_HAPPENS), list(_HELPS)
    d_w, d_l = rows["incentive_chosen"], rows["incentive_rejected"]
    with np.errstate(all="ignore"):
        lower, upper, rho = rows["inner"] / rows["sq_chosen"], rows["sq_rejected"] / rows["inner"], d_w / d_l
        narrow = np.log(upper / lower) < _NARROW
    entangled = rows["regime"].isin([Regime.BOTH_DOWN, Regime.BOTH_UP]) & (rows["inner"] > 0)
    cases = [
        (rows["identical"].astype(bool) | ~entangled, ""),
        (~((d_w > 0) & (d_l > 0)), "signs"),
        (~(lower < upper), "parallel"),
        ((rho < lower) & narrow, "more_narrow"),
        (rho < lower, "more"),
        (narrow, "less_narrow"),
    ]
    help_code = np.select(
        [np.asarray(case) for case, _ in cases],
        [helps.index(name) for _, name in cases],
        default=helps.index("less"),
    )
    kinds = {str(name): number for number, name in enumerate(happens)}
    happen_code = np.where(rows["identical"].astype(bool), 0, rows["regime"].astype(str).map(kinds))
    return happen_code.astype(int) * len(helps) + help_code


def pair_sentence(pair: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    """Say what one step of a loss does to a pair, why, and which incentive ratio would be ideal.

    Args:
        pair: a row of the pairs of a run folder.
        prediction: the row of its predictions for this pair and one loss.
    """
    row = {**pair, **prediction}
    sentence = SENTENCES[int(sentence_codes(pd.DataFrame([row]))[0])]
    d_w, d_l = row["incentive_chosen"], row["incentive_rejected"]
    of_chosen, of_rejected = _ratio(row["inner"], row["sq_chosen"]), _ratio(row["inner"], row["sq_rejected"])
    return sentence.format(
        loss=row["loss"],
        d_w=d_w,
        d_l=d_l,
        rho=_ratio(d_w, d_l),
        ratio_chosen=of_chosen,
        ratio_rejected=of_rejected,
        lower=of_chosen,
        upper=_ratio(row["sq_rejected"], row["inner"]),
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan


def spoken(name: str) -> str:
    """A name of the code as words.

    >>> spoken("both_up")
    'both up'
    """
    return name.replace("_", " ")


def is_known(value: float | None) -> bool:
    """Whether a number is there: JSON has neither NaN nor infinity, which are written as null."""
    return value is not None and value == value


def reference_text(name: str) -> str:
    """A reference as a run's provenance names it, in words.

    >>> reference_text("adapter_off")
    'the model without its adapter'
    """
    return "the model without its adapter" if name == "adapter_off" else name


def share_text(part: Mapping[str, float]) -> str:
    """A share of pairs with its interval.

    >>> share_text({"count": 13, "share": 0.31, "low": 0.21, "high": 0.42})
    '31 % (95 % interval 21 to 42 %)'
    """
    low, high = (f"{100 * part[end]:.0f}" for end in ("low", "high"))
    return f"{100 * part['share']:.0f} % (95 % interval {low} to {high} %)"


def portion(part: Mapping[str, float]) -> str:
    """A share without its interval: `31 %`, or the number of pairs where that would round to nothing.

    >>> portion({"count": 1, "share": 0.001})
    '1 pair'
    """
    return f"{100 * part['share']:.0f} %" if part["share"] >= 0.005 else counted(int(part["count"]))


def counted(count: int, noun: str = "pair") -> str:
    """`1 pair`, `3 pairs`.

    Args:
        count: how many.
        noun: what, in the singular.
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def correlation_text(rho: Mapping[str, float | None]) -> str:
    """A rank correlation with its interval."""
    if not is_known(rho["rho"]):
        return "unknown"
    return f"{rho['rho']:.2f} (95 % interval {rho['low']:.2f} to {rho['high']:.2f})"


LONGEST = 24
"""Characters of a token that are shown."""


def visible(text: str, longest: int = LONGEST) -> str:
    r"""A token as it can be printed anywhere: spaces as ␣, control characters escaped, cut if long.

    Args:
        text: the token.
        longest: characters kept at most.

    >>> visible(" cat\n")
    '␣cat\\n'
    """
    shown = "".join(_character(c) for c in text)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def _character(c: str) -> str:
    if c == " ":
        return "␣"
    return c if c.isprintable() else c.encode("unicode_escape").decode("ascii")
