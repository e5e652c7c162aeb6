"""What a row says of its pair and its answers, against the scores written out."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from entangle.analysis.geometry import PairGeometry
from entangle.analysis.regimes import Regime, predict
from entangle.commands.joint.measure import (
    best_frame,
    loss_signal,
    pair_columns,
    pair_frame,
    pair_state,
    reward_products,
    rft_state,
    shared_columns,
    verdict,
)
from entangle.commands.joint.table import angles, joint_table, pooled_cosine, summarise_joint, with_states
from entangle.measure.prompts import FLAGS
from entangle.measure.rows import same_if_untold
from entangle.rewards.gradients import rloo_weights
from entangle.rewards.signals import Setting
from entangle.rewards.statistics import Support
from entangle.rewards.summary import Thresholds
from losses import CPO, DPO, DPOP, Incentives, PairLogps, build
from tests.rft.test_reward_gradients import a_policy, samples

BINARY = Setting(Support(0.0, 1.0, is_binary=True), group_size=3)


def a_row(index: int = 0, count: int = 6, seed: int = 0, rewards=None, entangled: bool = False):
    """A kept row, with the scores that it was made of: K answers', then the chosen's and the rejected's."""
    draw = np.random.default_rng([seed, index])
    scores = draw.normal(size=(count + 2, 5))
    if entangled:  # the rejected's score is the chosen's, three times as long
        scores[-1] = 3 * scores[-2] + 0.1 * scores[-1]
    gram = scores @ scores.T
    rewards = (
        draw.permutation([0.0, 1.0] * (count // 2)) if rewards is None else np.asarray(rewards, dtype=float)
    )
    logps, ref_logps = -draw.uniform(1, 9, size=count + 2), -draw.uniform(1, 9, size=count + 2)
    row = {
        "index": index,
        "prompt_hash": f"{index:04x}",
        "prompt_length": 3,
        "answers": count,
        "rewards": rewards,
        "logps": logps[:count],
        "ref_logps": ref_logps[:count],
        "lengths": draw.integers(1, 9, size=count),
        "finished": [True] * count,
        "gram": gram[:count, :count].ravel(),
        "pair_logps": logps[count:],
        "pair_ref_logps": ref_logps[count:],
        "pair_lengths": [4, 6],
        "pair_truncated": False,
        "pair_identical": False,
        "pair_gram": gram[count:].ravel(),
    } | dict.fromkeys(FLAGS, False)
    return row, scores


def incentive(row, beta=0.1):
    margin = (row["pair_logps"] - row["pair_ref_logps"]) @ [1, -1]
    return beta / (1 + math.exp(beta * margin)), margin


# --- the data set's pair ------------------------------------------------------------------------------------


def test_columns_of_a_pair_are_those_of_its_scores():
    """Against the written-out step d (g_w - g_l), d = beta s(-beta D)."""
    row, scores = a_row()
    (found,) = pair_columns(pair_frame(pd.DataFrame([row])), DPO(), 1e-10).to_dict("records")
    d, margin = incentive(row)
    g_w, g_l = scores[-2:]
    step = d * (g_w - g_l)
    assert found["margin"] == pytest.approx(margin)
    assert found["signal"] == pytest.approx(min(1.0, 2 * d / 0.1))
    assert found["distance"] == pytest.approx(np.linalg.norm(g_w - g_l))
    assert found["grad_norm"] == pytest.approx(np.linalg.norm(step))
    assert found["change_chosen"] == pytest.approx(step @ g_w)
    assert found["change_rejected"] == pytest.approx(step @ g_l)
    cosines = [x @ step / np.linalg.norm(x) / np.linalg.norm(step) for x in (g_w, -g_l)]
    assert found["effect"] == pytest.approx(found["signal"] * min(cosines))
    geometry = PairGeometry.from_scores(torch.from_numpy(g_w)[None], torch.from_numpy(g_l)[None])
    assert found["cosine"] == pytest.approx(float(geometry.cosine))
    incentives = Incentives(torch.tensor([d]), torch.tensor([d]))
    assert found["regime"] == predict(geometry, incentives).regimes[0]


@pytest.mark.parametrize("loss", [DPO(), CPO(), build("ipo")], ids=lambda loss: loss.name)
def test_effect_is_positive_iff_both_go_the_right_way(loss):
    """60 random pairs, half of them entangled; under every loss whose incentives are positive."""
    rows = pd.DataFrame([a_row(i, seed=4, entangled=i % 2 == 0)[0] for i in range(60)])
    found = pair_columns(pair_frame(rows), loss, 1e-10)
    trained = found[(found["incentive_chosen"] > 0) & (found["incentive_rejected"] > 0)]
    is_ideal = (trained["change_chosen"] > 0) & (trained["change_rejected"] < 0)
    assert ((trained["effect"] > 0) == is_ideal).all() and 0 < is_ideal.sum() < len(trained)
    assert trained["effect"].abs().max() <= 1


def logps(*columns) -> PairLogps:
    """chosen, rejected, ref_chosen, ref_rejected."""
    chosen, rejected, ref_chosen, ref_rejected = (torch.tensor([float(c)]) for c in columns)
    return PairLogps(chosen, rejected, torch.tensor([4]), torch.tensor([6]), ref_chosen, ref_rejected)


def test_signal_compares_with_the_start_of_training():
    """DPO: 2 s(-beta D), at most 1; whatever beta's scale; a hinge that is off has none left."""
    learnt = logps(-10, -60, -30, -30)
    assert loss_signal(DPO(), learnt) == pytest.approx(2 / (1 + math.exp(5)))
    assert loss_signal(DPO(), logps(-30, -10, -20, -20)) == 1.0
    assert loss_signal(DPO(beta=0.01), learnt) == pytest.approx(2 / (1 + math.exp(0.5)))
    assert loss_signal(build("hinge"), learnt) == 0.0
    for loss in (DPO(), build("simpo"), build("ipo"), CPO()):
        assert loss_signal(loss, logps(-10, -60, -10, -60)) == 1.0


def test_rounding_between_policy_and_reference_decides_no_kink():
    """DPOP's penalty is on below a log-ratio of 0: by a rounding it stays off."""
    row = a_row()[0]
    row["pair_ref_logps"] = row["pair_logps"] + 1e-9
    frame = pair_frame(pd.DataFrame([row]))
    assert frame["ref_logps_chosen"].item() == row["pair_logps"][0]
    found = pair_columns(frame, DPOP(), 1e-6)
    assert found["signal"].item() == 1.0
    assert found["incentive_chosen"].item() == found["incentive_rejected"].item()
    assert same_if_untold(torch.tensor([-5.0]), torch.tensor([-5.1])).item() == -5.0


# --- sampled answers ----------------------------------------------------------------------------------------


def test_best_against_worst_answer():
    row, scores = a_row(rewards=[0.2, 0.9, 0.1, 0.9, 0.4, 0.1])
    tied = a_row(1, rewards=[0.3] * 6)[0]
    frame = best_frame(pd.DataFrame([row, tied]))
    assert frame["index"].tolist() == [0]
    found = frame.iloc[0]
    assert (found["chosen_answer"], found["rejected_answer"]) == (1, 2)
    assert found["reward_gap"] == pytest.approx(0.8)
    assert found["inner"] == pytest.approx(scores[1] @ scores[2])
    assert (found["logps_chosen"], found["ref_logps_rejected"]) == (row["logps"][1], row["ref_logps"][2])


def test_what_pair_and_answers_have_in_common():
    row, scores = a_row()
    found = shared_columns(row, DPO())
    gradient = rloo_weights(row["rewards"]) @ scores[:-2]
    distances = [
        np.sum((a - b) ** 2) for i, a in enumerate(scores[:-2]) for j, b in enumerate(scores[:-2]) if i != j
    ]
    assert found["answer_distance"] == pytest.approx(math.sqrt(np.mean(distances)))
    assert found["reward_change_chosen"] == pytest.approx(gradient @ scores[-2])
    assert found["reward_change_rejected"] == pytest.approx(gradient @ scores[-1])
    assert found["online_yield"] == pytest.approx(9 / 15)  # three answers each: 9 of 15 pairs differ
    table = joint_table(pd.DataFrame([row]), DPO(), BINARY, 1e-10)
    step = incentive(row)[0] * (scores[-2] - scores[-1])
    assert table["pair_reward_product"].item() == pytest.approx(step @ gradient)
    cosine = step @ gradient / np.linalg.norm(step) / np.linalg.norm(gradient)
    assert table["pair_reward_cosine"].item() == pytest.approx(cosine)


def test_a_pairs_product_with_the_reward_gradient_is_unbiased():
    """By enumeration of all samples of 3: the mean is <d, grad V>."""
    outputs, r = a_policy(5, vocabulary=2, length=2)
    draw = np.random.default_rng(2)
    pair = draw.normal(size=(2, outputs.scores.shape[1]))
    found = np.zeros(2)
    for d, p in samples(outputs, 3):
        row, _ = a_row(count=6)
        scores = outputs.scores[d]
        row |= {"rewards": r[d], "gram": (scores @ scores.T).ravel()}
        row |= {"pair_gram": np.concatenate([pair @ scores.T, pair @ pair.T], 1).ravel()}
        row |= {name: row[name][:3] for name in ("logps", "ref_logps", "lengths")}
        columns = shared_columns(row, DPO())
        found += p * np.array([columns["reward_change_chosen"], columns["reward_change_rejected"]])
    np.testing.assert_allclose(found, pair @ outputs.gradient(r), rtol=1e-10)


def test_online_signal_is_the_mean_over_pairs_that_differ():
    """At the start of training every pair has signal 1; with one answer learnt, its pairs have less."""
    row, _ = a_row(rewards=[1, 0, 0, 0, 0, 0])
    row["ref_logps"] = row["logps"]
    found = shared_columns(row, DPO())
    assert (found["online_signal"], found["online_yield"]) == (1.0, 5 / 15)
    row["ref_logps"] = row["logps"] - np.array([30, 0, 0, 0, 0, 0])
    assert shared_columns(row, DPO())["online_signal"] == pytest.approx(2 / (1 + math.exp(3)))
    tied = shared_columns(row | {"rewards": np.ones(6)}, DPO())
    assert (tied["online_yield"], tied["online_sq"], tied["online_product"]) == (0, 0, 0)
    assert math.isnan(tied["online_signal"])


# --- states and aggregates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("regime", "signal", "identical", "state"),
    [
        (Regime.IDEAL, 0.5, False, "clear"),
        (Regime.BOTH_DOWN, 0.5, False, "entangled"),
        (Regime.BOTH_UP, 0.5, False, "entangled"),
        (Regime.BOTH_DOWN, 0.05, False, "saturated"),
        (Regime.IDEAL, math.nan, False, "saturated"),
        (Regime.DEGENERATE, 1.0, False, "degenerate"),
        (Regime.IDEAL, 1.0, True, "degenerate"),
        (math.nan, math.nan, math.nan, "tied"),
    ],
)
def test_state_of_a_pair(regime, signal, identical, state):
    regime = regime if isinstance(regime, float) else str(regime)
    assert pair_state({"regime": regime, "signal": signal, "identical": identical}, 0.1) == state


@pytest.mark.parametrize(
    ("std", "mean", "distinct", "state"),
    [
        (0.2, 0.1, 4, "clear"),
        (0.01, 0.1, 4, "flat"),
        (0.0, 0.1, 1, "tied"),
        (0.0, 0.9, 1, "solved"),
        (0.01, 0.9, 4, "solved"),
    ],
)
def test_state_of_a_prompts_rewards(std, mean, distinct, state):
    row = {"reward_std": std, "reward_mean": mean, "reward_distinct": distinct}
    assert rft_state(row, Thresholds(0.05, 0.5)) == state


def test_verdict_names_who_has_a_signal():
    assert [verdict(p, r) for p in ("clear", "saturated") for r in ("clear", "tied")] == [
        "both",
        "dpo_only",
        "rft_only",
        "neither",
    ]


@pytest.fixture(scope="module")
def measured():
    """Forty prompts: every fourth pair entangled, every fifth prompt's rewards tied."""
    rows = [
        a_row(i, seed=7, entangled=i % 4 == 0, rewards=[0.0] * 6 if i % 5 == 0 else None)[0]
        for i in range(40)
    ]
    table = joint_table(pd.DataFrame(rows), DPO(), BINARY, 1e-10)
    return with_states(table, Thresholds(0.05, 0.5), 0.1, 0.1)


def test_summary_counts_what_the_rows_say(measured):
    summary = summarise_joint(measured, Thresholds(0.05, 0.5))
    assert summary["states"]["rft"]["tied"]["count"] == 8 == summary["states"]["best"]["tied"]["count"]
    assert summary["states"]["pair"]["entangled"]["count"] >= 10
    assert sum(map(sum, (row.values() for row in summary["reasons"].values()))) == 40
    assert sum(share["count"] for share in summary["verdicts"].values()) == 40
    neither = measured[(measured["pair_state"] != "clear") & (measured["rft_state"] != "clear")]
    assert summary["verdicts"]["neither"]["count"] == len(neither) == summary["reasons"]["entangled"]["tied"]
    lost = [(measured[c] != "clear").mean() for c in ("pair_state", "rft_state")]
    assert summary["neither_if_independent"] == pytest.approx(lost[0] * lost[1])
    assert measured["rft_signal"].tolist() == pytest.approx((measured["reward_std"] / 0.5).tolist())
    assert summary["online"]["yield"] == pytest.approx(measured["online_yield"].mean())


def test_prompts_without_any_pair_of_answers(measured):
    """Where every prompt's rewards tie there is no sampled pair at all, and the columns stay."""
    rows = pd.DataFrame([a_row(i, rewards=[1.0] * 6)[0] for i in range(3)])
    table = with_states(joint_table(rows, DPO(), BINARY, 1e-10), Thresholds(0.05, 0.5), 0.1, 0.1)
    assert set(table.columns) == set(measured.columns)
    assert (table["best_state"] == "tied").all() and (table["rft_state"] == "solved").all()
    assert math.isnan(summarise_joint(table, Thresholds(0.05, 0.5))["angles"]["pair"]["cosine"])


def test_angle_of_steps_that_are_known():
    """Over 300 prompts d and grad V have cosine 0.6 each; noise on estimates leaves the pooled cosine there."""
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(3, 300))
    prompts = pd.DataFrame(
        {
            "pair_grad_norm": 2.0,
            "grad_sq": 1 + 3 * noise[0],
            "pair_reward_product": 1.2 + noise[1],
            "online_sq": 1.0,
            "online_product": -1 + 0.1 * noise[2],
        }
    )
    found = angles(prompts)
    assert (
        found["pair"]["low"] < 0.6 < found["pair"]["high"]
        and found["pair"]["high"] - found["pair"]["low"] < 0.3
    )
    assert found["online"]["high"] < -0.7
    assert found["pair"]["product"]["mean"] == pytest.approx(prompts["pair_reward_product"].mean())
    assert math.isnan(pooled_cosine(np.array([1.0, 1.0, -1.0])))


def test_products_survive_pairs_without_a_step():
    table = pd.DataFrame(
        {
            "pair_incentive_chosen": [0.0],
            "pair_incentive_rejected": [0.0],
            "reward_change_chosen": [1.0],
            "reward_change_rejected": [1.0],
            "pair_grad_norm": [0.0],
            "rloo_sample_norm": [1.0],
        }
    )
    assert reward_products(table)["pair_reward_cosine"].isna().all()
