"""A prompt's kept numbers -> what a preference pair and what its answers' rewards would teach, side by side.

Pure functions of the rows that `entangle joint` keeps. Both methods weigh the same vectors S_i - S_j (g_w - g_l
for a pair), S = grad log pi:

    RFT   grad V = E[(r_i - r_j)/2 (S_i - S_j)]         DPO   -grad loss = beta s(-beta D) (g_w - g_l)

so their weights, geometries, norms and first-order gains can be compared term by term [derived].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch

from entangle.analysis.predictions import geometry_of, logps_of, predict_losses
from entangle.analysis.regimes import Regime
from entangle.analysis.statistics import Array
from entangle.commands.joint.products import kernel_product, preference_kernel, reward_kernel
from entangle.measure.rows import same_if_untold
from entangle.rewards.signals import gram_of
from entangle.rewards.summary import Thresholds
from losses import Incentives, PairLogps, PreferenceLoss

SOURCES = ("pair", "best")
"""Where a prompt's preference pair comes from: `pair` is the data set's, `best` the sampled answer with the
highest reward against the one with the lowest. They are prefixes of columns."""

STATES = {
    "clear": "the chosen rises and the rejected falls",
    "entangled": "one of the two log-probs moves the wrong way",
    "saturated": "the pair is learnt: hardly any of the loss's incentive is left",
    "degenerate": "the two responses can't be told apart, or a change not from 0",
    "tied": "all sampled answers have one reward: no pair can be formed",
}
"""What a preference pair has to teach, or why it has nothing; `tied` is for sampled pairs alone."""

RFT_STATES = {
    "clear": "rewards differ within the prompt",
    "flat": "small std, low mean: little signal where there is most to gain",
    "tied": "all rewards are one, and it is low",
    "solved": "small std (or none), high mean: nothing left to gain",
}
"""What a prompt's answers have to teach, or why they have nothing."""

VERDICTS = {
    "both": "signal for both",
    "dpo_only": "signal for the pair alone",
    "rft_only": "signal for the rewards alone",
    "neither": "signal for neither",
}
"""The data set's pair and the rewards of a prompt, together."""


# --- preference pairs ---------------------------------------------------------------------------------------


def pair_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """The data set's pairs of measured prompts, with the columns of a probe's pairs."""
    return pd.DataFrame([_data_pair(row) for row in rows.to_dict("records")])


def best_frame(rows: pd.DataFrame) -> pd.DataFrame:
    """Best against worst sampled answer of every prompt whose rewards don't all tie; the first ones of several.

    Columns as `pair_frame`, and chosen_answer, rejected_answer (their places among the answers) and
    reward_gap.
    """
    found = (_best_pair(row) for row in rows.to_dict("records"))
    return pd.DataFrame([pair for pair in found if pair is not None])


def _data_pair(row: Mapping[Any, Any]) -> dict[str, Any]:
    gram = _pair_gram(row)
    logps, ref_logps, lengths = (
        np.asarray(row[f"pair_{name}"]) for name in ("logps", "ref_logps", "lengths")
    )
    pair = _pair_row(row["index"], logps, ref_logps, lengths, gram[:, -2:])
    return pair | {"identical": row["pair_identical"], "truncated": row["pair_truncated"]}


def _best_pair(row: Mapping[Any, Any]) -> dict[str, Any] | None:
    rewards = np.asarray(row["rewards"], dtype=np.float64)
    places = [int(rewards.argmax()), int(rewards.argmin())]
    if rewards[places[0]] == rewards[places[1]]:
        return None
    logps, ref_logps, lengths = (np.asarray(row[name])[places] for name in ("logps", "ref_logps", "lengths"))
    block = gram_of(row)[np.ix_(places, places)]
    pair = _pair_row(row["index"], logps, ref_logps, lengths, block)
    return pair | {
        "identical": False,
        "truncated": not np.asarray(row["finished"])[places].all(),
        "chosen_answer": places[0],
        "rejected_answer": places[1],
        "reward_gap": float(rewards[places[0]] - rewards[places[1]]),
    }


