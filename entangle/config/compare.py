"""Options of `entangle compare`."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from entangle.config.base import DEFAULT_LOSSES, check_at_least
from entangle.config.kinds import DataName, Losses, Settings
from entangle.config.specs import read_value
from entangle.config.train import TrainConfig
from entangle.config.typed import convert, types_of
from entangle.errors import ConfigError


@dataclass(frozen=True)
class CompareConfig(TrainConfig):
    """Train losses x varied options x seeds from one start on one data set, and judge them on the same held-out pairs.

    Every option of `entangle train` holds for all runs; what differs stands in losses, vary and seeds.
    """

    VERB: ClassVar[str] = "compare"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*TrainConfig.UNRECORDED, "plots")

    losses: Losses = DEFAULT_LOSSES
    """Losses to train with, each name or name:key=value,... (`entangle losses` lists them)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the order of the data and of a fresh LoRA: every loss and setting is trained once with each."""
    vary: Settings = ()
    """Options of `entangle train` to vary, every combination of: learning_rate=1e-5,1e-4; in a YAML file a mapping of
    lists (a list of lists varies mitigations). Or settings one by one, each a mapping: {sft_share: 0.05}; in a YAML
    file a list of mappings."""
    probe_every: int = 10
    """Optimiser steps between probes of the held-out pairs."""
    quality_dataset_name: DataName | None = None
    """Posts with a reference summary, not trained on: the trained policies' own summaries are compared with it."""
    quality_split: str = "test"
    """Split of quality_dataset_name."""
    quality_reference: str = "completion"
    """Its column with the reference summary."""
    quality_limit: int | None = 64
    """Summaries of at most this many posts."""
    quality_samples: int = 2
    """Summaries sampled per post (temperature 1), beside the greedy one."""
    max_completion_length: int = 48
    """Tokens of a summary at most."""
    plots: bool = True
    """Draw the figures (needs matplotlib)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self,
            {
                "probe_every": 1,
                "quality_limit": 1,
                "quality_samples": 0,
                "max_completion_length": 1,
            },
        )
        if not (self.losses and self.seeds):
            raise ConfigError(
                f"At least one loss and one seed are needed; got {self.losses} and {self.seeds}."
            )
        if self.loss != "dpo" or self.seed is not None:
            raise ConfigError(
                "A comparison has several losses and seeds: give losses and seeds, not loss and seed."
            )
        if self.limit is not None:
            raise ConfigError(
                "limit would draw other pairs for every seed; train_share takes the same ones for all."
            )
        for _ in self.settings():  # an option that can't be varied, or its value, is refused here
            pass

    def settings(self) -> Iterator[tuple[dict[str, Any], TrainConfig]]:
        """What is varied, and the training options that follow, in order: losses, then combinations, then seeds.

        Raises:
            ConfigError: an option of `vary` isn't one of `entangle train`, or a value of it makes no sense.
        """
        base = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        varied = _settings(self.vary)
        for loss in self.losses:
            for setting in varied:
                for seed in self.seeds:
                    yield setting, TrainConfig(**base | {"loss": loss, "seed": seed} | setting)


_FIXED = {"loss", "seed", "output_dir", "overwrite", "dataset_name"}
_KINDS = {name: kind for name, kind in types_of(TrainConfig).items() if name not in _FIXED}
"""Types of the options of `entangle train` that `vary` can vary."""


def _settings(vary: Sequence[str]) -> list[dict[str, Any]]:
    """The settings that `vary` asks for: its mappings one by one, or every combination of its values."""
    mappings = [item for item in vary if item.lstrip().startswith("{")]
    if mappings and len(mappings) < len(vary):
        raise ConfigError(
            "vary is either options with their values (every combination of them), or mappings that are a setting "
            f"each; got both: {', '.join(vary)}."
        )
    if mappings:
        return [_setting(item) for item in mappings]
    grid = dict(map(_varied, vary))
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _setting(item: str) -> dict[str, Any]:
    """A complete setting, given as a mapping."""
    setting = read_value(item)
    _check_names(setting, item)
    return {name: convert(value, _KINDS[name], f"vary: {name}") for name, value in setting.items()}


def _varied(item: str) -> tuple[str, list[Any]]:
    """An option with its values."""
    name, equals, text = item.partition("=")
    _check_names([name] if equals else [], item)
    values = read_value(text)
    if not isinstance(values, list):
        values = [read_value(value) for value in text.split(",")]
    return name, [convert(value, _KINDS[name], f"vary: {name}") for value in values]


def _check_names(names: Collection[str], item: str) -> None:
    if not names or not set(names) <= set(_KINDS):
        raise ConfigError(
            "vary takes options of `entangle train` as option=value,value or as mappings {option: value} (losses and "
            f"seeds have their own); got {item!r}."
        )
