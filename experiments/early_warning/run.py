"""Which pairs' chosen log-prob will have fallen at the end? Asked of a probe before training, and after 5 % of it.

    python experiments/compare/split.py
    python experiments/early_warning/run.py

Trains DPO (train.yaml) on the first 96 training pairs with three seeds, and asks how well numbers of a pair, measured
at step 0 and at step 4 of 72, rank the pairs that end with a lower chosen log-prob. AUROC (0.5: no better than chance)
as mean over seeds, with a 95 % bootstrap interval over pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from entangle.analysis.statistics import bootstrap
from entangle.commands.probe import run_probe
from entangle.commands.train import run_train
from entangle.config import ProbeConfig, TrainConfig, parse
from entangle.figures.style import panels, save

PAIRS, EARLY, SEEDS = 96, 4, (0, 1, 2)
DATA = Path("runs/early_warning/pairs.jsonl")
RESULTS = Path("experiments/results/early_warning")
CONSOLE = Console(stderr=True)

WARNINGS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "cosine": lambda rows: rows["cosine"],
    "c / A": lambda rows: rows["inner"] / rows["sq_chosen"],
    "band slack (low)": lambda rows: -rows["slack"],
    "predicted change of the chosen (low)": lambda rows: -rows["change_chosen"],
    "CHES": lambda rows: rows["ches"],
    "CHES, length-normalised": lambda rows: rows["ches_norm"],
    "edit distance (low)": lambda rows: -rows["edit_distance"],
    "length difference": lambda rows: (rows["length_chosen"] - rows["length_rejected"]).abs(),
    "chosen longer than rejected": lambda rows: rows["length_chosen"] - rows["length_rejected"],
    "chosen log-prob per token (high)": lambda rows: rows["logps_chosen"] / rows["length_chosen"],
}
"""Numbers of a pair by name, each so that a high value warns."""


def trained(seed: int) -> tuple[Path, pd.Series]:
    """A run's folder, and by pair whether its chosen log-prob has fallen at the end."""
    flags = [
        "--config",
        "experiments/early_warning/train.yaml",
        "--dataset_name",
        str(DATA),
        "--eval_dataset_name",
        str(DATA),
        "--seed",
        str(seed),
        "--output_dir",
        f"runs/early_warning/seed{seed}",
    ]
    result = run_train(parse(TrainConfig, flags, prog="early_warning")[0], CONSOLE)
    assert result.held_out is not None
    rows = result.held_out.set_index("index")
    return result.run.path, rows["logps_chosen_end"] < rows["logps_chosen"]


def probed(seed: int, run: Path, step: int) -> pd.DataFrame:
    """The training pairs' numbers before training (step 0) or at a checkpoint."""
    policy: dict[str, Any] = {"model_name_or_path": str(run / f"checkpoint-{step}")}
    if step == 0:
        policy = {"use_peft": True, "seed": seed}
    result = run_probe(
        ProbeConfig(
            dataset_name=str(DATA),
            losses=("dpo",),
            diagnostics=("ches", "edit_distance"),
            save_text=False,
            output_dir=f"runs/early_warning/probe-seed{seed}-step{step}",
            **policy,
        ),
        CONSOLE,
    )
    return result.pairs.merge(result.predictions, on="index").set_index("index")


def auroc(score: np.ndarray, fell: np.ndarray) -> float:
    """Probability that a fallen pair scores higher than one that didn't fall; ties count half."""
    if fell.all() or not fell.any():
        return float("nan")
    ranks = pd.Series(score).rank().to_numpy()
    positives = int(fell.sum())
    return float(
        (ranks[fell].sum() - positives * (positives + 1) / 2) / (positives * (len(fell) - positives))
    )


def measured(scores: np.ndarray, fell: np.ndarray, draws: int = 1000) -> dict[str, float]:
    """Mean AUROC over seeds, `(seeds, pairs)` each, and its interval over resampled pairs."""

    def mean(chosen: np.ndarray) -> float:
        return float(np.nanmean([auroc(s[chosen], f[chosen]) for s, f in zip(scores, fell, strict=True)]))

    pairs = np.arange(scores.shape[1])
    low, high = bootstrap(
        lambda drawn, axis: np.apply_along_axis(mean, axis, drawn.astype(int)), pairs, draws=draws
    )
    return {"auroc": mean(pairs), "low": low, "high": high}


def figure(table: pd.DataFrame) -> None:
    """AUROC of every number at both times."""
    drawn, axes = panels(1, 2, 9.0, 4.0, sharey=True)
    for each, (step, own) in zip(axes, table.groupby("step"), strict=True):
        places = np.arange(len(own), 0, -1)
        spread = [own["auroc"] - own["low"], own["high"] - own["auroc"]]
        each.errorbar(own["auroc"], places, xerr=spread, fmt="o", ms=4, color="#2b5c8a")
        each.axvline(0.5, color="#999999", lw=0.9, ls="--")
        each.set_xlim(0, 1)
        each.set_xlabel("AUROC, 95 % interval")
        each.set_title(f"measured at step {step}", fontsize=10, loc="left")
        each.set_yticks(places, own["warning"])
    save(drawn, RESULTS / "auroc.png")


def main() -> None:
    """Train and probe what isn't there, and write table and figure."""
    DATA.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    DATA.write_text("".join(Path("runs/tldr/train.jsonl").read_text().splitlines(keepends=True)[:PAIRS]))
    runs = {seed: trained(seed) for seed in SEEDS}
    fell = pd.DataFrame({seed: outcome for seed, (_, outcome) in runs.items()})
    print(
        f"fallen chosen log-probs by seed: {fell.mean().round(3).to_dict()}; in all: {fell.all(axis=1).mean():.3f}"
    )
    rows = []
    for step in (0, EARLY):
        probes = [probed(seed, runs[seed][0], step).loc[fell.index] for seed in SEEDS]
        for name, warning in WARNINGS.items():
            scores = np.stack([warning(probe).to_numpy(float) for probe in probes])
            rows.append({"step": step, "warning": name} | measured(scores, fell.to_numpy().T))
    table = pd.DataFrame(rows)
    table.to_csv(RESULTS / "auroc.csv", index=False, float_format="%.4f")
    fell.to_csv(RESULTS / "fell.csv")
    figure(table)
    print(table.to_string(index=False))


if __name__ == "__main__":
    main()
