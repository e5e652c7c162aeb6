"""What all other pairs of a finished probe do to each pair: `entangle across`.

The formulas are in `entangle.analysis.across`.

    RUN/across.parquet   one row per pair and loss
    RUN/across.json      the set's block and each loss's means
    RUN/across.png       the parts, loss by loss
    RUN/across/          what a measurement has that isn't finished
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console, RenderableType
from torch import Tensor

from entangle.analysis.across import Across, set_block
from entangle.analysis.geometry import SIDES
from entangle.analysis.predictions import geometry_of
from entangle.analysis.regimes import REGIMES
from entangle.analysis.statistics import share
from entangle.commands.output import Output
from entangle.commands.probe import ProbeResult
from entangle.config import AcrossConfig, build_losses
from entangle.config.hashing import hash_file
from entangle.errors import ConfigError, RunError
from entangle.measure.across import CrossProducts, Weights
from entangle.measure.plan import Plan, extremes
from entangle.measure.reload import load_again, metric_again, options_of
from entangle.runs.session import Session
from entangle.scores import make_engine
from entangle.scores.directions import directions_at_a_time
from entangle.tables.across import across_tables
from entangle.tables.base import Shown

ACROSS = "across.json"


@dataclass(frozen=True)
class AcrossResult(Shown):
    """What all other pairs do to each pair.

    Args:
        probe: the run that the pairs are from.
        rows: one row per pair and loss: index, loss, `PARTS` of both sides as <part>_<side> (nats; own and partner of
            the pair's own loss, pull and push means over the other pairs), epoch_<side> (their sum over an epoch, nats
            per unit of learning rate / batch size), exerted_<side> (what its own step does to the log-probs of the
            other pairs, mean over them), regime (alone) and epoch_regime.
        summary: `pairs` (N), `epoch_pairs`, `set` (sq_chosen, inner, sq_rejected: U with standard errors; cosine,
            norm_ratio, band; alone: the means of A, c and B), and `losses`: by side the means of the
            parts over an epoch, of their sum (change, error) and of what the others do (others, others_error); the
            regime of the means, shares of pairs.
    """

    probe: ProbeResult
    rows: pd.DataFrame
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> AcrossResult:
        """Read what was found into a probe's folder.

        Raises:
            RunError: there is no finished probe at `path`, or nothing was measured across its pairs.
        """
        probe = ProbeResult.load(path)
        return cls(probe, probe.folder.read_table("across.parquet"), probe.folder.read_json(ACROSS))

    def renderable(self) -> RenderableType:
        """The set as one pair, and a row per loss."""
        return across_tables(self.summary)


def run_across(config: AcrossConfig, console: Console | None = None) -> AcrossResult:
    """Measure a finished probe's pairs against each other, and write what was found into its folder.

    Costs two passes of the engine over the pairs (one where all scores fit in memory), whatever the number of losses
    of a small adapter. A measurement that was broken off is resumed; with other options or losses it is begun anew. An
    earlier result is replaced. Under `accelerate launch` or `torchrun` the processes share the pairs.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: the run isn't a finished probe, its model or data has changed, or a loss isn't in it.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    session = Session.start(config, console)
    probe = ProbeResult.load(config.run)
    labels = _labels(probe, config)
    numbers = probe.scored(config.limit, least=2)
    indices = numbers["index"].tolist()
    options = options_of(probe.folder)
    policy, pairs = load_again(probe.folder, options, indices, session.processes)
    engine = make_engine(policy.model, policy.parameters, options.engine)
    engine.check(policy.collate(extremes(pairs)))
    incentives = {label: _incentives(probe, label, numbers) for label in labels}
    products = CrossProducts(
        session=session,
        plan=Plan.make(pairs, options.shard_size, config.batch_size, directions_at_a_time(engine) // 4),
        policy=policy,
        engine=engine,
        weights=Weights(_directions(incentives), indices),
        metric=metric_again(options, policy),
    )
    made_from = hash_file(probe.folder.path / "predictions.parquet")
    session.claim(probe.folder.read_json("identity.json") | {"predictions": made_from})
    products.measure()
    session.finish(lambda: _close(session, config, probe, numbers, incentives, products.read()))
    return AcrossResult.load(config.run)


def _close(
    session: Session,
    config: AcrossConfig,
    probe: ProbeResult,
    numbers: pd.DataFrame,
    incentives: Mapping[str, tuple[Tensor, Tensor]],
    products: Tensor,
) -> None:
    """Write what follows from the products, and remove what the measurement has kept on its way."""
    geometry = geometry_of(numbers, float(probe.folder.read_json("provenance.json")["resolution"]))
    block = torch.stack([geometry.sq_chosen, geometry.inner, geometry.sq_rejected])
    size, mean = config.epoch_pairs or len(numbers), products[..., -2:]
    measured = [
        Across(label, *own, block, products[..., 2 * k : 2 * k + 2], mean, size)
        for k, (label, own) in enumerate(incentives.items())
    ]
    alone = probe.predictions.set_index(["loss", "index"])["regime"]
    indices = numbers["index"].to_numpy()
    rows = [
        each.rows(geometry.resolution).assign(
            index=indices, loss=each.loss, regime=alone.loc[each.loss].loc[indices].astype(str).to_numpy()
        )
        for each in measured
    ]
    table = pd.concat(rows, ignore_index=True)
    summary = {
        "pairs": len(numbers),
        "epoch_pairs": size,
        "metric": options_of(probe.folder).metric,
        "set": set_block(block, mean),
        "losses": {each.loss: each.summary() | _shares(table, each.loss) for each in measured},
    }
    first = ["index", "loss"]
    probe.folder.write_table("across.parquet", table[[*first, *table.columns.drop(first)]])
    probe.folder.write_json(ACROSS, summary)
    if config.plots:
        from entangle.figures.epochs import parts_figure
        from entangle.figures.style import save

        save(parts_figure(summary), probe.folder.path / "across.png")
    shutil.rmtree(session.run.path)


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
    return Output(result.renderable(), f"Across pairs: {result.probe.folder.path / 'across.parquet'}")


def _labels(probe: ProbeResult, config: AcrossConfig) -> list[str]:
    known = list(dict.fromkeys(probe.predictions["loss"]))
    if not known:
        raise RunError(f"No pair of {probe.folder.path} could be scored, so there is nothing to compare.")
    labels = [loss.label for loss in build_losses(config.losses)] or known
    if missing := [label for label in labels if label not in known]:
        raise ConfigError(
            f"{', '.join(missing)} isn't among the losses of {probe.folder.path}: {', '.join(known)}. Probe with it "
            "first."
        )
    return labels


def _incentives(probe: ProbeResult, label: str, numbers: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """d_w and d_l of the pairs under a loss, `(N,)` float64 each."""
    own = probe.predictions[probe.predictions["loss"] == label].set_index("index").loc[numbers["index"]]
    chosen, rejected = (torch.tensor(own[f"incentive_{side}"].to_numpy(float)) for side in SIDES)
    return chosen, rejected


def _directions(incentives: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """`(2 L + 2, 2, N)`: for each loss d_w on chosen scores and d_l on rejected ones, then 1 on each; over N."""
    each = torch.stack([torch.stack(own) for own in incentives.values()])
    sides = torch.cat([each, torch.ones_like(each[:1])])  # (L + 1, 2, N)
    return torch.diag_embed(sides.transpose(1, 2)).permute(0, 2, 3, 1).flatten(0, 1) / each.shape[-1]
