"""What all tables share: numbers as cells, heads, and how a result shows itself in a terminal or a notebook.

Text from a data set is untrusted: tables print it with markup switched off.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.regimes import Regime
from entangle.analysis.wording import reference_text
from entangle.config import EMBEDDED
from entangle.tables.console import SafeConsole

REGIME_STYLES = {
    Regime.IDEAL: "green",
    Regime.BOTH_UP: "yellow",
    Regime.BOTH_DOWN: "red",
    Regime.INVERTED: "magenta",
    Regime.DEGENERATE: "dim",
}
"""How the terminal colours a regime."""

IDEAL_MEANS = "ideal: the chosen rises and the rejected falls, by this step alone"
"""Said where a table first speaks of ideal pairs."""


def percent(share: Mapping[str, float], *, interval: bool = True) -> str:
    """`62 [51-72]`: a share and its interval in per cent; a dot for none at all."""
    if share["share"] is None:  # nothing could be counted
        return "-"
    if share["count"] == 0 and not interval:
        return "·"
    text = f"{100 * share['share']:.0f}"
    return f"{text} [{100 * share['low']:.0f}-{100 * share['high']:.0f}]" if interval else text


def number(value: float | None, form: str = ".3g") -> str:
    """A number as a cell; a dash for none."""
    return "-" if value is None or value != value else format(value, form)


def with_interval(rho: Mapping[str, float | None]) -> str:
    """A rank correlation and its interval as a cell."""
    return f"{number(rho['rho'])} [{number(rho['low'])}, {number(rho['high'])}]"


def plain_table(title: str, **options: Any) -> Table:
    """An empty table with a rule under its head and nothing around it."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, **options)


def heading(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> Text:
    """Pairs counted, and what the numbers are of: model, parameters, precision, metric."""
    text = Text(count_line(summary, provenance), "bold")
    text.append(
        f"\n{measured_on(provenance)}, {provenance['metric'].upper()} metric, reference: "
        f"{reference_text(provenance['reference'])}\n",
        style="not bold",
    )
    return text


def measured_on(provenance: Mapping[str, Any]) -> str:
    """Model, probed parameters and precision in a few words."""
    return (
        f"{model_name(provenance)}, {provenance['probed_parameters']:,} {provenance['probed_kind']} parameters, scores "
        f"in {provenance['score_dtype']}"
    )


def model_name(provenance: Mapping[str, Any]) -> str:
    """Model and adapter, without the folders that they lie in."""
    names = [provenance["model_name_or_path"], provenance["adapter_name_or_path"]]
    return " + ".join(dict.fromkeys(Path(name).name for name in names if name))


def of_data(count: int, noun: str, provenance: Mapping[str, Any]) -> str:
    """What was counted and of which data: a file by its name, a data set of the hub by its id.

    Args:
        count: how many.
        noun: what, in the plural.
        provenance: of the run; without `dataset_name`, as of pairs in memory, nothing is said of the data.

    >>> of_data(40, "pairs", {"dataset_name": "data/pairs.jsonl"}), of_data(72, "pairs", {"dataset_name": "embedded"})
    ('40 pairs of pairs.jsonl', '72 embedded pairs')
    """
    name = provenance.get("dataset_name")
    if name is None:
        return f"{count} {noun}"
    if name == EMBEDDED:
        return f"{count} {EMBEDDED} {noun}"
    is_place = bool(Path(name).suffix) or Path(name).is_absolute()
    return f"{count} {noun} of {Path(name).name if is_place else name}"


def count_line(summary: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """`450 pairs of pairs.jsonl, 448 scored; 2 truncated`."""
    counts = dict(summary["pairs"])
    total, scored = counts.pop("total"), counts.pop("scored")
    flags = ", ".join(f"{count} {flag.replace('_', '-')}" for flag, count in counts.items() if count)
    return f"{of_data(total, 'pairs', provenance)}, {scored} scored" + (f"; {flags}" if flags else "")


def snippet(text: str, width: int = 150) -> str:
    """The start of a text on one line, control characters shown as spaces."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def render(renderable: RenderableType, width: int = 100) -> str:
    """Plain text of a table, for a notebook or a file."""
    console = SafeConsole(width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class Shown(ABC):
    """A command's result: shown as rich tables in a terminal, as plain text, and in a notebook."""

    @abstractmethod
    def renderable(self) -> RenderableType:
        """The tables as rich objects."""

    def table(self, width: int = 100, **shown: Any) -> str:
        """The tables as plain text; `shown` is passed to `renderable`."""
        return render(self.renderable(**shown), width)

    def _repr_html_(self) -> str:
        return to_html(self.renderable())


def to_html(renderable: RenderableType, width: int = 100) -> str:
    """The same as HTML for a notebook, in colour; everything in it is escaped."""
    console = SafeConsole(width=width, record=True, file=io.StringIO(), force_jupyter=False)
    console.print(renderable)
    style = (
        "overflow-x:auto;white-space:pre;line-height:1.25;font-family:ui-monospace,Menlo,Consolas,monospace"
    )
    return console.export_html(inline_styles=True, code_format=f'<pre style="{style}">{{code}}</pre>')
