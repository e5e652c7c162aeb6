"""Log-probs of responses under a causal language model, for rows of any length, padded on any side.

Rows are first made compact: real tokens moved to the left, cut after the last position whose logits are
needed. So a row's numbers can't depend on the padding, every model may be called without an attention mask
(a causal model never looks to the right, and nothing real stands to the right of a real token), and learned
positions (GPT-2) are right for left-padded input too.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from entangle.errors import UserError
from entangle.scores.float64 import keeping_float64
from entangle.scores.rotary import alike, forget_lengths, length_factors
from entangle.scores.rows import RowBatch


@dataclass(frozen=True)
class Rows:
    """Right-padded rows and the positions that predict their scored tokens.

    Args:
        input_ids: `(rows, L)` int64.
        lengths: `(rows,)` int64, tokens of each row that the model has to see.
        index: `(rows, S)` int64, positions in `[0, L)` that predict a scored token; 0 where not `valid`.
        targets: `(rows, S)` int64, the scored tokens.
        valid: `(rows, S)` bool, False where a row has fewer than S scored tokens.
        columns: `(rows, S)` int64, where the log-prob belongs on the `(rows, T - 1)` grid of the batch.
    """

    input_ids: Tensor
    lengths: Tensor
    index: Tensor
    targets: Tensor
    valid: Tensor
    columns: Tensor

    @classmethod
    def from_batch(cls, batch: RowBatch, *, whole: bool = False) -> Rows:
        """Compact rows of a batch padded on either side.

        Args:
            batch: the rows.
            whole: keep every token of a row, also those after the last position that predicts a scored one.
        """
        real = batch.attention_mask.bool()
        order = real.int().argsort(dim=1, descending=True, stable=True)  # real tokens first, in their order
        ids = torch.where(real, batch.input_ids, 0).gather(1, order)
        scored = nn.functional.pad(batch.scored & real[:, 1:], (1, 0)).gather(1, order)[:, 1:]
        predicts = scored.int().argsort(dim=1, descending=True, stable=True)  # scored positions first
        counts = scored.sum(1)
        predicts = predicts[:, : max(int(counts.max()), 1)]
        valid = torch.arange(predicts.shape[1], device=ids.device) < counts[:, None]
        index = torch.where(valid, predicts, 0)
        lengths = real.sum(1).clamp(min=1) if whole else index.amax(1) + 1
        return cls(
            input_ids=fill_after(ids, lengths),
            lengths=lengths,
            index=index,
            targets=ids.gather(1, index + 1),
            valid=valid,
            columns=(order.gather(1, index + 1) - 1).clamp(min=0),
        )

    @property
    def position_ids(self) -> Tensor:
        """`(rows, L)`; written out per row, so that no module sees one position for all rows.

        A filler has its row's last position: learned positions may reach no further.
        """
        slots = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return torch.minimum(slots, self.lengths[:, None] - 1)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, rows: slice | Tensor) -> Rows:
        """Some of the rows, cut to what these rows need."""
        lengths, valid = self.lengths[rows], self.valid[rows]
        width, scored = int(lengths.max()), max(int(valid.sum(1).max()), 1)
        return Rows(
            input_ids=self.input_ids[rows, :width],
            lengths=lengths,
            index=self.index[rows, :scored],
            targets=self.targets[rows, :scored],
            valid=valid[:, :scored],
            columns=self.columns[rows, :scored],
        )


def token_logps(model: nn.Module, batch: RowBatch) -> Tensor:
    """Log-prob of token t + 1 at position t, `(rows, T - 1)`, nats; 0 where the token isn't scored.

    Differentiable. The LM head runs at scored positions only. Law: a row's values depend neither on the other
    rows nor on the side or amount of padding. The model stays in the mode it is in.

    Args:
        model: a causal language model.
        batch: rows `(rows, T)`, padded on either side.
    """
    rows = rows_for(model, batch)
    values = scored_logps(model, rows)
    grid = values.new_zeros(batch.scored.shape)
    return grid.scatter_add(1, rows.columns.to(values.device), values).to(batch.input_ids.device)


@torch.no_grad()
def row_logps(model: nn.Module, batch: RowBatch) -> Tensor:
    """The log-prob ln pi(response | prompt), `(rows,)` float64, nats: `token_logps` summed, in eval mode.

    Args:
        model: a causal language model.
        batch: rows `(rows, T)`, padded on either side.
    """
    with evaluating(model):
        return token_logps(model, batch).sum(1, dtype=torch.float64)


def rows_for(model: nn.Module, batch: RowBatch) -> Rows:
    """The rows of a batch as this model has to see them, where it takes its token ids.

    Args:
        model: a causal language model.
        batch: rows `(rows, T)`, padded on either side.
    """
    return Rows.from_batch(batch.to(input_device(model)), whole=bool(length_factors(model)))


def scored_logps(model: nn.Module, rows: Rows) -> Tensor:
    """Log-probs of the scored tokens, `(rows, S)`; 0 where not `valid`. Differentiable.

    One forward pass, or one for every group of rows with the same rotary factors (see `rotary`).

    Args:
        model: a causal language model.
        rows: a batch without padding, S scored tokens at most.
    """
    groups = alike(model, rows.lengths)
    if len(groups) == 1:
        return _logps_together(model, rows)
    parts = [_logps_together(model, rows[group]) for group in groups]
    width = rows.index.shape[1]
    padded = torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
    return padded[torch.cat(groups).argsort().to(padded.device)]


def _logps_together(model: nn.Module, rows: Rows) -> Tensor:
    """`scored_logps` in one forward pass."""
    with head_at(model, rows.index):
        logits = forward(model, model_inputs(model, rows)).logits
    if logits.shape[1] != rows.index.shape[1]:  # the head was out of reach: it ran at every position
        logits = gather_positions(logits, rows.index)
    return target_logps(logits, rows.targets, rows.valid)


def target_logps(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """The log-prob ln softmax(logits)[target], `(rows, S)`, in float32 at least; 0 where not `valid`.

    Args:
        logits: `(rows, S, V)`.
        targets: `(rows, S)`, token ids.
        valid: `(rows, S)` bool: there is a token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets, valid = targets.to(logits.device), valid.to(logits.device)
    values = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return torch.where(valid, values, 0)


