"""The study's two figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.interactions.separation import SIZES

Rows = Sequence[Mapping[str, str | int | float]]
COLOURS = ("#888888", "#b7791f", "#2b5c8a", "#c8382e")
METHODS = {"random": "random", "spectral": "effective resistance"}
METHODS |= {"walks_1": "walk index, 1 step", "walks_2": "walk index, 2 steps"}
FEATURES = {"pixels": "pixels as features", "identity": "no features but the vertex itself"}
STYLE: dict = dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= {"figure.constrained_layout.use": True, "svg.hashsalt": "interactions", "lines.markersize": 4}


@matplotlib.rc_context(STYLE)
def draw_ranks(rows: Rows, path: Path) -> None:
    """Rank over the size of the grid; log_D of the last one over the walk index, of graph and vertex prediction."""
    figure = Figure(figsize=(12.5, 4.0))
    grids, whole, single = figure.subplots(1, 3)
    for row in rows:
        ranks, colour = [int(each) for each in str(row["ranks"]).split()], COLOURS[int(row["width"]) - 1]
        sizes, marker = SIZES[: len(ranks)], "os^"[int(row["depth"]) - 1]
        look = {"color": colour, "mfc": colour if ranks[-1] < sizes[-1] else "none", "alpha": 0.6}
        grids.plot(sizes, ranks, "-o", lw=0.8, **look)
        axes = whole if row["prediction"] == "graph" else single
        axes.plot(int(row["walk_index"]), log(ranks[-1], int(row["width"])), marker, **look)
    grids.loglog(base=2)
    grids.set(title="hollow: grid too small", xlabel="templates of each side", ylabel="rank of the grid")
    line = np.linspace(0, 300, 600)
    for axes, title, slack in ((whole, "graph prediction", 1), (single, "vertex prediction", 0)):
        axes.plot(line, 2 * line + slack, "-", color="#222222", lw=1, label="upper bound")
        axes.set_xscale("symlog", linthresh=1)
        axes.set(title=title, xlabel="walk index WI$_{L-1}$", ylim=(-0.3, 10), xlim=(-0.15, 300))
        axes.set_ylabel("log$_D$ of the separation rank")
    for width, colour in enumerate(COLOURS[1:], 2):
        single.plot([], [], "o", color=colour, label=f"D = {width}")
    for depth, marker in enumerate("os^", 1):
        single.plot([], [], marker, color="#555555", label=f"L = {depth}")
    single.legend(ncols=2, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


@matplotlib.rc_context(STYLE)
def draw_accuracy(rows: Rows, path: Path) -> None:
    """Mean accuracy with 95 % intervals over the share of edges removed; a panel per features."""
    figure = Figure(figsize=(9.5, 3.8))
    panels = figure.subplots(1, len(FEATURES))
    for axes, (kind, title) in zip(panels, FEATURES.items(), strict=True):
        for colour, (method, label) in zip(COLOURS, METHODS.items(), strict=True):
            own = [row for row in rows if row["features"] == kind and row["method"] in (method, "none")]
            names = ("removed", "accuracy", "accuracy_interval")
            removed, mean, half = np.array(sorted([float(row[name]) for name in names] for row in own)).T
            axes.plot(100 * removed, mean, "-o", color=colour, label=label)
            axes.fill_between(100 * removed, mean - half, mean + half, color=colour, alpha=0.15, lw=0)
        axes.set(title=title, xlabel="edges removed, %", ylabel="test accuracy, %")
    panels[1].legend(fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Date": None})
