"""What-if: intervals against a scan of real losses, smallest changes, verdicts, refusals, files, words."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from torch.testing import assert_close

from entangle.analysis.geometry import RESOLUTION, PairGeometry
from entangle.analysis.hyperparameters import (
    DEFAULT_KNOBS,
    KNOBS,
    IncentiveLine,
    PartlyNormalised,
    SettingRange,
    best_change,
    falling_interval,
    fewest_change,
    ideal_interval,
    readable,
    smallest_change,
)
from entangle.analysis.predictions import geometry_of, incentives_of, is_scored, logps_of, predict_losses
from entangle.analysis.regimes import REGIMES, critical_addition, critical_shift, predict
from entangle.analysis.statistics import wilson
from entangle.cli import main
from entangle.commands.whatif import what_if
from entangle.commands.whatif.choice import token_requirements
from entangle.commands.whatif.grid import apply_grid
from entangle.commands.whatif.scored import margin_growth
from entangle.config import build_losses
from entangle.errors import ConfigError, RunError
from entangle.runs.folder import RunFolder
from losses import CATALOGUE, CPO, DPO, DPOP, IPO, KTO, WPO, DPOShift, Incentives, SigmoidNorm, build
from tests.run_folders import pairs_of, synthetic_pairs, synthetic_run, with_flag

FLOAT32 = RESOLUTION[torch.float32]
BATCH_COUPLED = [name for name in CATALOGUE if build(name).is_batch_coupled]


def one_block(resolution: float = FLOAT32) -> PairGeometry:
    """A = 1, B = 8.5, c = 1.5: DPO lowers both; ideal for rho between 1.5 and 5.67."""
    one = torch.ones(1, dtype=torch.float64)
    return PairGeometry(one, 8.5 * one, 1.5 * one, -0.5 * one, 7 * one, resolution=resolution)


def constant(chosen: float, rejected: float, pairs: int = 1) -> Incentives:
    return Incentives(
        *(torch.full((pairs,), float(value), dtype=torch.float64) for value in (chosen, rejected))
    )


def hand_pairs(count: int = 4) -> pd.DataFrame:
    """`count` copies of `one_block`, DPO's d = .05 (beta .1 at the reference), one-token responses."""
    block = one_block()
    columns = (
        getattr(block, f.name).expand(count) for f in dataclasses.fields(block) if f.name != "resolution"
    )
    logps = torch.full((2, count), -3.0, dtype=torch.float64)
    return pairs_of(PairGeometry(*columns), logps, logps, torch.ones(2, count))


def ideal_under(pairs: pd.DataFrame, loss, batch_size: int = 8) -> np.ndarray:
    """The slow oracle: one loss through `predict_losses`, which the probe uses."""
    rows = predict_losses(pairs, [loss], resolution=FLOAT32, batch_size=batch_size)
    return (rows["regime"] == "ideal").to_numpy()


# Intervals


def test_the_hand_fixture_has_the_interval_of_the_theory():
    line = IncentiveLine(constant(0.05, 0.05), constant(1, 0))
    lower, upper = ideal_interval(one_block(resolution=0.0), line)
    assert (lower.item(), upper.item()) == pytest.approx((0.025, 0.05 * (8.5 / 1.5 - 1)), abs=1e-15)
    assert upper.item() == pytest.approx(0.2333, abs=1e-4)


def test_critical_nll_weights_of_the_hand_fixture_come_out_of_the_whole_command():
    result = what_if(hand_pairs(), ["dpo"], knobs=["nll", "nll_sum"])
    for knob in ("nll", "nll_sum"):  # one-token responses: both units agree
        assert result.critical[f"{knob}_lower"].tolist() == pytest.approx([0.025] * 4, rel=1e-4)
        assert result.critical[f"{knob}_upper"].tolist() == pytest.approx([7 / 30] * 4, rel=1e-4)


def test_intervals_are_the_closed_forms_where_those_hold():
    """Without tolerance: `critical_addition` for (base + x, base), `critical_shift` for (1, x)."""
    chosen, rejected = torch.randn(2, 400, 3, dtype=torch.float64)
    block = dataclasses.replace(PairGeometry.from_scores(chosen, rejected), resolution=0.0)
    base = torch.rand(400, dtype=torch.float64) + 0.1
    ones, zeros = torch.ones_like(base), torch.zeros_like(base)
    found = ideal_interval(block, IncentiveLine(Incentives(base, base), Incentives(ones, zeros)))
    unbound = block.inner <= 0  # the interval is then cut at 0 by the other response instead
    for got, expected in zip(found, critical_addition(block, base), strict=True):
        assert_close(got[~unbound], expected[~unbound], rtol=1e-9, atol=1e-12)
    assert torch.isposinf(found[1][unbound]).all()
    found = ideal_interval(block, IncentiveLine(Incentives(ones, zeros), Incentives(zeros, ones)))
    for got, expected in zip(found, critical_shift(block), strict=True):
        assert_close(got[~unbound], expected[~unbound], rtol=1e-9, atol=1e-12)
    assert (found[0][unbound] <= 0).all() and torch.isposinf(found[1][unbound]).all()


