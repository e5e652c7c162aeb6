"""Five answers on a past run: is it happening, since when, is it harmful, which part of the data, what would stop it.

Decided here once, for the terminal and for the page, from what the log says (`log`) and what was measured on pairs at
checkpoints (`measured`, `responsible`, `change`); each of them may be missing. Every answer is a headline that fits a
terminal of 80 columns beside its name, and details: what it rests on, and what it can't know.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from entangle.analysis.regimes import Regime
from entangle.analysis.set_verdict import set_verdict
from entangle.analysis.statistics import Z
from entangle.analysis.verdict import pair_verdict
from entangle.analysis.wording import share_text

YES, NO, UNKNOWN = "yes", "no", "can't tell"

COLLAPSE = 0.25
"""Share of its own log-prob that the chosen may lose before that is called harmful: the doctor's bound, too."""

CONCENTRATED = 0.5
"""From this share on of all lowering, a tenth of the pairs is called responsible."""

WIDTH = 72
"""Columns of a headline beside its question."""

Evidence = Mapping[str, Any]
"""Plain values, as the command's summary.json holds them: log, measured, responsible, change, missing."""


@dataclass(frozen=True)
class Answer:
    """One of the five.

    Args:
        question: its name, in a word.
        verdict: yes, no, can't tell, or what stands for it.
        line: the headline, with the interval.
        details: what it rests on and what it can't know, in sentences.
        paste: lines for the training's own file, where there are some.
    """

    question: str
    verdict: str
    line: str
    details: tuple[str, ...] = ()
    paste: tuple[str, ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def answers(evidence: Evidence) -> list[Answer]:
    """The five, in the order in which they are asked.

    Args:
        evidence: what was found.

    Examples:
        >>> move = {"value": -0.4, "low": -0.6, "high": -0.2}
        >>> steps = {"first_step": 1, "last_step": 90, "onset": 30, "source": "training rows"}
        >>> log = {"chosen": move, "rejected": move, "warnings": ["coupled_fall"], "held_out": None} | steps
        >>> for answer in answers({"log": log})[:2]:
        ...     print(answer.line)
        yes, by the log: chosen reward -0.4 (-0.6 to -0.2)
        step 30 by the log
    """
    first = _happening(evidence)
    is_fallen = first.verdict == YES
    return [
        first,
        _since(evidence, is_fallen),
        _harmful(evidence, is_fallen),
        _responsible(evidence, is_fallen),
        _change(evidence, is_fallen),
    ]


def exit_status(found: Sequence[Answer]) -> int:
    """0 the chosen log-prob didn't fall, 1 it did, 2 it can't be told.

    Args:
        found: the five answers.
    """
    return {NO: 0, YES: 1}.get(found[0].verdict, 2)


# --- is it happening --------------------------------------------------------------------------------------------


def _happening(evidence: Evidence) -> Answer:
    """Whether the mean chosen log-prob fell: by the measured pairs where they can tell, else by the log."""
    found, log = evidence.get("measured"), evidence.get("log")
    by_pairs = UNKNOWN if found is None else fell(found["chosen"])
    by_log = UNKNOWN if log is None else fell(log["chosen"])
    verdict = by_pairs if by_pairs != UNKNOWN else by_log
    if by_pairs == NO and by_log == YES:
        verdict = YES
    details = [*_on_which(found), *_of_log(log)]
    if UNKNOWN not in (by_pairs, by_log) and by_pairs != by_log:
        details.append(
            "Log and pairs differ: the log's rows are other pairs each time, these the same; believe the pairs on "
            "themselves, and the log on the run."
        )
    if found is None and log is None:
        return Answer(
            "falling", UNKNOWN, "can't tell: neither log nor checkpoints could be read", tuple(details)
        )
    if found is None:
        line = f"{verdict}, by the log: chosen reward {_reward(log, 'chosen')}"
    else:
        line = f"{verdict}: chosen {_nats(found['chosen'])}"
        both = f"{verdict}: chosen {_interval(found['chosen'])}, rejected {_interval(found['rejected'])} nats"
        if len(both) <= WIDTH:
            line = both
        else:
            details.insert(1, f"Rejected: {_nats(found['rejected'])}.")
    return Answer("falling", verdict, line, tuple(details))


def fell(move: Mapping[str, Any] | None) -> str:
    """Whether a change is below 0 beyond its interval: yes, no, or that it can't be told.

    Args:
        move: value, low and high; None if it wasn't measured.
    """
    if move is None or move["value"] is None:
        return UNKNOWN
    low, high = _ends(move)
    if high < 0:
        return YES
    return NO if low > 0 or move["value"] >= 0 and math.isfinite(low + high) else UNKNOWN


def _on_which(found: Evidence | None) -> list[str]:
    if found is None:
        return []
    steps = found["steps"]
    where = f"step {steps[-1]}" if steps[-1] else "the final model"
    return [
        f"Mean over {found['pairs']} pairs{found['sample']}, {where} against the start, {found['start']}; 95 % "
        f"intervals. Both fell on {share_text(found['both_fell'])} of them."
    ]


def _of_log(log: Evidence | None) -> list[str]:
    if log is None:
        return []
    warned = f"; the doctor warns of {', '.join(log['warnings'])}" if log["warnings"] else "; no warning"
    return [
        f"The log, steps {log['first_step']} to {log['last_step']} ({log['source']}): chosen reward "
        f"{_reward(log, 'chosen')}, rejected {_reward(log, 'rejected')}{warned}."
    ]


# --- since when -------------------------------------------------------------------------------------------------


def fall_since(points: pd.DataFrame) -> tuple[int | None, int | None]:
    """The checkpoints between which the chosen log-prob fell for good: the last before (None: the start), the first.

    Args:
        points: rows of `entangle.analysis.curves.curve`.

    Returns:
        `(before, from)`; from is None if it hasn't fallen at the last one.
    """
    fallen = (points["moved_chosen"] < -Z * points["moved_chosen_error"]).to_numpy()[::-1].cumprod()[::-1] > 0
    steps = points["step"].to_numpy()
    if not fallen.any():
        return None, None
    first = int(fallen.argmax())
    return (int(steps[first - 1]) if first else None), int(steps[first])


def _since(evidence: Evidence, is_fallen: bool) -> Answer:
    """From which step on."""
    found, log = evidence.get("measured"), evidence.get("log")
    if not is_fallen:
        return Answer("since", "-", "nothing has fallen")
    by_log = None if log is None else log["onset"]
    details: list[str] = []
    between = ""
    if found is not None and found["since"]["from"] is not None:
        low, high = found["since"]["before"], found["since"]["from"]
        last = f"{'step ' if low is None else ''}{high}" if high else "the end"
        between = f"between {'the start' if low is None else f'steps {low}'} and {last}"
        probed = [str(step) for step in found["steps"] if step]
        details.append(
            f"Probed checkpoints: {', '.join(probed)}; between two of them nothing was measured."
            if probed
            else "Only the final model was probed."
        )
    if by_log is not None:
        details.append(
            "By the log's rows, smoothed over three: the first step from which the chosen reward stays below its "
            "start to the end, beyond their noise. In the first epoch these are pairs not trained on yet."
        )
    else:
        details += _no_onset(log)
    told = [
        f"{between} on these pairs" if between else "",
        f"step {by_log} by the log" if by_log else "",
    ]
    if any(told):
        return Answer("since", between or f"step {by_log}", "; ".join(filter(None, told)), tuple(details))
    return Answer("since", UNKNOWN, "can't tell: no log row and no checkpoint shows where", tuple(details))


def _no_onset(log: Evidence | None) -> list[str]:
    return (
        []
        if log is not None
        else ["A log would say it to the step; more checkpoints (save_steps) would, too."]
    )


# --- is it harmful ----------------------------------------------------------------------------------------------


def _harmful(evidence: Evidence, is_fallen: bool) -> Answer:
    """What the fall costs: per token, on held-out pairs where the log has some; quality isn't measured."""
    found, log = evidence.get("measured"), evidence.get("log")
    held_out = None if log is None else log["held_out"]
    details = [
        _held_out(held_out),
        "Quality isn't measured: sample answers from the first and the last checkpoint.",
    ]
    if found is None:
        if not is_fallen:
            return Answer("harmful", NO, "no fall, no harm of this kind", tuple(details))
        collapsed = log is not None and "chosen_collapse" in log["warnings"]
        verdict = YES if collapsed else UNKNOWN
        line = "yes: the log's chosen log-prob collapses" if collapsed else "can't tell: no pair was measured"
        return Answer("harmful", verdict, line, tuple(details))
    token, lost = found["per_token"], found["lost"]
    low, high = _ends(lost)
    verdict = YES if low > COLLAPSE else "not by itself" if high < COLLAPSE else UNKNOWN
    if not is_fallen:
        verdict = NO
    line = f"{verdict}: per token {_nats(token)}, x{math.exp(min(token['value'], 99.0)):.2g} as likely"
    grew = found["grew"]
    size = f"{100 * lost['value']:+.2g} % ({100 * low:+.2g} to {100 * high:+.2g} %)"
    details.insert(
        0,
        f"The chosen's distance from log-prob 0 changed by {size} since the start; growth by {100 * COLLAPSE:.0f} % or "
        f"more is called harmful. The margin grew on {share_text(grew)} of the pairs.",
    )
    return Answer("harmful", verdict, line, tuple(details))


def _held_out(move: Mapping[str, Any] | None) -> str:
    if move is None:
        return "Held out: the log has no evaluation set, so whether other pairs fall too isn't known."
    said = {YES: "falls too", NO: "doesn't fall", UNKNOWN: "moves within its noise"}[fell(move)]
    return f"Held out, by the log's evaluation set: the chosen reward {said} ({_interval(move)})."


# --- which part of the data -------------------------------------------------------------------------------------


def _responsible(evidence: Evidence, is_fallen: bool) -> Answer:
    """Which pairs' steps lower the chosen log-probs of the others."""
    found = evidence.get("responsible")
    if found is None:
        return Answer("which", UNKNOWN, "can't tell: " + _unmeasured(evidence))
    share = found["share"]
    part = f"{100 * share['value']:.0f} % ({100 * share['low']:.0f}-{100 * share['high']:.0f})"
    tenth = f"{len(found['pairs'])} of {found['of']}"
    if not is_fallen:
        return Answer("which", "-", "nothing has fallen", _which_details(found))
    if not found["pairs"]:
        return Answer(
            "which", NO, "none: no pair's step lowers the others' chosen log-probs", _which_details(found)
        )
    if share["low"] > CONCENTRATED:
        line = f"{tenth} pairs do {part} of the lowering: "
        line += _fitting(found["pairs"], WIDTH - len(line))
    else:
        line = f"no small part: the worst {tenth} do {part} of the lowering"
    return Answer("which", "a part" if share["low"] > CONCENTRATED else "all", line, _which_details(found))


def _fitting(indices: Sequence[int], width: int) -> str:
    """As many indices as fit, and dots for the rest."""
    for count in range(len(indices), 0, -1):
        text = ", ".join([*map(str, indices[:count]), *(["..."] if count < len(indices) else [])])
        if len(text) <= width:
            return text
    return "..."


def _which_details(found: Evidence) -> tuple[str, ...]:
    at = f"step {found['step']}" if found["step"] else "the final model"
    said = [
        f"At {at}, by what a step on each pair alone does to the other pairs' chosen log-probs, to first order; the "
        "share is of all lowering. Pairs outside the sample aren't known, nor whether leaving these out would help.",
        found["alone"],
    ]
    if found["pairs"]:
        said.append(
            f"Worst first: {', '.join(map(str, found['pairs'][:20]))} (rows of the data, counted from 0)."
        )
    if found["kinds"]:
        said.append(
            f"By {found['column']}: "
            + "; ".join(f"{name} {_interval(move)} ({count})" for name, move, count in found["kinds"][:6])
            + " nats of the chosen since the start (pairs)."
        )
    if found["tokens"]:
        said.append(
            f"In pair {found['tokens']['pair']} most of the entanglement is in the tokens "
            f"{', '.join(found['tokens']['rejected'])} of the rejected and {', '.join(found['tokens']['chosen'])} of "
            "the chosen response."
        )
    return tuple(said)


def _unmeasured(evidence: Evidence) -> str:
    return "no pair was measured" if evidence.get("measured") is None else "that wasn't measured"


# --- what would stop it -----------------------------------------------------------------------------------------


def _change(evidence: Evidence, is_fallen: bool) -> Answer:
    """The smallest change of the loss under which the mean chosen log-prob wouldn't fall."""
    found = evidence.get("change")
    if found is None:
        return Answer("stop it", UNKNOWN, "can't tell: " + _unmeasured(evidence))
    details = [*found["verdict"]]
    limits = (
        "To first order at that checkpoint, on these pairs, by plain gradient steps (training uses AdamW): a setting "
        "to try, not a promise; what it does to quality isn't known."
    )
    if not is_fallen:
        return Answer("stop it", "-", "nothing to stop", (*details, limits))
    if found["is_steady"]:
        line = "by no loss: a step on this set doesn't lower it, by its mean"
        return Answer("stop it", NO, line, (*details, _LOWER, limits))
    if found["knob"] is None:
        line = "no: no NLL weight and no other knob of the loss stops it"
        tried = f"Tried were {found['tried']}."
        return Answer("stop it", NO, line, (*details, tried, _LOWER, limits))
    before, after = found["before"], found["after"]
    is_sure = before is not None and after is not None and _ends(before)[1] < 0 < _ends(after)[0]
    if before is not None and after is not None and math.isfinite(sum((*_ends(before), *_ends(after)))):
        details.append(
            f"Per nat of margin the mean chosen then moves by {_nats(after)} instead of {_nats(before)}."
        )
    if found["instead"]:
        details.append(found["instead"])
    paste = tuple(found["lines"] or (f"entangle train --loss '{found['spec']}'",))
    where = "in TRL's config" if found["lines"] else "which TRL lacks"
    if not is_sure:
        details.append("By these pairs' means, and not beyond doubt: more pairs would tell (--minutes).")
    line = f"{'' if is_sure else 'perhaps '}{_TURNED[found['knob']].format(found['setting'])}, {where}:"
    return Answer("stop it", "a loss", line, (*details, limits), paste)


_TURNED = {
    "nll_batch": "an NLL term of weight {:g}",
    "dpop": "DPOP with a penalty of {:g}",
    "shift": "DPO-Shift with lambda {:g}",
}
"""Knobs that are turned, in words."""

TURNED = tuple(_TURNED)
"""Their names."""


_LOWER = "What is left is to go less far: a lower learning rate, fewer epochs, or an earlier checkpoint."


def verdict_on_changes(summary: Mapping[str, Any]) -> list[str]:
    """What the loss does to the set and to the pairs, as sentences.

    Args:
        summary: of a what-if that starts from the training's loss.
    """
    alone = pair_verdict(summary["regimes"], summary["base"])
    return [set_verdict(summary["set"], summary["base"]), alone] if "set" in summary else [alone]


def own_steps(regimes: Mapping[str, Mapping[str, float]], total: int) -> str:
    """Whether the pairs' own steps do it, or those of others.

    Args:
        regimes: shares of the pairs under the training's loss.
        total: pairs.
    """
    down = regimes[Regime.BOTH_DOWN]
    if 2 * down["count"] > total:
        return f"Each pair's own step lowers its chosen response, too, on {share_text(down)} of them."
    return (
        f"A pair's own step lowers its chosen response on only {share_text(down)} of them: it is mostly the steps on "
        "other pairs."
    )


# --- numbers ----------------------------------------------------------------------------------------------------


def _nats(move: Mapping[str, Any]) -> str:
    """`-3.10 nats (-3.90 to -2.30)`."""
    value, _, ends = _interval(move).partition(" ")
    return f"{value} nats {ends}"


def _interval(move: Mapping[str, Any]) -> str:
    """`-3.10 (-3.90 to -2.30)`."""
    return f"{_short(move['value'])} ({' to '.join(map(_short, _ends(move)))})"


def _reward(log: Evidence | None, side: str) -> str:
    """A logged reward's change with its interval; a dash where the log hasn't it."""
    return "-" if log is None or log[side] is None else _interval(log[side])


def _short(value: float) -> str:
    size = abs(value)
    if not math.isfinite(value):
        return "inf" if value > 0 else "-inf" if value < 0 else "?"
    if size < 0.0095:
        return f"{value:+.1g}" if value else "0"
    return f"{value:+.0f}" if size >= 99.5 else f"{value:+.1f}" if size >= 0.995 else f"{value:+.2g}"


def _ends(move: Mapping[str, Any]) -> tuple[float, float]:
    low, high = move.get("low"), move.get("high")
    return (-math.inf if low is None else low), (math.inf if high is None else high)
