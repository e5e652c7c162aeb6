"""The frontier: what a method leaves of the margin, and what becomes of the held-out chosen log-prob.

python experiments/cure/frontier.py    # from the committed results of the configurations beside it
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from entangle.analysis.statistics import Z
from entangle.figures.style import FAINT, LINES, legend_below, panels, save

RESULTS = Path("experiments/results/cure")
PARTS = {
    "A rule to learn (marked endings)": ("rule", "rule_losses"),
    "TL;DR, where this policy learns none": ("tldr", "tldr_losses"),
}


def main() -> None:
    """Draw one panel per data set: margin across, chosen upwards, 95 % intervals over held-out pairs."""
    figure, axes = panels(1, 2, 10.0, 4.4, sharex=False)
    names: list[str] = []
    for each, (title, folders) in zip(axes, PARTS.items(), strict=True):
        files = [RESULTS / folder / "variants.parquet" for folder in folders]
        rows = pd.concat([pd.read_parquet(file) for file in files if file.is_file()])
        for row in rows.to_dict("records"):
            name = str(row["variant"]).replace(", mitigations=", " + ")
            names += [name] if name not in names else []
            each.errorbar(
                row["moved_margin"],
                row["moved_chosen"],
                xerr=Z * row["moved_margin_error"],
                yerr=Z * row["moved_chosen_error"],
                fmt="o",
                ms=5,
                capsize=2,
                color=LINES[names.index(name) % len(LINES)],
                label=name,
            )
        each.axhline(0, color=FAINT, lw=0.8, zorder=0)
        each.set_title(title, fontsize=10, loc="left")
        each.set_xlabel("growth of the held-out margin, nats")
    axes[0].set_ylabel("change of the held-out\nchosen log-prob, nats")
    legend_below(figure)
    save(figure, RESULTS / "frontier.png")


if __name__ == "__main__":
    main()