@pytest.mark.parametrize("resolution", [FLOAT32, 0.05])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_intervals_hold_the_tolerance_and_any_signs(signs: tuple[int, int], resolution: float):
    """On a random line of incentives, `predict` says ideal exactly within the interval: a scan."""
    chosen, rejected = torch.randn(2, 60, 3, dtype=torch.float64)
    block = dataclasses.replace(PairGeometry.from_scores(chosen, rejected), resolution=resolution)
    fixed, slope = torch.rand(2, 2, 60, dtype=torch.float64) + 0.05
    line = IncentiveLine(
        Incentives(signs[0] * fixed[0], signs[1] * fixed[1]),
        Incentives(slope[0], -slope[1] * torch.rand(60)),
    )
    lower, upper = ideal_interval(block, line)
    seen = 0
    for x in torch.linspace(-6, 6, 401, dtype=torch.float64).tolist():
        ideal = predict(block, line.at(x)).regime_codes == 0
        assert torch.equal(ideal, (lower < x) & (x < upper))
        seen += int(ideal.sum())
    assert seen > 100


@pytest.mark.parametrize("name", list(KNOBS))
@pytest.mark.parametrize("at_reference", [False, True], ids=["trained", "at the reference"])
def test_intervals_agree_with_a_scan_of_the_real_losses(name: str, at_reference: bool):
    """For every knob and pair: ideal under the loss at a setting iff the setting is within the interval."""
    pairs = synthetic_pairs(50, norm_ratio=1.7, at_reference=at_reference)
    pairs.loc[::3, "length_rejected"] = pairs["length_chosen"]  # the length exponent doesn't act on these
    knob, base = KNOBS[name], DPO(beta=0.2)
    critical = what_if(pairs, ["dpo"], base=base, knobs=[name]).critical
    lower, upper = (critical[f"{name}_{side}"].to_numpy() for side in ("lower", "upper"))
    top = knob.end if math.isfinite(knob.end) else 12.0
    settings = [x for x in np.linspace(knob.start, top, 25) if x > 0 or name != "shift"]
    changes = 0
    for x in settings:
        ideal = ideal_under(pairs, knob.loss(base, float(x)))
        assert (ideal == ((lower < x) & (x < upper))).all(), x
        changes += int((ideal != ideal_under(pairs, knob.origin(base))).sum())
    assert changes > 10 or (name == "dpop" and at_reference)  # the scan crosses ends


@pytest.mark.parametrize("base", ["ipo", "cpo:nll_weight=0.1", "kto", "cal_dpo", "npo"])
def test_the_nll_knob_works_from_any_base(base: str):
    from entangle.config import parse_spec

    pairs, loss = synthetic_pairs(40, norm_ratio=1.5), build(parse_spec(base))
    critical = what_if(pairs, ["dpo"], base=loss, knobs=["nll_sum"]).critical
    lower, upper = critical["nll_sum_lower"].to_numpy(), critical["nll_sum_upper"].to_numpy()
    size = float(incentives_of(loss, logps_of(pairs), 8).rejected.abs().median())
    for x in size * np.linspace(0, 4, 9):
        assert (ideal_under(pairs, KNOBS["nll_sum"].loss(loss, x)) == ((lower < x) & (x < upper))).all()


def test_every_knob_starts_at_the_loss_it_says():
    logps = logps_of(synthetic_pairs(20))
    for knob in KNOBS.values():
        found, expected = (
            incentives_of(loss, logps, 8) for loss in (knob.loss(DPO(), knob.start), knob.origin(DPO()))
        )
        assert_close(found.chosen, expected.chosen)
        assert_close(found.rejected, expected.rejected)


def test_partly_normalised_ends_in_two_losses_of_the_catalogue():
    logps = logps_of(synthetic_pairs(20))
    for exponent, loss in ((0.0, DPO(beta=0.3)), (1.0, SigmoidNorm(beta=0.3))):
        assert_close(PartlyNormalised(0.3, exponent).per_pair(logps), loss.per_pair(logps))
    assert_close(
        PartlyNormalised(0.3, 0.0, False).per_pair(logps), CPO(beta=0.3, nll_weight=0.0).per_pair(logps)
    )
    found = incentives_of(PartlyNormalised(0.1, 0.5), logps, 8)
    assert_close(found.chosen / found.rejected, (logps.length_rejected / logps.length_chosen).sqrt())


# The smallest change


def scan_count(lower: torch.Tensor, upper: torch.Tensor, x: float) -> int:
    return int(((lower < x) & (x < upper)).sum())


