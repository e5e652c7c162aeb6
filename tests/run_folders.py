"""Finished run folders without a model: rows as `entangle probe` writes them, from random or given blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from entangle.analysis.geometry import RESOLUTION, PairGeometry
from entangle.analysis.predictions import predict_losses
from entangle.analysis.summary import summarise
from entangle.config import ProbeConfig
from entangle.runs.folder import RunFolder
from losses import build


def synthetic_pairs(
    count: int = 60,
    *,
    has_reference: bool = True,
    at_reference: bool = False,
    cosine: float = 0.8,
    norm_ratio: float = 1.0,
    seed: int = 0,
) -> pd.DataFrame:
    """Rows of `count` pairs with random scores of three entries, similar to each other, and random log-probs.

    Args:
        count: number of pairs.
        has_reference: False leaves the reference columns empty.
        at_reference: the policy is the reference (log-ratios are 0).
        cosine: about how similar the two scores of a pair are; 0 is unrelated.
        norm_ratio: about how much longer the rejected score is; below 1 DPO makes many pairs fall together.
        seed: of the generator; the same seed gives the same rows.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    shared, scale = normal(count, 3), (0.8 * normal(2, count, 1)).exp()
    chosen, rejected = scale * (cosine * shared + (1 - cosine**2) ** 0.5 * normal(2, count, 3))
    rejected = norm_ratio * rejected
    lengths = torch.randint(3, 60, (2, count), generator=draw)
    logps = -2 * lengths - normal(2, count).abs()
    drift = torch.zeros(2, count) if at_reference else 3 * normal(2, count)
    reference = logps - drift if has_reference else torch.full((2, count), torch.nan)
    return pairs_of(PairGeometry.from_scores(chosen, rejected), logps, reference, lengths)


def pairs_of(
    geometry: PairGeometry, logps: torch.Tensor, reference: torch.Tensor, lengths: torch.Tensor
) -> pd.DataFrame:
    """Rows of pairs with given blocks, log-probs and lengths (chosen, rejected: `(2, B)`), no flag set."""
    count = len(geometry.inner)
    lower, upper = geometry.critical_ratio
    return pd.DataFrame(
        {
            "index": range(count),
            "prompt_hash": [f"{i:08x}" for i in range(count)],
            "kind": "synthetic",
            "prompt_length": 10,
            "truncated": False,
            "identical": False,
            "dropped": False,
            "empty": False,
            "sq_chosen": geometry.sq_chosen,
            "sq_rejected": geometry.sq_rejected,
            "inner": geometry.inner,
            "gap_chosen": geometry.gap_chosen,
            "gap_rejected": geometry.gap_rejected,
            "logps_chosen": logps[0].double(),
            "logps_rejected": logps[1].double(),
            "ref_logps_chosen": reference[0].double(),
            "ref_logps_rejected": reference[1].double(),
            "cosine": geometry.cosine,
            "band_lower": lower,
            "band_upper": upper,
            "length_chosen": lengths[0],
            "length_rejected": lengths[1],
            "non_finite": False,
        }
    )


def with_flag(pairs: pd.DataFrame, rows: Sequence[int], flag: str) -> pd.DataFrame:
    """The same rows, some of them flagged; what `dropped` and `empty` mean for the numbers is applied too."""
    pairs = pairs.copy()
    pairs.loc[list(rows), flag] = True
    if flag in ("dropped", "empty"):
        numbers = [
            name
            for name in pairs.columns
            if name.startswith(("logps", "ref_logps", "band")) or name.endswith(("_sq", "_gap"))
        ]
        pairs.loc[list(rows), [*numbers, "inner", "cosine"]] = float("nan")
    return pairs


def synthetic_run(
    path: Path,
    pairs: pd.DataFrame | None = None,
    *,
    losses: Sequence[str] = ("dpo",),
    is_finished: bool = True,
    provenance: Mapping[str, Any] | None = None,
) -> RunFolder:
    """A run folder as `entangle probe` leaves it, with texts, predictions and provenance.

    Args:
        path: where it goes.
        pairs: its rows; by default those of `synthetic_pairs()`.
        losses: names of the losses judged.
        is_finished: False leaves out what a probe writes last.
        provenance: entries that differ from the usual ones.
    """
    pairs = synthetic_pairs() if pairs is None else pairs
    run = RunFolder(path)
    run.begin(ProbeConfig(losses=tuple(losses), loss_batch_size=8, group_by="kind"), {"data": "synthetic"})
    middle = len(pairs) // 2
    for number, rows in enumerate((pairs[:middle], pairs[middle:])):
        run.write_shard("pairs", number, rows)
    if not is_finished:
        return run
    resolution = RESOLUTION[torch.float32]
    predictions = predict_losses(pairs, [build(name) for name in losses], resolution=resolution, batch_size=8)
    texts = pd.DataFrame(
        {
            "index": pairs["index"],
            "prompt": "A question?",
            "chosen": "A [bold]good[/bold] answer.",
            "rejected": "No.",
        }
    )
    run.write_table("texts.parquet", texts)
    run.write_table("predictions.parquet", predictions)
    run.write_json(
        "provenance.json",
        {
            "model_name_or_path": "synthetic",
            "adapter_name_or_path": None,
            "probed_parameters": 3,
            "probed_kind": "full",
            "score_dtype": "float32",
            "reference": "synthetic",
            "resolution": resolution,
            "metric": "sgd",
        }
        | dict(provenance or {}),
    )
    run.write_json("summary.json", summarise(pairs, predictions, "kind"))
    return run
