"""The sections of a page, in the order in which they are read; a section without anything to show is left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

from entangle.analysis.curves import onset, over_seeds
from entangle.analysis.geometry import SIDES
from entangle.analysis.ledger import describe_change
from entangle.analysis.summary import derived
from entangle.figures.joint import VERDICT_COLOURS
from entangle.figures.rft import HARM, NOISE, POINT
from entangle.report import charts as figures
from entangle.report import training_charts as course_figures
from entangle.report.blocks import Block, Figure, Heading, Prose, Section, Table
from entangle.report.rows import extra_columns
from entangle.report.source import Source, module_shares, step_table
from entangle.tables import across as across_tables
from entangle.tables.compare import final_rows
from entangle.tables.joint import VERDICTS
from entangle.tables.probe import percent
from entangle.tables.sweep import SET_CAPTION, SET_TITLE, set_rows
from entangle.tables.whatif import setting_text, until_text

LIVE_HEIGHT = 470
FLATTEST = 10
"""Prompts with the smallest spread that are listed."""


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


def has_pairs(source: Source) -> bool:
    """Whether a run has pairs that were scored."""
    return source.pairs is not None and bool(source.summary.get("regimes"))


def _regimes(source: Source) -> list[Block]:
    return [figures.regime_bars(source.summary)] if has_pairs(source) else []


def _plane(source: Source) -> list[Block]:
    if not has_pairs(source):
        return []
    shares = source.summary["regimes"][source.losses[0]]
    said = ", ".join(
        f"{figures.spoken(regime)} {share['count']}" for regime, share in shares.items() if share["count"]
    )
    middle = derived(source.scored).median()
    return [
        Figure(
            caption="Every pair: norm ratio against cosine. Below the line of the loss a pair is ideal",
            alt=f"Scatter plot of {len(source.scored)} pairs; under {source.losses[0]}: {said}. Median cosine "
            f"{middle['cosine']:.3f}, median norm ratio {middle['norm_ratio']:.3f}. The table of all pairs has all "
            "numbers.",
            live="plane", height=LIVE_HEIGHT, terms=("cosine", "norm_ratio", "band", "rho", "regime"),
        )
    ]  # fmt: skip


def _changes(source: Source) -> list[Block]:
    if not has_pairs(source):
        return []
    assert source.predictions is not None
    rows = []
    for loss, part in source.predictions.groupby("loss", sort=False):
        cells = [str(loss)]
        for column in ("change_chosen", "change_rejected"):
            low, middle, high = part[column].quantile([0.05, 0.5, 0.95])
            cells.append(f"{middle:+.3g} [{low:+.3g}, {high:+.3g}]")
        rows.append([*cells, percent(source.summary["regimes"][loss]["ideal"])])
    head = [
        Heading("loss"),
        Heading("chosen", "change"),
        Heading("rejected", "change"),
        Heading("ideal %", "interval"),
    ]
    blocks: list[Block] = [
        Figure(
            caption="What one step does to every pair: change of the chosen against change of the rejected log-prob",
            alt="Scatter plot of the predicted changes; its quadrants are the regimes. Medians are in the table below.",
            live="changes", height=LIVE_HEIGHT, terms=("change", "regime"),
            table=Table("Predicted change per unit learning rate, nats: median [5 %, 95 % of the pairs]", head, rows),
        )
    ]  # fmt: skip
    if "verification" in source.summary:
        blocks.append(_verification(source))
    return blocks


def _verification(source: Source) -> Table:
    head = [Heading(text, "verification") for text in ("steps", "signs agree", "slope", "R^2", "error ratio")]
    rows = [
        [
            loss, str(row["steps"]), f"{row['signs_agree']} of {row['signs_compared']}",
            *(figures.number(row[key], ".4g") for key in ("slope", "r_squared", "error_ratio")),
        ]
        for loss, row in source.summary["verification"].items()
    ]  # fmt: skip
    return Table("Predictions against one real SGD step per pair and loss", [Heading("loss"), *head], rows)


def _modules(source: Source) -> list[Block]:
    if source.modules is None or not has_pairs(source):
        return []
    shares = module_shares(source.modules, source.scored)
    blocks: list[Block] = [] if shares is None else [figures.module_map(shares)]
    return blocks + (figures.module_table(source.summary["modules"]) if "modules" in source.summary else [])


def _columns(source: Source) -> list[Block]:
    extra = extra_columns(source.scored) if has_pairs(source) else []
    if not extra:
        return []
    judged = source.judged(source.losses[0])
    geometry = derived(judged)[["cosine", "norm_ratio", "ratio_chosen", "length_ratio"]].assign(
        change_chosen=judged["change_chosen"]
    )
    others = [name for name in geometry if name not in extra]
    return [figures.correlation_map(pd.concat([geometry[others], judged[extra]], axis=1), extra)]


def _what_if(source: Source) -> list[Block]:
    if source.what_if is None:
        return []
    summary = source.what_if.summary
    blocks: list[Block] = [Prose(str(summary["recommendation"]))]
    if summary["changes"]:
        head = [
            Heading("knob", "knob"), Heading("setting", "knob"), Heading("up to", "knob"),
            Heading("ideal %", "interval"), Heading("both up %", "regime"), Heading("both down %", "regime"),
            Heading("margin growth", "margin_growth"), Heading("margin kept %", "margin_kept"),
        ]  # fmt: skip
        rows = []
        for change in summary["changes"]:
            at = change["at_setting"]
            kept = at["margin_efficiency_median"]
            rows.append([
                change["knob"], setting_text(change), until_text(change),
                percent(at["regimes"]["ideal"]), percent(at["regimes"]["both_up"]), percent(at["regimes"]["both_down"]),
                figures.number(at["margin_change_median"]), figures.number(None if kept is None else 100 * kept, ".0f"),
            ])  # fmt: skip
        title = f"Smallest change that makes {100 * summary['target']:g} % of the pairs ideal, from {summary['base']}"
        blocks.append(Table(title, head, rows))
        curves = source.what_if.curves
        blocks += [figures.knob_curve(curves, change, summary["target"]) for change in summary["changes"]]
    blocks.append(Prose("Limits: " + " ".join(summary["limits"]), is_quiet=True))
    return blocks


def _across(source: Source) -> list[Block]:
    if source.across is None:
        return []
    rows = [
        [
            loss, across_tables.ratio(row["rho"]), percent(row["regimes_alone"]["both_down"]),
            percent(row["regimes_epoch"]["both_down"]),
        ]
        for loss, row in source.across["losses"].items()
    ]  # fmt: skip
    head = [
        Heading("loss"), Heading("rho", "rho"), Heading("both down, alone", "regime"),
        Heading("both down, epoch", "across"),
    ]  # fmt: skip
    return [
        Prose(across_tables.set_sentence(source.across)), Prose(across_tables.verdict(source.across)),
        *(course_figures.across_bars(source.across, side) for side in SIDES),
        Table("Pairs that lose both log-probs, % [95 % interval]: in one step alone, and over an epoch", head, rows),
    ]  # fmt: skip


def _training(source: Source) -> list[Block]:
    blocks: list[Block] = []
    points = None if source.steps is None else step_table(source.steps)
    if points is not None and len(points) > 1:
        blocks.append(course_figures.change_curves(points, onset(points)))
        if "ideal" in points:
            blocks.append(course_figures.regime_areas(points))
    if source.curve is not None and "set_cosine" in source.curve:
        heads, rows = set_rows(source.curve)
        terms = {"ideal for rho between": "across", "rho": "rho", "others on chosen": "across"}
        title = SET_TITLE.format(**source.summary)
        blocks.append(Table(title, [Heading(head, terms.get(head, "")) for head in heads], rows))
        blocks.append(Prose(SET_CAPTION, is_quiet=True))
    if source.ledger is not None:
        blocks += [Prose(describe_change(source.ledger, side)) for side in SIDES]
        blocks += [course_figures.ledger_areas(source.ledger, side) for side in SIDES]
    return blocks


def _comparison(source: Source) -> list[Block]:
    if source.variants is None:
        return []
    blocks: list[Block] = []
    if source.curves is not None:
        bands = over_seeds(source.curves)
        blocks += [course_figures.variant_curves(bands, side) for side in SIDES]
    if source.causes is not None:
        blocks += [course_figures.variant_causes(source.causes, side) for side in SIDES]
    blocks.append(course_figures.variant_dots(source.variants))
    heads, rows = final_rows(source.variants, source.summary.get("start", {}))
    keys = {"chosen": "moved", "rejected": "moved", "both fell": "both_fell", "predicted to": "regime"}
    keys |= {"accuracy": "margin_grew", "ROUGE-L": "summaries", "length": "summaries"}
    table = Table(
        f"At step {source.variants['step'].max():.0f}: mean over seeds ± half the range; changes in nats, shares in %",
        [Heading(head or "loss and setting", keys.get(head, "")) for head in heads], rows,
    )  # fmt: skip
    return [*blocks, table]


def _rewards(source: Source) -> list[Block]:
    if source.changes is not None:
        drawn = figures.prompt_scatter(
            source.changes, ("reward_std_before", "reward std before"), ("change", "change of the mean reward"),
            caption="What the fine-tuning changed, by the spread that there was before; one point per prompt",
            terms=("reward_std",), limits=(None, 0.0),
        )  # fmt: skip
        return [drawn] if drawn is not None else []
    if source.prompts is None or "reward_std" not in source.prompts:
        return []
    prompts, limits = source.prompts, source.summary.get("thresholds", {})
    if {"grad_sq", "grad_sq_error"} <= set(prompts):
        prompts = prompts.assign(told=prompts["grad_sq"] > 2 * prompts["grad_sq_error"])
    if limits:
        prompts = prompts.assign(
            harmful=(prompts["reward_std"] < limits["std"]) & (prompts["reward_mean"] < limits["mean"])
        )
    drawn = [
        figures.prompt_scatter(
            prompts, ("reward_std", "reward std"), ("grad_norm", "norm of the expected reward gradient"),
            logarithmic=True, caption="Spread of a prompt's rewards against the gradient that it leaves",
            terms=("reward_std", "reward_gradient"),
            groups=("told", {True: "above two errors", False: "within two errors of 0"}, {True: POINT, False: NOISE}),
        ),
        figures.prompt_scatter(
            prompts, ("reward_mean", "mean reward of a prompt's answers"), ("reward_std", "reward std"),
            caption="Mean and std of the reward, one point per prompt; the dotted lines are the limits",
            terms=("reward_std",), limits=(limits.get("mean"), limits.get("std")),
            groups=("harmful", {False: "others", True: "small std, low mean"}, {False: POINT, True: HARM}),
        ),
    ]  # fmt: skip
    blocks: list[Block] = [figure for figure in drawn if figure is not None]
    if "prevalence" in source.summary:
        limits = source.summary["thresholds"]
        names = {
            "small": f"std below {limits['std']:g}",
            "small_low": f"... and mean below {limits['mean']:g} (the harmful cell)",
            "small_high": f"... and mean above {limits['mean']:g}",
        }  # fmt: skip
        rows = [[text, percent(source.summary["prevalence"][key])] for key, text in names.items()]
        head = [Heading("prompts with"), Heading("share % [95 %]", "interval")]
        blocks.append(Table(f"Of {source.summary['prompts']['measured']} prompts", head, rows))
    if "trl" in source.summary:
        blocks.append(Prose(str(source.summary["trl"]["explanation"]), is_quiet=True))
    return [*blocks, _flattest(source)]


def _flattest(source: Source) -> Table:
    """The prompts whose rewards vary least, with their texts where the run has kept them."""
    assert source.prompts is not None
    rows = source.prompts.dropna(subset=["reward_std"]).nsmallest(FLATTEST, ["reward_std", "reward_mean"])
    texts = (
        {} if source.texts is None else dict(zip(source.texts["index"], source.texts["prompt"], strict=True))
    )
    head = [
        Heading("prompt"), Heading("mean"), Heading("std [95 %]", "reward_std"), Heading("gradient", "reward_gradient"),
    ]  # fmt: skip
    cells = [
        [
            f"{row['index']} {' '.join(str(texts.get(row['index'], '')).split())[:80]}",
            figures.number(row["reward_mean"]),
            f"{figures.number(row['reward_std'])} [{figures.number(row.get('reward_std_low'), '.2g')}, "
            f"{figures.number(row.get('reward_std_high'), '.2g')}]", figures.number(row.get("grad_norm"), ".2g"),
        ]
        for row in rows.to_dict("records")
    ]  # fmt: skip
    return Table(f"The {len(rows)} prompts whose rewards vary least", head, cells)


def _joint(source: Source) -> list[Block]:
    if source.prompts is None or "verdicts" not in source.summary:
        return []
    loss = source.summary["loss"]
    drawn = [
        figures.prompt_scatter(
            source.prompts, ("pair_effect", f"effect of a {loss} step on the prompt's pair"),
            ("rft_signal", "reward std / half-range"), terms=("prompt_signal", "pair_effect"),
            caption="What the pair and the rewards of a prompt have to teach: upper right both, lower left neither",
            groups=("verdict", VERDICTS, VERDICT_COLOURS),
        ),
        figures.prompt_scatter(
            source.prompts, ("pair_cosine", "cosine of the pair"), ("reward_std", "reward std"),
            caption="Are entangled pairs the prompts with a small reward std?", terms=("cosine", "reward_std"),
        ),
    ]  # fmt: skip
    rows = [[VERDICTS[name], percent(part)] for name, part in source.summary["verdicts"].items()]
    head = [Heading("signal"), Heading("prompts, % [95 %]", "interval")]
    table = Table(f"Of {source.summary['prompts']['measured']} prompts", head, rows)
    return [*(figure for figure in drawn if figure is not None), table]


_SECTIONS: tuple[tuple[str, str, str, Callable[[Source], list[Block]], tuple[str, ...]], ...] = (
    (
        "regimes", "Regimes", "Which way one small step moves the two log-probs of a pair, for every loss.", _regimes,
        ("regime", "rho", "interval"),
    ),
    (
        "plane", "The plane of pairs", "The points don't move with the loss, its line does: a pair is ideal below it. "
        "Above it, on the left both responses rise, on the right both fall. Choose a point to see its pair.", _plane,
        ("score", "cosine", "norm_ratio", "band", "rho"),
    ),
    (
        "changes", "Predicted changes", "By how much: to first order, in nats per unit of learning rate.", _changes,
        ("change", "incentives", "gram"),
    ),
    (
        "modules", "Layers and modules", "c is a sum over the probed tensors: where it comes from.", _modules,
        ("module_share", "module_norms", "module_cosine", "module_falls"),
    ),
    (
        "columns", "Diagnostics", "How the columns that came with the pairs go with their geometry.", _columns,
        ("rank_correlation",),
    ),
    (
        "whatif", "What would change it", "The same pairs under other losses and settings, without the model.",
        _what_if, ("knob", "margin_growth", "margin_kept"),
    ),
    (
        "across", "Across pairs", "What all other pairs of the set do to a pair over an epoch, beside its own step.",
        _across, ("across", "interval"),
    ),
    (
        "training", "Over training", "What was measured, and what it came from.", _training, ("ledger", "logps"),
    ),
    (
        "comparison", "Losses compared", "The same pairs, seeds and start for all; measured on the probed pairs.",
        _comparison, ("logps", "both_fell"),
    ),
    (
        "rewards", "Rewards", "How much the reward varies over the answers to a prompt, and what gradient that leaves.",
        _rewards, ("reward_std", "reward_gradient"),
    ),
    (
        "joint", "Preference pairs and rewards", "The same prompts, both methods.", _joint,
        ("prompt_signal", "pair_effect", "rank_correlation"),
    ),
)  # fmt: skip
