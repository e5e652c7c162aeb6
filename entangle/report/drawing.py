"""A drawing of matplotlib as a part of the page: shapes and text in the page's own colours and font.

What comes back holds no script, no picture and no address; ids are its own, so that drawings don't meet.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from entangle.errors import UserError
from entangle.figures.style import FAINT, INK, ON_DARK, QUIET, any_script

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS: Mapping[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "hatch.linewidth": 0.5,
}
"""How a drawing for the page differs from a file: text stays text, in the size of the page's small print."""

THEME = {
    INK: "--ink",
    "#000000": "--ink",
    "#1f77b4": "--ink",  # what the caps of error bars, which have no inside, are filled with
    QUIET: "--quiet",
    FAINT: "--line",
    "#ffffff": "--card",
    **{colour: f"--data-{colour[1:]}" for colour in ON_DARK},
}
"""Colours of drawings and the properties of the style sheet that stand for them."""

_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_LOCAL = re.compile(r"url\(#([^)]+)\)")
_FONT = re.compile(r"(font-family:|font: (?:[a-z]+ )*[\d.]+px) [^;]*")
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def palette(is_dark: bool) -> str:
    """The colours of data as properties of the style sheet."""
    return " ".join(f"{THEME[light]}: {dark if is_dark else light};" for light, dark in ON_DARK.items())


def svg(draw: Callable[[float], Figure], width: float, key: str) -> str:
    """A drawing as an SVG element.

    Args:
        draw: from a width in inches to the drawing.
        width: inches.
        key: before every id.

    Raises:
        UserError: matplotlib isn't installed.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise UserError("The report needs matplotlib: pip install jinja2 matplotlib") from error
    settings: dict[Any, Any] = {**SETTINGS, "svg.hashsalt": key}
    with rc_context(settings), any_script():
        text = io.StringIO()
        draw(width).savefig(text, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(_FORBIDDEN.sub(" ", text.getvalue()))
    for parent in root.iter():
        for child in [child for child in parent if _name(child) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _name(element)
        element.attrib = {
            name.rpartition("}")[2]: _themed(name, value, key) for name, value in element.attrib.items()
        }
    _, _, across, down = root.get("viewBox", "0 0 1 1").split()
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "fill": "currentColor",
        "stroke-linejoin": "round",
        "aria-hidden": "true",
        "style": f"aspect-ratio: {across} / {down}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def _name(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _themed(name: str, value: str, key: str) -> str:
    """The value of an attribute with the page's colours and font, and with ids that are the drawing's own."""
    if name == "id":
        return f"{key}-{value}"
    if name.endswith("href"):
        return value.replace("#", f"#{key}-", 1)
    if name in ("style", "fill", "stroke", "clip-path"):
        value = _LOCAL.sub(rf"url(#{key}-\1)", value)
        value = _COLOUR.sub(lambda found: _property(found[0]), value)
        return _FONT.sub(r"\1 var(--font)", value)
    return value


def _property(colour: str) -> str:
    return f"var({THEME[colour]})" if colour in THEME else colour
