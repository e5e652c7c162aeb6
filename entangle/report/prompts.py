"""Sections of a run of prompts: rewards, and rewards beside preference pairs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from entangle.analysis.findings import SIGNALS
from entangle.analysis.statistics import rank_correlation
from entangle.analysis.wording import correlation_text
from entangle.figures import rewards, signals
from entangle.figures.style import figure_of, new_axes
from entangle.report.blocks import Block, Figure, Heading, Prose, Table
from entangle.report.source import Source
from entangle.tables.base import number, percent

FLATTEST = 10
"""Prompts with the smallest spread that are listed."""


STD = ("reward_std", "the reward's std")


def _height(width: float) -> float:
    return 0.55 * width + 1.0


def _related(rows: pd.DataFrame, x: tuple[str, str], y: tuple[str, str]) -> str:
    """How two columns, each given as (name, words), go together over the prompts, for those who don't see it."""
    rows = rows[[x[0], y[0]]].replace([np.inf, -np.inf], np.nan).dropna()
    found: Mapping[str, float | None] = rank_correlation(rows[x[0]], rows[y[0]])
    return f"{len(rows)} prompts; rank correlation of {x[1]} and {y[1]}: {correlation_text(found)}."


def reward_blocks(source: Source) -> list[Block]:
    """Spread of the rewards, the gradient that it leaves, and what a fine-tuning has changed."""
    if (changes := source.changes) is not None:
        x, y = ("reward_std_before", "the reward's std before"), ("change", "the change of its mean")
        return [
            Figure(
                name="change",
                caption="What the fine-tuning changed, by the spread that there was before; one point per prompt",
                alt=_related(changes, x, y),
                draw=lambda w: figure_of(rewards.change(new_axes(w, _height(w)), changes, source.summary)),
                is_wide=True,
                terms=("reward_std", "rank_correlation"),
            )
        ]
    if source.prompts is None or "reward_std" not in source.prompts or "thresholds" not in source.summary:
        return []
    prompts = source.prompts.dropna(subset=["reward_std"])
    blocks: list[Block] = []
    if "verdicts" not in source.summary:
        blocks.append(
            Figure(
                name="rewards",
                caption="Spread of a prompt's rewards against the gradient that it leaves",
                alt=_related(prompts, STD, ("grad_norm", "the norm of its gradient")),
                draw=lambda w: figure_of(
                    rewards.scatter(new_axes(w, _height(w) + 0.4), prompts, source.summary)
                ),
                terms=("reward_std", "reward_gradient", "rank_correlation"),
            )
        )
    blocks.append(
        Figure(
            name="spread",
            caption="Mean and std of the reward, one point per prompt; the dotted lines are the thresholds",
            alt=_related(prompts, ("reward_mean", "the mean reward"), STD),
            draw=lambda w: figure_of(
                rewards.reward_map(new_axes(w, _height(w) + 0.4), prompts, source.summary)
            ),
            terms=("reward_std", "rank_correlation"),
        )
    )
    if "prevalence" in source.summary:
        blocks.append(_prevalence(source))
    if "trl" in source.summary:
        blocks.append(Prose(str(source.summary["trl"]["explanation"]), is_quiet=True))
    return [*blocks, _flattest(source)]


def _prevalence(source: Source) -> Table:
    thresholds = source.summary["thresholds"]
    names = {
        "small": f"std below {thresholds['std']:g}",
        "small_low": f"... and mean below {thresholds['mean']:g}: no signal where it is needed",
        "small_high": f"... and mean above {thresholds['mean']:g}",
    }
    rows = [[text, percent(source.summary["prevalence"][key])] for key, text in names.items()]
    head = [Heading("prompts with"), Heading("share % [95 %]", "interval")]
    return Table(f"Of {source.summary['prompts']['measured']} prompts", head, rows)


def _flattest(source: Source) -> Table:
    """The prompts whose rewards vary least, with their texts where the run has kept them."""
    assert source.prompts is not None
    rows = source.prompts.dropna(subset=["reward_std"]).nsmallest(FLATTEST, ["reward_std", "reward_mean"])
    texts = (
        {} if source.texts is None else dict(zip(source.texts["index"], source.texts["prompt"], strict=True))
    )
    head = [
        Heading("prompt"),
        Heading("mean"),
        Heading("std [95 %]", "reward_std"),
        Heading("gradient", "reward_gradient"),
    ]
    cells = [
        [
            f"{row['index']} {' '.join(str(texts.get(row['index'], '')).split())[:80]}",
            number(row["reward_mean"]),
            f"{number(row['reward_std'])} [{number(row.get('reward_std_low'), '.2g')}, "
            f"{number(row.get('reward_std_high'), '.2g')}]",
            number(row.get("grad_norm"), ".2g"),
        ]
        for row in rows.to_dict("records")
    ]
    return Table(f"The {len(rows)} prompts whose rewards vary least", head, cells)


def joint_blocks(source: Source) -> list[Block]:
    """The same prompts under a preference loss and under rewards."""
    if source.prompts is None or "verdicts" not in source.summary:
        return []
    prompts, summary = source.prompts, source.summary
    effect, cosine = ("pair_effect", "the effect of the pair's step"), ("pair_cosine", "the pair's cosine")
    rows = [[SIGNALS[name], percent(part)] for name, part in summary["verdicts"].items()]
    head = [Heading("signal"), Heading("prompts, % [95 %]", "interval")]
    return [
        Figure(
            name="quadrants",
            caption="What the pair and the rewards of a prompt have to teach: upper right both, lower left neither",
            alt=_related(prompts, effect, ("rft_signal", "the rewards' signal")),
            draw=lambda w: figure_of(signals.quadrants(new_axes(w, _height(w)), prompts, summary)),
            terms=("prompt_signal", "pair_effect", "rank_correlation"),
        ),
        Figure(
            name="entanglement",
            caption="Are entangled pairs the prompts with a small reward std?",
            alt=_related(prompts, cosine, STD),
            draw=lambda w: figure_of(signals.entanglement(new_axes(w, _height(w)), prompts, summary)),
            terms=("cosine", "reward_std", "rank_correlation"),
        ),
        Table(f"Of {summary['prompts']['measured']} prompts", head, rows),
    ]
