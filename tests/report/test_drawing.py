"""Drawings as parts of the page: nothing but shapes and text, in the page's colours, with ids of their own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from entangle.analysis.geometry import SIDES
from entangle.analysis.regimes import REGIMES
from entangle.figures.curves import set_band, trajectory
from entangle.figures.pairs import changes, plane
from entangle.figures.regimes import regime_bars
from entangle.figures.settings import knob_curve
from entangle.figures.style import ON_DARK, figure_of, new_axes
from entangle.report import drawing
from entangle.report.blocks import Figure
from entangle.report.command import load_sources
from entangle.report.sections import sections
from tests.report.test_page import HOSTILE
from tests.run_folders import synthetic_pairs, synthetic_run


def shares(*losses: str) -> dict:
    share = {"count": 4, "share": 0.2, "low": 0.1, "high": 0.4}
    return {loss: {regime: share for regime in REGIMES} for loss in losses}


def bars(width: float, *losses: str):
    return figure_of(regime_bars(new_axes(width, 3.0), shares(*losses)))


def test_text_stays_text_and_colours_are_the_page_s():
    made = drawing.svg(lambda width: bars(width, "dpo", "ipo"), 4.2, "key")
    assert ">dpo</text>" in made and ">share of pairs, %</text>" in made
    assert not re.findall(r"#[0-9a-f]{3,8}\b(?![^<]*</text>)", made.replace("#key-", ""))
    assert {f"var(--data-{colour[1:]})" for colour in list(ON_DARK)[:4]} <= set(
        re.findall(r"var\([^)]+\)", made)
    )
    assert "var(--font)" in made and "DejaVu" not in made


def test_hostile_names_make_no_element():
    made = drawing.svg(lambda width: bars(width, HOSTILE, "a\x07$x$b"), 9.2, "key")
    tags = {element.tag for element in ElementTree.fromstring(made).iter()}
    assert tags <= {"svg", "g", "path", "defs", "use", "text", "clipPath", "rect", "pattern", "tspan"}
    texts = [text.text for text in ElementTree.fromstring(made).iter("text")]
    assert HOSTILE[:48] + "…" in texts and "a $x$b" in texts


def test_no_two_drawings_share_an_id():
    """Clip paths and marks are found by id: of two figures alike, neither may reach into the other."""
    found: list[str] = []
    for key in ("one", "two"):
        made = drawing.svg(lambda width: bars(width, "dpo"), 4.2, key)
        ids = re.findall(r' id="([^"]+)"', made)
        assert set(re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', made)) != set()
        assert {a or b for a, b in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', made)} <= set(ids)
        found += ids
    assert len(found) == len(set(found))


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> list[Figure]:
    pairs = synthetic_pairs(72, norm_ratio=0.7).assign(extra=range(72))
    run = synthetic_run(tmp_path_factory.mktemp("drawing") / "run", pairs, losses=("dpo", "simpo", "sft"))
    found = sections(load_sources([run.path]))
    return [block for section in found for block in section.columns[0] if isinstance(block, Figure)]


def test_legends_are_below_their_axes(figures):
    """On both widths: the top of a legend is under the lowest axes, so it never lies over what is drawn."""
    for figure, width in ((each, width) for each in figures for width in (each.page_width, each.width)):
        made = figure.draw(width)
        made.draw_without_rendering()
        lowest = min(axes.get_window_extent().y0 for axes in made.axes)
        for legend in [*made.legends, *(axes.get_legend() for axes in made.axes)]:
            if legend is not None:
                box = legend.get_window_extent()
                assert box.y1 <= lowest and box.x0 >= 0 and box.x1 <= made.bbox.x1, (figure.name, width)


def test_every_figure_has_a_text_and_a_name_of_its_own(figures):
    names = [figure.name for figure in figures]
    assert {"regimes", "plane", "changes", "correlations", "knob-nll"} <= set(names) and len(names) == len(
        set(names)
    )
    assert all(len(figure.alt) > 30 for figure in figures)


def curve(settings: list[float]) -> Iterator[dict]:
    for number, setting in enumerate(settings):
        yield {
            "knob": "nll",
            "setting": setting,
            **dict.fromkeys(REGIMES, 0),
            "ideal": number,
            "both_up": 9 - number,
        }


def test_a_knob_s_axis_begins_at_its_start_and_shows_the_target():
    """Geometric settings stand on a log axis, with the 0 that they start from on it."""
    curves = pd.DataFrame(curve([0.0, 0.01, 0.1, 1.0, 10.0]))
    change = {
        "knob": "nll",
        "title": "weight",
        "start": 0.0,
        "setting": 1.0,
        "reaches": True,
        "at_start": {"label": "dpo"},
    }
    axes = knob_curve(new_axes(), curves, change, 0.9)
    assert axes.get_xscale() == "symlog" and axes.get_xlim()[0] == 0.0 and 0.0 in axes.get_xticks()
    assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [90.0]


def test_an_empty_band_is_drawn_as_empty():
    """Between the steps whose band is open nothing is drawn where no rho is ideal, and a cross says so."""
    points = pd.DataFrame({"step": [0, 10, 20], "set_rho": 1.0})
    points = points.assign(set_low=[0.9, 1.2, 0.8], set_high=[1.1, 1.1, 1.3])
    for name in ("set_low", "set_high"):
        points = points.assign(**{f"{name}_low": points[name] - 0.05, f"{name}_high": points[name] + 0.05})
    axes = set_band(new_axes(), points)
    for edge in axes.lines[:2]:
        assert np.isnan(edge.get_ydata()[1]) and np.isfinite(edge.get_ydata()[[0, 2]]).all()
    (cross,) = [line for line in axes.lines if line.get_label() == "no rho is ideal"]
    assert list(cross.get_xdata()) == [10]
    labels = axes.get_legend_handles_labels()[1]
    assert "set may be ideal" in labels and "set ideal, 95 %" in labels


def test_a_band_without_its_interval_isn_t_drawn():
    """Nothing between or at the edges of a band whose edges aren't known; a dot says so."""
    points = pd.DataFrame({"step": [0, 10], "set_rho": 1.0, "set_low": 0.9, "set_high": 1.1})
    points = points.assign(set_low_low=0.0, set_low_high=np.inf, set_high_low=0.0, set_high_high=np.inf)
    axes = set_band(new_axes(), points)
    assert all(np.isnan(edge.get_ydata()).all() for edge in axes.lines[:2])
    assert "band not known from these pairs" in axes.get_legend_handles_labels()[1]
    assert "set may be ideal" not in axes.get_legend_handles_labels()[1]
    sweep = points[["step", "set_rho", "set_low", "set_high"]].assign(set_cosine=0.9)
    sweep = sweep.assign(**{f"moved_{side}{end}": 0.0 for side in SIDES for end in ("", "_error")})
    assert len(trajectory(sweep).axes) == 1  # an older table, which has no intervals at all


def test_pairs_without_a_direction_leave_the_plane_readable():
    """A zero score has no norm ratio: the others keep their place."""
    pairs = synthetic_pairs(6)
    pairs.loc[0, ["sq_chosen", "inner"]] = 0.0
    axes = plane(new_axes(), pairs, pd.Series(["ideal"] * 6), {"dpo": 1.0})
    assert np.isfinite(axes.get_xlim()).all()
    assert changes(
        new_axes(), pd.DataFrame({"change_chosen": [0.0], "change_rejected": [0.0], "regime": ["ideal"]})
    )