def fill_after(ids: Tensor, lengths: Tensor) -> Tensor:
    """`(rows, max length)`: every row's first `lengths` tokens, then token 0, which nothing depends on.

    Args:
        ids: `(rows, T)`, token ids.
        lengths: `(rows,)`, each row's own tokens.
    """
    slots = torch.arange(int(lengths.max()), device=ids.device)
    return torch.where(slots < lengths[:, None], ids[:, : len(slots)], 0)


def gather_positions(values: Tensor, index: Tensor) -> Tensor:
    """`values` `(rows, L, d)` at positions `index` `(rows, S)`: `(rows, S, d)`.

    Args:
        values: `(rows, L, d)`.
        index: `(rows, S)`, positions.
    """
    return values.gather(1, index.to(values.device)[..., None].expand(-1, -1, values.shape[-1]))


def model_inputs(model: nn.Module, rows: Rows) -> dict[str, Any]:
    """Keyword arguments for a forward pass without cache and without mask.

    Args:
        model: the model; it is only given what it takes.
        rows: a batch without padding.
    """
    inputs = {"input_ids": rows.input_ids, "position_ids": rows.position_ids, "use_cache": False}
    return known_inputs(model, inputs)


def forward(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """A forward pass whose numbers depend on its inputs alone, in any precision.

    Grouped matrix products of experts exist in float32 and half precision only; a float64 model's experts are
    evaluated one by one.

    Args:
        model: the model; it is only given what it takes.
        inputs: keyword arguments.
    """
    forget_lengths(model)
    with plain_experts(model):
        return model(**known_inputs(model, inputs))


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Within: a float64 model with experts evaluates them one by one.

    Args:
        model: the model.
    """
    configs = {}
    if any(p.dtype == torch.float64 for p in model.parameters()):
        configs = {id(own): own for m in model.modules() if (own := getattr(m, "config", None)) is not None}
    chosen = [(own, getattr(own, "_experts_implementation", None)) for own in configs.values()]
    before = [(own, name) for own, name in chosen if name not in (None, "eager")]
    try:
        for own, _ in before:
            own._experts_implementation = "eager"
        yield
    finally:
        for own, name in before:
            own._experts_implementation = name


def known_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments that the model takes (BLOOM has no use for positions).

    Args:
        model: the model.
        inputs: keyword arguments of its forward.
    """
    known = inspect.signature(type(causal_lm(model)).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


@contextmanager
def head_at(model: nn.Module, index: Tensor) -> Iterator[None]:
    """Within: the LM head sees the hidden states of positions `index` `(rows, S)` only.

    A hook in front of the head, so whatever the model does to its logits (soft-capping, scale) stays the
    model's own business. Where the head isn't called on `(rows, L, hidden)` this does nothing.

    Args:
        model: a model with `get_output_embeddings`.
        index: `(rows, S)`, positions.
    """
    head = causal_lm(model).get_output_embeddings()  # pyright: ignore[reportCallIssue]
    rows, scored = index.shape

    def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or args[0].ndim != 3 or len(args[0]) != rows or args[0].shape[1] <= scored:
            return None
        return gather_positions(args[0], index), *args[1:]

    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within: every module is in eval mode (no dropout, no checkpointing); afterwards in its own again.

    A model in float64 is so in its norms and rotary factors too (see `entangle.scores.float64`).
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        with keeping_float64(model):
            yield
    finally:
        for module in training:
            module.training = True


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model inside an adapter.

    Raises:
        UserError: the adapter changes the input (prompt or prefix tuning), so that positions aren't tokens.
    """
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type
        raise UserError(f"Adapters with virtual tokens ({kind}) aren't supported; use LoRA or full training.")
    return model.get_base_model()


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its token ids."""
    embedding = causal_lm(model).get_input_embeddings()  # pyright: ignore[reportCallIssue]
    return next(embedding.parameters()).device
