"""The comparison: train every trial that isn't finished, let it write summaries, and put all side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, Group, RenderableType
from rich.text import Text

from entangle import embedded
from entangle.analysis.agreement import KEYS, agreement, directions, drift_agreement, drift_sentence, drifts
from entangle.analysis.curves import over_seeds
from entangle.commands.compare.curves import final_numbers, labelled, ledger_means, run_curves
from entangle.commands.compare.quality import means, summaries
from entangle.commands.compare.trials import Trial, trials_of
from entangle.commands.train import TrainResult, check_training, run_train
from entangle.config import EMBEDDED, CompareConfig, InputOptions, hash_options
from entangle.errors import ConfigError, RunError
from entangle.measure.inputs import load_policy_of
from entangle.models import Policy
from entangle.rewards.rollouts import Prompt, hash_prompts, load_prompts
from entangle.runs.folder import RunFolder
from entangle.runs.progress import Interrupted, progress_bar
from entangle.runs.session import Session
from entangle.tables.base import Shown
from entangle.tables.compare import comparison_tables
from entangle.tables.ledger import ledger_tables

TABLES = ("curves", "runs", "variants", "directions", "drifts", "ledger")


@dataclass(frozen=True)
class CompareResult(Shown):
    """A finished comparison.

    Args:
        run: its folder.
        curves: one row per run and probe, with variant, loss and seed (see `entangle.analysis.curves.curve`).
        runs: one row per run: its last point, the onset, the quality of its summaries.
        variants: the same as means over seeds, with the smallest and largest value as *_low and *_high.
        directions: predicted and measured directions of the mean log-probs (see `entangle.analysis.agreement`).
        drifts: both means at once, as the set foretold them and as they were measured (likewise); may be empty.
        ledger: one row per run and side: what its ledger says of the mean change (`analysis.ledger`); empty
            unless the runs kept one.
        start: quality of the summaries before training; empty if none was asked for.
    """

    run: RunFolder
    curves: pd.DataFrame
    runs: pd.DataFrame
    variants: pd.DataFrame
    directions: pd.DataFrame
    drifts: pd.DataFrame
    ledger: pd.DataFrame
    start: dict[str, float]

    @classmethod
    def load(cls, path: str | Path) -> CompareResult:
        """Read a finished comparison.

        Raises:
            RunError: there is none at `path`.
        """
        run = RunFolder.open(path, CompareConfig.VERB)
        tables: dict[str, Any] = {name: run.table(f"{name}.parquet") for name in TABLES}
        tables["drifts"] = pd.DataFrame() if tables["drifts"] is None else tables["drifts"]
        return cls(run=run, start=run.read_json("summary.json")["start"], **tables)

    @property
    def bands(self) -> pd.DataFrame:
        """The curves as means over seeds, with the smallest and largest value as *_low and *_high."""
        return over_seeds(self.curves)

    def agreement(self, by: str | None = None) -> pd.DataFrame:
        """How often the inner-product condition gave the direction of the mean log-probs, with intervals."""
        return agreement(self.directions, by)

    def drift_agreement(self, by: str | None = None) -> pd.DataFrame:
        """How well the set foretold both mean log-probs (see `entangle.analysis.agreement.drift_agreement`)."""
        return drift_agreement(self.drifts, by)

    def renderable(self) -> RenderableType:
        """The tables as a rich object."""
        parts = [comparison_tables(self.variants, self.start, self.runs["seed"].nunique())]
        if len(self.drifts):
            parts.append(Text(drift_sentence(self.drift_agreement().to_dict("records")[0])))
        if len(self.ledger):
            parts.append(ledger_tables(self.ledger))
        return Group(*parts)


def run_compare(config: CompareConfig, console: Console | None = None) -> CompareResult:
    """Train and judge a grid of losses, settings and seeds.

    Each trial is a run of `entangle train` in a folder of its own; finished ones are skipped, so the command resumes,
    and a grid may be extended later. Under `accelerate launch` every trial is trained by all processes.

    Args:
        config: the options.
        console: where progress and notes go; standard error by default.

    Raises:
        UserError: an option, the data, the model or a run folder can't be used.
        Interrupted: Ctrl-C; what was finished is kept.
    """
    session = Session.start(config, console)
    folder, console, processes = session.run, session.console, session.processes
    trials, posts = trials_of(config), _posts(config)
    for trial in trials:
        check_training(trial.train)
    texts = _summary_file(config, posts)
    with processes.main_process_first():
        _claim(folder)
    for number, trial in enumerate(trials, 1):
        if config.overwrite or not trial.is_finished:
            console.print(f"Run {number} of {len(trials)}: {trial.variant}, seed {trial.seed}", markup=False)
            try:
                run_train(trial.train, console)
            except Interrupted as stop:
                raise Interrupted(
                    f"Stopped in run {number} of {len(trials)}; what is finished is kept in {folder.path}. Resume with "
                    "the same command."
                ) from stop
        if posts and processes.is_main_process and not (trial.run.path / texts).is_file():
            trained = TrainResult.load(trial.run.path).model_path
            trial.run.write_table(texts, _summaries(config, _policy(config, trained), posts, console))
        processes.wait_for_everyone()

    def close() -> None:
        if posts and not (folder.path / texts).is_file():
            folder.write_table(texts, _summaries(config, _policy(config), posts, console))
        _write(_collect(folder, trials, texts), config)

    return CompareResult.load(session.finish(close))


def _claim(folder: RunFolder) -> None:
    """Make the folder, or go on in one that a comparison has made. What a trial's folder holds, its own run checks."""
    there = [file for file in folder.path.glob("*") if file.name != "runs"]
    marked = folder.path / "identity.json"
    if there and not (marked.is_file() and folder.read_json(marked.name).get("command") == "compare"):
        raise RunError(f"{folder.path} isn't empty and holds no comparison. Choose another --output_dir.")
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_json(marked.name, {"command": "compare"})