@pytest.mark.parametrize(("start", "end"), [(0.0, math.inf), (1.0, 0.0), (0.0, 1.0)])
def test_the_smallest_change_is_the_smallest(start: float, end: float):
    """Against a dense scan; and right before it fewer intervals hold, over many random sets."""
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        lower = torch.randn(25, generator=draw, dtype=torch.float64)
        upper = lower + torch.rand(25, generator=draw, dtype=torch.float64)
        lower[::6] = upper[::6] = torch.nan
        top = end if math.isfinite(end) else 4.0
        scan = np.linspace(start, top, 4001)
        counts = np.array([scan_count(lower, upper, x) for x in scan])
        best = best_change(lower, upper, start, end)
        assert best.count >= counts.max() and scan_count(lower, upper, best.nearest) == best.count
        for needed in (1, 4, best.count, best.count + 1):
            found = smallest_change(lower, upper, needed, start, end)
            assert (found is None) == (needed > best.count)
            if found is None:
                assert (counts < needed).all()
                continue
            assert scan_count(lower, upper, found.nearest) == found.count >= needed
            distance = abs(found.nearest - start)
            closer = np.abs(scan - start) < distance * (1 - 1e-6)
            assert (counts[closer] < needed).all()
            if distance:
                assert scan_count(lower, upper, start + (found.nearest - start) * (1 - 1e-6)) < needed
            inside = (np.abs(scan - start) >= distance) & (np.abs(scan - start) < abs(found.until - start))
            assert (counts[inside] >= needed).all()
            if found.until != end:  # 1 - (1 - x) isn't x to the last digit
                assert scan_count(lower, upper, found.until + math.copysign(1e-12, end - start)) < needed


def test_an_interval_does_not_hold_its_ends():
    lower, upper = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert smallest_change(lower, upper, 2, 0.0, math.inf) is None
    found = smallest_change(lower, upper, 1, 0.0, math.inf)
    assert found is not None and 0 < found.nearest < 1e-6


@pytest.mark.parametrize(
    ("found", "start", "expected"),
    [
        (SettingRange(0.02500001, 0.2333, 3), 0.0, 0.026),
        (SettingRange(0.02500001, 0.0256, 3), 0.0, 0.0251),
        (SettingRange(0.6543, 0.1, 3), 1.0, 0.65),
        (SettingRange(0.65438, 0.654, 3), 1.0, 0.6543),
        (SettingRange(0.0, 1.0, 3), 0.0, 0.0),
        (SettingRange(132.01, math.inf, 3), 0.0, 140.0),
    ],
)
def test_readable_settings_stay_within_the_stretch(found: SettingRange, start: float, expected: float):
    assert readable(found, start) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["nll", "nll_sum", "nll_batch", "dpop", "shift"])
def test_the_smallest_helpful_setting_reaches_the_target_and_a_millionth_less_does_not(name: str):
    pairs = synthetic_pairs(60, norm_ratio=2.0, cosine=0.6)
    first = ideal_under(pairs, DPO()).sum()
    (change,) = what_if(pairs, ["dpo"], knobs=[name], target=(first + 3) / 60).summary["changes"]
    assert change["reaches"] and change["needed"] == first + 3
    knob = KNOBS[name]
    at = {x: ideal_under(pairs, knob.loss(DPO(), x)).sum() for x in (change["exact"], change["setting"])}
    assert min(at.values()) >= first + 3 > ideal_under(pairs, knob.loss(DPO(), _nearer(change, 1e-6))).sum()
    assert change["at_setting"]["regimes"]["ideal"]["count"] == at[change["setting"]]
    assert change["gained"] - change["lost"] == at[change["setting"]] - first


def _nearer(change: dict, part: float) -> float:
    return change["start"] + (change["exact"] - change["start"]) * (1 - part)


def test_an_nll_weight_helps_first_and_overshoots_then():
    (change,) = what_if(hand_pairs(), ["dpo"], knobs=["nll"]).summary["changes"]
    assert change["exact"] == pytest.approx(0.025, rel=1e-4) and change["until"] == pytest.approx(
        7 / 30, rel=1e-4
    )
    past = predict_losses(hand_pairs(), [KNOBS["nll"].loss(DPO(), 0.24)], resolution=FLOAT32, batch_size=8)
    assert set(past["regime"]) == {"both_up"} == {change["overshoots_into"]}


def test_a_target_out_of_reach_is_said_with_the_best_that_there_is():
    pairs = synthetic_pairs(80, norm_ratio=2.5, cosine=0.9)
    result = what_if(pairs, ["dpo"], target=0.95)
    assert not any(change["reaches"] for change in result.summary["changes"])
    for change in result.summary["changes"]:
        knob = KNOBS[change["knob"]]
        settings = [
            x for x in np.linspace(knob.start, min(knob.end, 20.0), 60) if x > 0 or change["knob"] != "shift"
        ]
        scanned = max(ideal_under(pairs, knob.loss(DPO(), float(x))).sum() for x in settings)
        assert change["best_count"] >= scanned
        assert ideal_under(pairs, knob.loss(DPO(), change["best"])).sum() == change["best_count"]
    assert "brings 95 % there" in result.summary["recommendation"]