def _pair_row(index: int, logps: Array, ref_logps: Array, lengths: Array, block: Array) -> dict[str, Any]:
    """One pair as a probe keeps it, from its `(2, 2)` Gram block.

    Gaps are differences of float64 sums over one set of scores: their error, a few roundings of the scores' own
    precision, is below the resolution at which signs are believed.
    """
    ref_logps = _told(ref_logps, logps)
    (sq_chosen, inner), (_, sq_rejected) = block
    return {
        "index": index,
        "logps_chosen": logps[0],
        "logps_rejected": logps[1],
        "ref_logps_chosen": ref_logps[0],
        "ref_logps_rejected": ref_logps[1],
        "length_chosen": lengths[0],
        "length_rejected": lengths[1],
        "sq_chosen": sq_chosen,
        "sq_rejected": sq_rejected,
        "inner": inner,
        "gap_chosen": sq_chosen - inner,
        "gap_rejected": sq_rejected - inner,
        "dropped": False,
        "empty": False,
        "non_finite": False,
    }


def _told(ref_logps: Array, logps: Array) -> Array:
    return same_if_untold(torch.tensor(ref_logps), torch.tensor(logps)).numpy()


def _pair_gram(row: Mapping[Any, Any]) -> Array:
    """`(2, K + 2)`: dot products of the pair's scores with the answers', the chosen's and the rejected's."""
    return np.asarray(row["pair_gram"], dtype=np.float64).reshape(2, -1)


def loss_signal(loss: PreferenceLoss, logps: PairLogps) -> Array:
    """How much of a loss's incentive is left, `(B,)` in [0, 1]: |d_w| + |d_l| over its value at policy = reference.

    At most 1 (a loss whose incentive has grown since its start isn't short of signal). For DPO it is
    min(1, 2 s(-beta D)): 1 at the start of training, towards 0 as the margin grows. NaN for a loss that
    has no incentive at the start.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None
    start = PairLogps(
        logps.ref_chosen,
        logps.ref_rejected,
        logps.length_chosen,
        logps.length_rejected,
        logps.ref_chosen,
        logps.ref_rejected,
    )
    now, then = (_size(loss.incentives(at)) for at in (logps, start))
    return torch.where(then > 0, (now / then).clamp(max=1.0), torch.nan).numpy()


def _size(incentives: Incentives) -> torch.Tensor:
    return incentives.chosen.double().abs() + incentives.rejected.double().abs()


def pair_columns(frame: pd.DataFrame, loss: PreferenceLoss, resolution: float) -> pd.DataFrame:
    """What a loss has to say to each pair.

    Returns:
        index, and by pair: the frame's own columns but its log-probs; `signal` (see `loss_signal`), `margin` (D,
        nats), `cosine`, `distance` |g_w - g_l|, `grad_norm` |d_w g_w - d_l g_l|; the columns of predictions
        (incentives, changes per unit learning rate, regime, band, slack); `effect`: signal x min(cos of the step
        with g_w, cos of the step with -g_l), in [-1, 1], positive iff the chosen rises and the rejected falls.
    """
    geometry, logps = geometry_of(frame, resolution), logps_of(frame)
    predictions = predict_losses(frame, [loss], resolution=resolution, batch_size=1).drop(columns="loss")
    d_w, d_l = predictions["incentive_chosen"].to_numpy(), predictions["incentive_rejected"].to_numpy()
    a, b, c = (frame[name].to_numpy() for name in ("sq_chosen", "sq_rejected", "inner"))
    step = np.sqrt(np.maximum(d_w**2 * a - 2 * d_w * d_l * c + d_l**2 * b, 0.0))
    signal = loss_signal(loss, logps)
    with np.errstate(divide="ignore", invalid="ignore"):
        up = predictions["change_chosen"].to_numpy() / (step * np.sqrt(a))
        down = -predictions["change_rejected"].to_numpy() / (step * np.sqrt(b))
    kept = frame.drop(
        columns=[name for name in frame if "logps" in str(name) or name in ("dropped", "empty", "non_finite")]
    )
    numbers = pd.DataFrame(
        {
            "index": frame["index"],
            "signal": signal,
            "margin": logps.logratio_margin.numpy(),
            "cosine": geometry.cosine.numpy(),
            "distance": np.sqrt(np.maximum(a - 2 * c + b, 0.0)),
            "grad_norm": step,
            "effect": signal * np.minimum(up, down),
        }
    )
    return kept.merge(numbers, on="index").merge(predictions, on="index")


def pair_state(row: Mapping[str, Any], threshold: float) -> str:
    """The state of a pair (see `STATES`) from its columns.

    Saturation is judged first: a pair with hardly any incentive is lost whichever way it would go.
    """
    if not isinstance(row["regime"], str):
        return "tied"
    if row["identical"] or row["regime"] == Regime.DEGENERATE:
        return "degenerate"
    if not row["signal"] >= threshold:
        return "saturated"
    return "clear" if row["regime"] == Regime.IDEAL else "entangled"


# --- answers ------------------------------------------------------------------------------------------------


def rft_state(row: Mapping[str, Any], thresholds: Thresholds) -> str:
    """The state of a prompt's rewards (see `RFT_STATES`) from its mean and std."""
    if row["reward_std"] >= thresholds.std:
        return "clear"
    if row["reward_mean"] >= thresholds.mean:
        return "solved"
    return "tied" if row["reward_distinct"] == 1 else "flat"


