"""Reads finished probes: the share of both-down pairs per loss, and what distinguishes those pairs.

python experiments/probe/reading.py experiments/results/probe/tldr experiments/results/probe/tldr_small_llama
"""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu

from entangle import ProbeResult
from entangle.analysis.predictions import is_scored
from entangle.analysis.statistics import share
from entangle.analysis.summary import derived

LOSSES = ("dpo", "simpo", "dpop", "cpo")


def features(pairs: pd.DataFrame) -> pd.DataFrame:
    """What is known of a pair beside its regime, by dataset index."""
    known = derived(pairs)
    known["length_chosen"], known["length_rejected"] = pairs["length_chosen"], pairs["length_rejected"]
    known["prompt_length"] = pairs["prompt_length"]
    known["chosen_mean_logp"] = pairs["logps_chosen"] / pairs["length_chosen"]
    known["rejected_mean_logp"] = pairs["logps_rejected"] / pairs["length_rejected"]
    known["mean_logp_gap"] = known["chosen_mean_logp"] - known["rejected_mean_logp"]
    return known.set_index(pairs["index"])


def area(positive: pd.Series, negative: pd.Series) -> float:
    """AUROC: how often a positive pair has the larger value; 0.5 says nothing."""
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def read(run: str) -> None:
    """Print the reading of one run."""
    result = ProbeResult.load(run)
    known = features(result.pairs[is_scored(result.pairs)])
    print(f"\n{run}: {len(known)} pairs")
    for loss in LOSSES:
        regimes = result.predictions.query("loss == @loss").set_index("index")["regime"]
        down = regimes == "both_down"
        found = share(int(down.sum()), len(down))
        interval = f"[{100 * found['low']:.1f}-{100 * found['high']:.1f}]"
        print(f"  {loss}: both down {100 * found['share']:.1f} % {interval}")
        if 5 <= down.sum() <= len(down) - 5:
            areas = {name: area(column[down], column[~down]) for name, column in known.items()}
            ranked = sorted(areas.items(), key=lambda item: -abs(item[1] - 0.5))
            print("    AUROC of", ", ".join(f"{name} {value:.2f}" for name, value in ranked))
            for name, _ in ranked[:3]:
                inside, outside = np.median(known[name][down]), np.median(known[name][~down])
                print(f"    median {name}: {inside:.3g} both down, {outside:.3g} others")


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        read(folder)
