"""Judged losses and settings in groups, and their labels made short.

Long lists are cut, the base's label first:

    >>> listed(["simpo", "cpo", "dpo"], base="dpo", shown=2)
    'dpo, cpo and 1 more'
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd


def by_verdict(settings: pd.DataFrame, count: int, base: str) -> list[pd.DataFrame]:
    """Settings grouped by equal verdicts, at most `count` groups, most ideal first, the base's among them.

    Args:
        settings: one row per setting, with label and verdict.
        count: groups at most.
        base: label of the loss that is always shown.
    """
    groups = sorted(
        (g for _, g in settings.groupby("verdict", sort=False)), key=lambda g: -g["ideal"].iloc[0]
    )
    place = next(i for i, group in enumerate(groups) if (group["label"] == base).any())
    return groups[:count] if place < count else [*groups[: count - 1], groups[place]]


def short_labels(group: pd.DataFrame, settings: pd.DataFrame) -> list[str]:
    """Labels of a verdict; a loss whose every setting has this verdict is named once.

    Args:
        group: the settings of one verdict.
        settings: all settings.
    """
    labels = {}
    for loss, own in group.groupby("loss", sort=False):
        everything = len(own) == (settings["loss"] == loss).sum() > 1
        labels |= dict.fromkeys([f"{loss} (all {len(own)})"] if everything else own["label"])
    return list(labels)


def listed(labels: Sequence[str], base: str, shown: int = 8, width: int = 60) -> str:
    """The first labels, the base before all, then the shorter ones, and how many more there are.

    Args:
        labels: what is listed.
        base: the label that comes first.
        shown: labels at most.
        width: characters that they take at most.
    """
    first = base.partition("(")[0]
    ordered = sorted(labels, key=lambda label: (label.partition("(")[0].strip() != first, len(label)))
    cut = [label if len(label) <= width else f"{label[: width - 1]}…" for label in ordered[:shown]]
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(cut) + more
