"""Entanglement across pairs: what the gradients of all the other pairs do to each pair's log-probs.

A pair's regime is about one step on that pair alone. Training takes steps on batches of other pairs, and a pair is in
one batch of an epoch only. With S_wi, S_li the scores of pair i and d_wj, d_lj the incentives of pair j, N pairs in
batches of b at learning rate lr change its chosen log-prob over an epoch, to first order and with scores held still, by

    (lr / b) [ own + partner + (N - 1) (pull + push) ]

    own  = d_wi |S_wi|^2        partner = -d_li <S_wi, S_li>                                    the pair's own step
    pull = mean over j != i of d_wj <S_wi, S_wj>      push = -mean over j != i of d_lj <S_wi, S_lj>   all others

(rejected: the same with S_li in front). Products between pairs are small, and there are N - 1 of them.

The set is like one pair: with U_ww, U_wl, U_ll the means over i != j of <S_wi, S_wj>, <S_wi, S_lj>, <S_li, S_lj>, the
mean chosen log-prob falls, under equal incentives, iff U_wl > U_ww: the condition of arXiv 2410.13828 (its section 3)
with mean gradients. U are unbiased (no i = j), with standard errors of U-statistics over pairs.

    RUN/across.parquet   one row per pair and loss
    RUN/across.json      the set's block and each loss's means
    RUN/across.png       the parts, loss by loss
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console, RenderableType
from torch import Tensor

from entangle.analysis.geometry import SIDES
from entangle.analysis.predictions import geometry_of, is_scored
from entangle.analysis.regimes import REGIMES, Prediction, Regime
from entangle.analysis.statistics import share
from entangle.commands.output import Output
from entangle.commands.probe import ProbeResult
from entangle.config import AcrossConfig, build_losses
from entangle.data import TokenizedPair
from entangle.errors import ConfigError, RunError
from entangle.measure.plan import Plan, extremes, longest
from entangle.measure.reload import load_again, options_of
from entangle.models import load_adam_state
from entangle.runs.progress import notes_console, progress_bar
from entangle.scores import gram_products, make_engine
from entangle.scores.gram import directions_at_a_time
from entangle.tables.across import across_tables
from entangle.tables.base import Shown

ACROSS = "across.json"
PARTS = ("own", "partner", "pull", "push")


@dataclass(frozen=True)
class AcrossResult(Shown):
    """What all other pairs do to each pair.

    Args:
        probe: the run that the pairs are from.
        rows: one row per pair and loss: index, loss, `PARTS` of both sides as <part>_<side> (nats; own and partner of
            the pair's own loss, pull and push means over the other pairs), epoch_<side> (their sum over an epoch, nats
            per unit of learning rate / batch size), regime (alone) and epoch_regime.
        summary: `pairs` (N), `epoch_pairs`, `set` (sq_chosen, inner, sq_rejected: U with standard errors; cosine,
            norm_ratio, band; alone: the means of A, c and B), and `losses`: by side the means of the
            parts over an epoch, of their sum (change, error) and of what the others do (others, others_error); the
            regime of the means, shares of pairs.
    """

    probe: ProbeResult
    rows: pd.DataFrame
    summary: dict[str, Any]

    def renderable(self) -> RenderableType:
        """The set as one pair, and a row per loss."""
        return across_tables(self.summary)


def run_across(config: AcrossConfig, console: Console | None = None) -> AcrossResult:
    """Measure a finished probe's pairs against each other, and write what was found into its folder.

    Costs two passes of the engine over the pairs (one where all scores fit in memory), whatever the number of losses
    of a small adapter. An earlier result is replaced.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: the run isn't a finished probe, its model or data has changed, or a loss isn't in it.
    """
    out = notes_console(console)
    probe = ProbeResult.load(config.run)
    labels = _labels(probe, config)
    numbers = _chosen_pairs(probe, config.limit)
    options = options_of(probe.run)
    policy, pairs = load_again(probe.run, options, numbers["index"].tolist())
    metric = None
    if options.optimizer_state is not None:
        state = load_adam_state(options.optimizer_state, policy.model, policy.trained)
        metric = state.metric(policy.parameters)
    engine = make_engine(policy.model, policy.parameters, options.engine)
    engine.check(policy.collate(extremes(pairs)))
    most = directions_at_a_time(engine) // 4  # a pass writes its rows' scores out
    passes = list(_passes(pairs, config.batch_size, max(1, most)))
    order = pd.Index(numbers["index"]).get_indexer(
        pd.Index([pair.index for batch in passes for pair in batch])
    )
    push = {label: _incentives(probe, label, numbers) for label in labels}
    weights = _weights(push, order, [len(batch) for batch in passes])
    lots = -(-len(weights) // directions_at_a_time(engine))
    with progress_bar(out, "responses", 4 * lots * len(pairs), 0) as advance:
        batches = [policy.collate(batch) for batch in passes]
        found = gram_products(engine, batches, weights, metric=metric, advance=advance)
    products = _by_pair(found, order, [len(batch) for batch in passes])
    geometry = geometry_of(numbers, float(probe.run.read_json("provenance.json")["resolution"]))
    block = torch.stack([geometry.sq_chosen, geometry.inner, geometry.sq_rejected])
    size = config.epoch_pairs or len(numbers)
    measured = [
        Across(label, *push[label], block, products[..., [2 * k, 2 * k + 1]], products[..., -2:], size)
        for k, label in enumerate(labels)
    ]
    alone = probe.predictions.set_index(["loss", "index"])["regime"]
    rows = pd.concat([
        each.rows(geometry.resolution).assign(
            index=numbers["index"].to_numpy(), loss=each.loss,
            regime=alone.loc[each.loss].loc[numbers["index"]].astype(str).to_numpy(),
        )
        for each in measured
    ], ignore_index=True)  # fmt: skip
    summary = {
        "pairs": len(numbers), "epoch_pairs": size, "metric": options.metric,
        "set": set_block(block, products[..., -2:]),
        "losses": {each.loss: each.summary() | _shares(rows, each.loss) for each in measured},
    }  # fmt: skip
    result = AcrossResult(probe, rows[["index", "loss", *rows.columns.drop(["index", "loss"])]], summary)
    probe.run.write_table("across.parquet", result.rows)
    probe.run.write_json(ACROSS, summary)
    if config.plots:
        from entangle.figures.epochs import parts_figure
        from entangle.figures.style import save

        save(parts_figure(summary), probe.run.path / "across.png")
    return result


@dataclass(frozen=True)
class Across:
    """One loss on N pairs.

    Args:
        loss: its label.
        chosen: d_w, `(N,)`.
        rejected: d_l, `(N,)`.
        block: A, c, B of every pair, `(3, N)`.
        moved: `(N, 2, 2)`: products of both scores of every pair (axis 1) with mean_j d_wj S_wj and mean_j d_lj S_lj.
        mean: `(N, 2, 2)`: the same with mean_j S_wj and mean_j S_lj.
        size: pairs of an epoch.
    """

    loss: str
    chosen: Tensor
    rejected: Tensor
    block: Tensor
    moved: Tensor
    mean: Tensor
    size: int

    @property
    def parts(self) -> Tensor:
        """`(4, 2, N)`: `PARTS` by side; pull and push as means over the other pairs."""
        (own_w, inner, own_l), n = self.block, len(self.chosen)
        own = torch.stack([self.chosen * own_w, -self.rejected * own_l])
        partner = torch.stack([-self.rejected * inner, self.chosen * inner])
        at_home = torch.stack(
            [torch.stack([own[0], partner[0]], -1), torch.stack([partner[1], own[1]], -1)], 1
        )
        others = (n * self.moved * torch.tensor([1.0, -1.0]) - at_home) / (n - 1)  # (N, side, pull or push)
        pull, push = others.permute(2, 1, 0)
        return torch.stack([own, partner, pull, push])

    @property
    def epoch(self) -> Tensor:
        """`(4, 2, N)`: what each part gives over an epoch, nats per unit of learning rate / batch size."""
        return self.parts * torch.tensor([1.0, 1.0, self.size - 1.0, self.size - 1.0]).view(4, 1, 1)

    def rows(self, resolution: float) -> pd.DataFrame:
        """One row per pair, with the columns of `AcrossResult.rows`."""
        parts, epoch = self.parts, self.epoch
        change, floor = epoch.sum(0), resolution * epoch.abs().sum(0)
        nothing = torch.full_like(change[0], torch.nan)
        prediction = Prediction(change[0], change[1], floor[0], floor[1], nothing, nothing)
        columns = {
            f"{name}_{side}": parts[i, k].numpy()
            for i, name in enumerate(PARTS)
            for k, side in enumerate(SIDES)
        }
        columns |= {f"epoch_{side}": change[k].numpy() for k, side in enumerate(SIDES)}
        return pd.DataFrame(columns | {"epoch_regime": list(map(str, prediction.regimes))})

    def summary(self) -> dict[str, Any]:
        """Means of the parts over an epoch; of their sum, and of what the others do, with errors; the regime."""
        epoch, n = self.epoch, len(self.chosen)
        means = {
            side: {name: float(epoch[i, k].mean()) for i, name in enumerate(PARTS)}
            for k, side in enumerate(SIDES)
        }
        suffered = self.parts[2:].sum(0)  # (side, N): what the others do to pair i
        (own_w, inner, own_l), exerted = self.block, []
        for k, (by_chosen, by_rejected) in enumerate(((own_w, inner), (inner, own_l))):
            done = self.chosen * (n * self.mean[:, 0, k] - by_chosen)
            exerted.append((done - self.rejected * (n * self.mean[:, 1, k] - by_rejected)) / (n - 1))
        for k, side in enumerate(SIDES):
            others = (self.size - 1) * (suffered[k] + exerted[k])
            change = others + self.parts[:2, k].sum(0)
            means[side] |= {
                "change": float(epoch[:, k].sum(0).mean()), "error": float(change.std() / n**0.5),
                "others": float(epoch[2:, k].sum(0).mean()), "others_error": float(others.std() / n**0.5),
            }  # fmt: skip
        up, down = means["chosen"]["change"] > 0, means["rejected"]["change"] < 0
        regime = Regime.IDEAL if up and down else Regime.BOTH_UP if up else Regime.BOTH_DOWN
        return means | {"regime": str(regime if up or down else Regime.INVERTED), "rho": self._ratio()}

    def _ratio(self) -> float:
        return float((self.chosen / self.rejected).nanmedian())


def set_block(block: Tensor, mean: Tensor) -> dict[str, Any]:
    """The set as one pair: U_ww, U_wl, U_ll with standard errors, and what follows from them.

    Args:
        block: A, c, B of every pair, `(3, N)`.
        mean: `(N, 2, 2)`: products of both scores of every pair with mean_j S_wj and mean_j S_lj.
    """
    n = mean.shape[0]
    first = (n * mean[:, [0, 0, 1], [0, 1, 1]].T - block) / (
        n - 1
    )  # (3, N): pair i's mean product with the others
    second = (n * mean[:, [0, 1, 1], [0, 0, 1]].T - block) / (n - 1)
    value, error = first.mean(1), (first + second).std(1) / n**0.5
    sq_chosen, inner, sq_rejected = value.tolist()
    names = ("sq_chosen", "inner", "sq_rejected")
    is_known = sq_chosen > 0 and sq_rejected > 0
    return {
        **dict(zip(names, value.tolist(), strict=True)),
        **{f"{name}_error": e for name, e in zip(names, error.tolist(), strict=True)},
        "alone": dict(zip(names, block.mean(1).tolist(), strict=True)),
        "cosine": inner / (sq_chosen * sq_rejected) ** 0.5 if is_known else float("nan"),
        "norm_ratio": (sq_rejected / sq_chosen) ** 0.5 if is_known else float("nan"),
        "band": [max(0.0, inner / sq_chosen), sq_rejected / inner if inner > 0 else float("inf")]
        if is_known
        else [float("nan")] * 2,
    }


def _shares(rows: pd.DataFrame, loss: str) -> dict[str, Any]:
    """Shares of pairs per regime, each alone and over an epoch."""
    own = rows[rows["loss"] == loss]
    return {
        f"regimes_{name}": {str(r): share(int((own[column] == r).sum()), len(own)) for r in REGIMES}
        for name, column in (("alone", "regime"), ("epoch", "epoch_regime"))
    }


def command(config: AcrossConfig, console: Console | None = None) -> Output:
    """`entangle across`."""
    result = run_across(config, console)
    return Output(result.renderable(), f"Across pairs: {result.probe.run.path / 'across.parquet'}")


def _labels(probe: ProbeResult, config: AcrossConfig) -> list[str]:
    known = list(dict.fromkeys(probe.predictions["loss"]))
    if not known:
        raise RunError(f"No pair of {probe.run.path} could be scored, so there is nothing to compare.")
    labels = [loss.label for loss in build_losses(config.losses)] or known
    if missing := [label for label in labels if label not in known]:
        raise ConfigError(
            f"{', '.join(missing)} isn't among the losses of {probe.run.path}: {', '.join(known)}. Probe with it first."
        )
    return labels


def _chosen_pairs(probe: ProbeResult, limit: int | None) -> pd.DataFrame:
    """Rows of the scored pairs, evenly spread where there are more than asked for."""
    rows = probe.pairs[is_scored(probe.pairs)]
    if len(rows) < 2:
        raise RunError(f"Expected at least 2 scored pairs in {probe.run.path}; it has {len(rows)}.")
    count = min(limit or len(rows), len(rows))
    return rows.iloc[np.linspace(0, len(rows) - 1, count).round().astype(int)].reset_index(drop=True)


def _passes(pairs: Sequence[TokenizedPair], batch_size: int | None, most: int) -> list[list[TokenizedPair]]:
    ordered = tuple(sorted(pairs, key=lambda pair: (longest(pair), pair.index)))
    return [
        batch[start : start + most]
        for batch in Plan((ordered,), batch_size).passes(0)
        for start in range(0, len(batch), most)
    ]


def _incentives(probe: ProbeResult, label: str, numbers: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """d_w and d_l of the pairs under a loss, `(N,)` float64 each."""
    own = probe.predictions[probe.predictions["loss"] == label].set_index("index").loc[numbers["index"]]
    chosen, rejected = (torch.tensor(own[f"incentive_{side}"].to_numpy(float)) for side in SIDES)
    return chosen, rejected


def _weights(
    incentives: Mapping[str, tuple[Tensor, Tensor]], order: np.ndarray, sizes: Sequence[int]
) -> Tensor:
    """`(2 L + 2, rows)`: for each loss d_w on chosen rows and d_l on rejected ones, then 1 on each; over N."""
    n = len(order)
    one = torch.ones(n, dtype=torch.float64)
    directions = []
    for chosen, rejected in [*incentives.values(), (one, one)]:
        zero = torch.zeros(n, dtype=torch.float64)
        directions += [_in_rows(chosen[order], zero, sizes), _in_rows(zero, rejected[order], sizes)]
    return torch.stack(directions) / n


def _in_rows(chosen: Tensor, rejected: Tensor, sizes: Sequence[int]) -> Tensor:
    """Values of pairs in the order of the passes as values of rows: each pass's chosen rows, then its rejected ones."""
    parts = zip(chosen.split(list(sizes)), rejected.split(list(sizes)), strict=True)
    return torch.cat([torch.cat(part) for part in parts])


def _by_pair(found: Tensor, order: np.ndarray, sizes: Sequence[int]) -> Tensor:
    """`(N, 2, D)` in the order of the pairs, from `(rows, D)` in that of the passes."""
    parts = [part.view(2, -1, found.shape[1]).transpose(0, 1) for part in found.split([2 * n for n in sizes])]
    return torch.cat(parts)[np.argsort(order)]
