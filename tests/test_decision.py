"""The decision at the top of a page: the strongest evidence counts, and a weaker one never speaks against it."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from entangle.analysis.decision import HARMFUL, HARMLESS, OPEN, of_probe, of_training
from entangle.analysis.statistics import share
from entangle.analysis.verdict import advice


def regimes(**counts: int) -> dict[str, Any]:
    total = sum(counts.values())
    names = ("ideal", "both_up", "both_down", "inverted", "degenerate")
    return {name: share(counts.get(name, 0), total) for name in names}


def move(chosen: float, rejected: float, half: float = 0.5) -> dict[str, Any]:
    def estimate(value: float) -> dict[str, Any]:
        known = abs(value) > half
        return {
            "value": value,
            "low": value - half,
            "high": value + half,
            "has_meaning": known,
            "pairs_needed": None if known else 240,
        }

    return {"chosen": estimate(chosen), "rejected": estimate(rejected)}


def whole(epoch: tuple[float, float], fresh: tuple[float, float]) -> dict[str, Any]:
    return {"losses": {"dpo": move(*fresh)}, "epoch": {"losses": {"dpo": move(*epoch)}}}


GOOD = {"regimes": {"dpo": regimes(ideal=98, both_down=2)}}


@pytest.mark.parametrize(
    ("content", "verdict", "said"),
    [
        (
            whole((-2.0, -3.0), (-2.0, -3.0)),
            HARMFUL,
            "over these pairs lowers the mean chosen log-prob: chosen -2 ",
        ),
        (whole((2.0, -3.0), (-2.0, -3.0)), HARMFUL, "Harmful to other pairs"),
        (whole((2.0, -3.0), (0.1, -3.0)), HARMLESS, "Not harmful to these pairs"),
        (whole((0.1, -3.0), (0.1, -3.0)), OPEN, "Can't tell"),
        (whole((2.0, 3.0), (2.0, 3.0)), HARMLESS, "raises the mean chosen"),
    ],
)
def test_the_set_decides_whatever_single_pairs_say(content, verdict, said):
    found = of_probe(GOOD, "dpo", whole=content, worst=[3, 1])
    assert found.verdict == verdict and said in found.headline and found.pairs == (3, 1)
    assert ("No single pair shows it" in " ".join(found.details)) == (verdict == HARMFUL)
    assert ("about 240 pairs" in " ".join(found.details)) == (
        abs(content["losses"]["dpo"]["chosen"]["value"]) < 0.5
    )


def test_an_epoch_across_pairs_outweighs_the_set_s_own_block():
    side = {"change": -40.0, "error": 5.0}
    across = {"losses": {"dpo": {"chosen": side, "rejected": side}}}
    found = of_probe(GOOD, "dpo", whole=whole((2.0, -3.0), (2.0, -3.0)), across=across)
    assert found.verdict == HARMFUL and "chosen -40 (95 % interval -49.8 to -30.2)" in found.headline


def test_pairs_alone_prove_no_safety():
    found = of_probe(GOOD, "dpo")
    assert found.verdict == OPEN and "What all pairs together do wasn't measured" in found.details[0]
    many = {"regimes": {"dpo": regimes(ideal=50, both_down=50)}}
    assert of_probe(many, "dpo").verdict == HARMFUL and "on 50 of 100 pairs" in of_probe(many, "dpo").headline


def test_no_change_is_needed_is_never_said_of_a_harmful_set():
    summary = {"regimes": GOOD["regimes"]["dpo"], "target": 0.9, "base": "dpo", "pairs": {"scored": 100}}
    assert "no change is needed" in advice(summary)[0]
    for said in (
        advice(summary | {"set": whole((-2.0, -3.0), (0.1, -3.0))}),
        advice(summary | {"set": whole((0.1, 0.0), (-2.0, -3.0))}),
        advice(summary, is_harmful=True),
    ):
        assert "not enough" in said[0] and "no change" not in " ".join(said)


def course(*chosen: float, margin: float = 0.2) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curve and rows of two pairs at steps 0, 10, ...; pair 1 falls by what the mean does and one nat more."""
    points = pd.DataFrame(
        {
            "step": [10 * i for i in range(len(chosen))],
            "pairs": 2,
            "moved_chosen": chosen,
            "moved_rejected": [value - margin for value in chosen],
            "moved_margin": margin,
        }
    ).assign(**{f"moved_{name}_error": 0.1 for name in ("chosen", "rejected", "margin")})
    rows = [
        {"step": 10 * i, "index": index, "logps_chosen": -9 + value - index * (i > 0), "logps_rejected": -9}
        for i, value in enumerate(chosen)
        for index in (0, 1)
    ]
    return points, pd.DataFrame(rows)


def test_measured_changes_decide_a_run():
    found = of_training(*course(0.0, -0.1, -2.0, -3.0), held_out=True)
    assert found.verdict == HARMFUL and "by step 30: chosen -3 (95 % interval -3.2 to -2.8)" in found.headline
    assert "2 held-out pairs" in found.headline and found.pairs == (1, 0)
    assert any(text.startswith("Between step 10 and step 20 the chosen fell") for text in found.details)
    assert of_training(*course(0.0, 2.0), held_out=False).verdict == HARMLESS
    assert of_training(*course(0.0, -0.05), held_out=False).verdict == OPEN
    shrunk = of_training(*course(0.0, 2.0, margin=-1.0), held_out=False)
    assert shrunk.verdict == HARMFUL and "shrunk the margin" in shrunk.headline
