"""Options of `entangle why`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from entangle.config.base import InputOptions, Replaced, RunOptions
from entangle.config.kinds import DataName, Losses, ModelName
from entangle.config.sweep import SweepConfig
from entangle.errors import ConfigError


@dataclass(frozen=True)
class WhyConfig(RunOptions, InputOptions):
    """Why did both log-probs fall? Exit status 0 they didn't, 1 they did, 2 it can't be told, 70 a bug."""

    VERB: ClassVar[str] = "why"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "minutes")

    TRAINING_FOLDER: ClassVar[str | None] = "run"

    run: tyro.conf.Positional[str] = ""
    """Output folder of the training run, of TRL, LLaMA-Factory, axolotl, ms-swift or unsloth."""
    dataset_name: DataName = ""
    """The pairs of the training: hub id, .json/.jsonl/.csv/.parquet file, or folder. Without them only the log is
    read."""
    minutes: float = 10.0
    """What all of it may take; pairs and checkpoints are chosen so that it does."""
    losses: Annotated[Losses, tyro.conf.arg(aliases=["--loss"])] = ()
    """The loss of the training, as name or name:key=value,...; by default what the folder says, else dpo."""
    model_name_or_path: ModelName = ""
    """The model that training began from, where the folder doesn't name it or it is elsewhere now."""
    limit: int | None = None
    """Measure this many pairs, instead of as many as the minutes allow."""
    seed: int | None = 0
    """Seed of the sample of pairs."""
    batch_size: int | None = None
    """Pairs per pass; by default as many as fit 4096 tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.minutes < float("inf"):
            raise ConfigError(f"minutes must be above 0; got {self.minutes}.")
        if self.adapter_name_or_path:
            raise ConfigError("adapter_name_or_path has no place here: the checkpoints say what is probed.")
        object.__setattr__(self, "run", self.run or self.output_dir or "")

    @property
    def run_path(self) -> Path:
        """The folder of the result: `output_dir`, by default RUN/why."""
        given = Path(self.output_dir or self.run)
        return given / "why" if given.resolve() == Path(self.run).resolve() else given

    @property
    def place(self) -> tuple[str, ...]:
        """Words of the command line that name the folder, and the time, which isn't recorded."""
        return ("--output_dir", str(self.run_path), "--minutes", f"{self.minutes:g}")

    @property
    def replaces(self) -> Replaced:
        """A `why` of other options or inputs in the training folder, which is begun anew; any run if `overwrite`."""
        is_own = self.run_path.resolve() == (Path(self.run) / "why").resolve()
        return "any" if self.overwrite else "another" if is_own else "nothing"

    def sweep_of(self, folder: Path, base: str, losses: tuple[Any, ...], pairs: int | None) -> SweepConfig:
        """The sweep of a training folder's checkpoints whose probes this command makes.

        Args:
            folder: with the checkpoints.
            base: the model that training began from; empty: what an adapter names.
            losses: to judge, the training's first.
            pairs: how many; each number has a folder of its own.
        """
        own = {field.name: getattr(self, field.name) for field in fields(InputOptions)}
        place = str(self.run_path / f"pairs-{pairs}")
        return SweepConfig(
            **own | {"model_name_or_path": base, "limit": pairs},
            run=str(folder),
            output_dir=place,
            losses=losses,
            batch_size=self.batch_size,
            metrics=("sgd",),
            plots=False,
        )
