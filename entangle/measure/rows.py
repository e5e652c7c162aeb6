"""Rows of a run folder's pairs: what is written of every pair, scored or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from entangle.analysis.geometry import GEOMETRY_COLUMNS, RESOLUTION
from entangle.analysis.predictions import FLAGS
from entangle.data import PreferencePair, TokenizedPair
from entangle.diagnostics import columns_of
from entangle.models import Policy
from entangle.scores import PairScores
from entangle.scores.rows import RowBatch

NUMBERS = (
    *GEOMETRY_COLUMNS,
    "logps_chosen",
    "logps_rejected",
    "ref_logps_chosen",
    "ref_logps_rejected",
    "moved_chosen",
    "moved_rejected",
    "cosine",
    "band_lower",
    "band_upper",
)
"""Columns of a pair that are numbers from the model."""

ROW_COLUMNS = (
    *NUMBERS,
    *FLAGS,
    "index",
    "prompt_hash",
    "prompt_length",
    "length_chosen",
    "length_rejected",
    *columns_of(["all"]),
)
"""Columns of a run folder's pairs; a column of the data set with such a name is stored as data_<name>."""


@dataclass(frozen=True)
class Pass:
    """Pairs that went through the model together.

    Args:
        pairs: the pairs.
        rows: their rows, as the model read them.
        scores: what the engine found.
        policy: the model.
    """

    pairs: Sequence[TokenizedPair]
    rows: RowBatch
    scores: PairScores
    policy: Policy


Columns = Callable[[Pass], Mapping[str, Tensor]]
"""What a pass says of its pairs: `(pairs,)` by name of the column."""


def number_columns(done: Pass) -> dict[str, Tensor]:
    """The Gram block, log-probs under policy and reference and how far they have moved, lengths, and if all is finite.

    `moved_<side>`, nats: what training has done to a log-prob since the reference; a prediction is of the next step.
    """
    geometry = done.scores.geometry
    chosen, rejected = done.scores.logps.double().cpu().chunk(2)
    is_one = done.policy.is_its_reference
    reference = done.scores.logps if is_one else done.policy.reference.logps(done.rows, done.pairs)
    numbers = {name: getattr(geometry, name).cpu() for name in GEOMETRY_COLUMNS}
    numbers |= {"logps_chosen": chosen, "logps_rejected": rejected}
    nothing = torch.full_like(chosen, torch.nan)
    ref_chosen, ref_rejected = (nothing, nothing) if reference is None else reference.double().cpu().chunk(2)
    ref_chosen, ref_rejected = same_if_untold(ref_chosen, chosen), same_if_untold(ref_rejected, rejected)
    numbers |= {"ref_logps_chosen": ref_chosen, "ref_logps_rejected": ref_rejected}
    finite = torch.stack([v for k, v in numbers.items() if reference is not None or not k.startswith("ref_")])
    length_chosen, length_rejected = done.rows.lengths.cpu().chunk(2)
    lower, upper = geometry.critical_ratio
    return numbers | {
        "moved_chosen": chosen - ref_chosen,
        "moved_rejected": rejected - ref_rejected,
        "cosine": geometry.cosine,
        "band_lower": lower,
        "band_upper": upper,
        "length_chosen": length_chosen,
        "length_rejected": length_rejected,
        "non_finite": ~finite.isfinite().all(0),
    }


def same_if_untold(reference: Tensor, logps: Tensor) -> Tensor:
    """The reference log-prob, or the policy's own where float32 can't tell the two apart.

    Policy and reference may be one function computed along two paths (two copies of a model). The rounding between
    them must not decide on which side of a loss's kink at log-ratio 0 (DPOP) a pair falls.
    """
    untold = (reference - logps).abs() <= RESOLUTION[torch.float32] * logps.abs().clamp(min=1.0)
    return torch.where(untold, logps, reference)


def unscored_row(pair: TokenizedPair) -> dict[str, Any]:
    """A pair that can't be scored: it keeps its row, with empty numbers and the flag that says why."""
    lengths = {"length_chosen": len(pair.chosen_ids), "length_rejected": len(pair.rejected_ids)}
    return description_of(pair) | dict.fromkeys(NUMBERS, float("nan")) | lengths | {"non_finite": False}


def description_of(pair: TokenizedPair) -> dict[str, Any]:
    """What is known of a pair before the model reads it: its own columns, index, prompt and flags."""
    extra = {f"data_{name}" if name in ROW_COLUMNS else name: value for name, value in pair.extra.items()}
    flags = {name: getattr(pair, name) and not pair.dropped for name in ("truncated", "identical", "empty")}
    description = {
        "index": pair.index,
        "prompt_hash": pair.prompt_hash,
        "prompt_length": len(pair.prompt_ids),
    }
    return extra | description | flags | {"dropped": pair.dropped}


def texts_of(pairs: Sequence[PreferencePair]) -> pd.DataFrame:
    """index, prompt, chosen, rejected as text; conversations as their turns."""
    sides = ("prompt", "chosen", "rejected")
    return pd.DataFrame(
        [{"index": pair.index} | {side: _text(getattr(pair, side)) for side in sides} for pair in pairs]
    )


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(f"{message['role']}: {message.get('content') or ''}" for message in content)