def test_dpop_is_idle_at_the_reference_and_says_so():
    pairs = synthetic_pairs(40, at_reference=True, norm_ratio=2.0)
    result = what_if(pairs, ["dpo"], knobs=["dpop"])
    (change,) = result.summary["changes"]
    assert change["acts_on"] == 0 and change["setting"] == change["start"]
    assert "penalty is off" in result.summary["recommendation"]


# Verdicts of losses and grids


def test_verdicts_are_those_of_the_probe():
    """Every loss of the catalogue that the rows can judge, against `predict_losses` row by row."""
    pairs = with_flag(synthetic_pairs(45), [3, 17], "dropped")
    result = what_if(pairs, grid=["dpop.penalty=1,5", "ipo.tau=0.01,1"])
    scored = is_scored(pairs)
    judged = [build({"name": row.loss, **json.loads(row.setting)}) for row in result.settings.itertuples()]
    expected = predict_losses(pairs, judged, resolution=FLOAT32, batch_size=8)
    assert len(result.regimes) == scored.sum() == 43
    for loss, row in zip(judged, result.settings.to_dict("records"), strict=True):
        rows = expected[expected["loss"] == loss.label]
        assert rows["regime"].tolist() == result.regimes[loss.label].astype(str).tolist()
        assert {name: (rows["regime"] == name).sum() for name in REGIMES} == {
            r: row[f"{r}_count"] for r in REGIMES
        }
        change = (rows["change_chosen"] - rows["change_rejected"]).median()
        assert row["margin_change_median"] == pytest.approx(change, rel=1e-9)


def test_equal_verdicts_share_a_number():
    settings = what_if(
        synthetic_pairs(60), ["dpo", "robust", "dpop", "sft"], ["dpo.beta=0.01,0.1,1"]
    ).settings
    by_label = settings.set_index("label")["verdict"]
    assert by_label["dpo(beta=0.01)"] == by_label["dpo"] == by_label["dpo(beta=1)"] == by_label["robust"]
    assert settings["verdict"].nunique() == 3


def test_intervals_of_shares_are_wilsons():
    counts, totals = np.array([0, 3, 40, 60]), np.full(4, 60)
    for low, high, count in zip(*wilson(counts, totals), counts, strict=True):
        expected = binomtest(int(count), 60).proportion_ci(0.95, method="wilson")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_margin_of_equal_incentives_grows_as_fast_as_it_can():
    block = PairGeometry.from_scores(*torch.randn(2, 50, 3, dtype=torch.float64))
    assert margin_growth(block, constant(0.7, 0.7, 50))["margin_efficiency_mean"] == pytest.approx(
        1, abs=1e-9
    )
    sft, scaled = (margin_growth(block, constant(scale, 0, 50)) for scale in (1, 100))
    assert sft["margin_efficiency_median"] == pytest.approx(scaled["margin_efficiency_median"], rel=1e-9)
    assert sft["margin_efficiency_median"] < 1
    assert scaled["margin_change_mean"] == pytest.approx(100 * sft["margin_change_mean"])


def test_margin_efficiency_is_the_cosine_between_the_step_and_the_steepest_direction():
    chosen, rejected = torch.randn(2, 1, 5, dtype=torch.float64)
    step, steepest = 1.3 * chosen - 0.2 * rejected, chosen - rejected
    expected = torch.nn.functional.cosine_similarity(step, steepest).item()
    found = margin_growth(PairGeometry.from_scores(chosen, rejected), constant(1.3, 0.2))
    assert found["margin_efficiency_mean"] == pytest.approx(expected, abs=1e-12)
    assert found["margin_change_mean"] == pytest.approx((step * steepest).sum().item(), abs=1e-12)


def test_a_grid_multiplies_the_settings_of_the_losses_it_names():
    grid = ["beta=0.1,0.5", "dpop.penalty=1,5"]
    labels = [loss.label for loss in apply_grid([DPO(), DPOP(), IPO()], grid)]
    assert labels == [
        "dpo",
        "dpo(beta=0.5)",
        "dpop(penalty=1)",
        "dpop(penalty=5)",
        "dpop(beta=0.5, penalty=1)",
        "dpop(beta=0.5, penalty=5)",
        "ipo",
    ]
    assert apply_grid([DPOShift()], ["shift=5e-1"])[0].config == {
        "name": "dpo_shift",
        "beta": 0.1,
        "shift": 0.5,
    }


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("dpop.lam=1,5", "'dpop' has no hyper-parameter 'lam'. Known: beta, penalty"),
        ("lam=1,5", "The judged losses have no hyper-parameter 'lam'"),
        ("ipo.tau=1", "'ipo', which isn't judged here. Judged: dpo, dpop"),
        ("dpo.beta", "got 'dpo.beta'"),
        ("dpo.beta=", "got 'dpo.beta='"),
        (".beta=1", "got '.beta=1'"),
        (1, "got '1'"),  # [dpo.beta=0.1,1] in YAML, unquoted
        ("dpo.beta=0.1,high", "expected numbers separated by commas; got 'high'"),
        ("dpo.beta=-1", "expects beta > 0"),
    ],
)
def test_a_wrong_grid_is_refused_with_what_is_known(grid, words: str):
    with pytest.raises(ConfigError) as caught:
        apply_grid([DPO(), DPOP()], [grid])
    assert words in str(caught.value)


