"""What the other measurements say in plain sentences: sets, checkpoints, training, comparisons, rewards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from entangle.analysis.curves import SIDES, onset
from entangle.analysis.ledger import MEANINGS, PARTS
from entangle.analysis.statistics import Z, share
from entangle.analysis.wording import correlation_text, is_known, share_text

# --- all pairs of a set ---------------------------------------------------------------------------------------


def set_sentence(summary: Mapping[str, Any]) -> str:
    """The geometry of a set of pairs as one pair.

    Args:
        summary: of `entangle across`.
    """
    block, others = summary["set"], summary["epoch_pairs"] - 1
    between = block["sq_chosen"] / block["alone"]["sq_chosen"]
    sentence = (
        f"{summary['pairs']} pairs, {summary['metric'].upper()} metric. The inner product of two different pairs' "
        f"chosen scores is {100 * between:.2g} % of a score's squared norm on average; {others} other pairs of an "
        f"epoch make it {others * between:.3g} times a pair's own."
    )
    if not is_known(block["cosine"]):
        return f"{sentence} Different pairs' scores have no direction in common, so the set has no band."
    beyond = " (the estimate lies beyond it: too few pairs to know more)" if abs(block["cosine"]) > 1 else ""
    sentence += f" Mean scores have cosine {cosine_text(block['cosine'])}{beyond} and norm ratio "
    sentence += f"{block['norm_ratio']:.3f}: "
    low, high = block["band"]
    if low is not None and high is not None and low >= high:
        return f"{sentence}no rho is ideal for the set."
    return f"{sentence}the set is ideal for rho between {ratio_text(low)} and {ratio_text(high)}."


def ratio_text(value: float | None) -> str:
    """An incentive ratio, which may be infinite (null in JSON)."""
    return "inf" if value is None else f"{value:.3g}"


def cosine_text(value: float) -> str:
    """A cosine of mean scores, whose estimate from few pairs can come out as 1 or above: that isn't printed as a fact.

    >>> cosine_text(0.93812), cosine_text(1.04)
    ('0.938', 'about 1')
    """
    return f"{value:.3f}" if abs(value) < 1 else f"about {1 if value > 0 else -1}"


def epoch_sentence(summary: Mapping[str, Any]) -> str:
    """Where an epoch takes the mean log-probs under the first loss, and how sure that is.

    Args:
        summary: of `entangle across`.
    """
    loss, row = next(iter(summary["losses"].items()))
    moves = []
    for side in SIDES:
        change, error = row[side]["change"], row[side]["error"]
        doubt = (
            "" if abs(change) > Z * error else " (within the error of these pairs: it may as well not move)"
        )
        moves.append(f"the mean {side} log-prob {'rises' if change > 0 else 'falls'}{doubt}")
    return f"Under {loss} an epoch's first-order effect: {' and '.join(moves)}."


# --- checkpoints and training ---------------------------------------------------------------------------------


def onset_sentence(summary: Mapping[str, Any]) -> str:
    """When the coupled decrease of a sweep's pairs began.

    Args:
        summary: of a sweep.
    """
    fallen = f"Both log-probs of {share_text(summary['fallen_pairs'])} of the pairs are below their start at the end."
    if summary["onset"] is None:
        return f"No coupled decrease of the means at the last checkpoint. {fallen}"
    return f"Both means are below their start for good from step {summary['onset']} on. {fallen}"


def training_sentences(points: pd.DataFrame) -> list[str]:
    """What was measured by the last step of a training run or a sweep.

    Args:
        points: rows of `entangle.analysis.curves.curve`.
    """
    last, began = points.iloc[-1], onset(points)
    pairs = int(last["pairs"])
    both = share(round(last["both_fell"] * pairs), pairs)
    moved = [_direction(last[f"moved_{side}"], last[f"moved_{side}_error"]) for side in SIDES]
    happened = f"the chosen log-prob {moved[0]} and the rejected {moved[1]}"
    if moved[0] == moved[1]:
        happened = f"both log-probs {moved[0]}"
    return [
        f"By step {last['step']:.0f} {happened}: chosen {last['moved_chosen']:+.3g} nats, rejected "
        f"{last['moved_rejected']:+.3g}, on average over {pairs} pairs.",
        f"Both have fallen on {share_text(both)} of them"
        + (f", on average for good from step {began} on." if began is not None else "."),
    ]


def _direction(moved: float, error: float) -> str:
    """What a mean change has done, beyond its noise."""
    if not abs(moved) > Z * error:
        return "stayed within noise of the start"
    return "rose" if moved > 0 else "fell"


def comparison_headline(
    variants: pd.DataFrame, start: Mapping[str, float], seeds: int
) -> tuple[str, tuple[str, ...]]:
    """Which loss is best, by chosen log-prob, margin, accuracy and quality together, and why no other; or that none is.

    A loss counts if its margin grew and its chosen log-prob rose on every seed, more than half of the pairs prefer the
    chosen response, and the summaries' ROUGE-L (where it was measured) isn't below its value before training.

    Args:
        variants: one row per loss and setting: its last point, over seeds.
        start: quality of the summaries before training.
        seeds: number of seeds; 0 where it isn't known.
    """
    table = variants.set_index("variant")
    grew = _ends_of(table, "moved_margin") > 0
    rose, right = _ends_of(table, "moved_chosen") > 0, table["accuracy"] > 0.5
    kept = pd.Series(True, index=table.index)
    if "rouge_l_greedy" in table and start.get("rouge_l_greedy") is not None:
        kept = table["rouge_l_greedy"] >= start["rouge_l_greedy"]
    of = f"{len(table)} losses and settings"
    basis = f"{table['pairs'].iloc[0]:.0f} probed pairs" + (
        f", {seeds} seed{'s' if seeds > 1 else ''}" if seeds else ""
    )
    good = table[grew & rose & right & kept]
    if len(good):
        best = good["moved_margin"].idxmax()
        return f"Best of {of} ({basis}): {_reached(table, best)}.", ()
    details = []
    if grew.any():
        least = table.loc[grew, "moved_chosen"].idxmax()
        details.append(
            f"The margin grew on every seed under {'; '.join(table.index[grew])}. Of these {least} costs the chosen "
            f"least: {_reached(table, least)}."
        )
    else:
        details.append("The margin grew on every seed under none.")
    if (bought := rose & ~grew).any():
        details.append(
            f"Where the chosen rose ({'; '.join(table.index[bought])}) no gain of margin is certain."
        )
    quality = ", ROUGE-L no worse than before" if "rouge_l_greedy" in table and start else ""
    return (
        f"None of {of} is good in all ({basis}): chosen up, margin up, most pairs preferred{quality}.",
        tuple(details),
    )


def _ends_of(table: pd.DataFrame, name: str) -> pd.Series:
    """The lowest value over seeds, where it is there."""
    return table[f"{name}_low"] if f"{name}_low" in table else table[name]


def _reached(table: pd.DataFrame, name: Any) -> str:
    """What a loss has reached, in a few words."""
    row = table.iloc[table.index.tolist().index(name)]
    said = f"{name}, chosen {row['moved_chosen']:+.2g} nats, margin {row['moved_margin']:+.2g}, "
    said += f"{100 * row['accuracy']:.0f} % of the pairs preferred"
    return said if "rouge_l_greedy" not in row else f"{said}, ROUGE-L {100 * row['rouge_l_greedy']:.1f} %"


def comparison_sentences(variants: pd.DataFrame, causes: pd.DataFrame | None) -> list[str]:
    """Losses and settings side by side: which lower the chosen log-prob, on which share of pairs, and what did it.

    Args:
        variants: one row per loss and setting: its last point, over seeds.
        causes: one row per run and side: what the mean change came from, where ledgers were kept.
    """
    moved, both = variants.set_index("variant")["moved_chosen"], variants.set_index("variant")["both_fell"]
    fell = int((moved < 0).sum())
    row = variants.nlargest(1, "both_fell").iloc[0]
    low, high = (f"{100 * row[f'both_fell_{end}']:.0f}" for end in ("low", "high"))
    sentences = [
        f"By step {variants['step'].max():.0f} the mean chosen log-prob of the probed pairs has fallen under {fell} of "
        f"{len(variants)} losses and settings: from {moved.min():+.2g} nats ({moved.idxmin()}) to {moved.max():+.2g} "
        f"({moved.idxmax()}).",
        f"Both log-probs have fallen on {100 * both.min():.0f} % ({both.idxmin()}) to {100 * both.max():.0f} % "
        f"({both.idxmax()}) of the {row['pairs']:.0f} pairs, means over seeds; the range over seeds of the latter is "
        f"{low} to {high} %.",
    ]
    if causes is not None:
        own = causes[(causes["side"] == "chosen") & (causes["variant"] == moved.idxmin())][list(PARTS)].mean()
        parts = own.reindex(own.abs().sort_values(ascending=False).index)[:3]
        listed = ", ".join(f"{value:+.2g} from {MEANINGS[str(part)]}" for part, value in parts.items())
        sentences.append(
            f"Under {moved.idxmin()} the chosen log-prob's change comes from, in nats: {listed}."
        )
    elif "both_down" in variants:
        predicted = variants["both_down"].max()
        sentences.append(
            f"A step on a pair alone would lower both on at most {100 * predicted:.0f} %"
            + (
                ": other pairs and earlier steps do the rest; a ledger takes them apart (ledger: true)."
                if predicted < both.max() / 2
                else ": the pairs' own gradients go far to explain it."
            )
        )
    return sentences


# --- rewards --------------------------------------------------------------------------------------------------


def reward_sentences(summary: Mapping[str, Any]) -> list[str]:
    """How many prompts have a reward that teaches nothing where it should.

    Args:
        summary: of `entangle rft`.
    """
    harmful, thresholds = summary["prevalence"]["small_low"], summary["thresholds"]
    many = "Most" if harmful["share"] > 0.5 else "Some" if harmful["count"] else "No"
    return [
        f"{many} prompts have a reward that is low and hardly varies over their answers: hardly any gradient of the "
        "reward is left.",
        f"These are {share_text(harmful)} of the {summary['prompts']['measured']} prompts: std below "
        f"{thresholds['std']:g}, mean below {thresholds['mean']:g}.",
        "An SFT phase on good answers, or easier prompts, would give such prompts a signal.",
    ]


def cut_sentence(cut: Mapping[str, float]) -> str:
    """That answers were cut before they ended, and what their rewards have to do with it.

    Args:
        cut: a summary's `cut`: count, share, reward_gap with its standard error.
    """
    gap, error = cut["reward_gap"], cut["reward_gap_error"]
    start = f"{cut['count']:.0f} answers ({100 * cut['share']:.0f} %) were cut before they ended"
    if gap is None or error is None or gap != gap or error != error:
        return f"{start}: their rewards are of what was there. Allow longer answers to be sure."
    half = Z * error
    if abs(gap) <= half:
        return (
            f"{start}; their rewards don't differ clearly from those of the others ({gap:+.2g} ± {half:.2g})."
        )
    return (
        f"{start}, and their reward is {abs(gap):.2g} ± {half:.2g} {'lower' if gap < 0 else 'higher'} than that of the "
        "others to the same prompt: a part of the spread is the cut's. Allow longer answers."
    )


def change_sentences(summary: Mapping[str, Any]) -> list[str]:
    """What a fine-tuning has changed in the rewards of the same prompts.

    Args:
        summary: of `entangle rft --before --after`.
    """
    groups = summary["groups"]
    ends = " and ".join(
        f"{group['change']:+.2g} ({group['low']:+.2g} to {group['high']:+.2g}) in the group with the {size} std"
        for size, group in (("smallest", groups[0]), ("largest", groups[-1]))
    )
    return [
        f"The fine-tuning has changed the mean reward by {summary['change']:+.2g} on average over {summary['prompts']} "
        "prompts.",
        f"By the std before it: {ends}.",
        f"The rank correlation of a prompt's std before and its change is {correlation_text(summary['std_and_change'])}"
        ": if prompts with a small std had been left out, it would be positive.",
    ]


SIGNALS = {
    "both": "both have a signal",
    "dpo_only": "the pair alone",
    "rft_only": "the rewards alone",
    "neither": "neither",
}
"""Which of a prompt's pair and its rewards have something to teach, in words."""


