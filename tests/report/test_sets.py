"""The set on the page: its mark in the plane, drift by loss, layers, kinds, and the course over a run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.analysis.curves import set_point
from entangle.analysis.predictions import predict_losses
from entangle.figures.pairs import plane, set_spread
from entangle.figures.sets import (
    REACH,
    drift_bars,
    drift_course,
    drift_dots,
    kind_blocks,
    known_changes,
    set_layers,
)
from entangle.figures.style import new_axes
from entangle.measure.set_content import set_content
from entangle.measure.sets import Grouping
from entangle.report.blocks import Figure, Prose
from entangle.report.command import load_sources
from entangle.report.page import render_page
from entangle.report.sections import sections
from entangle.report.source import Source, read_source
from entangle.runs.folder import RunFolder, as_json
from entangle.scores.sums import SumGram
from losses import build
from tests.report.browser import browser, complaints, show
from tests.run_folders import synthetic_pairs, synthetic_run

KINDS = ("length", "words")


def gram(shift: float, seed: int = 0, groups: int = 16, size: int = 4, noise: float = 0.2) -> SumGram:
    """Sums of scores in three dimensions: all have a direction in common; the rejected ones are longer by `shift`."""
    draw = torch.Generator().manual_seed(seed)
    scores = noise * torch.randn(groups * size, 2, 3, generator=draw, dtype=torch.float64)
    scores += torch.tensor([[1.0, 0.4, 0.0], [1.0 + shift, -0.4, 0.0]], dtype=torch.float64)
    summed = scores.view(groups, size, 2, 3).sum(1)
    return SumGram(
        products=torch.einsum("gdk,hek->gdhe", summed, summed),
        own=torch.einsum("gsdk,gsek->gde", *[scores.view(groups, size, 2, 3)] * 2),
        pairs=torch.full((groups,), size),
        squares=torch.full((groups,), size),
        prompts=torch.full((groups,), size),
    )


def content_of(shift: float, losses: tuple[str, ...] = ("dpo", "sft"), noise: float = 0.2) -> dict:
    """What a probe writes as set.json for such scores, of two layers and two kinds of pairs."""
    pairs = synthetic_pairs(64, at_reference=True)
    predictions = predict_losses(pairs, [build(name) for name in losses], resolution=1e-6, batch_size=8)
    grouping = Grouping({i: i // 4 for i in range(64)}, tuple(KINDS[i % 2] for i in range(16)), "kind")
    grams = {f"model.layers.{i}.mlp.up_proj": gram(shift, i, noise=noise) for i in range(2)}
    return as_json(set_content(grams, grouping, predictions, "sgd"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = synthetic_run(tmp_path_factory.mktemp("set") / "run", synthetic_pairs(64), losses=("dpo", "sft"))
    content = content_of(0.8)
    run.write_json("set.json", content)
    summary = dict(run.read_json("summary.json"))
    run.write_json(
        "summary.json",
        summary | {"set": {k: v for k, v in content.items() if k not in ("sums", "layers", "kinds")}},
    )
    return run.path


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return load_sources([folder])[0]


def test_section_of_the_set_stands_first_and_says_which_loss_drifts(source):
    section = sections([source])[0]
    prose, drift, layers, kinds = section.columns[0]
    assert section.key == "set" and isinstance(prose, Prose) and "64 pairs" in prose.text
    assert isinstance(drift, Figure) and isinstance(layers, Figure) and isinstance(kinds, Figure)
    assert drift.table is not None and [row[0] for row in drift.table.rows] == ["dpo", "sft"]
    assert drift.table.rows[0][-1] == "both fall" and drift.table.rows[1][-1] == "both rise"
    assert layers.table is not None and [row[0] for row in layers.table.rows] == ["0", "1"]
    assert kinds.table is not None and len(kinds.table.rows) == 4 and "words" in kinds.caption
    assert {"set", "set-drift", "drift"} - set(section.terms) == {"set-drift"}


def test_drift_has_its_interval_and_the_lines_at_a_half():
    moves = content_of(0.8)["losses"]
    axes = drift_bars(new_axes(), moves)
    upright = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert upright == [-0.5, 0.5]
    drift = moves["dpo"]["drift"]
    assert drift["value"] < -0.5  # longer rejected scores: both fall
    spans = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert any(span == pytest.approx((max(drift["low"], -REACH), drift["high"])) for span in spans)
    words = [text.get_text() for text in axes.texts]
    assert "both fall" in words and "they part" in words and "both rise" in words


def test_a_drift_without_an_interval_has_no_mark():
    move = content_of(0.8)["losses"]["dpo"]
    unknown = move | {
        "drift": move["drift"] | {"low": None, "high": None, "has_meaning": False},
        "is_certain": False,
    }
    axes = drift_bars(new_axes(), {"dpo": unknown})
    assert not [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert "not known" in [text.get_text() for text in axes.texts]


def test_layers_share_the_product_of_the_set():
    content = content_of(0.3)
    shares, cosines = set_layers(content).axes
    dots = [line for line in shares.lines if line.get_marker() == "o"]
    assert sum(float(dot.get_ydata()[0]) for dot in dots) == pytest.approx(100)
    assert all(0 < line.get_ydata()[0] < 1 for line in cosines.lines if line.get_marker() == "o")


def test_a_cosine_cut_to_1_is_an_interval_without_a_dot():
    content = content_of(0.3)
    block = content["layers"]["0"]
    block["cosine"] = {"value": 1.0, "low": 0.98, "high": 1.0, "has_meaning": True, "pairs_needed": None}
    block["may_be_parallel"] = True
    cosines = set_layers(content).axes[1]
    assert len([line for line in cosines.lines if line.get_marker() == "o"]) == 1
    assert (
        len([line for line in cosines.lines if len(line.get_xdata()) == 2 and line.get_linewidth() > 1]) == 2
    )


def test_kinds_show_only_changes_whose_sign_is_known():
    kinds = content_of(0.8)["kinds"]
    known = known_changes(kinds["block"], sorted(KINDS), "dpo", "chosen")
    assert known.shape == (2, 2) and (known[np.isfinite(known)] < 0).all() and np.isfinite(known).any()
    noisy = content_of(0.0, noise=5.0)["kinds"]
    unknown = known_changes(noisy["block"], sorted(KINDS), "dpo", "chosen")
    assert np.isnan(unknown).any()
    drawn = kind_blocks(noisy, "dpo").axes[0]
    assert len(drawn.texts) == np.isfinite(unknown).sum()


def test_the_set_has_a_mark_of_its_own_in_the_plane():
    pairs = synthetic_pairs(12)
    content = content_of(0.8)
    axes = plane(new_axes(), pairs, pd.Series(["ideal"] * 12), {"dpo": 1.0}, content)
    (mark,) = [line for line in axes.lines if str(line.get_label()).startswith("the set of 64 pairs")]
    assert mark.get_xdata()[0] == pytest.approx(math.log(content["norm_ratio"]["value"]))
    spread = set_spread(content)
    assert spread is not None and spread[1] == [content["cosine"][end] for end in ("value", "low", "high")]
    unbounded = content | {"norm_ratio": content["norm_ratio"] | {"high": None}}
    assert set_spread(unbounded) is None
    axes = plane(new_axes(), pairs, pd.Series(["ideal"] * 12), {"dpo": 1.0}, unbounded)
    assert not [line for line in axes.lines if str(line.get_label()).startswith("the set")]


def test_the_live_plane_shows_the_set_with_its_interval(folder, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(render_page(load_sources([folder])), encoding="utf-8")
    with browser() as opened:
        show(opened, file)
        parts = opened.execute_script(
            "return [...document.querySelectorAll('#figure-plane-0-0 .whole path')].map(p => p.getAttribute('d'))"
        )
        assert len(parts) == 3  # two bars and the diamond
        legend = opened.execute_script("return document.getElementById('tools-plane-0-0').textContent")
        assert "the set of 64 pairs: norm ratio" in legend and "[" in legend
        assert complaints(opened) == []


def steps() -> pd.DataFrame:
    """Two pairs of looks: both fall by the same, then both part."""
    draw, moves = np.random.default_rng(0), ((0.0, 0.0), (-1.0, -2.0), (0.0, -3.0))
    rows = [
        pd.DataFrame(
            {
                "step": 10 * number,
                "index": range(20),
                "logps_chosen": up + 0.1 * draw.standard_normal(20),
                "logps_rejected": down + 0.1 * draw.standard_normal(20),
                "change_chosen": 1.0 + 0.01 * draw.standard_normal(20),
                "change_rejected": -1.0 + 0.01 * draw.standard_normal(20),
                "regime": "ideal",
                "cosine": 0.5,
            }
        )
        for number, (up, down) in enumerate(moves)
    ]
    return pd.concat(rows, ignore_index=True)


def training_run(path: Path) -> RunFolder:
    run = synthetic_run(path, is_finished=False)
    for file in (run.path / "pairs").iterdir():
        file.unlink()
    run.write_table("steps.parquet", steps())
    run.write_json("summary.json", {"steps": 20})
    return run


def test_a_training_run_shows_predicted_beside_measured_drift(tmp_path):
    source = read_source(training_run(tmp_path / "run").path)
    (section,) = sections([source])
    (figure,) = [b for b in section.columns[0] if isinstance(b, Figure) and b.name == "drift"]
    assert figure.table is not None and figure.table.rows[0][:2] == ["0 to 10", figure.table.rows[0][1]]
    assert figure.table.rows[0][-1] == "no" and "each pair alone" in figure.caption
    said = [b.text for b in section.columns[0] if isinstance(b, Prose)]
    assert any("a parting of the two was predicted, a fall of both was measured" in text for text in said)
    labels = figure.draw(7.0).axes[0].get_legend_handles_labels()[1]
    assert labels == ["predicted from each pair alone", "measured until the next look"]


def test_a_set_measured_over_a_run_is_drawn_in_the_optimiser_s_metric(tmp_path):
    run = training_run(tmp_path / "run")
    content = content_of(0.8)
    rows = [
        {"step": step, "metric": m} | set_point(content, "dpo")
        for step in (0, 10, 20)
        for m in ("sgd", "adamw")
    ]
    run.write_table("set.parquet", pd.DataFrame(rows))
    source = read_source(run.path)
    blocks = sections([source])[0].columns[0]
    course, drift = [block for block in blocks if isinstance(block, Figure)][:2]
    assert "the set in ADAMW's metric" in drift.caption
    assert len(course.draw(7.0).axes) == 4 and "rho" in course.draw(7.0).axes[3].get_ylabel()
    assert replace(source, sets=None) and "set-drift" not in render_page([source])


def test_figures_of_drift_leave_out_what_has_no_interval():
    table = pd.DataFrame(
        {
            "step": [0, 10],
            "until": [10, 20],
            "of": "the set",
            "measured_margin": [1.0, -1.0],
            "variant": "dpo",
        }
        | {"predicted": [-1.0, -2.0], "predicted_low": [-np.inf, -3.0], "predicted_high": [np.inf, -1.0]}
        | {"measured": [-1.5, np.nan], "measured_low": [-2.0, -np.inf], "measured_high": [-1.0, np.inf]}
    )
    axes = drift_course(new_axes(), table)
    marks = [line for line in axes.lines if line.get_marker() in ("o", "D") and len(line.get_xdata()) == 1]
    assert sorted(float(mark.get_ydata()[0]) for mark in marks) == [-2.0, -1.5]
    assert "no margin was gained: no drift" in axes.get_legend_handles_labels()[1]
    assert len(drift_dots(new_axes(), table).containers) == 0  # one is unbounded, the other has no drift
    assert (
        len(drift_dots(new_axes(), table.drop(columns=["predicted_low", "predicted_high"])).containers) == 1
    )
