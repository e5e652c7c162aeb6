"""Normalised edit distance of the responses."""

from __future__ import annotations

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from entangle.diagnostics.reading import Reading


def edit_distance(reading: Reading) -> dict[str, Tensor]:
    """Insertions, deletions and substitutions of tokens between the responses, over the longer one's length.

    In [0, 1]; 0 iff the token sequences are equal.
    """
    distances = [Levenshtein.normalized_distance(*pair) for pair in reading.responses]
    return {"edit_distance": torch.tensor(distances, dtype=torch.float64)}
