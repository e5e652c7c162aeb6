"""Training curves forecast from a finished probe: `entangle forecast`.

The recursion is in `entangle.analysis.forecast`. The first call measures the Gram matrix of the probe's pairs; further
ones read it and need no model.

    RUN/gram.parquet       products of all pairs' scores
    RUN/forecast.parquet   one row per loss, seed, step and split
    RUN/forecast.json      where each loss ends, and its means
    RUN/forecast.png       the curves
    RUN/forecast/          what a measurement has that isn't finished
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
from rich.console import Console

from entangle.commands.forecast.curves import ForecastResult, forecast_pairs
from entangle.commands.output import Output
from entangle.commands.probe import ProbeResult
from entangle.config import ForecastConfig, build_losses
from entangle.measure.gram import GRAM, PairGram, measure_gram
from entangle.measure.plan import extremes
from entangle.measure.reload import load_again, metric_again, options_of
from entangle.runs.session import Session
from entangle.scores import make_engine

FORECAST = "forecast.json"


def run_forecast(config: ForecastConfig, console: Console | None = None) -> ForecastResult:
    """Forecast training curves from a finished probe, and write them into its folder.

    The Gram matrix is measured where the folder doesn't hold that of these pairs; a measurement that was broken off is
    resumed. Under `accelerate launch` or `torchrun` the processes share the pairs.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: the run isn't a finished probe, its model or data has changed, or a loss can't be forecast.
        Interrupted: Ctrl-C; the shard at hand is finished first.
    """
    session = Session.start(config, console)
    probe = ProbeResult.load(config.run)
    rows = probe.scored(config.limit, least=4)
    gram = PairGram.load(probe.folder)
    if gram is None or list(gram.indices) != rows["index"].tolist():
        gram = _measure(session, config, probe, rows)
    result = forecast_pairs(
        gram,
        rows,
        build_losses(config.losses or (probe.first_loss,)),
        metric=str(probe.provenance["metric"]),
        learning_rate=config.learning_rate,
        batch_size=config.per_device_train_batch_size,
        steps=config.max_steps,
        momentum=config.momentum,
        eval_share=config.eval_share,
        seeds=config.seeds,
    )
    session.finish(lambda: _write(config, probe, result))
    return result


def _measure(session: Session, config: ForecastConfig, probe: ProbeResult, rows: pd.DataFrame) -> PairGram:
    """Load the probe's model again, and keep the products of its pairs in its folder."""
    options = options_of(probe.folder)
    policy, pairs = load_again(probe.folder, options, rows["index"].tolist(), session.processes)
    engine = make_engine(policy.model, policy.parameters, options.engine)
    engine.check(policy.collate(extremes(pairs)))
    session.claim(probe.folder.read_json("identity.json"))
    gram = measure_gram(
        session,
        policy,
        engine,
        pairs,
        metric=metric_again(options, policy),
        shard_size=options.shard_size,
        batch_size=config.batch_size,
    )

    def keep() -> None:
        probe.folder.write_table(GRAM, gram.rows())
        shutil.rmtree(session.run.path)

    session.finish(keep)
    return gram


def _write(config: ForecastConfig, probe: ProbeResult, result: ForecastResult) -> None:
    probe.folder.write_table("forecast.parquet", result.curves)
    probe.folder.write_json(FORECAST, result.summary)
    if config.plots:
        from entangle.figures.forecast import forecast_figure
        from entangle.figures.style import save

        save(forecast_figure(result.curves), probe.folder.path / "forecast.png")


def command(config: ForecastConfig, console: Console | None = None) -> Output:
    """`entangle forecast`."""
    result = run_forecast(config, console)
    place = Path(config.run) / ("forecast.png" if config.plots else "forecast.parquet")
    return Output(result.renderable(), f"Forecast: {place}")
