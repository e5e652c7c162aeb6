"""What an engine gives: Gram entries of scores, and products of scores with a direction."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from entangle.analysis.geometry import GEOMETRY_COLUMNS, RESOLUTION, PairGeometry
from entangle.errors import UserError
from entangle.scores.fused import check_unfused
from entangle.scores.logps import Rows, evaluating, plain_experts, rows_for
from entangle.scores.model_check import check_causal, check_rows_apart
from entangle.scores.rows import RowBatch
from entangle.scores.summing import PassSums

Metric = Mapping[str, Tensor]
"""A diagonal metric P: positive weights by parameter name, of the parameter's shape. None means P = 1."""


INT8_RESOLUTION = 2e-2
"""That of a model with 8-bit weights (LLM.int8, arXiv 2208.07339): its activations are rounded to 8 bits as well, which
turns the last digit of an input into a hundredth of an output."""


class UncoveredParameter(UserError):
    """The factored engine has no exact rule for a parameter that was asked for."""


@dataclass(frozen=True)
class PairScores:
    """What a batch of n pairs says, whatever the loss.

    Args:
        logps: `(2n,)` float64, log pi of every row in nats: chosen rows first, then rejected.
        geometry: Gram blocks over all probed parameters, `(n,)` each.
        modules: the same for the parameters of each module alone (LoRA's A and B are two modules); they sum
            to `geometry`. None unless asked for.

    Raises:
        ValueError: there aren't two log-probs to a pair.
    """

    logps: Tensor
    geometry: PairGeometry
    modules: dict[str, PairGeometry] | None = None

    def __post_init__(self) -> None:
        if self.logps.shape != (2 * len(self.geometry.inner),):
            raise ValueError(
                f"PairScores needs 2 log-probs per pair; got {tuple(self.logps.shape)} for "
                f"{len(self.geometry.inner)} pairs."
            )


class Engine(ABC):
    """Computes with the scores S(y) = d log pi(y) / d theta of a batch's rows, theta = the given parameters.

    For every engine: a row's numbers depend neither on the other rows of the batch nor on padding; the model
    runs in eval mode and is left as it was found: mode, `requires_grad`, `.grad` and weights.

    Args:
        model: a causal language model of transformers, plain or with a PEFT adapter.
        parameters: the probed parameters by name.

    Attributes:
        notes: what the user should know about how the numbers come about; may grow while the engine runs.

    Raises:
        UserError: the model is sharded over processes.
        ValueError: no parameter is given, one is given under two names, or one isn't the model's.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        if not parameters or len({id(p) for p in parameters.values()}) != len(parameters):
            raise ValueError(f"An engine needs parameters, each under one name; got {list(parameters)[:5]}.")
        own = {id(p) for p in model.parameters()}
        check_whole(model)
        foreign = [name for name, p in parameters.items() if id(p) not in own]
        if foreign:
            raise ValueError(f"An engine needs parameters of its own model; these aren't: {foreign[:5]}.")
        self.model = model
        self.parameters = dict(parameters)
        self.notes: list[str] = []
        self._is_model_checked = False

    def check(self, batch: RowBatch) -> None:
        """Refuse a model whose log-probs aren't those of single rows, each token given the ones before it.

        The first batch is checked without being asked for. Called with the longest rows of a job (and some short
        ones) before it begins, it finds what shows on long rows only, and finds it before anything is computed.
        Costs forward passes over the longest and the shortest row.

        Args:
            batch: rows as they will come.

        Raises:
            UserError: the model can't be run on such rows, isn't causal, or mixes the rows of a batch.
        """
        self._check_model(batch)

    def _check_model(self, batch: RowBatch) -> None:
        """The checks that concern the model alone."""
        check_unfused(self.model)
        rows = rows_for(self.model, batch)
        whole = Rows.from_batch(batch.to(rows.input_ids.device), whole=True)
        with torch.no_grad(), evaluating(self.model):
            check_causal(self.model, whole, self.resolution)
            self.notes += check_rows_apart(self.model, rows, self.resolution)
        self._is_model_checked = True

    def _check_once(self, batch: RowBatch) -> None:
        if not self._is_model_checked:
            self._check_model(batch)

    def take_as_checked(self) -> None:
        """Leave the checks of the model out: another engine has made them."""
        self._is_model_checked = True

    def pairs(
        self,
        batch: RowBatch,
        *,
        modules: bool = False,
        metric: Metric | None = None,
        sums: PassSums | None = None,
    ) -> PairScores:
        """Log-probs and Gram block of every pair, dots being <g, P g'>; `batch.group_size` must be 2.

        With `sums`, from `GroupSums.of_pass`, the scores are added up there on the way.

        Args:
            batch: B pairs: chosen rows first, then rejected.
            modules: whether the blocks are wanted by module too.
            metric: P, by parameter, of shape `(a, b)` each; None: the plain dot product.
            sums: where the scores are added up on the way.
        """
        check_pairs(batch)
        logps, blocks = self.blocks(batch, metric, sums)
        if sums is not None and (undo := sums.finish(blocks)) is not None:
            self.blocks(batch, metric, undo)
        return pair_scores(logps, blocks, self.resolution, modules)

    @abstractmethod
    def blocks(
        self, batch: RowBatch, metric: Metric | None, sums: PassSums | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-probs of pairs, `(2n,)` float64, and the five columns of their blocks by module, `(5, n)` float64.

        Args:
            batch: n pairs.
            metric: P, by parameter; None: the plain dot product.
            sums: where the scores are added up on the way; None: nowhere.
        """

    @abstractmethod
    def gram(self, batch: RowBatch, *, metric: Metric | None = None) -> Tensor:
        """K[a, b] = <S_a, P S_b> for all rows, `(rows, rows)` float64: symmetric, positive semi-definite.

        Args:
            batch: any rows.
            metric: P, by parameter; None: the plain dot product.
        """

    @abstractmethod
    def products(self, batch: RowBatch, direction: Mapping[str, Tensor]) -> Tensor:
        """<S_a, direction> for all rows, `(rows,)` float64.

        The first-order change of every row's log-prob when the parameters move by `direction` (shaped like
        the parameters; names that are absent don't move).

        Args:
            batch: any rows.
            direction: by parameter name, in its shape.
        """

    @abstractmethod
    def scores(self, batch: RowBatch) -> dict[str, Tensor]:
        """The scores themselves, written out: `(rows, numel)` by parameter. Memory: rows times theta."""

    @property
    def resolution(self) -> float:
        """Relative error that this model's precision leaves in a dot product of scores."""
        dtypes = {p.dtype for p in self.model.parameters()}
        if torch.int8 in dtypes:
            return INT8_RESOLUTION
        device = next(self.model.parameters()).device.type
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        if device == "cuda" and torch.backends.cuda.matmul.allow_tf32:
            dtypes.add(torch.float16)  # TensorFloat-32 keeps as many digits
        return max(RESOLUTION[dtype] for dtype in dtypes if dtype in RESOLUTION)


