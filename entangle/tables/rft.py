"""Tables of an `entangle rft` run for a terminal. Text from a data set is printed with markup switched off."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.wording import reference_text
from entangle.tables.base import measured_on, number, of_data, percent, snippet, with_interval
from entangle.tables.groups import group_tables

_MEANINGS = {
    "reward_mean": "mean reward",
    "reward_std": "std of the reward",
    "grad_norm": "norm of the expected reward gradient",
    "bound_trace": "std x sqrt(tr F), a bound on it",
    "kl": "KL to the reference, nats",
}


def reward_tables(
    summary: Mapping[str, Any], provenance: Mapping[str, Any], prompts: pd.DataFrame, worst: int = 3
) -> RenderableType:
    """All tables of a run: shares of prompts, distributions, gradients, prompts without signal.

    Args:
        summary: the run's aggregates.
        provenance: what its numbers were computed from.
        prompts: its rows of prompts.
        worst: prompts that are listed.
    """
    parts: list[RenderableType] = [prompt_heading(summary, provenance)]
    if "prevalence" not in summary:
        return Group(*parts, "No prompt could be measured.")
    if "groups" in summary:
        parts.append(group_tables(summary["groups"]))
    if "history" in summary:
        parts.append(history_table(summary["history"]))
    if "rewards" in summary:
        parts.append(rewards_table(summary["rewards"]))
    if summary.get("group_sizes"):
        parts.append(size_table(summary["group_sizes"]))
    parts += [prevalence_table(summary), quantile_table(summary), gradient_table(summary)]
    if "trl" in summary:
        parts.append(trl_lines(summary))
    parts.append(prompt_table(prompts, summary, worst))
    return Group(*parts)


def prompt_heading(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> Text:
    """Prompts and answers counted, and what the numbers are of."""
    counts = dict(summary["prompts"])
    total, measured = counts.pop("total"), counts.pop("measured")
    flags = "".join(f"; {count} {flag.replace('_', '-')}" for flag, count in counts.items() if count)
    text = Text(
        f"{of_data(total, 'prompts', provenance)}, {measured} measured with {summary['answers']} answers{flags}",
        "bold",
    )
    text.append(
        f"\n{measured_on(provenance)}, reward {provenance['reward']['name']}, reference: "
        f"{reference_text(provenance['reference'])}\n",
        style="not bold",
    )
    return text


def prevalence_table(summary: Mapping[str, Any]) -> Table:
    """Shares of prompts with a small std, split by mean reward."""
    limits, cells = summary["thresholds"], summary["prevalence"]
    small, low = f"std < {limits['std']:.3g}", f"mean < {limits['mean']:.3g}"
    table = Table(title="Share of prompts, % [95 % interval]", title_justify="left")
    for column in ("prompts with", "Wilson", "bootstrap"):
        table.add_column(column, justify="left" if column == "prompts with" else "right")
    for name, label in {
        "small": f"small std ({small})",
        "small_low": f"small std and low mean ({low}): no signal where it is needed",
        "small_high": "small std and high mean: solved",
    }.items():
        cell = cells[name]
        ends = cell["bootstrap_low"], cell["bootstrap_high"]
        bootstrap = (
            "" if None in ends else f"[{100 * ends[0]:.0f}-{100 * ends[1]:.0f}]"
        )  # None for one prompt
        table.add_row(label, percent(cell), bootstrap, style="red" if name == "small_low" else None)
    table.add_row("all answers tied", percent(summary["tied"]), "")
    caption = "the std is the empirical one of the sampled answers"
    if summary.get("true_prevalence_low") is not None:
        caption += f"; truly small in at least {100 * summary['true_prevalence_low']:.0f} % of prompts"
    table.caption = caption
    return table


def history_table(history: Sequence[Mapping[str, Any]], most: int = 12) -> Table:
    """Rewards by step of the training, from the file's own: at most so many steps, evenly chosen, the last included."""
    table = Table(title="The rollouts' rewards by step", title_justify="left")
    for column in (
        "step",
        "prompts",
        "mean",
        "std within a prompt",
        "all answers tied, % [95 %]",
        "seen before, %",
    ):
        table.add_column(column, justify="right")
    every = -(-len(history) // most)
    for row in list(history)[::-1][::every][::-1]:
        tied = f"{100 * row['tied']:.0f} [{100 * row['tied_low']:.0f}-{100 * row['tied_high']:.0f}]"
        numbers = number(row["reward_mean"]), number(row["reward_std"])
        table.add_row(
            f"{row['step']:g}", str(row["prompts"]), *numbers, tied, f"{100 * row['seen_before']:.0f}"
        )
    return table


def rewards_table(content: Mapping[str, Any]) -> Table:
    """A row per reward function: how much it varies within a prompt, and how far it agrees with the one that counts."""
    table = Table(title="Reward functions on the same answers, within prompts", title_justify="left")
    for column in ("function", "std", "dead, %", "share of variance", "accuracy", "variance x accuracy"):
        table.add_column(column, justify="left" if column == "function" else "right")
    for name, row in content["functions"].items():
        accuracy = row["accuracy"]["value"]
        numbers = (number(row[key]) for key in ("std", "share", "teacher"))
        std, part, teacher = numbers
        table.add_row(Text(name), std, percent(row["dead"]), part, number(accuracy), teacher)
    pairs = "; ".join(
        f"{row['first']} and {row['second']} {with_interval(row)}" for row in content["correlations"]
    )
    caption = (
        f"accuracy: pairs of answers in the order of {content['main']}. Correlations within prompts: {pairs}"
    )
    table.caption = Text(caption)  # pyright: ignore[reportAttributeAccessIssue]
    return table


def size_table(sizes: Sequence[Mapping[str, Any]]) -> Table:
    """A row per group size: live groups, and what one costs."""
    table = Table(title="Answers per prompt: what groups of each size would be worth", title_justify="left")
    for column in (
        "group",
        "live, % [95 %]",
        "groups drawn per live one",
        "answers per live group",
        "|E gradient|",
    ):
        table.add_column(column, justify="right")
    for row in sizes:
        live = f"{100 * row['live']:.0f}"
        if row["live_low"] is not None:  # a single prompt has no interval
            live += f" [{100 * row['live_low']:.0f}-{100 * row['live_high']:.0f}]"
        cost = [_ends(row, name) for name in ("groups", "rollouts")]
        table.add_row(str(row["size"]), live, *cost, number(row["grad_norm"]))
    table.caption = (
        "live: rewards differ; drawing until all groups are live, as DAPO does, costs the third column"
    )
    return table


def _ends(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value is None or value == math.inf:
        return "no live one"
    return f"{value:.3g} [{number(low)}-{'inf' if high in (None, math.inf) else number(high)}]"


def quantile_table(summary: Mapping[str, Any]) -> Table:
    """Distribution of rewards and gradients over prompts."""
    table = Table(title="Distribution over the prompts", title_justify="left")
    table.add_column("quantile")
    for quantile in summary["quantiles"]["reward_mean"]:
        table.add_column(f"{100 * float(quantile):.0f} %", justify="right")
    for name, meaning in _MEANINGS.items():
        table.add_row(meaning, *(number(value) for value in summary["quantiles"][name].values()))
    return table


def gradient_table(summary: Mapping[str, Any]) -> Table:
    """How far the gradient follows the std, and how tight each bound is."""
    gradient, setting = summary["gradient"], summary["setting"]
    table = Table(title="Expected reward gradient", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rho = gradient["std_rank_correlation"]
    table.add_row(
        "rank correlation of std and gradient norm",
        with_interval(rho),
    )
    table.add_row("prompts whose gradient is above two errors, %", percent(gradient["above_two_errors"]))
    table.add_row(
        "root mean square of the gradient norm over prompts (+- error)",
        f"{number(gradient['rms_norm'])} +- {number(gradient['rms_norm_error'])}",
    )
    table.add_row(
        "share of signal in one group's squared RLOO gradient", number(gradient["signal_in_one_group"])
    )
    kl = summary["kl_gradient"]
    for name, label in {
        "mean_sq": "mean squared norm of KL's gradient",
        "reward_product": "mean <reward, KL gradient>",
    }.items():
        if kl[name] is not None and kl[name] == kl[name]:
            table.add_row(f"{label} (+- error)", f"{number(kl[name])} +- {number(kl[name + '_error'])}")
    labels = {
        "bound_fisher": "std x sqrt(largest eigenvalue of F)",
        "bound_trace": "std x sqrt(tr F)",
        "bound_length": "std x gamma x sqrt(L)",
        "bound_paper": "6 L gamma R^(1/3) std^(2/3), the paper's form",
    }
    knows_gamma = setting["gamma"] is not None and setting["gamma"] == setting["gamma"]
    for name, label in labels.items():
        if knows_gamma or "gamma" not in label:
            table.add_row(
                f"that root mean square / the one of {label}", number(gradient["share_of_bound"][name])
            )
    if knows_gamma:
        table.caption = (
            f"gamma {setting['gamma']:.3g} is a lower estimate; L = {setting['max_length']} tokens"
        )
    return table


def trl_lines(summary: Mapping[str, Any]) -> Text:
    """TRL's own metrics beside ours, and why they differ."""
    trl, size = summary["trl"], summary["setting"]["group_size"]
    text = Text("TRL's metrics on the same rewards\n", "bold")
    text.append(
        f"reward_std {trl['reward_std']:.4g} (within a prompt: {summary['within_prompt_std']:.4g}), "
        f"frac_reward_zero_std {trl['frac_reward_zero_std']:.4g}; with groups of {size} a group ties with probability "
        f"{number(summary['dead_probability'])}\n",
        style="not bold",
    )
    text.append(trl["explanation"] + "\n", style="dim not bold")
    return text


def prompt_table(prompts: pd.DataFrame, summary: Mapping[str, Any], count: int) -> Table | Text:
    """The prompts of the harmful cell, smallest std first."""
    limits = summary["thresholds"]
    cell = prompts[(prompts["reward_std"] < limits["std"]) & (prompts["reward_mean"] < limits["mean"])]
    if cell.empty:
        return Text("No prompt has a small std and a low mean.", style="green")
    table = Table(
        title=f"Prompts without signal: {min(count, len(cell))} of {len(cell)}", title_justify="left"
    )
    for column in ("prompt", "mean", "std", "std up to", "gradient"):
        table.add_column(column, justify="right")
    table.add_column("text")
    for row in cell.nsmallest(count, "reward_std").to_dict("records"):
        numbers = (row["reward_mean"], row["reward_std"], row["reward_std_high"], row["grad_norm"])
        table.add_row(str(row["index"]), *map(number, numbers), Text(snippet(str(row.get("prompt", "")), 60)))
    return table


def change_tables(summary: Mapping[str, Any]) -> RenderableType:
    """Change of the mean reward by initial std, and where prompts went."""
    further = [transition_table(summary["transitions"])] if "transitions" in summary else []
    return Group(change_table(summary), *further)


def transition_table(transitions: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """A row per state before: how many prompts went to each state, and their share of the row."""
    table = Table(title="Prompts before (rows) and after, % of the row [95 %]", title_justify="left")
    table.add_column("before")
    for state in transitions:
        table.add_column(state, justify="right")
    for state, row in transitions.items():
        total = sum(int(cell["count"]) for cell in row.values())
        cells = (f"{cell['count']}: {percent(cell)}" if total else "-" for cell in row.values())
        table.add_row(f"{state} ({total})", *cells)
    table.caption = "dead: all answers tie at a low reward; mixed: they differ; solved: all tie at a high one"
    return table


def change_table(summary: Mapping[str, Any]) -> Table:
    """Change of the mean reward by initial std."""
    table = Table(title=f"Change of the reward of {summary['prompts']} prompts", title_justify="left")
    for column in ("initial std", "prompts", "mean change [95 %]", "mean |change|"):
        table.add_column(column, justify="right")
    for group in summary["groups"]:
        table.add_row(
            f"{number(group['std_low'])} to {number(group['std_high'])}",
            str(group["prompts"]),
            f"{group['change']:+.3g} [{group['low']:+.3g}, {group['high']:+.3g}]",
            number(group["absolute_change"]),
        )
    rho = summary["std_and_change"]
    table.caption = (
        f"rank correlation of initial std and change: {number(rho['rho'])} [{number(rho['low'])}, "
        f"{number(rho['high'])}]; one prompt's change has an error of about {number(summary['typical_error'])}"
    )
    return table
