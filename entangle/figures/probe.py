"""Figures of a run folder, as functions that draw on a matplotlib axes. Needs entangle[plots]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.regimes import Regime
from entangle.analysis.summary import derived
from entangle.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS: dict[str, str] = {
    Regime.IDEAL: "#2a9d6f",
    Regime.BOTH_UP: "#e0a526",
    Regime.BOTH_DOWN: "#c8382e",
    Regime.INVERTED: "#8a4fbf",
    Regime.DEGENERATE: "#9a9a9a",
}
MARKERS: dict[str, str] = {
    Regime.IDEAL: "o", Regime.BOTH_UP: "^", Regime.BOTH_DOWN: "v", Regime.INVERTED: "s", Regime.DEGENERATE: "x",
}  # fmt: skip


def new_axes(width: float = 7.0, height: float = 4.6) -> Axes:
    """An empty figure's axes, drawn without a display.

    Raises:
        UserError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Figures need matplotlib: pip install 'entangle[plots]'.") from error
    axes = Figure(figsize=(width, height), layout="constrained").add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def save(axes: Axes, path: str | Path) -> None:
    """Write the figure of an axes; the suffix decides the format (png, svg, pdf)."""
    axes.get_figure(root=True).savefig(path, dpi=150)  # pyright: ignore[reportOptionalMemberAccess]


def plane(axes: Axes, pairs: pd.DataFrame, regimes: pd.Series, ratios: Mapping[str, float]) -> Axes:
    """Every pair in the plane of norm ratio and cosine, with the border of the ideal region of each loss.

    A loss with incentive ratio rho is ideal below the tent cos = exp(-|ln r* - ln rho|) (the band |ln rho - ln r*|
    < -ln cos read the other way round); left of its peak, above it, both rise; right of it both fall.

    Args:
        axes: where to draw.
        pairs: scored rows of a run folder.
        regimes: the regime of each row, in the order of `pairs`.
        ratios: rho by loss label; at most three read well.
    """
    points = derived(pairs).assign(regime=regimes.to_numpy(), log_ratio=lambda d: np.log(d["norm_ratio"]))
    for regime, colour in COLOURS.items():
        rows = points[points["regime"] == regime]
        if len(rows):
            label = f"{regime.replace('_', ' ')} ({len(rows)})"
            axes.scatter(
                rows["log_ratio"], rows["cosine"], s=16, c=colour, marker=MARKERS[regime], alpha=0.75,
                linewidths=0.6 if regime is Regime.DEGENERATE else 0, label=label,
            )  # fmt: skip
    reach = max(1.0, float(points["log_ratio"].abs().max()) * 1.08)
    grid = np.sort(
        np.append(np.linspace(-reach, reach, 400), np.log(list(ratios.values())))
    )  # peaks included
    for (loss, rho), style in zip(ratios.items(), ("-", "--", ":"), strict=False):
        label = f"border of ideal, {loss} (rho = {rho:.3g})"
        axes.plot(grid, np.exp(-np.abs(grid - np.log(rho))), style, color="#333333", lw=1.2, label=label)
    ticks = np.array([0.125, 0.25, 0.5, 1, 2, 4, 8, 16])
    ticks = ticks[np.abs(np.log(ticks)) <= reach]
    axes.set_xticks(np.log(ticks), [f"{tick:g}" for tick in ticks])
    axes.set_xlim(-reach, reach)
    lowest = min(-0.1, float(points["cosine"].min()) - 0.05)
    angle = (lambda cosine: -np.arccos(np.clip(cosine, -1, 1)), lambda angle: np.cos(angle))
    axes.set_yscale("function", functions=angle)  # near 1, where entangled pairs are, cosines crowd
    axes.set_ylim(lowest, 1.0)
    ticks = np.array([1, 0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0, -0.25, -0.5, -0.75])
    axes.set_yticks(ticks[ticks >= lowest], [f"{tick:g}" for tick in ticks[ticks >= lowest]])
    axes.axhline(0, color="#cccccc", lw=0.8, zorder=0)
    axes.set_xlabel("norm ratio  |rejected gradient| / |chosen gradient|")
    axes.set_ylabel("cosine of the two gradients")
    figure = axes.get_figure(root=True)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)  # pyright: ignore[reportOptionalMemberAccess]
    return axes