@pytest.mark.parametrize("name", BATCH_COUPLED)
def test_batches_evaluated_together_are_those_evaluated_one_by_one(name: str):
    """19 pairs in batches of 8: two whole ones at once, and the rest."""
    logps, loss = logps_of(synthetic_pairs(19)), build(name)
    found = incentives_of(loss, logps, 8)
    parts = [loss.incentives(logps[start : start + 8]) for start in (0, 8, 16)]
    assert_close(found.chosen, torch.cat([part.chosen for part in parts]))
    assert_close(found.rejected, torch.cat([part.rejected for part in parts]))


def test_the_batch_composition_decides_and_is_said():
    pairs = synthetic_pairs(40)
    eight, four = (what_if(pairs, ["kto"], loss_batch_size=size) for size in (8, 4))
    assert eight.settings["margin_change_mean"].iloc[-1] != four.settings["margin_change_mean"].iloc[-1]
    assert "batches of 4 consecutive scored pairs" in four.table(120)
    assert "consecutive" not in what_if(pairs, ["dpo"]).table(120)


def test_the_work_grows_with_the_settings_not_with_the_pairs(monkeypatch: pytest.MonkeyPatch):
    """A batch-coupled loss is called a fixed number of times, however many batches there are."""
    calls = {"kto": 0}
    original = KTO.per_pair

    def counted(self, logps):
        calls["kto"] += 1
        return original(self, logps)

    monkeypatch.setattr(KTO, "per_pair", counted)
    seen = []
    for count in (20, 500):
        calls["kto"] = 0
        what_if(synthetic_pairs(count), ["kto"], ["kto.beta=0.1,0.2,0.3"])
        seen.append(calls["kto"])
    assert seen == [6, 6]  # whole batches at once, and the rest, at three settings


# Refusals


def test_token_weighted_losses_are_refused_by_name_with_what_to_record():
    refused = what_if(synthetic_pairs(20)).summary["refused"]
    for name in (name for name in CATALOGUE if build(name).needs_tokens):
        assert any(sentence.startswith(name) for sentence in refused)
    assert any("log_collision_chosen" in sentence for sentence in refused if sentence.startswith("wpo"))
    assert any("kl_rejected" in sentence for sentence in refused if sentence.startswith("tdpo1"))
    with pytest.raises(ConfigError, match="wpo weighs tokens"):
        what_if(synthetic_pairs(20), ["dpo", "wpo"])


def test_requirements_of_a_token_weighted_loss_are_asked_of_the_loss():
    expected = {"log_collision_chosen", "log_collision_rejected", "ref_chosen", "ref_rejected"}
    assert set(token_requirements(WPO())) == expected


