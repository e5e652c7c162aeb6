"""Tables of an `entangle joint` run for a terminal. Text from a data set is printed with markup switched off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from entangle.analysis.findings import SIGNALS
from entangle.analysis.wording import pair_sentence
from entangle.tables.base import number, percent, snippet, with_interval
from entangle.tables.rft import prompt_heading

PAIR_STATES = {
    "clear": "signal",
    "entangled": "entangled",
    "saturated": "saturated",
    "degenerate": "sign unknown",
    "tied": "tied rewards: no pair",
}
RFT_STATES = {
    "clear": "signal",
    "flat": "small std, low mean",
    "tied": "tied rewards, low",
    "solved": "small std, high mean",
}
_UNITS = {
    "dimensionless signal, in [0, 1]": ("pair_signal", "best_signal", "rft_signal"),
    "size of S_i - S_j (for answers: root mean square)": (
        "pair_distance",
        "best_distance",
        "answer_distance",
    ),
    "norm of a step of learning rate 1": ("pair_grad_norm", "best_grad_norm", None),
    "cosine of the pair's gradients": ("pair_cosine", "best_cosine", None),
}

_RANKED = {
    "cosine_and_std": "cosine of the pair, std of the reward",
    "best_cosine_and_std": "cosine of best and worst answer, std of the reward",
    "effect_and_std": "effect of the pair's step, std of the reward",
    "distances": "|g_w - g_l| of the pair, its size over the answers",
    "norms": "norm of the pair's step, of the reward gradient",
    "signals": "signal of the pair, of the rewards",
}


def joint_tables(
    summary: Mapping[str, Any],
    provenance: Mapping[str, Any],
    prompts: pd.DataFrame,
    texts: pd.DataFrame | None,
) -> RenderableType:
    """All tables of a run, and its most telling prompts.

    Args:
        summary: the run's aggregates.
        provenance: what its numbers were computed from.
        prompts: its measured rows of prompts.
        texts: index, chosen, rejected, best and worst answer of the prompts, where they were kept.
    """
    parts: list[RenderableType] = [prompt_heading(summary, provenance)]
    if "verdicts" not in summary:
        return Group(*parts, "No prompt could be measured.")
    parts += [
        signal_table(summary),
        reason_table(summary),
        sampled_table(summary),
        rank_table(summary),
        angle_table(summary),
        cards(prompts, texts, summary["loss"]),
    ]
    return Group(*parts)


def signal_table(summary: Mapping[str, Any]) -> Table:
    """Both methods in the same units: medians over the prompts, with their 5 % and 95 % quantiles."""
    table = Table(
        title="Both signals in the same units: median [5 %, 95 %] of the prompts", title_justify="left"
    )
    for column in (
        "",
        f"{summary['loss']}: the data set's pair",
        f"{summary['loss']}: best against worst",
        "RFT",
    ):
        table.add_column(Text(column), justify="right" if column else "left")
    quantiles, gradient = summary["quantiles"], summary["gradient"]
    for label, columns in _UNITS.items():
        cells = ["" if name is None else _quantiles(quantiles[name]) for name in columns]
        if label.startswith("norm"):
            cells[2] = f"rms {number(gradient['rms_norm'])} +- {number(gradient['rms_norm_error'])}"
        table.add_row(label, *cells)
    table.caption = (
        "signal: incentive over the one at the start of training; for RFT the std over the half-range of the rewards. "
        "The norm of a preference step holds beta, that of RFT the rewards' unit"
    )
    return table


def reason_table(summary: Mapping[str, Any]) -> Table:
    """Which prompts give no signal to which method, and why: counts by both reasons."""
    table = Table(title="Prompts by what the pair and the rewards have to teach", title_justify="left")
    table.add_column("the data set's pair")
    reasons, states = summary["reasons"], summary["states"]
    shown = [name for name in RFT_STATES if states["rft"][name]["count"]]
    for name in shown:
        table.add_column(f"rewards: {RFT_STATES[name]}", justify="right")
    table.add_column("all, % [95 %]", justify="right")
    for name, row in reasons.items():
        if sum(row.values()):
            cells = (str(row[column]) for column in shown)
            style = None if name == "clear" else "red"
            table.add_row(PAIR_STATES[name], *cells, percent(states["pair"][name]), style=style)
    table.add_row("all, % [95 %]", *(percent(states["rft"][name]) for name in shown), "")
    verdicts, limits = summary["verdicts"], summary["thresholds"]
    table.caption = (
        ", ".join(f"{label}: {percent(verdicts[name])} %" for name, label in SIGNALS.items())
        + f"; neither, were the two independent: {100 * summary['neither_if_independent']:.0f} %. "
        f"Limits: std {limits['std']:.3g}, mean {limits['mean']:.3g}, incentive {limits['signal']:.3g} of the start's"
    )
    return table


def sampled_table(summary: Mapping[str, Any]) -> Text:
    """What pairs of the sampled answers themselves have to teach."""
    states, online = summary["states"]["best"], summary["online"]
    text = Text("Pairs of sampled answers\n", "bold")
    shares = ", ".join(
        f"{PAIR_STATES[n]} {percent(share)} %" for n, share in states.items() if share["count"]
    )
    text.append(
        f"best against worst: {shares}; of all pairs of two answers {100 * online['yield']:.0f} % have different "
        f"rewards, their median signal is {number(summary['quantiles']['online_signal']['0.5'])}\n",
        style="not bold",
    )
    return text


def rank_table(summary: Mapping[str, Any]) -> Table:
    """Whether the two methods' quantities go together over the prompts."""
    table = Table(title="Rank correlations over the prompts [95 % interval]", title_justify="left")
    table.add_column("of")
    table.add_column("rho", justify="right")
    for name, label in _RANKED.items():
        rho = summary["rank_correlations"][name]
        table.add_row(label, with_interval(rho))
    table.caption = "entangled pairs are the low-std prompts if the first is negative"
    return table


def angle_table(summary: Mapping[str, Any]) -> Table:
    """The angle between the preference step and the expected reward gradient."""
    table = Table(title="Preference step d and expected reward gradient", title_justify="left")
    for column in ("d from", "cosine [95 %]", "mean <d, grad V> (+- error)", "above 0, %"):
        table.add_column(column, justify="left" if column == "d from" else "right")
    for name, label in {"pair": "the data set's pairs", "online": "all pairs of sampled answers"}.items():
        row = summary["angles"][name]
        table.add_row(
            label,
            f"{number(row['cosine'])} [{number(row['low'])}, {number(row['high'])}]",
            f"{number(row['product']['mean'])} +- {number(row['product']['error'])}",
            percent(row["positive"]),
        )
    steps = summary["reward_step"]
    moved = " and ".join(
        f"{n} {steps[n]['mean']:+.3g} +- {number(steps[n]['error'])}" for n in ("chosen", "rejected")
    )
    table.caption = (
        "<d, grad V>: change of the mean reward by a preference step of learning rate 1; the other way round, a "
        f"step on the reward changes the pair's log-probs by {moved} nats"
    )
    return table


# --- prompts ------------------------------------------------------------------------------------------------


def telling(prompts: pd.DataFrame) -> Iterator[tuple[str, dict[str, Any]]]:
    """The most telling prompts with what each shows, at most one of a kind.

    Least std where neither teaches and where the pair alone does, most std where the rewards alone do, and the pair
    whose step lowers the mean reward most surely.
    """
    for name, title, ascending in (
        ("neither", "Neither has a signal", True),
        ("dpo_only", "The pair has a signal, the rewards don't", True),
        ("rft_only", "The rewards have a signal, the pair doesn't", False),
    ):
        rows = prompts[prompts["verdict"] == name].sort_values(
            "reward_std", ascending=ascending, kind="stable"
        )
        yield from ((title, _named(row)) for row in rows.head(1).to_dict("records"))
    against = prompts[prompts["pair_reward_cosine"] < 0].nsmallest(1, "pair_reward_cosine")
    yield from (
        ("A step on the pair lowers the mean reward", _named(row)) for row in against.to_dict("records")
    )


def cards(prompts: pd.DataFrame, texts: pd.DataFrame | None, loss: str) -> Group:
    """The most telling prompts as readable blocks."""
    by_index = {} if texts is None else texts.set_index("index").to_dict("index")
    panels = [_card(title, row, by_index.get(row["index"]), loss) for title, row in telling(prompts)]
    return Group(Text("The most telling prompts", "bold"), *panels)


def _card(title: str, row: Mapping[str, Any], text: Mapping[Any, str] | None, loss: str) -> Panel:
    pair = {name.removeprefix("pair_"): value for name, value in row.items() if name.startswith("pair_")}
    pair |= {"loss": loss}
    body = Text(pair_sentence(pair, pair))
    body.append(
        f"\npair: {PAIR_STATES[row['pair_state']]}, signal {number(row['pair_signal'])}, cosine "
        f"{number(row['pair_cosine'])}; rewards: {RFT_STATES[row['rft_state']]}, mean {number(row['reward_mean'])}, "
        f"std {number(row['reward_std'])}; cosine of step and sampled reward gradient "
        f"{number(row['pair_reward_cosine'])}",
        style="dim",
    )
    if text is not None:
        for mark, name, style in (("+ ", "chosen", "green"), ("- ", "rejected", "red")):
            body.append(f"\n{mark}", style=style).append(snippet(text[name]))
        for mark, name in (("best  ", "best"), ("worst ", "worst")):
            body.append(f"\n{mark}", style="cyan").append(snippet(text[name]))
    return Panel(body, title=Text(f"prompt {row['index']}: {title}"), title_align="left", border_style="dim")


def _named(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in row.items()}


def _quantiles(values: Mapping[str, float | None]) -> str:
    return f"{number(values['0.5'])} [{number(values['0.05'])}, {number(values['0.95'])}]"