def regime_bars(axes: Axes, shares: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Axes:
    """Stacked shares of the regimes, one bar per loss; the line is the 95 % interval of the ideal share.

    Args:
        axes: where to draw.
        shares: loss -> regime -> share, as in a summary's `regimes`.
    """
    losses, left = list(shares), np.zeros(len(shares))
    for regime, colour in COLOURS.items():
        part = np.array([100 * shares[loss][regime]["share"] for loss in losses])
        if part.any():
            axes.barh(losses, part, left=left, color=colour, label=regime.replace("_", " "), height=0.75)
        left += part
    ideal = {
        end: np.array([100 * shares[loss][Regime.IDEAL][end] for loss in losses])
        for end in ("share", "low", "high")
    }
    reach = np.stack([ideal["share"] - ideal["low"], ideal["high"] - ideal["share"]]).clip(min=0)
    axes.errorbar(ideal["share"], losses, xerr=reach, fmt="none", ecolor="#111111", elinewidth=1, capsize=2.5)
    axes.invert_yaxis()
    axes.set_xlim(0, 100.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share of pairs, %")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5)
    return axes


def changes(axes: Axes, judged: pd.DataFrame) -> Axes:
    """Every pair's two predicted changes; the quadrants are the regimes. Both axes bend (asinh) around zero.

    Args:
        axes: where to draw.
        judged: rows with change_chosen, change_rejected and regime, of one loss.
    """
    columns = ["change_chosen", "change_rejected"]
    sizes = judged[columns].abs().to_numpy()
    unit = float(np.quantile(sizes[sizes > 0], 0.2)) if (sizes > 0).any() else 1.0
    for regime, colour in COLOURS.items():
        rows = judged[judged["regime"] == regime]
        if len(rows):
            axes.scatter(
                rows[columns[0]], rows[columns[1]], s=16, c=colour, marker=MARKERS[regime], alpha=0.75,
                linewidths=0.6 if regime is Regime.DEGENERATE else 0, label=f"{regime.replace('_', ' ')} ({len(rows)})",
            )  # fmt: skip
    axes.set_xscale("asinh", linear_width=unit)
    axes.set_yscale("asinh", linear_width=unit)
    powers = np.arange(np.ceil(np.log10(unit)), np.log10(sizes.max(initial=unit)) + 1e-9)
    powers = powers[:: -(-len(powers) // 3) or 1]
    ticks = [*-(10 ** powers[::-1]), 0, *10**powers]
    labels = [*(f"$-10^{{{p:.0f}}}$" for p in powers[::-1]), "0", *(f"$10^{{{p:.0f}}}$" for p in powers)]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, labels)
    axes.minorticks_off()
    axes.axhline(0, color="#999999", lw=0.8, zorder=0)
    axes.axvline(0, color="#999999", lw=0.8, zorder=0)
    axes.set_xlabel("change of the chosen log-prob, nats per unit learning rate")
    axes.set_ylabel("change of the rejected log-prob")
    axes.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
    return axes


def module_grid(shares: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Shares in %, kinds of modules as rows and layers as columns, and the largest size.

    Args:
        shares: rows of `entangle.report.source.module_shares`.
    """
    grid = 100 * shares.pivot(index="kind", columns="layer", values="share")
    grid = grid.loc[list(dict.fromkeys(shares["kind"])), sorted(grid.columns)]
    return grid, float(np.nanmax(np.abs(grid.to_numpy()))) or 1.0


def module_map(axes: Axes, shares: pd.DataFrame) -> Axes:
    """What every kind of module adds to the mean cosine in every layer, %.

    Args:
        axes: where to draw.
        shares: rows of `entangle.report.source.module_shares`.
    """
    grid, bound = module_grid(shares)
    image = axes.imshow(grid, cmap="RdBu_r", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest")
    axes.set_xticks(
        range(len(grid.columns)), ["outside" if n < 0 else str(n) for n in map(int, grid.columns)]
    )
    axes.set_yticks(range(len(grid)), [str(kind) for kind in grid.index])
    axes.set_xlabel("layer")
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(image, ax=axes, label="% of the mean cosine", shrink=0.8)
    return axes
