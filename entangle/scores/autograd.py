"""The oracle: one backward pass per row, whole gradients, dots in float64. Right for any parameters; slow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from entangle.analysis.geometry import PairGeometry
from entangle.scores.base import (
    Engine,
    Metric,
    stack_geometry,
    studying,
)
from entangle.scores.logps import Rows, row_logps, rows_for, scored_logps
from entangle.scores.reduce import dots
from entangle.scores.rows import RowBatch
from entangle.scores.summing import PassSums
from entangle.scores.terms import module_name


class AutogradEngine(Engine):
    """Scores by plain autograd, a row at a time: what every other engine is tested against.

    Cost: a forward and a backward per row over all probed parameters; `pairs` keeps two scores in memory,
    `gram` the scores of all rows.
    """

    def blocks(
        self, batch: RowBatch, metric: Metric | None, sums: PassSums | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Engine.blocks`."""
        rows, n = self._rows(batch), len(batch.prompt_length)
        if sums is not None and not sums.is_known:
            sums.know(row_logps(self.model, batch))
        logps = torch.zeros(2 * n, dtype=torch.float64)
        columns: dict[str, Tensor] = defaultdict(lambda: torch.zeros(5, n, dtype=torch.float64))
        for i in range(n):
            logps[i], chosen = self.score(rows[i : i + 1])
            logps[n + i], rejected = self.score(rows[n + i : n + i + 1])
            for name in self.parameters:
                root = metric[name].to(chosen[name].device).double().sqrt() if metric else 1.0
                g_w, g_l = (chosen[name].double() * root).ravel(), (rejected[name].double() * root).ravel()
                block = stack_geometry(PairGeometry.from_scores(g_w[None], g_l[None]))
                columns[module_name(name)][:, i] += block[:, 0].cpu()
                if sums is not None:
                    value = torch.stack([chosen[name], rejected[name]]).reshape(2, -1, 1)
                    sums.add(name, value, block.isfinite().all(0), pairs=torch.tensor([i]))
        if sums is not None:
            for number, twins in enumerate(sums.twins):
                for module, gram in self._module_grams(rows, torch.cat([twins, twins + n]), metric).items():
                    sums.add_twins(module, number, gram)
        return logps, columns

    def gram(self, batch: RowBatch, *, metric: Metric | None = None) -> Tensor:
        """See `Engine.gram`."""
        rows = len(batch.input_ids)
        total = torch.zeros(rows, rows, dtype=torch.float64)
        for name, score in self.scores(batch).items():
            matrix = score.double()
            weighted = matrix * metric[name].to(matrix.device).double().ravel() if metric else matrix
            total += (weighted @ matrix.T).cpu()
        return total

    def products(self, batch: RowBatch, direction: Mapping[str, Tensor]) -> Tensor:
        """See `Engine.products`."""
        return torch.stack(
            [
                torch.stack(
                    [(score[name].double() * step).sum().cpu() for name, step in direction.items()]
                ).sum()
                for _, score in self._scores(batch)
            ]
        )

    def scores(self, batch: RowBatch) -> dict[str, Tensor]:
        """See `Engine.scores`."""
        scores = [score for _, score in self._scores(batch)]
        return {name: torch.stack([score[name].ravel() for score in scores]) for name in self.parameters}

    def score(self, row: Rows) -> tuple[Tensor, dict[str, Tensor]]:
        """The log-prob ln pi of a single row (float64) and its gradient in every probed parameter."""
        with studying(self.model, self.parameters):
            logp = scored_logps(self.model, row).sum(dtype=torch.float64)
            if not logp.requires_grad:  # no probed parameter takes part
                return logp.cpu(), {name: torch.zeros_like(p) for name, p in self.parameters.items()}
            grads = torch.autograd.grad(
                logp, list(self.parameters.values()), allow_unused=True, materialize_grads=True
            )
        return logp.detach().cpu(), dict(zip(self.parameters, grads, strict=True))

    def squared_norms(self, row: Rows) -> dict[str, float]:
        """|S|^2 of a single row in each parameter, one gradient in memory at a time."""
        norms = dict.fromkeys(self.parameters, 0.0)

        def measure(name: str, grad: Tensor) -> Tensor:
            flat = grad.reshape(1, -1)
            norms[name] = float(dots(flat, flat))
            return grad.new_zeros(()).expand_as(grad)  # so that the gradient itself is freed

        with studying(self.model, self.parameters):
            handles = [p.register_hook(partial(measure, name)) for name, p in self.parameters.items()]
            try:
                logp = scored_logps(self.model, row).sum(dtype=torch.float64)
                if logp.requires_grad:
                    torch.autograd.grad(logp, list(self.parameters.values()), allow_unused=True)
            finally:
                for handle in handles:
                    handle.remove()
        return norms

    def _module_grams(self, rows: Rows, chosen: Tensor, metric: Metric | None) -> dict[str, Tensor]:
        """<S_a, P S_b> of some of the rows by module."""
        scores = [self.score(rows[i : i + 1])[1] for i in chosen.tolist()]
        grams: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for name in self.parameters:
            matrix = torch.stack([score[name].ravel() for score in scores]).double()
            weighted = matrix * metric[name].to(matrix).ravel() if metric else matrix
            grams[module_name(name)] = grams[module_name(name)] + (weighted @ matrix.T).cpu()
        return grams

    def _rows(self, batch: RowBatch) -> Rows:
        self._check_once(batch)
        return rows_for(self.model, batch)

    def _scores(self, batch: RowBatch) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        rows = self._rows(batch)
        return (self.score(rows[i : i + 1]) for i in range(len(rows)))
