"""The figures of a run as files, by the functions of the plots' modules. Needs entangle[plots]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from entangle.analysis.curves import onset, over_seeds
from entangle.analysis.geometry import SIDES
from entangle.errors import RunError
from entangle.figures import (
    compare as compare_plots,
)
from entangle.figures import (
    curves as curve_plots,
)
from entangle.figures import (
    joint as joint_plots,
)
from entangle.figures import (
    ledger as ledger_plots,
)
from entangle.figures import (
    modules as module_plots,
)
from entangle.figures import (
    probe as plots,
)
from entangle.figures import (
    rft as rft_plots,
)
from entangle.figures import (
    whatif as whatif_plots,
)
from entangle.report.source import Source, module_shares, step_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def write_figures(sources: Sequence[Source], folder: str | Path, suffix: str) -> list[Path]:
    """Write every figure that some runs have something for.

    Args:
        sources: the runs; of several, each has a folder of its own.
        folder: where they go.
        suffix: png, svg or pdf.

    Returns:
        The files.

    Raises:
        UserError: matplotlib isn't installed.
        RunError: the folder can't be written.
    """
    written = []
    for source in sources:
        own = Path(folder) / source.name if len(sources) > 1 else Path(folder)
        try:
            own.mkdir(parents=True, exist_ok=True)
            for name, draw in figures(source):
                file = own / f"{name}.{suffix}"
                draw().savefig(file, dpi=150)
                written.append(file)
        except OSError as error:
            raise RunError(
                f"Can't write {own}: {error.strerror or error}. Choose another --output."
            ) from error
    return written


def figures(source: Source) -> Iterator[tuple[str, Callable[[], Figure]]]:
    """Name and drawing of every figure that a run has something for."""
    yield from _of_pairs(source)
    if source.steps is not None and (points := step_table(source.steps)) is not None and "ideal" in points:
        yield "training", lambda: curve_plots.trajectory(points, onset(points))
    if (ledger := source.ledger) is not None:
        for side in SIDES:
            yield (
                f"ledger-{side}",
                lambda side=side: _on(ledger_plots.stacked(plots.new_axes(8, 4.6), ledger, side)),
            )
    if source.variants is not None:
        yield from _of_comparison(source.variants, source.curves, source.summary.get("start", {}))
    if (causes := source.causes) is not None:
        yield "causes", lambda: compare_plots.ledger_bars(causes)
    if (changes := source.changes) is not None:
        yield "change", lambda: _on(rft_plots.change(plots.new_axes(), changes, source.summary))
    if (prompts := source.prompts) is None:
        return
    if "verdicts" in source.summary:
        yield "quadrants", lambda: _on(joint_plots.quadrants(plots.new_axes(), prompts, source.summary))
        yield "entanglement", lambda: _on(joint_plots.entanglement(plots.new_axes(), prompts, source.summary))
    else:
        yield "rewards", lambda: _on(rft_plots.scatter(plots.new_axes(), prompts, source.summary))
        yield "spread", lambda: _on(rft_plots.reward_map(plots.new_axes(), prompts, source.summary))


def _of_comparison(
    variants: pd.DataFrame, curves: pd.DataFrame | None, start: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Figure]]]:
    yield "final", lambda: compare_plots.final_dots(variants, start)
    if curves is not None:
        bands = over_seeds(curves)
        for name, draw in (
            ("logps", compare_plots.side_bands),
            ("margin", compare_plots.margin_and_accuracy),
        ):
            is_first = name == "logps"
            yield (
                name,
                lambda draw=draw, is_first=is_first: compare_plots.per_variant(bands, draw, legend=is_first),
            )


def _of_pairs(source: Source) -> Iterator[tuple[str, Callable[[], Figure]]]:
    if source.pairs is None or not source.losses:
        return
    loss, shares = source.losses[0], source.summary["regimes"]
    judged = source.judged(loss)
    rho = source.summary["incentive_ratio"].get(loss)
    ratios = {loss: rho} if rho else {}
    yield "regimes", lambda: _on(plots.regime_bars(plots.new_axes(8, 1.2 + 0.3 * len(shares)), shares))
    yield "plane", lambda: _on(plots.plane(plots.new_axes(8, 5.4), judged, judged["regime"], ratios))
    yield "changes", lambda: _on(plots.changes(plots.new_axes(6.4, 5.4), judged))
    if source.modules is not None and (parts := module_shares(source.modules, source.scored)) is not None:
        yield (
            "modules",
            lambda: _on(plots.module_map(plots.new_axes(8, 1.8 + 0.25 * parts["kind"].nunique()), parts)),
        )
        if "modules" in source.summary:
            yield "layers", lambda: _on(module_plots.layers(plots.new_axes(), source.summary["modules"]))
    if (what_if := source.what_if) is not None:
        target = what_if.summary["target"]
        for change in what_if.summary["changes"]:
            yield (
                f"knob-{change['knob']}",
                lambda change=change: _on(
                    whatif_plots.knob_curve(plots.new_axes(), what_if.curves, change, target)
                ),
            )


def _on(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure
