"""What a step on groups of answers does, in plain sentences: decided here once, for the terminal and for the page.

Three kinds of answers are told apart: those of a prompt's own group (exact; arXiv 2505.18830's displacement), further
answers to the same prompts, and answers to other prompts of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from entangle.analysis.set_verdict import (
    FALL,
    IDEAL,
    INVERTED,
    RISE,
    UNKNOWN,
    drift_text,
    finding,
    rounded,
)
from entangle.analysis.wording import counted, is_known, share_text

MANY = 100
"""Times as many prompts as there are: beyond that no number is named."""

WHERE = {
    "own": "the answers of their own groups",
    "further": "further answers to the same prompts",
    "others": "the answers to other prompts",
}
"""Whose log-probs move, by name in a summary's `groups`."""


def group_verdict(content: Mapping[str, Any]) -> list[str]:
    """All that is to be said of a run's groups under its first step, the main sentence first.

    Args:
        content: a summary's `groups`.
    """
    step, mixed = content["steps"][0], content["prompts"]["mixed"]
    if not mixed:
        return [
            f"No prompt of {content['prompts']['total']} has both correct and incorrect answers, so no step of {step} "
            "moves anything: draw more answers per prompt, or choose prompts that are neither solved nor out of reach."
        ]
    said = [displaced_sentence(content, step)]
    said += [where_sentence(content, where, step) for where in WHERE if content[where] is not None]
    return [*said, *damping_sentences(content, step)]


def displaced_sentence(content: Mapping[str, Any], step: str) -> str:
    """In how many prompts the mean correct answer falls by a step on its own group.

    Args:
        content: a summary's `groups`.
        step: label of the step.

    Examples:
        >>> part = {"count": 6, "total": 40, "share": 0.15, "low": 0.07, "high": 0.29}
        >>> content = {"prompts": {"mixed": 40}, "displaced": {"grpo": {"prompts": part}}}
        >>> print(displaced_sentence(content, "grpo"))
        Correct answers get less likely: one step of grpo on its own group lowers their mean log-prob in 6 of the 40 \
prompts whose rewards differ, 15 % (95 % interval 7 to 29 %).
    """
    part, mixed = content["displaced"][step]["prompts"], content["prompts"]["mixed"]
    if not part["count"]:
        return (
            f"No correct answers are displaced: one step of {step} on its own group lowers their mean log-prob in none "
            f"of the {counted(mixed, 'prompt')} whose rewards differ."
        )
    return (
        f"Correct answers get less likely: one step of {step} on its own group lowers their mean log-prob in "
        f"{part['count']} of the {counted(mixed, 'prompt')} whose rewards differ, {share_text(part)}."
    )


def where_sentence(content: Mapping[str, Any], where: str, step: str) -> str:
    """Which way the mean correct and the mean incorrect log-prob go, of one kind of answers.

    Args:
        content: a summary's `groups`.
        where: see `WHERE`.
        step: label of the step.
    """
    part = content[where]
    move, start = (
        part["moves"][step],
        f"In the mean over {counted(part['prompts'], 'prompt')}, {WHERE[where]}",
    )
    what, has_drift = finding(move), move["drift"]["has_meaning"]
    if what == UNKNOWN:
        needed = move["drift"]["pairs_needed"]
        is_near = needed and needed <= MANY * part["prompts"]
        enough = f"; about {rounded(needed)} prompts would tell" if is_near else ""
        return f"{start} go a way that so few prompts can't tell{enough}."
    if what == INVERTED:
        return f"{start} go the wrong way: correct ones fall, incorrect ones rise."
    if what == IDEAL:
        return f"{start} part: correct ones rise, incorrect ones fall."
    if what in (RISE, FALL):
        price = (
            f": each nat by which they part comes with {drift_text(move['drift'], absolute=True)} of {what} of both"
            if has_drift
            else ""
        )
        return f"{start} both {what}, correct and incorrect ones{price}."
    side = "rise" if move["drift"]["value"] > 0 else "fall"
    return f"{start} part or both {side}, these prompts can't tell which."


def damping_sentences(content: Mapping[str, Any], step: str) -> list[str]:
    """The weight on incorrect answers that keeps correct ones from falling, by prompt and in the mean.

    Args:
        content: a summary's `groups`.
        step: label of the step.
    """
    displaced, found = content["displaced"][step]["prompts"]["count"], content["damping"][step]
    if not displaced:
        return []
    said = [positives_sentence(content, step)]
    if found["least"] and found["least"] < 1:
        said.append(
            f"With incorrect answers weighted by {found['least']:.2g} no prompt's correct answers fall; half of the "
            f"displaced prompts need {found['median']:.2g} or less."
        )
    others = content["others"]
    if others is not None and finding(others["moves"][step]) == FALL and is_known(others["enough_negatives"]):
        said.append(
            "For the answers to other prompts, incorrect answers would have to be weighted by at most "
            f"{others['enough_negatives']:.2g}."
        )
    return said


def positives_sentence(content: Mapping[str, Any], step: str) -> str:
    """What the correct answers' part of the step does by itself.

    Args:
        content: a summary's `groups`.
        step: label of the step.
    """
    correct, incorrect = (content["parts"][step][side] for side in ("correct", "incorrect"))
    from_correct, from_incorrect = correct["own"] + correct["by_correct"], correct["by_incorrect"]
    return (
        f"Of the mean change of correct answers, {correct['change']:+.2g} nats by a step of learning rate 1, "
        f"{from_correct:+.2g} come from the correct answers and {from_incorrect:+.2g} from the incorrect ones; the "
        f"correct ones alone would move incorrect answers by {incorrect['by_correct']:+.2g}."
    )
