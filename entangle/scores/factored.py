"""The fast exact engine: one forward and one backward for all rows, no stored gradients.

All parameters are frozen for the pass, so autograd forms no weight gradient; hooks on the layers give each
row's scores as factors (`rules`), from which dot products are taken layer by layer (`reduce`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from entangle.analysis.geometry import RESOLUTION
from entangle.scores.autograd import AutogradEngine
from entangle.scores.base import (
    Engine,
    Metric,
    UncoveredParameter,
    studying,
)
from entangle.scores.check import disagreeing, logps_agree, sample_rows
from entangle.scores.ghost import Kernels
from entangle.scores.logps import Rows, evaluating, rows_for, scored_logps
from entangle.scores.lora import check_adapters, foldable, folded, lora_sites
from entangle.scores.prefix import Split, record_split, split_for
from entangle.scores.reduce import gram_block, pair_block
from entangle.scores.rotary import alike, length_factors
from entangle.scores.rows import RowBatch
from entangle.scores.sites import Recorder, RuleFailed, Site, find_sites
from entangle.scores.summing import PassSums, Sink
from entangle.scores.terms import Score, module_name

ONE_BY_ONE = (
    "where rows of a pair lie on both sides of a length at which rotary factors change, rows are evaluated one at a "
    "time (engine autograd), at a forward and a backward pass per response"
)


class FactoredEngine(Engine):
    """Exact scores from layer inputs and output gradients.

    On its first batch the engine compares itself with plain autograd on a few rows (`check`), so that a model
    which doesn't fit its assumptions is found out rather than measured wrongly.

    Args:
        model: see `Engine`.
        parameters: see `Engine`.
        fallback: compute parameters without a rule by `AutogradEngine` (a backward per row) and say so in
            `notes`, instead of refusing them.
        share_prompts: evaluate a prompt once for all its responses (see `prefix`).

    Raises:
        UncoveredParameter: a parameter has no rule and `fallback` is off; the message names them.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        *,
        fallback: bool = False,
        share_prompts: bool = True,
    ) -> None:
        super().__init__(model, parameters)
        self._may_fall_back = fallback
        self._share_prompts = share_prompts
        self._are_rules_checked = self._is_sharing_checked = False
        self._dtypes: set[torch.dtype] = set()
        self._alone = AutogradEngine(model, parameters)
        self._alone.take_as_checked()
        self._fallback: AutogradEngine | None = None
        self._folded: list[LoraLinear] = []
        self._sites: list[Site] = []
        self._tap(foldable(model))

    @property
    def covered(self) -> set[str]:
        """Names of the parameters that a fast rule covers; the others go by the fallback."""
        return set(self.parameters) - set(self._fallback.parameters if self._fallback else ())

    @property
    def resolution(self) -> float:
        """See `Engine.resolution`; also what the layers were seen to compute in (autocast)."""
        return max([super().resolution, *(RESOLUTION.get(dtype, 0.0) for dtype in self._dtypes)])

    def blocks(
        self, batch: RowBatch, metric: Metric | None, sums: PassSums | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Engine.blocks`."""
        if self._one_by_one(batch):
            return self._alone.blocks(batch, metric, sums)
        n = len(batch.prompt_length)
        blocks: dict[str, Tensor] = {}
        kernels = Kernels()

        def take(name: str, score: Score) -> None:
            weight, module = self._weight(metric, name, score), module_name(name)
            sink = None if sums is None else Sink(sums, name)
            block = pair_block(score, weight, kernels, sink)
            blocks[module] = blocks.get(module, 0.0) + block
            if sums is not None:
                for number, twins in enumerate(sums.twins):
                    sums.add_twins(module, number, gram_block(score.of(twins), weight))

        logps = self._run(batch, take, None if sums is None else sums.know)
        unused = torch.zeros(5, n, dtype=torch.float64)  # a module that wasn't called has zero scores
        columns = {module_name(name): unused for name in self.parameters}
        columns |= {name: block.cpu() for name, block in blocks.items()}
        if self._fallback:
            for name, block in self._fallback.blocks(batch, metric, sums)[1].items():
                columns[name] = columns[name] + block
        return logps, columns

    def gram(self, batch: RowBatch, *, metric: Metric | None = None) -> Tensor:
        """See `Engine.gram`."""
        if self._one_by_one(batch):
            return self._alone.gram(batch, metric=metric)
        sums: dict[torch.device, Tensor] = {}

        def take(name: str, score: Score) -> None:
            block = gram_block(score, self._weight(metric, name, score))
            sums[block.device] = sums.get(block.device, 0.0) + block

        self._run(batch, take)
        rows = len(batch.input_ids)
        total = sum((part.cpu() for part in sums.values()), torch.zeros(rows, rows, dtype=torch.float64))
        if self._fallback:
            total += self._fallback.gram(batch, metric=metric)
        return total

    def products(self, batch: RowBatch, direction: Mapping[str, Tensor]) -> Tensor:
        """See `Engine.products`."""
        if self._one_by_one(batch):
            return self._alone.products(batch, direction)
        sums: dict[torch.device, Tensor] = {}

        def take(name: str, score: Score) -> None:
            if name in direction:
                step = direction[name].to(self.parameters[name].device)
                part = score.product(step.reshape(score.shape))
                sums[part.device] = sums.get(part.device, 0.0) + part

        self._run(batch, take)
        total = sum((part.cpu() for part in sums.values()), torch.zeros(len(batch.input_ids)).double())
        slow = {k: v for k, v in direction.items() if self._fallback and k in self._fallback.parameters}
        if self._fallback and slow:
            total += self._fallback.products(batch, slow)
        return total

    def scores(self, batch: RowBatch) -> dict[str, Tensor]:
        """See `Engine.scores`."""
        if self._one_by_one(batch):
            return self._alone.scores(batch)
        rows = len(batch.input_ids)
        written: dict[str, Tensor] = {}

        def take(name: str, score: Score) -> None:
            written[name] = torch.cat([value.flatten(1) for _, _, value in score.slices()], 1)

        self._run(batch, take)
        written |= self._fallback.scores(batch) if self._fallback else {}
        unused = {name: p for name, p in self.parameters.items() if name not in written}
        return written | {name: torch.zeros(rows, p.numel()).to(p) for name, p in unused.items()}

    def check(self, batch: RowBatch) -> None:
        """See `Engine.check`; also compares the rules on the shortest rows, and shared prompts on the longest."""
        self._check_model(batch)
        check_adapters(self.model, self.parameters, self._folded)
        n, rows = len(batch.prompt_length), rows_for(self.model, batch)
        members = torch.arange(batch.group_size, device=rows.lengths.device) * n
        tokens = rows.lengths.view(batch.group_size, n).amax(0)
        usable = rows.valid.any(1).view(batch.group_size, n).all(0)
        if not bool(usable.any()) or self._one_by_one(batch):
            return
        shortest = int(torch.where(usable, tokens, tokens.max() + 1).argmin())
        longest = rows[members + int(torch.where(usable, tokens, 0).argmax())]
        if not self._are_rules_checked:
            self._check_rules(rows[members + shortest], batch.group_size)
        if self._split(longest, batch.group_size) is not None and not self._is_sharing_checked:
            self._check_sharing(longest, batch.group_size)

    def _one_by_one(self, batch: RowBatch) -> bool:
        """Whether rows of this batch can't share a forward pass: their rotary factors differ (see `rotary`)."""
        if not length_factors(self.model):
            return False
        self._check_once(batch)
        rows = rows_for(self.model, batch)
        apart = len(alike(self.model, rows.lengths)) > 1
        if apart and ONE_BY_ONE not in self.notes:
            self.notes.append(ONE_BY_ONE)
        return apart

    def _tap(self, layers: list[LoraLinear]) -> None:
        """Find the sites with these layers folded; what no rule covers goes by the fallback."""
        self._folded = layers
        given_up = set(self._fallback.parameters) if self._fallback else set()
        wanted = {name: p for name, p in self.parameters.items() if name not in given_up}
        adapted, left = lora_sites(self.model, layers, wanted)
        sites, uncovered = find_sites(self.model, left) if left else ([], set())
        self._sites = adapted + sites
        if uncovered:
            self._give_up(uncovered, "have no fast rule")

    def _give_up(self, names: Iterable[str], reason: str) -> None:
        """Leave parameters to the fallback, or refuse them."""
        given_up = set(names) | set(self._fallback.parameters if self._fallback else ())
        few = ", ".join(sorted(names)[:5]) + (", ..." if len(set(names)) > 5 else "")
        if not self._may_fall_back:
            raise UncoveredParameter(
                f"{len(set(names))} of {len(self.parameters)} parameters {reason}: {few}. Use engine='auto' "
                "(one backward pass per response for these), engine='autograd', or probe other parameters."
            )
        self._sites = [
            replace(site, parameters={k: v for k, v in site.parameters.items() if v not in given_up})
            for site in self._sites
        ]
        self._sites = [site for site in self._sites if site.parameters]
        self._fallback = AutogradEngine(
            self.model, {name: self.parameters[name] for name in sorted(given_up)}
        )
        self._fallback.take_as_checked()
        self.notes.append(
            f"{len(set(names))} of {len(self.parameters)} parameters {reason} and cost one backward pass per "
            f"response: {few}"
        )

    def _run(
        self,
        batch: RowBatch,
        take: Callable[[str, Score], None],
        know: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """One pass over all rows: every parameter's scores go to `take`; log pi `(rows,)` float64.

        `know` is told these log-probs before there are any scores.
        """
        check_adapters(self.model, self.parameters, self._folded)
        self._check_once(batch)
        rows = rows_for(self.model, batch)
        if not self._are_rules_checked:
            self._check_rules(rows, batch.group_size)
        if self._split(rows, batch.group_size) is not None and not self._is_sharing_checked:
            self._check_sharing(rows, batch.group_size)
        return self._record(rows, self._split(rows, batch.group_size), batch.group_size, take, know)

    def _split(self, rows: Rows, group_size: int) -> Split | None:
        return split_for(self.model, rows, group_size) if self._share_prompts else None

    def _record(
        self,
        rows: Rows,
        split: Split | None,
        group_size: int,
        take: Callable[[str, Score], None],
        know: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        shapes = {name: matrix_shape(p) for name, p in self.parameters.items()}
        recorder = Recorder(self._sites, shapes, group_size, take, know)
        with studying(self.model, {}), folded(self._folded):
            if split is None:
                logps = record_rows(self.model, rows, recorder)
            else:
                logps = record_split(self.model, split, recorder)
            recorder.flush()
        self._dtypes |= recorder.dtypes
        return logps.detach().cpu()

    def _check_rules(self, rows: Rows, group_size: int) -> None:
        """Compare with plain autograd on a few rows; give up parameters whose scores aren't reproduced."""
        sample = sample_rows(rows, group_size)
        if sample is None or not self._sites:
            return
        self._check_folding(sample)
        norms = self._norms_by_rules(sample, group_size)
        covered = {name: self.parameters[name] for name in self.covered}
        oracle = AutogradEngine(self.model, covered).squared_norms(sample[:1])
        if wrong := disagreeing(norms, oracle, self.resolution):
            self._give_up(wrong, "aren't reproduced by their rule")
        self._are_rules_checked = True

    def _check_folding(self, sample: Rows) -> None:
        """Leave layers unfolded where folding changes log-probs: their weights are read past the module."""

        def keeps(layers: list[LoraLinear]) -> bool:
            with folded(layers):
                found = scored_logps(self.model, sample).sum(1, dtype=torch.float64)
            return logps_agree(found, plain, self.resolution)

        if not self._folded:
            return
        with torch.no_grad(), evaluating(self.model):
            plain = scored_logps(self.model, sample).sum(1, dtype=torch.float64)
            if keeps(self._folded):
                return
            names = {module: name.rpartition(".")[2] for name, module in self.model.named_modules()}
            alike_named = [
                [m for m in self._folded if names[m] == kind] for kind in {names[m] for m in self._folded}
            ]
            kept = [layer for layers in alike_named if keeps(layers) for layer in layers]
            kept = kept if keeps(kept) else []
        few = ", ".join(sorted({names[m] for m in self._folded if m not in kept})[:5])
        self._tap([layer for layer in self._folded if layer in kept])
        self.notes.append(
            f"LoRA isn't folded into {few}: the model reads that weight past its layer, where the adapter has no say"
        )

    def _norms_by_rules(self, sample: Rows, group_size: int) -> dict[str, float]:
        """`_norms` of the first whole row; parameters whose rule fails are given up until none does."""
        while True:
            try:
                return self._norms(sample, None, group_size)[0][0]
            except RuleFailed as failure:
                layers = {site for site in self._sites if type(site.module) is type(failure.site.module)}
                names = {name for site in layers for name in site.parameters.values()}
                self._give_up(names, f"of {type(failure.site.module).__name__} can't go by their rule")

    def _check_sharing(self, rows: Rows, group_size: int) -> None:
        """Compare shared prompts with whole rows on a few of them; stop sharing if they disagree.

        The last response's backward pass is looked at as well as the first one's: a kernel that overwrites what it has
        saved (Liger's SwiGLU does) is right once.
        """
        sample = sample_rows(rows, group_size)
        split = None if sample is None else split_for(self.model, sample, group_size, min_share=0.0)
        if sample is None or split is None:
            return
        norms, logps = self._norms(sample, None, group_size)
        try:
            shared_norms, shared_logps = self._norms(sample, split, group_size)
            wrong = [
                name
                for shared, whole in zip(shared_norms, norms, strict=True)
                for name in disagreeing(shared, whole, self.resolution)
            ]
            problem = f"the scores of {', '.join(wrong[:3])} differ" if wrong else ""
            if not logps_agree(shared_logps, logps, self.resolution):
                problem = "log-probs differ"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may fail in any way under a cache; whole rows remain
            problem = f"{type(error).__name__}: {error}"
        if problem:
            self._share_prompts = False
            self.notes.append(f"prompts are evaluated with every response, not once ({problem[:200]})")
        self._is_sharing_checked = True

    def _norms(
        self, rows: Rows, split: Split | None, group_size: int
    ) -> tuple[tuple[dict[str, float], dict[str, float]], Tensor]:
        """|S|^2 in each parameter, of the first prompt's first and last response, and log pi of all rows."""
        first: dict[str, float] = {}
        last: dict[str, float] = {}

        def take(name: str, score: Score) -> None:
            for member, norms in ((0, first), (-1, last)):
                norms[name] = float(gram_block(score.first_row(member), None))

        logps = self._record(rows, split, group_size, take)
        return (first, last), logps

    def _weight(self, metric: Metric | None, name: str, score: Score) -> Tensor | None:
        """The metric in one parameter, as a matrix on its device."""
        if metric is None:
            return None
        return metric[name].to(self.parameters[name].device).reshape(score.shape)


def record_rows(model: nn.Module, rows: Rows, recorder: Recorder) -> Tensor:
    """Run all rows at full length under a recorder; log pi of every row, `(rows,)` float64.

    Args:
        model: the model.
        rows: a batch without padding.
        recorder: what listens to its layers.
    """
    with recorder.recording(len(rows)):
        logps = scored_logps(model, rows).sum(1, dtype=torch.float64)
    recorder.know(logps.detach())
    if logps.requires_grad:
        logps.sum().backward()
    return logps


def matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """How a parameter counts as a matrix: vectors are columns, leading axes are joined."""
    if parameter.ndim < 2:
        return parameter.numel(), 1
    return parameter.numel() // parameter.shape[-1], parameter.shape[-1]