def verdict(pair: str, rft: str) -> str:
    """The two states as one of `VERDICTS`."""
    return {(True, True): "both", (True, False): "dpo_only", (False, True): "rft_only"}.get(
        (pair == "clear", rft == "clear"), "neither"
    )


def shared_columns(row: Mapping[Any, Any], loss: PreferenceLoss) -> dict[str, Any]:
    """What needs the answers and a preference pair together, for one prompt.

    Returns:
        - answer_distance: root mean square of |S_i - S_j| over the answers, unbiased before the root;
        - reward_change_chosen, reward_change_rejected: <grad V, g_w> and <grad V, g_l>, unbiased: what one step on
          the reward does to the pair's log-probs, per unit learning rate;
        - online_signal: mean signal of the pairs of sampled answers whose rewards differ; online_yield: their
          share;
        - online_sq, online_product: |E[step]|^2 of the loss on sampled pairs, <E[step], grad V>; unbiased.
    """
    gram, rewards = gram_of(row), np.asarray(row["rewards"], dtype=np.float64)
    count = len(rewards)
    centred = (rewards - rewards.mean()) / (count - 1)
    chosen, rejected = _pair_gram(row)[:, :count] @ centred
    trace = float(np.trace(gram) - gram.sum() / count) / (count - 1)
    return {
        "index": row["index"],
        "answer_distance": math.sqrt(max(2 * trace, 0.0)),
        "reward_change_chosen": chosen,
        "reward_change_rejected": rejected,
    } | _online_columns(row, gram, rewards, loss)


def _online_columns(
    row: Mapping[Any, Any], gram: Array, rewards: Array, loss: PreferenceLoss
) -> dict[str, Any]:
    wins = np.argwhere(rewards[:, None] > rewards[None, :])
    names = ("online_signal", "online_yield", "online_sq", "online_product")
    if not len(wins):
        return dict(zip(names, (math.nan, 0.0, 0.0, 0.0), strict=True))
    logps = np.asarray(row["logps"], dtype=np.float64)
    reference = _told(np.asarray(row["ref_logps"], dtype=np.float64), logps)
    lengths = np.asarray(row["lengths"], dtype=np.float64)
    won, lost = (
        [torch.from_numpy(column[wins[:, side]]) for column in (logps, lengths, reference)] for side in (0, 1)
    )
    pairs = PairLogps(won[0], lost[0], won[1], lost[1], won[2], lost[2])
    incentives = loss.incentives(pairs)
    chosen, rejected = np.zeros_like(gram), np.zeros_like(gram)
    chosen[tuple(wins.T)] = incentives.chosen.numpy()
    rejected[tuple(wins.T)] = incentives.rejected.numpy()
    own = preference_kernel(rewards, chosen, rejected)
    values = (
        float(np.nanmean(loss_signal(loss, pairs))),
        len(wins) / math.comb(len(rewards), 2),
        kernel_product(gram, own, own),
        kernel_product(gram, own, reward_kernel(rewards)),
    )
    return dict(zip(names, values, strict=True))


def reward_products(table: pd.DataFrame) -> pd.DataFrame:
    """The columns that relate a pair's step d = d_w g_w - d_l g_l to the expected reward gradient.

    - pair_reward_product: <d, grad V>, unbiased: change of the mean reward per unit learning rate of a step on the
      pair;
    - pair_reward_cosine: the same over |d| and the norm of the sample's own RLOO gradient, in [-1, 1]. The noise of
      that norm makes it smaller than the true cosine.
    """
    product = (
        table["pair_incentive_chosen"] * table["reward_change_chosen"]
        - table["pair_incentive_rejected"] * table["reward_change_rejected"]
    )
    size = table["pair_grad_norm"] * table["rloo_sample_norm"]
    return table.assign(pair_reward_product=product, pair_reward_cosine=(product / size).where(size > 0))
