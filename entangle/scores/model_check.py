"""What every engine takes for granted of a model, checked on the model itself with its longest rows.

A row's log-prob is the sum of its tokens' log-probs, each given the tokens before it, and doesn't depend on the rows
beside it. An encoder that is loaded as a causal model breaks the first, rows that mix break the second, and neither
raises an error: the numbers are merely those of something else.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entangle.analysis.geometry import RESOLUTION, logp_resolution
from entangle.errors import UserError
from entangle.scores.check import logps_agree
from entangle.scores.logps import (
    Rows,
    causal_lm,
    forward,
    gather_positions,
    head_at,
    model_inputs,
    scored_logps,
)
from entangle.scores.rotary import length_factors


def check_causal(model: nn.Module, rows: Rows, resolution: float) -> None:
    """Change the second half of the longest row, and see whether logits in the first half change.

    One forward pass over two rows; the head runs at four positions.

    Args:
        model: the model, in eval mode.
        rows: a batch without padding.
        resolution: relative error of dot products in this precision.

    Raises:
        UserError: they do, or the model can't be run on token ids at all.
    """
    longest = int(rows.lengths.argmax())
    length = int(rows.lengths[longest])
    middle = length // 2
    if middle < 1:
        return
    ids = rows.input_ids[longest, :length]
    other = torch.where(ids == ids.min(), ids.max(), ids.min())
    changed = torch.cat([ids[:middle], other[middle:]])
    early = torch.tensor(sorted({0, middle // 2, max(middle - 2, 0), middle - 1}), device=ids.device)
    nowhere = torch.zeros(2, len(early), dtype=torch.long, device=ids.device)
    both = Rows(
        torch.stack([ids, changed]), rows.lengths.new_full((2,), length), early.expand(2, -1),
        nowhere, nowhere.bool(), nowhere,
    )  # fmt: skip
    with head_at(model, both.index):
        logits = _logits(model, both)
    before, after = (
        gather_positions(logits, both.index) if logits.shape[1] != len(early) else logits
    ).double()
    difference, scale = float((before - after).abs().max()), float(before.abs().max())
    if difference > max(1e-4, 10 * logp_resolution(resolution)) * max(scale, 1.0):
        raise UserError(
            f"{type(causal_lm(model)).__name__} isn't causal: a later token changes the logits of earlier ones (by up "
            f"to {difference:.2g}), so its log-prob of a response isn't that of a language model, and no preference "
            "loss means what it says. Encoders such as BERT, RoBERTa or ELECTRA do this when loaded as causal models; "
            "use a model that was trained to predict the next token (a decoder made of an encoder's class has "
            "is_decoder: true in its config.json)."
        )


def check_rows_apart(model: nn.Module, rows: Rows, resolution: float) -> list[str]:
    """Evaluate the shortest row alone and beside the longest one: its log-probs must be the same.

    Args:
        model: the model, in eval mode.
        rows: a batch without padding.
        resolution: relative error of dot products in this precision.

    Returns:
        what the user should know: a note where rotary factors depend on length, or where half precision doesn't
        keep rows apart.

    Raises:
        UserError: they differ.
    """
    notes = []
    longest, shortest = int(rows.lengths.argmax()), int(rows.lengths.argmin())
    if any(int(rows.lengths[longest]) > rule.original for rule in length_factors(model)):
        notes.append(
            "this model's rotary factors depend on the length of the longest row (longrope or dynamic NTK): every row "
            "has those of its own length, as if evaluated alone; in training they depend on its batch"
        )
    if longest == shortest:
        return notes
    pair = rows[torch.tensor([shortest, longest], device=rows.input_ids.device)]
    alone = scored_logps(model, pair[:1]).sum(1, dtype=torch.float64)
    beside = scored_logps(model, pair)[:1].sum(1, dtype=torch.float64)
    if logps_agree(beside, alone, resolution):
        return notes
    difference = float((beside - alone).abs().max())
    if resolution > RESOLUTION[torch.float32]:
        return [
            *notes,
            f"in this precision a row's log-prob depends on its batch, by {difference:.2g} nats on one row",
        ]
    raise UserError(
        f"{type(causal_lm(model)).__name__} mixes the rows of a batch: the log-prob of a row changes by "
        f"{difference:.2g} nats when a longer row stands beside it. Scores of single responses can't be told from it; "
        "use a model whose rows don't depend on each other."
    )


def _logits(model: nn.Module, rows: Rows) -> Tensor:
    """Logits of a plain forward pass.

    Raises:
        UserError: there are none.
    """
    try:
        return forward(model, model_inputs(model, rows)).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, no engine can do without this pass
        raise UserError(
            f"{type(causal_lm(model)).__name__} can't be evaluated on rows of token ids as it is "
            f"({type(error).__name__}: {str(error)[:200]}). Check that it runs in transformers with this adapter and "
            "precision: an adapter on a layer that returns several values (a router) can't run at all."
        ) from error
