"""Counts the doctor's hits and false alarms on the logs of `make_logs.py`, against what was measured without the log.

    python experiments/doctor/count.py

Prints a table per seed: thresholds were settled on seed 0, seed 1 was held out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from make_logs import LOGS, SEEDS

from entangle.doctor import examine, read_log

Truth = dict[str, Any]


def dead(truth: Truth, first: bool = False) -> float:
    """Share of groups without spread among the first or the last fifth of those sampled."""
    groups = truth["groups"]
    part = groups[: len(groups) // 5] if first else groups[-(len(groups) // 5) :]
    return sum(max(group) == min(group) for group in part) / len(part)


def fell(truth: Truth) -> bool:
    """Both log-probs fell by more than a nat on average, the chosen by more than a tenth of the margin's growth."""
    chosen, rejected = truth["change_chosen"], truth["change_rejected"]
    return chosen < -1 and rejected < -1 and -chosen > 0.1 * (chosen - rejected)


def rose(truth: Truth) -> bool:
    """Both log-probs rose by more than a nat on average, the rejected by more than a tenth of the chosen's rise."""
    chosen, rejected = truth["change_chosen"], truth["change_rejected"]
    return chosen > 1 and rejected > 1 and rejected > 0.1 * chosen


CASES: dict[str, tuple[bool, Callable[[Truth], bool]]] = {
    "coupled_fall": (False, fell),
    "coupled_rise": (False, rose),
    "chosen_collapse": (False, lambda t: t["change_chosen"] < 0.25 * t["before_chosen"]),
    "no_margin": (False, lambda t: t["change_chosen"] - t["change_rejected"] < 0.1),
    "dead_groups": (True, lambda t: t["trainer"] == "grpo" and dead(t) > 0.5),
    "ties_broken": (True, lambda t: t["trainer"] == "rloo" and dead(t, first=True) > 0.05),
}
"""Rules whose truth was measured: whether it is of group trainers, and when the rule should find something."""
NOTES = ("coupled_rise",)
"""Rules that never warn: their notes count."""


def main() -> None:
    """Print a table per seed."""
    for seed in SEEDS:
        runs = sorted(folder for folder in LOGS.iterdir() if folder.name.endswith(f"-{seed}"))
        print(f"\nseed {seed}: {len(runs)} runs\n")
        print("| rule | runs | due | found | misses | false alarms | which |\n|---|---|---|---|---|---|---|")
        for rule, (is_groups, is_due) in CASES.items():
            counts, wrong = [0, 0, 0, 0, 0], []
            for run in runs:
                truth = json.loads((run / "truth.json").read_text())
                if ("groups" in truth) != is_groups:
                    continue
                found = examine(read_log(run)).findings
                does = any(
                    finding.rule == rule and (finding.level == "warning" or rule in NOTES)
                    for finding in found
                )
                should = is_due(truth)
                for place, hit in enumerate((True, should, does, should and not does, does and not should)):
                    counts[place] += hit
                wrong += [run.name] * (should != does)
            print(f"| {rule} | {' | '.join(map(str, counts))} | {' '.join(wrong)} |")


if __name__ == "__main__":
    main()