def _posts(config: CompareConfig) -> list[Prompt]:
    """The posts whose summaries are judged."""
    if config.quality_dataset_name is None:
        return []
    posts = load_prompts(config.quality_dataset_name, split=config.quality_split, limit=config.quality_limit)
    if config.quality_reference not in posts[0].columns:
        raise ConfigError(
            f"Expected the reference summaries in the column {config.quality_reference!r} (quality_reference) of "
            f"{config.quality_dataset_name}; its columns are: {', '.join(posts[0].columns)}."
        )
    return posts


def _summary_file(config: CompareConfig, posts: Sequence[Prompt]) -> str:
    """The file of a policy's summaries, named after what they are of: other posts or settings, another file."""
    asked = [config.quality_reference, config.quality_samples, config.max_completion_length]
    return f"summaries-{hash_options([hash_prompts(posts), *asked])}.parquet"


def _policy(config: CompareConfig, trained: Path | None = None) -> Policy:
    """The policy as training starts, or what a run has made of it."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(InputOptions)}
    options |= {"use_peft": False, "reference": "auto", "ref_model_name_or_path": None}
    options["parameters"] = "norm|ln_"  # nothing is probed here, and these are never quantised
    if trained is not None:
        options |= {"model_name_or_path": str(trained), "adapter_name_or_path": None}
    elif config.model_name_or_path == EMBEDDED:
        options["model_name_or_path"] = str(embedded.POLICY)
    return load_policy_of(InputOptions(**options))


def _summaries(
    config: CompareConfig, policy: Policy, posts: Sequence[Prompt], console: Console
) -> pd.DataFrame:
    with progress_bar(console, "summaries", len(posts), 0) as advance:
        return summaries(
            policy,
            posts,
            config.quality_reference,
            config.quality_samples,
            config.max_completion_length,
            advance,
        )


def _collect(folder: RunFolder, trials: Sequence[Trial], texts: str) -> CompareResult:
    """All tables of a comparison from its trials' folders."""
    rows = pd.concat([labelled(trial, steps_of(trial)) for trial in trials], ignore_index=True)
    sets = sets_of(trials)
    curves = run_curves(rows, sets)
    qualities = [
        {"variant": trial.variant, "loss": trial.loss, "seed": trial.seed} | means(table)
        for trial in trials
        if (table := trial.run.table(texts)) is not None
    ]
    runs = final_numbers(curves)
    if qualities:
        runs = runs.merge(pd.DataFrame(qualities), on=KEYS)
    ledgers = [
        ledger_means(trial, table)
        for trial in trials
        if (table := trial.run.table("ledger.parquet")) is not None
    ]
    start = folder.table(texts)
    return CompareResult(
        run=folder,
        curves=curves,
        runs=runs,
        variants=over_seeds(runs, by=("variant", "loss")),
        directions=directions(rows, sets),
        drifts=drifts(rows, sets),
        ledger=pd.concat(ledgers, ignore_index=True) if ledgers else pd.DataFrame(),
        start={} if start is None else means(start),
    )


def steps_of(trial: Trial) -> pd.DataFrame:
    """The rows of a finished run's probes.

    Raises:
        RunError: it has none.
    """
    rows = trial.run.table("steps.parquet")
    if rows is None:
        raise RunError(
            f"Expected the probes of a training run (steps.parquet) in {trial.run.path}; there are none."
        )
    return rows


def sets_of(trials: Sequence[Trial]) -> pd.DataFrame:
    """What the set said at the probes of all runs, with variant, loss and seed; empty where no run measured it."""
    tables = [
        table.assign(variant=trial.variant, loss=trial.loss, seed=trial.seed)
        for trial in trials
        if (table := trial.run.table("set.parquet")) is not None
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _write(result: CompareResult, config: CompareConfig) -> None:
    folder = result.run
    folder.write_yaml("config.yaml", dataclasses.asdict(config))
    for name in TABLES:
        folder.write_table(f"{name}.parquet", getattr(result, name))
    if config.plots:
        from entangle.figures.variants import write_figures

        agreed = result.agreement("variant") if len(result.directions) else pd.DataFrame()
        write_figures(result.curves, result.variants, result.start, agreed, result.ledger, folder.path)
    overall = {} if result.directions.empty else result.agreement().set_index("side").to_dict("index")
    folder.write_json(
        "summary.json",
        {
            "variants": result.variants.to_dict("records"),
            "start": result.start,
            "agreement": overall,
            "drift_agreement": result.drift_agreement().to_dict("records")[0] if len(result.drifts) else None,
            "seeds": sorted(set(config.seeds)),
        },
    )
