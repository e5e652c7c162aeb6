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
from entangle.scores.rotary import alike, length_factors


def check_causal(model: nn.Module, rows: Rows, resolution: float) -> None:
    """Change the end of the longest row, then leave it out: logits before the end must stay the same.

    The end is the last token, and the second half. Three forward passes over the row and two over a part of it,
    without gradients; the head runs at eight positions.

    Args:
        model: the model, in eval mode.
        rows: a batch without padding, every token of its rows (engines leave out the last, which predicts nothing).
        resolution: relative error of dot products in this precision.

    Raises:
        UserError: they don't, or the model can't be run on token ids at all.
    """
    longest = int(rows.lengths.argmax())
    ids = rows.input_ids[longest, : int(rows.lengths[longest])]
    ends = sorted({len(ids) // 2, len(ids) - 1} - {0})
    if not ends:
        return
    other = torch.where(ids == ids.min(), ids.max(), ids.min())
    seen = torch.tensor(sorted({p for end in ends for p in (0, end // 2, end - 2, end - 1) if p >= 0}))
    seen = seen.to(ids.device)
    before, difference = _logits_at(model, ids, seen), 0.0
    for end in ends:
        early = seen < end
        found = [_logits_at(model, torch.cat([ids[:end], other[end:]]), seen)[early]]
        if len(alike(model, torch.tensor([len(ids), end]))) == 1:
            found += [_logits_at(model, ids[:end], seen[early])]
        difference = max([difference, *(float((before[early] - logits).abs().max()) for logits in found)])
    scale = float(before.abs().max())
    if difference > max(1e-4, 10 * logp_resolution(resolution)) * scale:
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


def _logits_at(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    """Logits of a plain forward pass over one row, `(positions, V)` float64.

    Args:
        model: the model.
        ids: `(T,)`, token ids.
        positions: `(S,)`.

    Raises:
        UserError: there are none.
    """
    index, nothing = positions[None], torch.zeros_like(positions[None])
    rows = Rows(ids[None], nothing.new_full((1,), len(ids)), index, nothing, nothing.bool(), nothing)
    try:
        with head_at(model, index):
            logits = forward(model, model_inputs(model, rows)).logits
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, no engine can do without this pass
        raise UserError(
            f"{type(causal_lm(model)).__name__} can't be evaluated on rows of token ids as it is "
            f"({type(error).__name__}: {str(error)[:200]}). Check that it runs in transformers with this adapter and "
            "precision: an adapter on a layer that returns several values (a router) can't run at all."
        ) from error
    return (logits if logits.shape[1] == index.shape[1] else gather_positions(logits, index))[0].double()
