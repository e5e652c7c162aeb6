"""What one forward pass over a batch of pairs says, read when a diagnostic first asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from entangle.data import TokenizedPair
from entangle.errors import ModelError
from entangle.models import Policy
from entangle.scores.logps import (
    Rows,
    causal_lm,
    evaluating,
    forward,
    gather_positions,
    head_at,
    input_device,
    model_inputs,
    target_logps,
)
from entangle.scores.rows import RowBatch


@dataclass(frozen=True)
class Positions:
    """The positions that predict a scored token; chosen rows first, then rejected, as in the batch.

    Args:
        hidden: `(2B, S, d)`, the state that the LM head reads; None where the head can't be watched.
        logps: `(2B, S)`, log-prob of the response's own token, nats; 0 where there is none.
        entropy: `(2B, S)`, entropy of the next-token distribution, nats; 0 where there is none.
    """

    hidden: Tensor | None
    logps: Tensor
    entropy: Tensor


class Reading:
    """A batch of pairs under a policy. Nothing is computed before it is asked for, and nothing twice.

    Args:
        policy: the policy; its model is left as it was found.
        batch: B pairs, padded on either side by any amount.
        pairs: the pairs that the batch was collated from: only a reference that is columns of the data reads them.

    Raises:
        ValueError: the batch doesn't hold pairs.
    """

    def __init__(self, policy: Policy, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> None:
        if batch.group_size != 2:
            raise ValueError(f"A diagnostic needs 2 responses per prompt; got group_size {batch.group_size}.")
        self.policy, self.batch, self.pairs = policy, batch, pairs

    @cached_property
    def rows(self) -> Rows:
        """The batch without its padding."""
        return Rows.from_batch(self.batch.to(input_device(self.policy.model)))

    @cached_property
    def lengths(self) -> tuple[Tensor, Tensor]:
        """Scored tokens of chosen and rejected, `(B,)` float64 each."""
        chosen, rejected = self.rows.valid.sum(1).double().cpu().chunk(2)
        return chosen, rejected

    @cached_property
    def responses(self) -> list[tuple[list[int], list[int]]]:
        """The scored tokens of chosen and rejected, pair by pair."""
        counts = self.rows.valid.sum(1).tolist()
        tokens = [row[:count] for row, count in zip(self.rows.targets.tolist(), counts, strict=True)]
        half = len(tokens) // 2
        return list(zip(tokens[:half], tokens[half:], strict=True))

    @cached_property
    def positions(self) -> Positions:
        """The forward pass."""
        model, rows, seen = self.policy.model, self.rows, []
        head: Any = causal_lm(model).get_output_embeddings()  # pyright: ignore[reportCallIssue]
        with torch.no_grad(), evaluating(model), head_at(model, rows.index):
            # registered after head_at's own hook, so it sees the chosen positions
            watch = head and head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            try:
                logits = response_logits(model, rows)
            finally:
                if watch:
                    watch.remove()
        logps = logits.log_softmax(-1)
        entropy = torch.where(rows.valid.to(logps.device), -(logps.exp() * logps).nansum(-1), 0)
        hidden = seen[0] if len(seen) == 1 and seen[0].shape[:2] == logits.shape[:2] else None
        return Positions(hidden, target_logps(logits, rows.targets, rows.valid), entropy)

    def hidden(self) -> Tensor:
        """The state that the LM head reads, `(2B, S, d)`, 0 where there is no scored token.

        Raises:
            ModelError: the model's head can't be watched.
        """
        hidden = self.positions.hidden
        if hidden is None:
            raise ModelError(
                "Expected a model whose LM head (get_output_embeddings) is called once, on its last hidden states; "
                f"{type(self.policy.model).__name__} isn't. Leave out the diagnostics that read hidden states."
            )
        return torch.where(self.rows.valid.to(hidden.device)[..., None], hidden, 0)

    @cached_property
    def ref_logps(self) -> Tensor | None:
        """The log-prob ln pi_ref of every row, `(2B,)` float64, nats; None without a reference."""
        logps = self.policy.reference.logps(self.batch, self.pairs)
        return None if logps is None else logps.double().cpu()


def response_logits(model: nn.Module, rows: Rows) -> Tensor:
    """Logits at the positions that predict a scored token, `(rows, S, V)`, in float32 at least. Differentiable."""
    with head_at(model, rows.index):
        logits = forward(model, model_inputs(model, rows)).logits
    if logits.shape[1] != rows.index.shape[1]:  # the head was out of reach: it ran at every position
        logits = gather_positions(logits, rows.index)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
