"""A real task with perfect exploration: an MLP on scikit-learn's digits, a tenth of the inputs relabelled.

python -m experiments.rft.digits experiments/results/rft

The classifier is fitted to 1000 digits; then the labels of 10 % of them change. On these inputs the new label
is nearly impossible under the fitted policy, so its reward (+1 for the label, -1 otherwise) hardly varies.
Both fine-tunings see exact objectives: RFT the expected reward summed over all ten labels, SFT the
log-probability of the label. The setting follows the controlled study of arXiv 2310.20703; network, data and
learning rates are chosen here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from entangle.analysis.statistics import rank_correlation
from entangle.figures.style import new_axes

EPOCHS, BATCH, INPUTS, SHARE = 300, 100, 1000, 0.1
RATES = {"sgd": (0.2, 0.8, 2.0), "adam": (5e-4, 2e-3, 5e-3)}
METHODS = {"rft": ("#c8382e", "RFT"), "sft": ("#2b6cb0", "SFT")}


def load(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs `(N, 64)`, old labels, new labels `(N,)`, and which inputs were relabelled."""
    from sklearn.datasets import load_digits

    digits = load_digits()  # pyright: ignore[reportCallIssue]
    draw = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(digits.data), generator=draw)[:INPUTS]  # pyright: ignore[reportAttributeAccessIssue]
    inputs = torch.tensor(digits.data, dtype=torch.float32)[kept] / 16  # pyright: ignore[reportAttributeAccessIssue]
    old = torch.tensor(digits.target)[kept]  # pyright: ignore[reportAttributeAccessIssue]
    changed = torch.rand(INPUTS, generator=draw) < SHARE
    other = (old + torch.randint(1, 10, (INPUTS,), generator=draw)) % 10
    return inputs, old, torch.where(changed, other, old), changed


def network(seed: int) -> nn.Module:
    """64-128-10, ReLU."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def loss_of(method: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Minus the expected reward 2 p - 1, or minus the label's log-probability; both exact."""
    logp = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return -(2 * logp.exp() - 1).mean() if method == "rft" else -logp.mean()


def train(
    model: nn.Module,
    method: str,
    optimiser: str,
    rate: float,
    inputs: Tensor,
    labels: Tensor,
    epochs: int,
    seed: int,
) -> list[Tensor]:
    """Fit in place; every input's expected reward before the first and after each epoch, `(N,)` each."""
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimiser]
    steps, draw = kind(model.parameters(), lr=rate), torch.Generator().manual_seed(seed)
    history = [rewards(model, inputs, labels)]
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs), generator=draw).split(BATCH):
            steps.zero_grad()
            loss_of(method, model(inputs[batch]), labels[batch]).backward()
            steps.step()
        history.append(rewards(model, inputs, labels))
    return history


@torch.no_grad()
def rewards(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Expected reward 2 p - 1 of every input."""
    return 2 * model(inputs).softmax(-1).gather(1, labels[:, None])[:, 0] - 1


def run(seed: int = 0) -> dict[str, dict]:
    """Rewards over training by optimiser and method, each at the rate that ends best; change against initial std."""
    inputs, old, new, changed = load(seed)
    fitted = network(seed)
    train(fitted, "sft", "adam", 1e-3, inputs, old, 60, seed)
    start = rewards(fitted, inputs, new)
    std = (1 - start**2).clamp(min=0).sqrt()  # rewards +-1 with mean m have variance 1 - m^2
    results: dict[str, dict] = {
        "start": {
            "relabelled": int(changed.sum()),
            "std_relabelled": float(std[changed].median()),
            "std_others": float(std[~changed].median()),
            "share_small_std": float((std[changed] < 0.1).float().mean()),
        }
    }
    for optimiser, rates in RATES.items():
        results[optimiser] = {}
        for method in METHODS:
            runs = {}
            for rate in rates:
                model = network(seed)
                model.load_state_dict(fitted.state_dict())
                runs[rate] = train(model, method, optimiser, rate, inputs, new, EPOCHS, seed)
            best = max(runs, key=lambda rate: float(runs[rate][-1].mean()))
            results[optimiser][method] = describe(runs[best], std, changed) | {
                "rate": best,
                "final_by_rate": {str(rate): float(h[-1].mean()) for rate, h in runs.items()},
            }
    return results


def describe(history: list[Tensor], std: Tensor, changed: Tensor) -> dict:
    """Mean rewards of both groups over training, epochs to fit, and change of reward against initial std.

    Fitted: the epoch from which the relabelled inputs' mean reward is above .6 (label probability .8); null:
        never.
    """
    import pandas as pd

    relabelled = [float(reward[changed].mean()) for reward in history]
    change = (history[-1] - history[0])[changed]
    early = (history[len(history) // 10] - history[0])[changed]
    return {
        "relabelled": relabelled,
        "others": [float(reward[~changed].mean()) for reward in history],
        "epochs_to_fit": next((epoch for epoch, reward in enumerate(relabelled) if reward >= 0.6), None),
        "fitted_relabelled": int((history[-1][changed] >= 0.6).sum()),
        "std": std[changed].tolist(),
        "change": change.tolist(),
        "rank_correlation": {
            when: rank_correlation(pd.Series(std[changed].numpy()), pd.Series(values.numpy()))
            for when, values in (("end", change), ("a tenth of the epochs", early))
        },
    }


def draw(results: dict[str, dict], path: Path) -> None:
    """Rows: optimisers. Columns: relabelled inputs, the others, change of reward against initial std."""
    figure = new_axes(11.0, 6.4).get_figure(root=True)
    assert figure is not None
    figure.clear()
    grid = figure.subplots(2, 3)
    for row, optimiser in zip(grid, RATES, strict=True):
        for method, (colour, label) in METHODS.items():
            found = results[optimiser][method]
            label = f"{label}, rate {found['rate']:g}"
            row[0].plot(found["relabelled"], color=colour, label=label)
            row[1].plot(found["others"], color=colour)
            row[2].plot(found["std"], found["change"], ".", color=colour, ms=5, alpha=0.7)
        row[0].legend(fontsize=8, frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.3))
        row[0].set(title=f"{optimiser.upper()}: relabelled inputs", ylabel="mean reward", ylim=(-1.05, 1.05))
        row[1].set(title="other inputs", ylim=(-1.05, 1.05))
        row[2].set(xscale="log", title="relabelled inputs", ylabel="change of reward at the end")
    for axes in grid[1][:2]:
        axes.set_xlabel("epochs")
    grid[1][2].set_xlabel("initial std of the reward")
    for axes in np.ravel(grid):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    outcome = run()
    (folder / "digits.json").write_text(json.dumps(outcome) + "\n")
    draw(outcome, folder / "digits.png")
    print(outcome["start"])
    for name in RATES:
        for kind, entry in outcome[name].items():
            keys = ("rate", "final_by_rate", "epochs_to_fit", "fitted_relabelled", "rank_correlation")
            print(name, kind, {key: entry[key] for key in keys}, entry["relabelled"][-1], entry["others"][-1])
