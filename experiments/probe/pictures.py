"""The pictures of the documentation: the plane, the page, and parts of it with numbers that reading.md explains.

python -m experiments.probe.pictures docs

Needs the extra `dev`, chromium and chromedriver. All is made anew from the pairs of the package, a minute on a CPU.
"""

from __future__ import annotations

import base64
import contextlib
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from entangle.cli import main
from experiments.probe.picture import draw
from tests.report.browser import browser, show

WIDTH = 1100
PLANE_LOSSES = ("dpo_shift:shift=0.9", "dpo")

Mark = tuple[str, float, float]
"""What a number stands at: a CSS selector, and where in its box, from 0, 0 (top left) to 1, 1."""


@dataclass(frozen=True)
class Picture:
    """A part of the page: from the top of one element to the bottom of another, at most so high, with numbers on it."""

    first: str
    last: str
    marks: tuple[Mark, ...] = ()
    height: int = 1200


PICTURES = {
    "report.png": Picture("body > header", "#regimes", height=1010),
    "reading-verdict.png": Picture(
        ".verdict",
        "#controls",
        (
            (".verdict .lede", 0, 0.2),
            (".verdict .said", 0, 0.5),
            (".verdict dl.facts", 0, 0.5),
            ("#loss", 0.7, 0),
            ("#legend", 1, 0.5),
        ),
    ),
    "reading-plane.png": Picture(
        "#plane",
        "#plane",
        (
            ("#plane .points", 0, 0.97),
            ("#plane .plot.live", 0.9, 0.52),
            ("#plane .whole", 1, 0.05),
            ("#plane .tools", 0.7, 0.36),
        ),
    ),
    "reading-pair.png": Picture(
        "#cards > .card",
        "#cards > .card",
        (
            ("#cards > .card .badge", 1, 0.5),
            ("#cards > .card .reason", 0, 0.5),
            ("#cards > .card dl.facts", 0, 0.5),
            ("#cards > .card .text.chosen", 0, 0.5),
            ("#cards > .card .text.rejected", 0, 0.5),
        ),
    ),
}

MARK = """
const [selector, x, y, number] = arguments
const found = document.querySelector(selector)
if (!found) return false
const box = found.getBoundingClientRect(), dot = document.createElement("div")
dot.textContent = number
const beside = x === 0 ? -14 : x === 1 ? 14 : 0
Object.assign(dot.style, {position: "absolute", left: `${box.left + scrollX + x * box.width - 11 + beside}px`,
  top: `${box.top + scrollY + y * box.height - 11}px`, width: "22px", height: "22px", borderRadius: "11px", zIndex: 99,
  background: "#7b1fa2", color: "white", font: "bold 13px/22px sans-serif", textAlign: "center"})
dot.className = "mark"
document.body.append(dot)
return true
"""
BOX = """
const [first, last] = [...arguments].map(one => document.querySelector(one)?.getBoundingClientRect())
return first && last ? [first.top + scrollY, last.bottom + scrollY] : null
"""


def make_page(folder: Path, *limit: str) -> Path:
    """Probe, take apart and report the pairs of the package; their page."""
    run = str(folder / "run")
    with contextlib.redirect_stdout(io.StringIO()):
        for command in (
            ("probe", "--output_dir", run, *limit),
            ("tokens", run, "--worst", "2", "--losses", "dpo"),
            ("report", run),
        ):
            if status := main(command):
                raise RuntimeError(f"entangle {' '.join(command)} ended with status {status}.")
    return folder / "run" / "report.html"


def photograph(opened: Any, picture: Picture, output: Path) -> None:
    """Put a picture's numbers on the open page, save that part of it, and take them off again.

    Raises:
        LookupError: the page has no longer what the picture shows.
    """
    for number, (selector, x, y) in enumerate(picture.marks, start=1):
        if not opened.execute_script(MARK, selector, x, y, number):
            raise LookupError(f"{output.name}: the page has no {selector!r}.")
    box = opened.execute_script(BOX, picture.first, picture.last)
    if box is None:
        raise LookupError(f"{output.name}: the page has no {picture.first!r} or no {picture.last!r}.")
    top, bottom = max(0, box[0] - 4), box[1] + 4
    clip = {"x": 0, "y": top, "width": WIDTH, "height": min(bottom - top, picture.height), "scale": 1}
    taken = opened.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    opened.execute_script("document.querySelectorAll('.mark').forEach(dot => dot.remove())")
    Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB").save(output, optimize=True)


def photograph_all(page: Path, output: Path) -> None:
    """Every picture of the page."""
    with browser() as opened:
        size = {"width": WIDTH, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        show(opened, page)
        opened.execute_script("document.documentElement.dataset.theme = 'light'")
        for name, picture in PICTURES.items():
            photograph(opened, picture, output / name)


def make(output: Path, *limit: str) -> None:
    """All pictures, into a folder; `limit` is an option of the probe, for a look with fewer pairs."""
    with tempfile.TemporaryDirectory() as folder:
        photograph_all(make_page(Path(folder), *limit), output)
        run = str(Path(folder) / "plane")
        with contextlib.redirect_stdout(io.StringIO()):
            main(["probe", "--losses", *PLANE_LOSSES, "--output_dir", run, *limit])
        draw(run, str(output / "plane.png"))


if __name__ == "__main__":
    make(Path(sys.argv[1]))
