"""Evaluating a prompt once for all its responses, with exact gradients through it.

    1. prefix pass     the prompt (all but its last token) once; every layer's keys and values are kept
    2. response pass   each row's remaining tokens against copies of those keys and values, which are leaves;
                       its backward gives the responses' part of every score, and the leaves' gradients
    3. prefix backward once per response of a prompt, with that response's gradients of keys and values:
                       the prompt's part of every score

The cut is the longest prefix that a prompt's rows have in common as tokens, and before the last prompt
token, whose output already predicts a scored token. In the prefix pass nothing above the last layer's keys
and values is computed: no response can see it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from entangle.scores.logps import (
    Rows,
    causal_lm,
    fill_after,
    forward,
    gather_positions,
    head_at,
    target_logps,
)
from entangle.scores.rotary import alike
from entangle.scores.sites import Recorder

MIN_SHARE = 0.2
"""The prompt is split off if that saves at least this share of the rows' tokens: more passes have a price.

About where splitting breaks even. Measured (`benchmarks/engine.py --case sharing`, float32, one CPU thread, +-0.05) in
units of whole rows, where 0.12, 0.18, 0.23 and 0.29 of the tokens are saved: 1.08, 1.01, 1.01 and 0.95 with LoRA on a
59M Llama; 1.05, 0.99, 0.92 and 0.89 with all of its parameters; 1.44, 1.20, 1.10 and 1.05 on two layers of 64.
"""


class NoSplit(RuntimeError):
    """This model doesn't keep its keys and values the way the split needs."""


@dataclass(frozen=True)
class Split:
    """Rows cut at their prompts' common prefix.

    Args:
        prefix_ids: `(n, P)` int64, padded on the right.
        prefix_lengths: `(n,)` int64.
        rest: what remains of each of the `K * n` rows; its positions count from the cut.
        group_size: K.
    """

    prefix_ids: Tensor
    prefix_lengths: Tensor
    rest: Rows
    group_size: int

    @classmethod
    def from_rows(cls, rows: Rows, group_size: int, *, equal: bool = False) -> Split:
        """Cut after the tokens that a prompt's rows share and that predict nothing scored.

        With `equal`, every prompt is cut where the shortest is, so that no prefix is padded.

        Args:
            rows: a batch without padding.
            group_size: K, rows per prompt.
            equal: cut every prompt where the shortest is.
        """
        n, width = len(rows) // group_size, rows.input_ids.shape[1]
        ids = rows.input_ids.view(group_size, n, width)
        shared = (ids == ids[0]).all(0).long().cumprod(1).sum(1)  # (n,)
        first_needed = torch.where(rows.valid, rows.index, width).amin(1)  # (K * n,)
        last = torch.minimum(first_needed, rows.lengths - 1).view(group_size, n).amin(0)
        lengths = torch.minimum(shared, last)
        lengths = lengths.min().expand_as(lengths) if equal else lengths
        cut = lengths.repeat(group_size)[:, None]
        remaining = rows.lengths - cut[:, 0]
        steps = torch.arange(width, device=cut.device)
        rest = Rows(
            input_ids=fill_after(rows.input_ids.gather(1, (cut + steps).clamp(max=width - 1)), remaining),
            lengths=remaining,
            index=torch.where(rows.valid, rows.index - cut, 0),
            targets=rows.targets,
            valid=rows.valid,
            columns=rows.columns,
        )
        return cls(fill_after(rows.input_ids[:n], lengths), lengths, rest, group_size)

    @property
    def is_padded(self) -> bool:
        """Whether prefixes differ in length."""
        return bool((self.prefix_lengths != self.prefix_ids.shape[1]).any())

    @property
    def tokens_saved(self) -> float:
        """Share of the rows' tokens that needn't be evaluated again."""
        saved = (self.group_size - 1) * int(self.prefix_lengths.sum())
        return saved / (int(self.rest.lengths.sum()) + self.group_size * int(self.prefix_lengths.sum()))

    @property
    def prefix_mask(self) -> Tensor:
        """`(n, P)` int64, 1 on tokens."""
        slots = torch.arange(self.prefix_ids.shape[1], device=self.prefix_ids.device)
        return (slots < self.prefix_lengths[:, None]).long()

    def prefix_inputs(self) -> dict[str, Any]:
        """Arguments of the prefix pass: with padding on the right, causal attention needs no mask."""
        slots = torch.arange(self.prefix_ids.shape[1], device=self.prefix_ids.device)
        return {"input_ids": self.prefix_ids, "position_ids": slots.expand_as(self.prefix_ids)}

    def response_inputs(self) -> dict[str, Any]:
        """Arguments of the response pass; a mask only where prefixes are padded."""
        ids = self.rest.input_ids
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": self.prefix_lengths.repeat(self.group_size)[:, None] + self.rest.position_ids,
        }
        if self.is_padded:
            inputs["attention_mask"] = torch.cat(
                [self.prefix_mask.repeat(self.group_size, 1), torch.ones_like(ids)], 1
            )
        return inputs