def test_without_a_reference_the_others_are_refused_and_the_base_changes():
    result = what_if(synthetic_pairs(30, has_reference=False))
    assert result.summary["base"] == "cpo(nll_weight=0)"
    assert any("The knob dpop" in sentence for sentence in result.summary["refused"])
    assert any(sentence.startswith("dpo needs a reference") for sentence in result.summary["refused"])
    assert {change["knob"] for change in result.summary["changes"]} == {"nll", "length"}
    with pytest.raises(ConfigError, match="dpo needs a reference"):
        what_if(synthetic_pairs(30, has_reference=False), base="dpo")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"losses": ["dop"]}, "Unknown loss 'dop'"),
        ({"losses": [{"name": "dpop", "lam": 5}]}, "Unknown hyper-parameter 'lam'"),
        ({"knobs": ["nlll"]}, "Unknown knob 'nlll'. Known knobs: nll"),
        ({"base": "wpo"}, "wpo weighs tokens"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(arguments: dict, words: str):
    with pytest.raises(ConfigError) as caught:
        what_if(synthetic_pairs(10), **arguments)
    assert words in str(caught.value)


def test_rows_without_any_score_are_refused():
    with pytest.raises(RunError, match="none of the 5 pairs"):
        what_if(with_flag(synthetic_pairs(5), range(5), "dropped"))


# Pairs that no loss can disentangle


def test_parallel_and_identical_pairs_are_listed_and_never_ideal():
    shared = torch.randn(6, 3, dtype=torch.float64)
    rejected = shared * torch.tensor([1, 1, 2, -1, -2, -0.5])[:, None]
    logps = torch.full((2, 6), -5.0)
    pairs = pairs_of(PairGeometry.from_scores(shared, rejected), logps, logps, torch.ones(2, 6))
    pairs.loc[0, "identical"] = True
    result = what_if(pairs)
    assert result.summary["inseparable"]["indices"] == [0, 1, 2]
    assert result.summary["inseparable"]["reasons"] == {"parallel": 2, "identical": 1}
    assert (result.critical["ideal_settings"][:3] == 0).all() and (
        result.critical["ideal_settings"][3:] > 0
    ).all()
    bounds = [f"{knob}_{side}" for knob in DEFAULT_KNOBS for side in ("lower", "upper")]
    assert result.critical.loc[:2, bounds].isna().all().all()
    assert "3 pairs can't be made ideal by any loss" in result.summary["recommendation"]
    assert "can't be reached on these pairs by any loss" in result.summary["recommendation"]


# Where the chosen stops falling


def falls_under(pairs: pd.DataFrame, loss, batch_size: int = 8) -> np.ndarray:
    """The slow oracle: pairs whose chosen a loss lowers, by `predict_losses`, beyond the error of the arithmetic."""
    rows = predict_losses(pairs, [loss], resolution=FLOAT32, batch_size=batch_size)
    d_w, d_l = rows["incentive_chosen"], rows["incentive_rejected"]
    norms = np.sqrt(pairs["sq_chosen"] * pairs["sq_rejected"])
    floor = FLOAT32 * (d_w.abs() * pairs["sq_chosen"] + d_l.abs() * norms)
    return (rows["change_chosen"] < -floor).to_numpy()


@pytest.mark.parametrize("name", list(KNOBS))
def test_falls_agree_with_a_scan_of_the_real_losses(name: str):
    """A pair's chosen falls within its interval alone; no scanned setting has fewer, no nearer one as few."""
    pairs = synthetic_pairs(50, norm_ratio=1.7)
    knob, base = KNOBS[name], DPO(beta=0.2)
    line = knob.line(base, logps_of(pairs), 8)
    lower, upper = (end.numpy() for end in falling_interval(geometry_of(pairs, FLOAT32), line))
    summary = what_if(pairs, ["dpo"], base=base, knobs=[name]).summary
    found = summary["changes"][0]["falls"]
    assert falls_under(pairs, base).sum() == summary["falls"]["count"] > 10
    assert falls_under(pairs, knob.loss(base, found["setting"])).sum() == found["after"]["count"]
    top, crossed = (knob.end if math.isfinite(knob.end) else 12.0), 0
    for x in [x for x in np.linspace(knob.start, top, 25) if x > 0 or name != "shift"]:
        falls = falls_under(pairs, knob.loss(base, float(x)))
        assert (falls == ((lower < x) & (x < upper))).all(), x
        assert falls.sum() >= found["after"]["count"]
        assert falls.sum() > found["after"]["count"] or abs(x - knob.start) >= abs(
            found["exact"] - knob.start
        )
        crossed += int((falls != falls_under(pairs, knob.origin(base))).sum())
    assert crossed > 10


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("start", "end"), [(0.0, math.inf), (0.0, 1.0), (1.0, 0.0)])
def test_the_fewest_intervals_are_found_by_trying_every_stretch(seed: int, start: float, end: float):
    draw = torch.Generator().manual_seed(seed)
    lower, width = torch.rand(2, 9, generator=draw, dtype=torch.float64) * 2 - 0.5
    upper = lower + width.abs()
    lower[0] = upper[0] = torch.nan
    found = fewest_change(lower, upper, start, end)
    ends = torch.cat([lower, upper, torch.tensor([start, min(end, 9.0)])])
    ends = ends[~ends.isnan()].sort().values
    inside = [x for x in ((ends[1:] + ends[:-1]) / 2).tolist() if min(start, end) <= x <= max(start, end)]
    counts = {x: int(((lower < x) & (x < upper)).sum()) for x in [start, *inside]}
    assert (
        found.count == min(counts.values()) == int(((lower < found.nearest) & (found.nearest < upper)).sum())
    )
    nearest = min((x for x in counts if counts[x] == found.count), key=lambda x: abs(x - start))
    assert abs(found.nearest - start) <= abs(nearest - start)
    assert all(counts[x] > found.count for x in inside if abs(x - start) < abs(found.nearest - start) - 1e-6)
    before, until = abs(found.nearest - start), abs(found.until - start)
    assert all(counts[x] == found.count for x in inside if before <= abs(x - start) < until)
    past = {x: count for x, count in counts.items() if abs(x - start) > until}
    assert not past or past[min(past, key=lambda x: abs(x - start))] > found.count


