"""Where the reference policy's log-probs come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from entangle.data import TokenizedPair
from entangle.errors import ModelError
from entangle.models.state import wanting_as_before
from entangle.scores.logps import row_logps
from entangle.scores.rows import RowBatch

REFERENCES = ("auto", "adapter_off", "model", "columns", "self", "none")


class Reference(ABC):
    """Where the log-probs of the reference policy come from."""

    name: ClassVar[str]

    @abstractmethod
    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor | None:
        """Log pi_ref(response | prompt) of the batch's rows, `(rows,)` float64, nats; None: no reference.

        Args:
            batch: the rows.
            pairs: the pairs that the rows were collated from, in their order; only columns are read from
                them.
        """


@dataclass(frozen=True)
class AdapterOff(Reference):
    """The base that the adapter sits on: what DPO with LoRA starts from."""

    model: PeftModel
    name: ClassVar[str] = "adapter_off"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs with the adapter switched off."""
        with adapter_off(self.model):
            return row_logps(self.model, batch)


START = "ref"
"""PEFT's adapter that TRL keeps where training goes on from an adapter that was there before: a copy of the start."""


@dataclass(frozen=True)
class RefAdapter(Reference):
    """The adapter `ref` beside the trained one: what TRL's training began from."""

    model: PeftModel
    name: ClassVar[str] = "adapter_ref"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs with the adapter `ref` in the place of the trained one."""
        active = cast(str, self.model.active_adapter)
        with wanting_as_before(self.model):
            self.model.set_adapter(START)
            try:
                return row_logps(self.model, batch)
            finally:
                self.model.set_adapter(active)


@dataclass(frozen=True)
class SecondModel(Reference):
    """Another model with the same tokens."""

    model: nn.Module
    name: ClassVar[str] = "model"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs under the second model."""
        return row_logps(self.model, batch)


@dataclass(frozen=True)
class Itself(Reference):
    """The policy as it is, frozen: every log-ratio is 0, as at the first step of a training run."""

    model: nn.Module
    name: ClassVar[str] = "self"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor:
        """Log-probs under the policy itself."""
        return row_logps(self.model, batch)


@dataclass(frozen=True)
class Columns(Reference):
    """Log-probs that the data set carries (`ref_chosen_logps`, `ref_rejected_logps`).

    Args:
        required: refuse pairs without them; otherwise data without them has no reference.
    """

    required: bool = True
    name: ClassVar[str] = "columns"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> Tensor | None:
        """The columns of the pairs.

        Raises:
            ModelError: a pair has none (unless no pair has and they aren't required), or a value is above 0.
        """
        values = [p.ref_chosen_logps for p in pairs] + [p.ref_rejected_logps for p in pairs]
        if not self.required and all(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        if len(known) < len(batch.input_ids):
            lacking = [p.index for p in pairs if p.ref_chosen_logps is None or p.ref_rejected_logps is None]
            raise ModelError(
                "Expected reference log-probs (ref_chosen_logps, ref_rejected_logps) for every pair; rows "
                f"without them: {lacking[:10]}. Complete the columns, or choose another reference."
            )
        logps = torch.tensor(known, dtype=torch.float64)
        if bool((logps > 0).any()):
            raise ModelError(
                f"ref_chosen_logps and ref_rejected_logps are summed log-probs, so none is above 0; got "
                f"{float(logps.max()):g}. Rewards or losses don't belong there."
            )
        return logps


@dataclass(frozen=True)
class NoReference(Reference):
    """There is none: only losses that don't compare with one can be judged."""

    name: ClassVar[str] = "none"

    def logps(self, batch: RowBatch, pairs: Sequence[TokenizedPair] = ()) -> None:
        """None."""
        return None


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Within: the model computes as its base does.

    PEFT marks every adapter parameter trainable when it switches the adapter on again; which ones want a
    gradient is restored here.
    """
    with wanting_as_before(model), model.disable_adapter():
        yield


def check_reference_options(reference: str, has_second: bool, has_adapter: bool) -> None:
    """Raise ModelError unless the reference asked for can be had."""
    if reference not in REFERENCES:
        raise ModelError(f"Unknown reference {reference!r}. Known: {', '.join(REFERENCES)}.")
    if reference == "adapter_off" and not has_adapter:
        raise ModelError(
            "reference 'adapter_off' needs an adapter (adapter_name_or_path or use_peft); the model has none."
        )
    if reference == "model" and not has_second:
        raise ModelError("reference 'model' needs ref_model_name_or_path; none is given.")
    if has_second and reference not in ("auto", "model"):
        raise ModelError(
            f"ref_model_name_or_path is given, but the reference is {reference!r}. Drop one of them."
        )


def make_reference(reference: str, model: nn.Module, second: nn.Module | None) -> Reference:
    """The reference of this name (see `entangle.config.ModelOptions`) for a policy."""
    if second is not None:
        return SecondModel(second)
    if isinstance(model, PeftModel) and reference == "auto" and START in model.peft_config:
        return RefAdapter(model)
    if reference in ("auto", "adapter_off") and isinstance(model, PeftModel):
        return AdapterOff(model)
    if reference in ("auto", "columns"):
        return Columns(required=reference == "columns")
    return Itself(model) if reference == "self" else NoReference()
