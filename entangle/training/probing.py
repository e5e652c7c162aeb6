"""Measuring a model in the middle of its training, so that the training doesn't notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import pandas as pd
from accelerate.utils import gather_object, reduce
from peft import PeftModel
from torch import Tensor, nn

from entangle.analysis.predictions import predict_losses, usable_losses
from entangle.data import PreferencePair, TokenizedPair, tokenize_pair
from entangle.measure.passes import Measurement, rows_of_shard
from entangle.measure.plan import Plan, is_scorable, longest
from entangle.measure.rows import number_columns
from entangle.measure.set_content import brief_content
from entangle.measure.sets import SetSums
from entangle.models import (
    AdapterOff,
    Columns,
    NoReference,
    Policy,
    RefAdapter,
    Reference,
    SecondModel,
    undisturbed,
)
from entangle.models.reference import START
from entangle.runs.folder import as_json
from entangle.scores import Engine, Metric, make_engine
from entangle.scores.rows import RowBatch
from losses import PreferenceLoss

SET_MEMORY = 2**31
"""Bytes that the set's sums may take beside a training: 16 groups of a LoRA of 16 million parameters, 4 of 67."""

PUSH_COLUMNS = ("incentive_chosen", "incentive_rejected", "change_chosen", "change_rejected", "regime")
"""What a step's rows take from `predict_losses`."""


class Probed(NamedTuple):
    """What one probe found.

    Args:
        rows: one per pair: the columns of a probe's pairs, and under the loss incentives, changes and regime.
        sets: the set of these pairs as one, by metric: `sgd`, and under a preconditioner `adamw` (see
            `entangle.measure.set_content.brief_content`); empty where it can't be measured.
    """

    rows: pd.DataFrame
    sets: dict[str, dict[str, Any]]


