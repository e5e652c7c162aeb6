"""How many pairs and checkpoints fit the minutes, from the time that a first pass took.

Ten minutes for pairs of a second each, and models that load in 20 seconds: two checkpoints, and as many pairs as fit.

    >>> size = fit(512, steps=(10, 20, 30), pace=Pace(per_pair=1.0, loading=20.0), seconds=600)
    >>> size.pairs, size.steps, round(size.seconds)
    (120, (10, 30), 540)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST = 16
"""Pairs below which hardly anything can be told."""

ENOUGH = 128
"""Pairs from which on further checkpoints are worth more than further pairs."""

MOST = 512
"""Pairs above which intervals hardly narrow."""

MOST_STEPS = 8
"""Checkpoints that are probed, at most."""

SHARE = 0.9
"""Of the time that is left, what may be planned: the rest is for sentences and the page."""

ACROSS = 2
"""Passes that it takes to measure which pairs do it."""


@dataclass(frozen=True)
class Pace:
    """What this machine needs.

    Args:
        per_pair: seconds of the engine for a pair.
        loading: seconds to load the model.
    """

    per_pair: float
    loading: float


@dataclass(frozen=True)
class Size:
    """What is measured.

    Args:
        pairs: how many.
        steps: checkpoints that are probed, in order.
        seconds: that it should take.
    """

    pairs: int
    steps: tuple[int, ...]
    seconds: float


def fit(pairs: int, steps: Sequence[int], pace: Pace, seconds: float) -> Size:
    """As many checkpoints and pairs as fit: `ENOUGH` pairs at two, then further checkpoints, then further pairs.

    At least `FEWEST` pairs at the first and the last checkpoint are measured whatever it takes.

    Args:
        pairs: that there are.
        steps: of all checkpoints, in order.
        pace: of this machine.
        seconds: that are left.
    """
    ends = min(2, len(steps))
    most = min(pairs, MOST)

    def room(count: int) -> float:
        """Pairs that fit `count` checkpoints."""
        left = SHARE * seconds - (count + 1) * pace.loading
        return left / ((count + ACROSS) * max(pace.per_pair, 1e-9))

    fitting = [
        count for count in range(ends, min(len(steps), MOST_STEPS) + 1) if room(count) >= min(ENOUGH, most)
    ]
    count = max(fitting, default=ends)
    chosen = int(min(most, max(FEWEST, room(count))))
    places = np.linspace(0, len(steps) - 1, count).round().astype(int) if count > 1 else [len(steps) - 1]
    taken = tuple(steps[place] for place in places)
    takes = (count + ACROSS) * chosen * pace.per_pair + (count + 1) * pace.loading
    return Size(chosen, taken, takes)
