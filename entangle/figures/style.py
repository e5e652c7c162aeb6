"""What all figures share: colours, marks, empty axes, legends, files. Needs matplotlib.

Every colour that a figure uses stands here with its counterpart on a dark page, so that the same drawing is read on
both.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entangle.analysis.regimes import Regime
from entangle.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

GREEN, AMBER, RED, VIOLET, GREY = "#2a9d6f", "#e0a526", "#c8382e", "#8a4fbf", "#8c8c8c"
BLUE, BROWN, PINK, SLATE = "#2b5c8a", "#7a5230", "#d1699e", "#5f6b73"
INK, QUIET, FAINT = "#222222", "#666666", "#cccccc"
"""Lines and words; what is said in passing; grids and axes of reference."""

ON_DARK = {
    GREEN: "#3fbf8b",
    AMBER: "#e0a526",
    RED: "#f0685c",
    VIOLET: "#b68ae4",
    GREY: "#9a9a9a",
    BLUE: "#6ea8de",
    BROWN: "#b98a63",
    PINK: "#e389b6",
    SLATE: "#9aa6ae",
}
"""The colours of data, and what each becomes on a dark page."""

REGIME_COLOURS: dict[str, str] = {
    Regime.IDEAL: GREEN,
    Regime.BOTH_UP: AMBER,
    Regime.BOTH_DOWN: RED,
    Regime.INVERTED: VIOLET,
    Regime.DEGENERATE: GREY,
}
MARKERS: dict[str, str] = {
    Regime.IDEAL: "o",
    Regime.BOTH_UP: "^",
    Regime.BOTH_DOWN: "v",
    Regime.INVERTED: "s",
    Regime.DEGENERATE: "x",
}
HATCHES: dict[str, str] = {
    Regime.IDEAL: "",
    Regime.BOTH_UP: "///",
    Regime.BOTH_DOWN: "\\\\\\",
    Regime.INVERTED: "xxx",
    Regime.DEGENERATE: "...",
}
"""Marks and hatches, so that colour isn't needed to distinguish regimes."""

SIDE_COLOURS = {"chosen": BLUE, "rejected": RED}
CAUSE_COLOURS = {
    "own": GREEN,
    "partner": RED,
    "others": AMBER,
    "momentum": BLUE,
    "decay": BROWN,
    "clipping": PINK,
    "remainder": GREY,
}
"""Causes of a ledger."""

LINES = (BLUE, RED, GREEN, AMBER, VIOLET, SLATE, PINK, BROWN)
"""Colours of lines, one after the other."""

SMALL = 8
"""Points of a legend's font."""


def new_axes(width: float = 7.0, height: float = 4.6) -> Axes:
    """An empty figure's axes, drawn without a display; sizes in inches.

    Raises:
        UserError: matplotlib isn't installed.
    """
    return panels(1, 1, width, height)[1][0]


def panels(
    rows: int, columns: int, width: float, height: float, *, sharex: bool = True, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` axes, row by row; sizes in inches.

    Raises:
        UserError: matplotlib isn't installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("Figures need matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False).flat)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_of(axes: Axes) -> Figure:
    """The whole figure that an axes stands in."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def legend_below(figure: Figure, axes: Sequence[Axes] | None = None) -> None:
    """One legend for a figure, under all its axes, in as many columns as its width allows; a label stands once."""
    entries: dict[str, Any] = {}
    for each in figure.axes if axes is None else axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if not entries:
        return
    longest = max(map(len, entries))
    columns = int(
        figure.get_figwidth() / (0.062 * longest + 0.5)
    )  # a letter, and the mark with its gaps, inches
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=max(1, min(columns, len(entries))),
        fontsize=SMALL,
        frameon=False,
    )


def safe(text: Any, width: int = 60) -> str:
    r"""Text from outside as a label: no formula is opened by it, no control character left in it, and it is cut.

    >>> safe("a$b$\x07")
    'a\\$b\\$ '
    """
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return (shown if len(shown) <= width else f"{shown[: width - 1]}…").replace("$", r"\$")


def whole_steps(axes: Axes) -> None:
    """Ticks of an axis of steps at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def plain_log(axis: Axis) -> None:
    """A log axis, all of it drawn, with numbers as people write them: `0.05`, not 5 x 10 to the -2."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low) if low > 0 else 0.0
    subs = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs) if decades > 0.7 else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def names_beside(axes: Axes, names: Iterable[Any]) -> list[str]:
    """Names as labels beside an axes, cut so that they leave it most of the figure's width."""
    room = int(0.4 * figure_of(axes).get_figwidth() / 0.075)
    return [safe(name, room) for name in names]


@contextmanager
def any_script() -> Iterator[None]:
    """Within it, a letter that the font hasn't got is drawn as a box, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def save(drawn: Axes | Figure, path: str | Path) -> None:
    """Write a figure, given itself or by one of its axes; the suffix decides the format (png, svg, pdf)."""
    with any_script():
        drawn.get_figure(root=True).savefig(path, dpi=150)  # pyright: ignore[reportOptionalMemberAccess]
