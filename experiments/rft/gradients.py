"""Bounds on the expected reward gradient, and its estimate from K answers, on enumerated policies.

python -m experiments.rft.gradients experiments/results/rft

Left: 300 random autoregressive linear policies with rewards in [-1, 1]: how far below each bound the gradient
is.
Right: one policy; mean and spread of the plain squared norm |RLOO estimate|^2 and of the unbiased estimate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from entangle.figures.style import new_axes
from entangle.rewards.bounds import fisher_bound, length_bound, paper_bound, trace_bound
from entangle.rewards.gradients import gradient_product, rloo_weights, weighted_norm
from experiments.rft.exact import Autoregressive

BOUNDS = {
    "paper": ("#c8382e", "6 L gamma std^(2/3), the paper's form"),
    "length": ("#e0a526", "std gamma sqrt(L)"),
    "trace": ("#2b6cb0", "std sqrt(tr F)"),
    "fisher": ("#2a9d6f", "std sqrt(largest eigenvalue of F)"),
}
COUNTS = (4, 8, 16, 32, 64)
DRAWS = 1500


def bound_ratios(count: int = 300) -> dict[str, list[float]]:
    """||grad V|| / bound for every policy, by bound; and the stds."""
    ratios: dict[str, list[float]] = {name: [] for name in (*BOUNDS, "std")}
    for seed in range(count):
        draw = np.random.default_rng(seed)
        model = Autoregressive.random(3, 1 + seed % 4, 4, seed)
        outputs = model(draw.normal(scale=draw.uniform(0.1, 4.0), size=(3, 4)))
        rewards = draw.uniform(-1, 1, size=len(outputs.probabilities))
        std, gradient = outputs.std(rewards), float(np.linalg.norm(outputs.gradient(rewards)))
        bounds = {
            "paper": paper_bound(std, outputs.length, outputs.gamma),
            "length": length_bound(std, outputs.length, outputs.gamma),
            "trace": trace_bound(std, outputs.trace),
            "fisher": fisher_bound(std, outputs.eigenvalue),
        }
        ratios["std"].append(std)
        for name, bound in bounds.items():
            ratios[name].append(gradient / bound)
    return ratios


def estimates() -> dict[str, dict]:
    """Mean and spread of both estimates of ||grad V||^2, by K, over `DRAWS` samples of K answers."""
    draw = np.random.default_rng(1)
    model = Autoregressive.random(3, 3, 6, seed=1)
    outputs = model(draw.normal(scale=0.6, size=(3, 6)))
    rewards = (np.arange(27) % 7 == 0).astype(float)
    gradient = outputs.gradient(rewards)
    found: dict[str, dict] = {"truth": {"sq": float(gradient @ gradient), "std": outputs.std(rewards)}}
    for count in COUNTS:
        values = []
        for _ in range(DRAWS):
            rows = draw.choice(27, size=count, p=outputs.probabilities)
            gram, r = outputs.gram[np.ix_(rows, rows)], rewards[rows]
            values.append((gradient_product(gram, r), weighted_norm(gram, rloo_weights(r)) ** 2))
        unbiased, plain = np.array(values).T
        found[str(count)] = {
            name: {"mean": float(v.mean()), "error": float(v.std() / np.sqrt(DRAWS)), "std": float(v.std())}
            for name, v in (("unbiased", unbiased), ("plain", plain))
        }
    return found


def draw_figure(ratios: dict[str, list[float]], found: dict[str, dict], path: Path) -> None:
    """Both panels."""
    figure = new_axes(10.4, 4.6).get_figure(root=True)
    assert figure is not None
    figure.clear()
    left, right = figure.subplots(1, 2)
    for name, (colour, label) in BOUNDS.items():
        label = f"{label}: median {np.median(ratios[name]):.3f}"
        left.plot(ratios["std"], ratios[name], ".", color=colour, ms=4, alpha=0.7, label=label)
    left.axhline(1, color="#333333", lw=0.8)
    left.set(xscale="log", yscale="log", xlabel="std of the reward", ylabel="gradient norm / bound")
    left.legend(fontsize=7.5, frameon=False, loc="lower right")
    truth = found["truth"]["sq"]
    for name, colour, shift in (("plain", "#c8382e", 0.97), ("unbiased", "#2b6cb0", 1.03)):
        rows = [found[str(count)][name] for count in COUNTS]
        right.errorbar(
            np.array(COUNTS) * shift,
            [row["mean"] / truth for row in rows],
            [row["std"] / truth for row in rows],
            fmt="o",
            ms=4,
            color=colour,
            capsize=3,
            label=f"{name} (bars: one standard deviation)",
        )
    right.axhline(1, color="#333333", lw=0.8)
    right.set_xscale("log", base=2)
    right.set_xticks(COUNTS, [str(count) for count in COUNTS])
    right.set(xlabel="answers K", ylabel="estimate of the squared norm / truth")
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    shares, table = bound_ratios(), estimates()
    medians = {name: float(np.median(values)) for name, values in shares.items()}
    largest = {name: float(np.max(values)) for name, values in shares.items()}
    content = {"median": medians, "largest": largest, "estimates": table}
    (folder / "gradients.json").write_text(json.dumps(content, indent=2) + "\n")
    draw_figure(shares, table, folder / "gradients.png")
    print(medians, {k: v for k, v in table.items()})
