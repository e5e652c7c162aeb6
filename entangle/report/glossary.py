"""What every number of a report means: the one place of its definitions.

Symbols: g_w, g_l are the scores of the chosen and of the rejected response (gradients of their summed log-probs in
the probed parameters); A = |g_w|^2, B = |g_l|^2, c = <g_w, g_l>; d_w, d_l are a loss's incentives; log is natural.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from entangle.diagnostics import Diagnostic


@dataclass(frozen=True)
class Entry:
    """A term, its formula (empty where it has none) and what it says."""

    term: str
    formula: str
    text: str


GLOSSARY: dict[str, Entry] = {
    "score": Entry(
        "score",
        "g = d log pi(response | prompt) / d parameters",
        "The gradient of a response's log-prob, summed over its tokens, in the probed parameters. A pair has two: "
        "g_w of the chosen and g_l of the rejected response.",
    ),
    "gram": Entry(
        "A, B and c",
        "A = |g_w|^2,  B = |g_l|^2,  c = <g_w, g_l>",
        "All that a pair's two scores contribute to one step. They don't depend on the loss, so one probe answers "
        "for every loss.",
    ),
    "entanglement": Entry(
        "entanglement",
        "c = <g_w, g_l>",
        "The product of the two scores. Where it is large, a step on one response moves the other along.",
    ),
    "cosine": Entry(
        "cosine",
        "cos = c / sqrt(A B)",
        "1: both responses move the parameters the same way; 0: they have nothing to do with each other; negative: "
        "raising one lowers the other. A high cosine alone is no diagnosis: the norm ratio counts as well.",
    ),
    "norm_ratio": Entry(
        "norm ratio",
        "r* = |g_l| / |g_w| = sqrt(B / A)",
        "How much longer the rejected response's gradient is. It is the middle of a pair's ideal band.",
    ),
    "ratio_chosen": Entry(
        "c / A", "c / A", "Under a loss with rho = 1 (DPO) the chosen log-prob falls iff this is above 1."
    ),
    "ratio_rejected": Entry(
        "c / B", "c / B", "Under a loss with rho = 1 (DPO) the rejected log-prob rises iff this is above 1."
    ),
    "incentives": Entry(
        "incentives d_w, d_l",
        "d_w = -d loss / d log pi(chosen),  d_l = d loss / d log pi(rejected)",
        "How strongly a loss raises the chosen and lowers the rejected, per nat. A step of SGD adds "
        "learning rate x (d_w g_w - d_l g_l) to the parameters.",
    ),
    "rho": Entry(
        "rho",
        "rho = d_w / d_l",
        "A loss's incentive ratio: all that it contributes to a regime. DPO, IPO, hinge and their kin have rho = 1 "
        "whatever beta is; length-normalised losses have rejected tokens / chosen tokens; SFT has infinity.",
    ),
    "band": Entry(
        "ideal band",
        "c / A < rho < B / c   (any rho if c <= 0)",
        "The incentive ratios under which one step raises the chosen and lowers the rejected response. Its centre on "
        "the log axis is the norm ratio, its half-width -log cos; at cosine 1 nothing is left of it.",
    ),
    "drift": Entry(
        "drift",
        "(D_w + D_l) / (2 (D_w - D_l))",
        "By how many nats both mean log-probs move for each nat of margin that a step on the whole set gains; D_w and "
        "D_l are the changes of the two means. Above 1/2 both rise, below -1/2 both fall, in between they part.",
    ),
    "slack": Entry(
        "slack",
        "min(log rho - log(c/A), log(B/c) - log rho)",
        "Distance to the nearer edge of the ideal band; negative outside.",
    ),
    "change": Entry(
        "predicted change",
        "chosen: d_w A - d_l c     rejected: d_w c - d_l B",
        "First-order change of a log-prob, in nats per unit of learning rate, by one SGD step on the pair's own loss. "
        "Multiply by your learning rate; in training, other pairs, momentum and weight decay come on top.",
    ),
    "regime": Entry(
        "regime",
        "signs of the two predicted changes",
        "ideal (+, -): chosen rises, rejected falls. both up (+, +): raising the chosen lifts the rejected. "
        "both down (-, -): lowering the rejected drags the chosen along. inverted (-, +): the incentives point the "
        "wrong way. degenerate: a change is smaller than the errors of the arithmetic, so its sign isn't guessed.",
    ),
    "set": Entry(
        "the set as one pair",
        "U_ww, U_wl, U_ll = means over i != j of <g_wi, g_wj>, <g_wi, g_lj>, <g_li, g_lj>",
        "All pairs through their mean scores. A pair alone is hardly ever entangled on real data, the set often is: "
        "what is said of a pair's A, c and B holds of these three, with intervals from groups of pairs.",
    ),
    "interval": Entry(
        "interval of a share",
        "(f + z^2/2n -+ z sqrt(f(1-f)/n + z^2/4n^2)) / (1 + z^2/n),  z = 1.96",
        "The 95 % Wilson interval of a share f of n pairs: how far the share may be off because only these pairs were "
        "looked at. It holds for pairs drawn like them.",
    ),
    "logps": Entry(
        "log-prob",
        "log pi(response | prompt), summed over its tokens",
        "In nats. A sum, not a mean: longer responses have lower ones.",
    ),
    "reward": Entry(
        "log-ratio",
        "log pi(y) - log pi_ref(y)",
        "How far the policy has moved from the reference on a response, in nats; beta times this is DPO's implicit "
        "reward. 0 where policy and reference are the same.",
    ),
    "length": Entry("tokens", "", "Scored tokens of a response, its end-of-text token included."),
    "reference": Entry(
        "reference",
        "",
        "The policy that log-ratios are taken against: the model with its adapter off, a second "
        "model, columns of the data set, the policy itself, or none.",
    ),
    "parameters": Entry(
        "parameters",
        "",
        "Scores are gradients in these parameters only. Regimes of a LoRA are not regimes of full training: probe "
        "what you train.",
    ),
    "precision": Entry(
        "precision",
        "",
        "The arithmetic that the scores were computed in. A change smaller than its errors counts as degenerate. "
        "Scores in 16 bits are approximate.",
    ),
    "metric": Entry(
        "metric",
        "sgd: step = -learning rate x gradient     adamw: step = -learning rate x P gradient",
        "The optimiser step that predictions assume. Adam rescales every coordinate by P, which changes A, B and c.",
    ),
    "share_of_c": Entry(
        "share of c",
        "<s_t, g_other> / c",
        "What one token adds to the entanglement: the product of its own score s_t with the whole score of the other "
        "response, relative to c. A side's shares sum to 100 %; a negative one takes entanglement away.",
    ),
    "module_share": Entry(
        "module's share of c",
        "mean over pairs of c_m / sqrt(A B), relative to the mean cosine",
        "c is a sum over modules, so each has its part; a pair counts for its cosine, not for the size of its scores. "
        "Negative parts take entanglement away.",
    ),
    "module_norms": Entry(
        "module's share of the norms",
        "mean of A_m / A and B_m / B",
        "How much of the two scores lies in a module.",
    ),
    "module_cosine": Entry(
        "module's cosine",
        "c_m / sqrt(A_m B_m)",
        "The cosine if nothing but this module were trained: median and quantiles over the pairs.",
    ),
    "module_falls": Entry(
        "chosen falls in a module",
        "A_m < c_m",
        "Share of the pairs whose chosen log-prob equal incentives on both responses would lower if nothing but this "
        "module were trained.",
    ),
    "knob": Entry(
        "knob",
        "incentives along a line: fixed + setting x slope",
        "One hyper-parameter turned from a base loss: an NLL weight (more incentive on the chosen), DPOP's penalty, "
        "DPO-Shift's factor on the rejected, a length exponent. The settings that make a pair ideal form one "
        "interval, known exactly.",
    ),
    "margin_growth": Entry(
        "margin growth",
        "predicted change of the chosen - predicted change of the rejected",
        "How fast the margin between the two log-probs widens, in nats per unit of learning rate (median pair).",
    ),
    "margin_kept": Entry(
        "margin kept",
        "margin growth / (|gradient of the loss| |g_w - g_l|)",
        "Margin growth at equal length of the step, in % of the fastest there is: what making pairs ideal costs. "
        "100 % for every loss with rho = 1.",
    ),
    "verification": Entry(
        "checked by real steps",
        "measured: log-prob after one real SGD step - before",
        "Predictions against measured changes. Signs agree: of the changes larger than both errors. Slope and R^2: "
        "of measured on predicted. Error ratio: error of a step / error of half of it; 4 for a second-order remainder.",
    ),
    "rank_correlation": Entry(
        "rank correlation",
        "Spearman's rho",
        "Do two columns order the pairs alike? 1 the same order, -1 the opposite, 0 unrelated.",
    ),
    "across": Entry(
        "across pairs",
        "own + partner + (N - 1) (pull + push)",
        "What an epoch over N pairs does to a log-prob, to first order with scores held still. Own and partner: the "
        "pair's own step, as in its regime. Pull and push: the mean effect of another pair's chosen and of its "
        "rejected response; each is small, but there are N - 1.",
    ),
    "moved": Entry(
        "change since the start",
        "log pi(response | prompt) now - before the first step",
        "In nats, mean over the probed pairs: measured, not predicted. Below 0 a response has lost probability.",
    ),
    "both_fell": Entry(
        "both fell",
        "share of the pairs with both changes since the start below 0",
        "Measured over the whole of training so far; the regime says what one step on the pair alone would do.",
    ),
    "margin_grew": Entry(
        "accuracy",
        "share of the pairs whose chosen log-prob has gained on the rejected one since the start",
        "One half is what noise gives.",
    ),
    "summaries": Entry(
        "quality of summaries",
        "ROUGE-L = F1 of the longest common subsequence of words",
        "Greedy summaries of held-out posts against the reference summary, mean over posts; length in tokens.",
    ),
    "ledger": Entry(
        "ledger",
        "measured change = own + partner + others + momentum + decay + clipping + remainder",
        "What a training step's measured change of a log-prob came from: the response's own score, its partner's (the "
        "entanglement), the other pairs of the batch, older gradients, weight decay, clipping, and what is left beyond "
        "first order.",
    ),
    "reward_std": Entry(
        "reward std",
        "s^2 = sum (r - mean)^2 / (K - 1)",
        "Standard deviation of the reward over K answers sampled for one prompt. Where it vanishes, so does the "
        "expected reward gradient.",
    ),
    "reward_gradient": Entry(
        "expected reward gradient",
        "|d E[r] / d parameters|",
        "Its squared norm is estimated without bias from all pairs of a prompt's answers, so an estimate may be "
        "negative (drawn as 0); above two standard errors it is hardly chance.",
    ),
    "prompt_signal": Entry(
        "signal",
        "pair: incentive / incentive at the start of training     rewards: std / half of the reward's range",
        "How much of a method's largest gradient a prompt leaves, from 0 to 1, in units that compare.",
    ),
    "pair_effect": Entry(
        "effect of the pair's step",
        "signal x smaller of the cosines between the step and (chosen up, rejected down)",
        "Below 0 one log-prob of the pair moves the wrong way; near 0 there is hardly a step.",
    ),
}
"""Definitions by key; templates and scripts refer to them by key, and a test holds that every key they use is here."""


def definition_key(column: str) -> str:
    """The key under which a column of pairs is defined; empty for one that isn't."""
    if column in GLOSSARY:
        return column
    known = {"length_ratio": "length", "change_chosen": "change", "change_rejected": "change"}
    return known.get(column) or (f"column-{column}" if column in _diagnostics() else "")


def glossary(columns: Iterable[str]) -> dict[str, Entry]:
    """All definitions, with those of the diagnostics among `columns`: each is defined where it is computed."""
    known = _diagnostics()
    found = {column: known[column] for column in columns if column in known}
    return GLOSSARY | {
        f"column-{column}": Entry(
            column.replace("_", " "), of.formula, f"{of.description} {of.source}".strip()
        )
        for column, of in found.items()
    }


def _diagnostics() -> dict[str, Diagnostic]:
    """The diagnostic of every column that one gives."""
    from entangle.diagnostics import DIAGNOSTICS  # here: it waits for the models' libraries

    return {column: diagnostic for diagnostic in DIAGNOSTICS.values() for column in diagnostic.columns}