def joint_sentences(summary: Mapping[str, Any]) -> list[str]:
    """Where the pair, the rewards, or both have a signal on the same prompts.

    Args:
        summary: of `entangle joint`.
    """
    shares, rho = summary["verdicts"], summary["rank_correlations"]["cosine_and_std"]
    return [
        f"Both {summary['loss']} on the prompt's pair and its answers' rewards have a signal on "
        f"{share_text(shares['both'])} of the {summary['prompts']['measured']} prompts.",
        f"The pair alone has one on {share_text(shares['dpo_only'])}, the rewards alone on "
        f"{share_text(shares['rft_only'])}, neither on {share_text(shares['neither'])}.",
        f"The rank correlation of the pair's cosine and the reward's std is {correlation_text(rho)}: if entangled "
        "pairs were the prompts with a small std, it would be negative.",
    ]


def forecast_sentence(summary: Mapping[str, Any]) -> str:
    """Which losses let the mean chosen log-prob fall, and how far a forecast may be believed.

    Args:
        summary: of `entangle forecast`.
    """
    split = "held_out" if summary["held_out"] else "trained"
    falling = [name for name, row in summary["losses"].items() if row[split]["chosen"]["high"] < 0]
    open_ = [
        name
        for name, row in summary["losses"].items()
        if row[split]["chosen"]["low"] < 0 and name not in falling
    ]
    said = (
        f"The mean chosen log-prob ends below its start under {', '.join(falling)}."
        if falling
        else "The mean chosen log-prob ends below its start under none of these losses in every order of the batches."
    )
    if open_:
        said += f" Under {', '.join(open_)} it depends on the order of the batches."
    short = [
        f"{name} from step {row['holds_to'] + 1}"
        for name, row in summary["losses"].items()
        if row["holds_to"] < summary["steps"]
    ]
    beyond = (
        f" Don't believe {', '.join(short)} on: by then the means of the trained pairs have moved by more than "
        f"{summary['horizon']:g} nat."
        if short
        else ""
    )
    return (
        f"{said}{beyond} This is training with all gradients held as they are at the start: it holds for the first "
        "steps, until they have turned, and a short real run (entangle train) shows how long that is. Clipping, weight "
        "decay and a schedule of the learning rate aren't in it."
    )
