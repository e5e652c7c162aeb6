"""The heat map of a pair's tokens. Needs matplotlib. Tokens are untrusted text: escaped before they are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from entangle.analysis.wording import visible
from entangle.figures.style import (
    GREEN,
    INK,
    QUIET,
    SIDE_COLOURS,
    VIOLET,
    any_script,
    new_axes,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARED_COLOURS = {"prefix": GREEN, "suffix": VIOLET}


def write_heat_maps(
    matrices: Mapping[int, np.ndarray], tokens: pd.DataFrame, cosines: Mapping[int, float], folder: Path
) -> list[str]:
    """Write `<index>.png` for every pair whose matrix is given.

    Args:
        matrices: token-by-token cosines `(T_w, T_l)` by index of the pair.
        tokens: one row per token: index (of the pair), side, text, shared, share.
        cosines: the cosine of the whole scores by index of the pair.
        folder: where they go.

    Returns:
        The file names.

    Raises:
        UserError: matplotlib isn't installed.
    """
    folder.mkdir(exist_ok=True)
    written = []
    for index, matrix in matrices.items():
        rows, columns = matrix.shape
        axes = new_axes(4.2 + 0.2 * columns, 3.4 + 0.185 * rows)
        title = f"pair {index}, cosine of the whole scores {cosines[index]:.3f}"
        with any_script():
            heat_map(axes, matrix, tokens[tokens["index"] == index], title)
        save(axes, folder / f"{index}.png")
        written.append(f"{index}.png")
    return written


def heat_map(axes: Axes, cosines: np.ndarray, tokens: pd.DataFrame, title: str) -> Axes:
    """Cosines of all token scores, chosen tokens downwards, rejected ones to the right, as in the paper.

    Shared prefix and suffix are framed, and their tokens coloured. The bars beside the map are each token's
    share of c, which the cosines don't show: long scores count for more.

    Args:
        axes: where to draw.
        cosines: `(T_w, T_l)`, NaN where a token has no gradient.
        tokens: the pair's rows of tokens.
        title: drawn above.
    """
    chosen, rejected = (tokens[tokens["side"] == side] for side in ("chosen", "rejected"))
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#d9d9d9")
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color(QUIET)
    axes.set_yticks(range(len(chosen)), _labels(chosen), fontsize=7)
    axes.set_xticks(range(len(rejected)), _labels(rejected), fontsize=7, rotation=90)
    axes.tick_params(length=2)
    for ticks, side in ((axes.get_yticklabels(), chosen), (axes.get_xticklabels(), rejected)):
        for tick, shared in zip(ticks, side["shared"], strict=True):
            tick.set_color(SHARED_COLOURS.get(shared, INK))
    axes.set_ylabel("chosen tokens", color=SIDE_COLOURS["chosen"])
    axes.set_xlabel("rejected tokens", color=SIDE_COLOURS["rejected"])
    _frame_shared(axes, chosen, rejected)
    _share_bars(axes, chosen, rejected)
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, location="right", shrink=0.6, aspect=30, pad=0.02)
    bar.set_label("cosine of the two tokens' scores", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, x=0.01, ha="left")
    return axes


def _labels(tokens: pd.DataFrame) -> list[str]:
    """Tokens as labels; a dollar sign would open a formula."""
    return [visible(text, 16).replace("$", r"\$") for text in tokens["text"]]


def _frame_shared(axes: Axes, chosen: pd.DataFrame, rejected: pd.DataFrame) -> None:
    """A frame around the block of the shared prefix and of the shared suffix."""
    from matplotlib.patches import Rectangle

    for kind, colour in SHARED_COLOURS.items():
        count = int((chosen["shared"] == kind).sum())
        if not count:
            continue
        x, y = (0, 0) if kind == "prefix" else (len(rejected) - count, len(chosen) - count)
        axes.add_patch(
            Rectangle(
                (x - 0.5, y - 0.5),
                count,
                count,
                fill=False,
                edgecolor=colour,
                linewidth=1.6,
                clip_on=False,
                label=f"shared {kind} ({count})",
            )
        )
    if axes.patches:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.0, 1.11),
            ncols=2,
            fontsize=8,
            frameon=False,
            borderaxespad=0.2,
            handlelength=1.2,
            handleheight=1.2,
        )


def _share_bars(axes: Axes, chosen: pd.DataFrame, rejected: pd.DataFrame) -> None:
    """Each token's share of c, in per cent: beside the rows and above the columns."""
    beside = axes.inset_axes((1.01, 0.0, 0.1, 1.0), sharey=axes)
    beside.barh(range(len(chosen)), 100 * chosen["share"], color=SIDE_COLOURS["chosen"], height=0.8)
    beside.set_xlabel("% of c", fontsize=7)
    beside.tick_params(left=False, labelleft=False, labelsize=7)
    beside.axvline(0, color=QUIET, lw=0.6)
    beside.spines[["top", "right", "left"]].set_visible(False)
    above = axes.inset_axes((0.0, 1.01, 1.0, 0.1), sharex=axes)
    above.bar(range(len(rejected)), 100 * rejected["share"], color=SIDE_COLOURS["rejected"], width=0.8)
    above.set_ylabel("% of c", fontsize=7)
    above.tick_params(bottom=False, labelbottom=False, labelsize=7)
    above.axhline(0, color=QUIET, lw=0.6)
    above.spines[["top", "right", "bottom"]].set_visible(False)
