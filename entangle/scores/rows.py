"""A batch of tokenised responses, the shape in which every engine takes its input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowBatch:
    """`K * n` responses, K to each of n prompts, as padded rows prompt + completion.

    Row `k * n + i` is answer k to prompt i; for pairs K = 2, answer 0 is the chosen response and answer 1 the
    rejected one (TRL's order: first half chosen, second half rejected).

    Args:
        input_ids: `(K * n, T)` int64, padded on either side.
        attention_mask: `(K * n, T)` int64, 1 on prompt and completion tokens.
        completion_mask: `(K * n, T)` int64, 1 on the tokens whose log-prob is scored.
        group_size: K.
        prompt_length: `(n,)` int64, tokens that the rows of a prompt have in common before the first scored one.

    Raises:
        ValueError: shapes differ, or the rows don't divide into groups.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    prompt_length: Tensor
    group_size: int = 2

    def __post_init__(self) -> None:
        shapes = {
            name: tuple(getattr(self, name).shape)
            for name in ("input_ids", "attention_mask", "completion_mask")
        }
        if len(set(shapes.values())) != 1 or self.input_ids.ndim != 2:
            raise ValueError(f"RowBatch fields must share one shape (rows, T); got {shapes}.")
        if len(self.input_ids) != self.group_size * len(self.prompt_length):
            raise ValueError(
                f"RowBatch needs group_size * prompts rows; got {len(self.input_ids)} rows, group_size "
                f"{self.group_size} and {len(self.prompt_length)} prompts."
            )

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each row, `(rows,)` int64 (a token without a token before it can't be scored)."""
        return self.scored.sum(1)

    @property
    def scored(self) -> Tensor:
        """`(rows, T - 1)` bool: position t predicts token t + 1, and that token is scored."""
        return (self.completion_mask[:, 1:] * self.attention_mask[:, :-1]).bool()

    @property
    def position_ids(self) -> Tensor:
        """`(rows, T)`: 0 at the first real token, whichever side is padded."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    def to(self, device: torch.device | str) -> RowBatch:
        """The same batch on another device."""
        return RowBatch(
            *(
                t.to(device)
                for t in (self.input_ids, self.attention_mask, self.completion_mask, self.prompt_length)
            ),
            group_size=self.group_size,
        )