def split_for(model: nn.Module, rows: Rows, group_size: int, *, min_share: float = MIN_SHARE) -> Split | None:
    """The split of a batch, or None where it doesn't save at least `min_share` of the tokens.

    Args:
        model: the model.
        rows: a batch without padding.
        group_size: K, rows per prompt.
        min_share: of the tokens, that a split must save.
    """
    if group_size < 2:
        return None
    split = Split.from_rows(rows, group_size)
    slots = split.prefix_ids.shape[1] + split.rest.input_ids.shape[1]
    if split.is_padded and slots > attention_window(model):
        # windows count slots of the cache, not positions, so padding inside it would move their edge
        split = Split.from_rows(rows, group_size, equal=True)
    if len(alike(model, torch.cat([rows.lengths, split.prefix_lengths]))) > 1:
        return None  # a prompt alone would have other rotary factors than with its responses
    return split if split.tokens_saved > 0 and split.tokens_saved >= min_share else None


def attention_window(model: nn.Module) -> float:
    """Tokens that the model's shortest sliding window or attention chunk holds; inf without any."""
    config = causal_lm(model).config.get_text_config()  # pyright: ignore
    sizes = [
        getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
    ]
    return min((size for size in sizes if isinstance(size, int)), default=float("inf"))


def record_split(model: nn.Module, split: Split, recorder: Recorder) -> Tensor:
    """Run the three passes under a recorder; log pi of every row, `(K * n,)` float64.

    Args:
        model: the model.
        split: n prompts and their K * n responses.
        recorder: what listens to its layers.

    Raises:
        NoSplit: the model didn't fill the cache with every layer's keys and values.
    """
    n, group_size = len(split.prefix_ids), split.group_size
    with recorder.recording(n, passes=group_size):
        kept = prefix_pass(model, split)
    leaves = [
        state.detach().repeat(group_size, 1, 1, 1).requires_grad_(state.requires_grad) for state in kept
    ]
    cache = DynamicCache()
    for layer in range(len(leaves) // 2):
        cache.update(leaves[2 * layer], leaves[2 * layer + 1], layer)
    with recorder.recording(n * group_size), head_at(model, split.rest.index):
        inputs = split.response_inputs() | {"past_key_values": cache, "use_cache": True}
        logits = forward(model, inputs).logits
    if logits.shape[1] != split.rest.index.shape[1]:
        logits = gather_positions(logits, split.rest.index)
    logps = target_logps(logits, split.rest.targets, split.rest.valid).sum(1, dtype=torch.float64)
    recorder.know(logps.detach())
    if logps.requires_grad:
        logps.sum().backward()
    open_states = [
        (state, leaf.grad) for state, leaf in zip(kept, leaves, strict=True) if leaf.grad is not None
    ]
    for k in range(group_size if open_states else 0):
        torch.autograd.backward(
            [state for state, _ in open_states],
            [grad[k * n : (k + 1) * n] for _, grad in open_states],
            retain_graph=k < group_size - 1,
        )
    return logps


class _Done(Exception):
    """Everything that responses can see of the prefix is computed."""


class _PrefixCache(DynamicCache):
    """Keeps all keys and values, and ends the pass once the last layer's are in."""

    def __init__(self, layer_count: int) -> None:
        super().__init__()
        self.layer_count = layer_count

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        """See `DynamicCache.update`."""
        states = super().update(key_states, value_states, layer_idx, *args, **kw)
        if layer_idx == self.layer_count - 1:
            raise _Done
        return states


def prefix_pass(model: nn.Module, split: Split) -> list[Tensor]:
    """Keys and values of every layer, with graph: [k_0, v_0, k_1, v_1, ...], `(n, heads, P, d)` each.

    Args:
        model: the model.
        split: n prompts and their responses.
    """
    count = causal_lm(model).config.get_text_config().num_hidden_layers  # pyright: ignore
    cache = _PrefixCache(count)
    try:
        forward(model, split.prefix_inputs() | {"past_key_values": cache, "use_cache": True})
    except _Done:
        pass
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    kept = [state for state in states if state is not None and state.ndim == 4]
    if len(kept) != 2 * count or any((len(s), s.shape[2]) != split.prefix_ids.shape for s in kept):
        raise NoSplit(
            f"{type(causal_lm(model)).__name__} doesn't keep keys and values of all {count} layers."
        )
    return kept