def test_a_small_weight_that_stops_every_fall_is_named_where_few_pairs_fall():
    """4 of 40 fall, 90 % are ideal as asked for, and still the weight under which none falls is said: 0.025."""
    unrelated = dict.fromkeys(("sq_chosen", "sq_rejected", "gap_chosen", "gap_rejected"), 1.0) | {
        "inner": 0.0
    }
    pairs = pd.concat([hand_pairs(4), hand_pairs(36).assign(**unrelated)], ignore_index=True)
    pairs["index"] = range(40)
    result = what_if(pairs, ["dpo"], knobs=["nll"])
    found = result.summary["changes"][0]["falls"]
    assert (found["before"]["count"], found["after"]["count"], found["until"]) == (4, 0, None)
    assert found["setting"] == pytest.approx(0.025) and found["exact"] == pytest.approx(0.025, rel=1e-4)
    said = "lowers the chosen response of 4 pairs, and of none with nll = 0.025; with nll 36 of 40 are then ideal"
    assert said in result.recommendation
    assert "none needed" in result.table(120) and "chosen falls on" in result.table(120)


def test_that_nothing_falls_is_said_in_a_sentence_and_that_nothing_helps_too():
    unrelated = PairGeometry.from_scores(*torch.eye(2, dtype=torch.float64)[:, None, :].expand(2, 30, 2))
    logps = torch.full((2, 30), -5.0)
    fine = what_if(pairs_of(unrelated, logps, logps, torch.ones(2, 30)))
    assert "Under dpo no pair's own step lowers its chosen response." in fine.table(120)
    assert fine.summary["paste"] is None
    stuck = what_if(hand_pairs(), ["dpo"], knobs=["length"])
    assert "no setting of a knob lowers that number" in stuck.recommendation
    assert stuck.summary["paste"] is None


# Lines to paste


def test_the_recommended_change_comes_as_lines_for_trl():
    """TRL has no per-pair NLL term: its own, per token of the batch, at the smallest weight that does the same."""
    result = what_if(hand_pairs(), ["dpo"], knobs=["nll"])
    paste = result.summary["paste"]
    assert (paste["knob"], paste["does"]) == ("nll_batch", "makes the share of pairs asked for ideal")
    lines = ["loss_type: [sigmoid, sft]", f"loss_weights: [1.0, {paste['setting']:g}]", "beta: 0.1"]
    assert paste["lines"] == lines
    weight = paste["setting"]
    assert ideal_under(hand_pairs(), KNOBS["nll_batch"].loss(DPO(), weight)).all()
    assert not ideal_under(hand_pairs(), KNOBS["nll_batch"].loss(DPO(), 0.9 * weight)).any()
    assert all(line in result.table(120) for line in lines)
    (again,) = build_losses([paste["spec"]])
    assert again.label == paste["loss"]


def test_a_loss_that_trl_does_not_have_is_pasted_for_the_trainer_here():
    paste = what_if(hand_pairs(), ["slic"], base="slic", knobs=["nll"]).summary["paste"]
    assert paste["lines"] is None and build_losses([paste["spec"]])[0].label == paste["loss"]
    assert "TRL's DPOTrainer has no such loss" in what_if(hand_pairs(), base="slic", knobs=["nll"]).table(120)


# The recommendation


def test_the_recommendation_follows_the_evidence():
    """No change where all is well; the cheapest knob where one helps; neither where none does."""
    unrelated = PairGeometry.from_scores(*torch.eye(2, dtype=torch.float64)[:, None, :].expand(2, 30, 2))
    logps = torch.full((2, 30), -5.0)
    fine = what_if(pairs_of(unrelated, logps, logps, torch.ones(2, 30))).summary["recommendation"]
    assert "no change is needed" in fine and "ideal by" not in fine
    helped = what_if(hand_pairs(), ["dpo"], knobs=["nll", "shift"])
    words = helped.summary["recommendation"]
    kept = {c["knob"]: c["at_setting"]["margin_efficiency_median"] for c in helped.summary["changes"]}
    assert f"cheapest knob that gets there is {max(kept, key=kept.__getitem__)}" in words
    assert "overshoots: on more pairs both responses rise" in words
    assert "no change is needed" not in words and "It can also be had with" in words
    assert (
        "No setting of length" in what_if(hand_pairs(), ["dpo"], knobs=["length"]).summary["recommendation"]
    )


def test_a_better_loss_is_named_when_no_knob_is_better():
    words = what_if(hand_pairs(), ["dpo", "dpo_shift"], ["shift=0.3"], knobs=["length"]).summary[
        "recommendation"
    ]
    assert "dpo_shift(shift=0.3) does best" in words


def test_limits_name_the_metric_the_probe_recorded(tmp_path: Path):
    run = synthetic_run(tmp_path / "run", provenance={"metric": "adam", "resolution": 5e-3})
    limits = " ".join(what_if(run).summary["limits"])
    assert "one small ADAM step" in limits and "16-bit" in limits
    assert "16-bit" not in " ".join(what_if(synthetic_pairs(20)).summary["limits"])


# The command