def check_whole(model: nn.Module) -> None:
    """Refuse a model whose parameters are sharded: FSDP2's and tensor parallelism's are DTensors, FSDP1 wraps modules.

    Raises:
        UserError: it is; says what to do instead.
    """
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor)]
    sharded += [name for name, m in model.named_modules() if isinstance(m, FullyShardedDataParallel)]
    if sharded:
        raise UserError(
            f"The model is sharded over processes (FSDP or tensor parallelism, such as {sharded[0] or 'all of it'}): "
            "each process sees a part of every gradient, and an engine needs whole ones. Probe the saved checkpoint: "
            "one process loads it whole, device_map='auto' spreads it over devices, and torchrun splits the pairs."
        )


def check_pairs(batch: RowBatch) -> None:
    """Raise ValueError unless the batch holds pairs."""
    if batch.group_size != 2:
        raise ValueError(f"pairs() needs 2 responses per prompt; got group_size {batch.group_size}.")


def stack_geometry(geometry: PairGeometry) -> Tensor:
    """The five columns as `(5, n)` float64: they add up over parameters."""
    return torch.stack([getattr(geometry, name) for name in GEOMETRY_COLUMNS])


def unstack_geometry(columns: Tensor, resolution: float) -> PairGeometry:
    """Inverse of `stack_geometry`.

    Args:
        columns: `(5, B)`, in the order of `GEOMETRY_COLUMNS`.
        resolution: relative error of the dot products.
    """
    return PairGeometry(*columns.unbind(0), resolution=resolution)


def pair_scores(logps: Tensor, columns: Mapping[str, Tensor], resolution: float, modules: bool) -> PairScores:
    """From the `(5, n)` columns of every module.

    Args:
        logps: `(2n,)`, nats, chosen rows first.
        columns: module -> `(5, n)`, in the order of `GEOMETRY_COLUMNS`.
        resolution: relative error of the dot products.
        modules: whether the blocks by module are kept.
    """
    total = unstack_geometry(torch.stack(list(columns.values())).sum(0), resolution)
    parts = {name: unstack_geometry(part, resolution) for name, part in columns.items()} if modules else None
    return PairScores(logps, total, parts)


@contextmanager
def studying(model: nn.Module, trained: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within: eval mode, gradients on, and exactly `trained` requires them. Afterwards all is as before.

    Args:
        model: the model.
        trained: the parameters that require gradients within, by name.
    """
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        with evaluating(model), plain_experts(model), torch.enable_grad():
            yield
    finally:
        for parameter, needed in before.items():
            parameter.requires_grad_(needed)
