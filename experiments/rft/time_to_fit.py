"""Time to fit as the initial reward std shrinks: RFT, GRPO and SFT with perfect exploration.

python -m experiments.rft.time_to_fit experiments/results/rft

Two exactly solvable policies: a softmax over 5 outputs, and an autoregressive one with 27 outputs of 3 tokens
that share their parameters. One output is correct, rewards are +1 and -1, every gradient is a sum over all
outputs, and the policy starts from a correct output of probability p. Time is learning rate times steps until
it has .8.

GRPO divides by the std, so its time doesn't depend on the rewards' scale; RFT's is inversely proportional to
it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from entangle.figures.style import new_axes
from entangle.rewards.gradients import grpo_factor
from experiments.rft.closed_forms import time_rft, time_sft
from experiments.rft.exact import Array, Autoregressive, Outputs, softmax_outputs

STARTS = np.geomspace(0.2, 1e-5, 14)
TARGET = 0.8
GROUP = 8
STYLES = {
    "rft": ("#c8382e", "o", "RFT"),
    "grpo": ("#e0a526", "s", f"GRPO, groups of {GROUP}"),
    "sft": ("#2b6cb0", "^", "SFT"),
}

Policy = Callable[[Array], Outputs]


def direction(method: str, outputs: Outputs, correct: int) -> Array:
    """Ascent direction in the parameters, exactly: E[r S], its GRPO form, or the correct output's score."""
    if method == "sft":
        return outputs.scores[correct]
    rewards = -np.ones(len(outputs.probabilities))
    rewards[correct] = 1.0
    p = float(outputs.probabilities[correct])
    factor = 1.0 if method == "rft" else grpo_factor(p, GROUP) / (2 * p * (1 - p))
    return factor * outputs.gradient(rewards)


def time_to_fit(policy: Policy, start: Array, correct: int, method: str, limit: int = 200_000) -> float:
    """Time until the correct output has probability `TARGET`, by ascent whose step keeps log p's change near .01."""
    theta, time = start.copy(), 0.0
    for _ in range(limit):
        outputs = policy(theta)
        if outputs.probabilities[correct] >= TARGET:
            return time
        step = direction(method, outputs, correct)
        rate = 0.01 / abs(float(outputs.scores[correct] @ step))
        theta, time = theta + rate * step.reshape(theta.shape), time + rate
    return float("nan")


def softmax_start(p: float, labels: int = 5) -> Array:
    """Logits with probability p for output 0, the others equal."""
    return np.log(np.array([p] + [(1 - p) / (labels - 1)] * (labels - 1)))


def lowered_start(policy: Policy, theta: Array, correct: int, p: float) -> Array:
    """Parameters from which the correct output has been unlearned down to probability p."""
    while True:
        outputs = policy(theta)
        now = float(outputs.probabilities[correct])
        if now <= p * 1.001:
            return theta
        score = outputs.scores[correct]
        drop = min(0.05, np.log(now / p))
        theta = theta - drop * score.reshape(theta.shape) / float(score @ score)


def slope(stds: list[float], times: list[float], count: int = 4) -> float:
    """Slope of log time in log std over the smallest stds."""
    return float(np.polyfit(np.log(stds[-count:]), np.log(times[-count:]), 1)[0])


def run() -> dict[str, dict]:
    """Times of both policies by method and initial std."""
    model = Autoregressive.random(3, 3, 6, seed=3)
    base = np.random.default_rng(3).normal(scale=0.1, size=(3, 6))
    correct = 14
    starts = [p for p in STARTS if p <= float(model(base).probabilities[correct])]
    theta, lowered = base, []
    for p in starts:
        theta = lowered_start(model, theta, correct, p)
        lowered.append(theta)
    studies: dict[str, tuple[Policy, list[Array], int]] = {
        "softmax over 5 outputs": (softmax_outputs, [softmax_start(p) for p in STARTS], 0),
        "autoregressive, 27 outputs": (model, lowered, correct),
    }
    results = {}
    for name, (policy, thetas, answer) in studies.items():
        chances = [float(policy(theta).probabilities[answer]) for theta in thetas]
        stds = [2 * float(np.sqrt(p * (1 - p))) for p in chances]
        times = {
            method: [time_to_fit(policy, theta, answer, method) for theta in thetas] for method in STYLES
        }
        slopes = {method: slope(stds, values) for method, values in times.items()}
        results[name] = {"p": chances, "std": stds, "time": times, "slope": slopes}
    flow = results["softmax over 5 outputs"]
    flow["closed_form"] = {
        "rft": [time_rft(p, TARGET, 5) for p in flow["p"]],
        "sft": [time_sft(p, TARGET, 5) for p in flow["p"]],
    }
    return results


def draw(results: dict[str, dict], path: Path) -> None:
    """Time against initial std, both axes logarithmic; lines are the closed forms."""
    figure = new_axes(10.0, 4.6).get_figure(root=True)
    assert figure is not None
    figure.clear()
    for axes, (name, result) in zip(
        np.ravel(figure.subplots(1, 2, sharey=True)), results.items(), strict=True
    ):
        for method, (colour, marker, label) in STYLES.items():
            label = f"{label}: slope {result['slope'][method]:.2f}"
            axes.plot(result["std"], result["time"][method], marker, color=colour, ms=5, label=label)
            if method in result.get("closed_form", {}):
                axes.plot(result["std"], result["closed_form"][method], "-", color=colour, lw=1.2)
        axes.set(xscale="log", yscale="log", xlabel="initial std of the reward", title=name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    figure.axes[0].set_ylabel(f"time until the correct output has probability {TARGET}")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    found = run()
    (folder / "time_to_fit.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(found, folder / "time_to_fit.png")
    for title, entry in found.items():
        print(title, {method: round(value, 3) for method, value in entry["slope"].items()})