def status(arguments: list[str]) -> int:
    """Exit status, also where the parser of flags exits by itself."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_command_writes_a_folder_that_answers_without_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pairs = with_flag(synthetic_pairs(60, norm_ratio=2.0), [1], "empty")
    run = synthetic_run(tmp_path / "run", pairs)
    before = sorted(p.name for p in run.path.iterdir())
    assert main(["whatif", str(run.path), "--losses", "dpo", "cpo", "--grid", "beta=0.05,0.1"]) == 0
    printed = capsys.readouterr().out
    out = RunFolder(run.path / "whatif")
    summary = out.read_json("summary.json")
    settings, critical = out.table("whatif.parquet"), out.table("critical.parquet")
    assert settings is not None and critical is not None
    assert settings["label"].tolist() == ["dpo(beta=0.05)", "dpo", "cpo(beta=0.05)", "cpo"]
    assert critical["index"].tolist() == [i for i in range(60) if i != 1]
    assert summary["recommendation"].split(".")[0] in " ".join(printed.split())
    assert {"losses.png", "plane.png", "knob-nll.png", "grid-beta.png"} <= set(summary["figures"])
    assert all((out.path / name).stat().st_size > 5000 for name in summary["figures"])
    assert sorted({p.name for p in run.path.iterdir()} - {"whatif"}) == before
    assert not list(out.path.glob("*.tmp"))


def test_running_again_replaces_the_result_and_its_figures(tmp_path: Path):
    run = synthetic_run(tmp_path / "run")
    out = run.path / "whatif"
    first = ["whatif", str(run.path), "--losses", "dpo"]
    assert main([*first, "--grid", "dpo.beta=0.1,0.2"]) == 0
    (out / "notes.txt").write_text("mine")
    assert (out / "grid-beta.png").is_file()
    assert main(first) == 0
    assert not (out / "grid-beta.png").exists() and (out / "notes.txt").read_text() == "mine"


def test_a_foreign_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = synthetic_run(tmp_path / "run")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    assert main(["whatif", str(run.path), "--output_dir", str(run.path)]) == 2
    assert "holds no what-if" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_a_failure_on_the_way_leaves_no_finished_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = synthetic_run(tmp_path / "run")
    arguments = ["whatif", str(run.path), "--losses", "dpo", "--no_plots"]
    assert main(arguments) == 0

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    assert main(arguments) == 2
    assert not RunFolder(run.path / "whatif").is_complete


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected the run folder of a finished probe"),
        (["nowhere"], "Expected a run folder"),
        (["run", "--target", "0"], "is a share of the pairs"),
        (["run", "--grid", "dpo.bta=1"], "no hyper-parameter 'bta'"),
        (["run", "--losses", "dop"], "Unknown loss 'dop'"),
        (["unfinished"], "isn't finished"),
    ],
)
def test_what_cannot_be_used_exits_with_status_2(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    synthetic_run(tmp_path / "run")
    synthetic_run(tmp_path / "unfinished", is_finished=False)
    monkeypatch.chdir(tmp_path)
    assert status(["whatif", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_what_if_of_a_what_if_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = synthetic_run(tmp_path / "run")
    assert main(["whatif", str(run.path), "--losses", "dpo", "--no_plots"]) == 0
    assert main(["whatif", str(run.path / "whatif")]) == 2
    assert "it holds no pairs" in capsys.readouterr().err


def test_texts_are_printed_as_they_are(tmp_path: Path):
    pairs = synthetic_pairs(12)
    pairs.loc[0, "identical"] = True
    table = what_if(synthetic_run(tmp_path / "run", pairs)).table()
    assert "A [bold]good[/bold] answer." in table


def test_options_come_from_a_file_too(tmp_path: Path):
    run = synthetic_run(tmp_path / "run")
    file = tmp_path / "whatif.yaml"
    file.write_text(
        "losses: [dpo, {name: dpop, penalty: 5}]\ngrid: ['dpo.beta=0.1,1']\nplots: false\ntarget: 0.5\n"
    )
    assert main(["whatif", str(run.path), "--config", str(file)]) == 0
    out = RunFolder(run.path / "whatif")
    settings = out.table("whatif.parquet")
    assert settings is not None and settings["label"].tolist() == ["dpo", "dpo(beta=1)", "dpop(penalty=5)"]
    assert out.read_json("summary.json")["target"] == 0.5


def test_resolution_and_batch_size_are_the_probes(tmp_path: Path):
    run = synthetic_run(tmp_path / "run", provenance={"resolution": 5e-3})
    run.write_yaml("config.yaml", run.config | {"loss_batch_size": 5})
    summary = what_if(run).summary
    assert (summary["resolution"], summary["loss_batch_size"]) == (5e-3, 5)
    summary = what_if(run, resolution=1e-6, loss_batch_size=4).summary
    assert (summary["resolution"], summary["loss_batch_size"]) == (1e-6, 4)
