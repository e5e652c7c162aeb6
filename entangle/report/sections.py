"""The sections of a page, in the order in which they are read; a section without anything to show is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from entangle.report.answers import answer_blocks
from entangle.report.blocks import Block, Figure, Section
from entangle.report.pairs import change_blocks, column_blocks, module_blocks, plane_blocks, regime_blocks
from entangle.report.prompts import joint_blocks, reward_blocks
from entangle.report.sets import set_blocks
from entangle.report.settings import epoch_blocks, what_if_blocks
from entangle.report.source import Source
from entangle.report.training import comparison_blocks, training_blocks


def sections(sources: Sequence[Source]) -> list[Section]:
    """Every section that some run has something for."""
    found = []
    for key, title, lead, blocks, terms in _SECTIONS:
        columns = {number: blocks(source) for number, source in enumerate(sources)}
        columns = {number: content for number, content in columns.items() if content}
        if columns:
            drawn = [block for content in columns.values() for block in content if isinstance(block, Figure)]
            terms = tuple(dict.fromkeys([*terms, *(term for figure in drawn for term in figure.terms)]))
            found.append(Section(key, title, lead, columns, terms))
    return found


_SECTIONS: tuple[tuple[str, str, str, Callable[[Source], list[Block]], tuple[str, ...]], ...] = (
    (
        "answers",
        "What the five lines rest on",
        "The log, and the same pairs at checkpoints of the run.",
        answer_blocks,
        ("logps", "interval"),
    ),
    (
        "set",
        "The set as one",
        "What a step on all pairs does to the mean log-probs: of real pairs this, and not the single pair, decides.",
        set_blocks,
        ("set", "drift", "interval"),
    ),
    (
        "regimes",
        "Regimes",
        "Which way one small step moves the two log-probs of a pair, for every loss.",
        regime_blocks,
        ("regime", "rho", "interval"),
    ),
    (
        "plane",
        "The plane of pairs",
        "The points don't move with the loss, its line does: a pair is ideal below it. "
        "Above it, on the left both responses rise, on the right both fall. Choose a point to see its pair.",
        plane_blocks,
        ("score", "cosine", "norm_ratio", "band", "rho"),
    ),
    (
        "changes",
        "Predicted changes",
        "By how much: to first order, in nats, by a step of learning rate 1: multiply by yours.",
        change_blocks,
        ("change", "incentives", "gram"),
    ),
    (
        "modules",
        "Layers and modules",
        "c is a sum over the probed tensors: where it comes from.",
        module_blocks,
        ("module_share", "module_norms", "module_cosine", "module_falls"),
    ),
    (
        "columns",
        "Diagnostics",
        "How the columns that came with the pairs go with their geometry.",
        column_blocks,
        ("rank_correlation",),
    ),
    (
        "whatif",
        "What would change it",
        "The same pairs under other losses and settings, without the model.",
        what_if_blocks,
        ("knob", "margin_growth", "margin_kept"),
    ),
    (
        "across",
        "Across pairs",
        "What all other pairs of the set do to a pair over an epoch, beside its own step.",
        epoch_blocks,
        ("across", "interval"),
    ),
    (
        "training",
        "Over training",
        "What was measured, and what it came from.",
        training_blocks,
        ("ledger", "logps"),
    ),
    (
        "comparison",
        "Losses compared",
        "The same pairs, seeds and start for all; measured on the probed pairs.",
        comparison_blocks,
        ("logps", "both_fell"),
    ),
    (
        "rewards",
        "Rewards",
        "How much the reward varies over the answers to a prompt, and what gradient that leaves.",
        reward_blocks,
        ("reward_std", "reward_gradient"),
    ),
    (
        "joint",
        "Preference pairs and rewards",
        "The same prompts, both methods.",
        joint_blocks,
        ("prompt_signal", "pair_effect", "rank_correlation"),
    ),
)