class ProbeSet:
    """A fixed set of pairs, measured again and again while a model is trained.

    Under several processes each measures its share of the pairs, and all of them must call together.

    Args:
        pairs: the pairs; their indices must differ. Reference log-probs that they carry count where there is no
            other reference.
        model: the policy, without wrappers of distribution.
        tokenizer: its tokenizer.
        ref_model: a reference of its own; None: the adapter switched off (or PEFT's adapter `ref`), and without
            an adapter none.
        max_length: tokens of a row, as in training.
        batch_size: pairs of a pass; None: as many as make 4096 tokens.
        process: (this process, processes).
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair | TokenizedPair],
        model: Any,
        tokenizer: Any,
        *,
        ref_model: nn.Module | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        process: tuple[int, int] = (0, 1),
    ) -> None:
        tokenized = [
            p if isinstance(p, TokenizedPair) else tokenize_pair(tokenizer, p, max_length) for p in pairs
        ]
        ordered = sorted(tokenized, key=lambda pair: (longest(pair), pair.index))
        self.pairs = {pair.index: pair for pair in ordered}
        self._own = tuple(ordered[process[0] :: process[1]])
        self._is_shared = process[1] > 1
        self._batch_size = batch_size
        self._is_referenced = False
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._reference = _reference_of(model, ref_model)
        self.policy = Policy(model, tokenizer, parameters, Columns(required=False))
        self.engine: Engine = make_engine(model, parameters)

    @property
    def has_reference(self) -> bool:
        """Whether reference log-probs can be had."""
        return not isinstance(self._reference, NoReference)

    def passes(self, most: int | None = None) -> Iterator[tuple[list[TokenizedPair], RowBatch]]:
        """This process's scorable pairs, as many at a time as go through the model together, but at most `most`."""
        for batch in Plan((self._own,), self._batch_size).passes(0):
            for start in range(0, len(batch), most or len(batch)):
                part = batch[start : start + (most or len(batch))]
                yield part, self.policy.collate(part)

    def measure(
        self, loss: PreferenceLoss | None, loss_batch_size: int, metric: Metric | None = None
    ) -> Probed:
        """Every pair, and in the same pass the set of them all.

        Reference log-probs are computed once and kept. A pair that can't be scored, and the incentives of a loss
        that weighs tokens, are left empty.

        Args:
            loss: the trained loss; None: no incentives, changes and regimes.
            loss_batch_size: pairs per batch of a batch-coupled loss.
            metric: the optimiser's preconditioner, in which the set is wanted too; None: it has none.
        """
        sums = SetSums.over(self.policy.parameters, list(self.pairs.values()), None, SET_MEMORY)
        with undisturbed(self.policy.model):
            if self.has_reference and not self._is_referenced:
                self._keep_reference()
            plan = Plan((self._own,), self._batch_size)
            measurement = Measurement(self.policy, self.engine, [number_columns], sums=sums)
            own = rows_of_shard(plan, 0, measurement, lambda count: None).rows
        rows = pd.DataFrame(self._gathered(own)).sort_values("index", ignore_index=True)
        for side in ("chosen", "rejected"):
            rows[f"logps_per_token_{side}"] = rows[f"logps_{side}"] / rows[f"length_{side}"]
        judged = self._judged(rows, loss, loss_batch_size)
        sets = {} if sums is None else self._sets(sums, judged, metric)
        if judged.empty:
            return Probed(rows.assign(**dict.fromkeys(PUSH_COLUMNS[:-1], float("nan")), regime=None), sets)
        return Probed(rows.merge(judged[["index", *PUSH_COLUMNS]], on="index", how="left"), sets)

    def _judged(self, rows: pd.DataFrame, loss: PreferenceLoss | None, loss_batch_size: int) -> pd.DataFrame:
        """Predictions under the loss; empty where it can't be judged."""
        has_reference = bool(rows["ref_logps_chosen"].notna().any())
        usable, _ = usable_losses([loss] if loss else [], has_reference=has_reference)
        if not usable:
            return pd.DataFrame(columns=["loss"])
        return predict_losses(rows, usable, resolution=self.engine.resolution, batch_size=loss_batch_size)

    def _sets(self, sums: SetSums, judged: pd.DataFrame, metric: Metric | None) -> dict[str, dict[str, Any]]:
        """The set as one, by metric; every process calls."""
        if self._is_shared:
            sums.share(lambda value: cast(Tensor, reduce(value, "sum")), gather_object)
        found = {"sgd": sums.joined(), "adamw": None if metric is None else sums.joined_under(metric)}
        return {
            name: as_json(brief_content(grams, sums.grouping, judged, name))
            for name, grams in found.items()
            if grams is not None
        }

    def restore_reference(self, rows: pd.DataFrame) -> None:
        """Take the reference log-probs from rows that were measured earlier in the same run."""
        self._is_referenced = True
        columns = ("index", "ref_logps_chosen", "ref_logps_rejected")
        known = {
            index: tuple(logps)
            for index, *logps in zip(*(rows[name].tolist() for name in columns), strict=True)
        }
        self._own = tuple(
            replace(pair, ref_chosen_logps=known[pair.index][0], ref_rejected_logps=known[pair.index][1])
            if pair.index in known and is_scorable(pair)
            else pair
            for pair in self._own
        )

    def _keep_reference(self) -> None:
        rows = []
        for batch, collated in self.passes():
            logps = self._reference.logps(collated, batch)
            assert logps is not None
            chosen, rejected = logps.clamp(max=0.0).chunk(2)
            rows += [
                {"index": pair.index, "ref_logps_chosen": float(up), "ref_logps_rejected": float(down)}
                for pair, up, down in zip(batch, chosen, rejected, strict=True)
            ]
        self.restore_reference(
            pd.DataFrame(rows, columns=["index", "ref_logps_chosen", "ref_logps_rejected"])
        )

    def _gathered(self, rows: list[Any]) -> list[Any]:
        return gather_object(rows) if self._is_shared else rows


def _reference_of(model: nn.Module, ref_model: nn.Module | None) -> Reference:
    if ref_model is not None:
        return SecondModel(ref_model)
    if isinstance(model, PeftModel):
        return RefAdapter(model) if START in model.peft_config else AdapterOff(model)
    return NoReference()
