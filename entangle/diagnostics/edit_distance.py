"""Normalised edit distance of the responses."""

from __future__ import annotations

import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor

from entangle.diagnostics.base import diagnostic
from entangle.diagnostics.reading import Reading


@diagnostic(
    "edit_distance",
    description="How different the responses are as token sequences: 0 equal, 1 nothing in common.",
    formula="Levenshtein(y_w, y_l) / max(n_w, n_l)",
    cost="tokens",
    source="arXiv 2402.13228, 2410.08847",
)
def edit_distance(reading: Reading) -> dict[str, Tensor]:
    """Insertions, deletions and substitutions of tokens between the responses, over the longer one's length.

    In [0, 1]; 0 iff the token sequences are equal.
    """
    distances = [Levenshtein.normalized_distance(*pair) for pair in reading.responses]
    return {"edit_distance": torch.tensor(distances, dtype=torch.float64)}
