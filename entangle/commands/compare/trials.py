"""The runs of a comparison: one per loss, setting and seed."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any

from entangle.config import CompareConfig, TrainConfig, build_losses, hash_options
from entangle.runs.folder import RunFolder


@dataclass(frozen=True)
class Trial:
    """One run of a comparison.

    Args:
        variant: loss and setting, as tables name them.
        loss: the loss's label.
        setting: the varied options with their values.
        train: its options, its folder among them.
    """

    variant: str
    loss: str
    setting: dict[str, Any]
    train: TrainConfig

    @property
    def seed(self) -> int:
        """The run's seed."""
        assert self.train.seed is not None
        return self.train.seed

    @property
    def run(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(self.train.run_path)

    @property
    def is_finished(self) -> bool:
        """Whether a run with these options is finished in its folder, told without loading anything."""
        return self.run.is_complete and not self.run.changed_options(self.train)


def trials_of(config: CompareConfig) -> list[Trial]:
    """Every run of a comparison; its folder is OUT/runs/<variant>-<hash>-seed<N>, whatever else the grid holds."""
    trials = []
    for setting, train in config.settings():
        loss = build_losses([train.loss])[0].label
        shown = [f"{name}={_short(value)}" for name, value in setting.items() if value != ()]
        variant = ", ".join([loss, *shown])
        code = hash_options([train.loss, setting])
        slug = re.sub(r"[^\w.=-]+", "-", variant).strip("-")[:60]
        folder = config.run_path / "runs" / f"{slug}-{code}-seed{train.seed}"
        trials.append(Trial(variant, loss, setting, dataclasses.replace(train, output_dir=str(folder))))
    return trials


def _short(value: Any) -> str:
    """A value of a varied option: mitigations by their names and options, everything else as JSON."""
    if not isinstance(value, tuple | list):
        return value if isinstance(value, str) else json.dumps(value)
    return "+".join(_named(item) if isinstance(item, dict) else str(item) for item in value)


def _named(item: dict[str, Any]) -> str:
    options = {key: value for key, value in item.items() if key != "name"}
    return (
        f"{item.get('name')}({', '.join(f'{k}={v}' for k, v in options.items())})"
        if options
        else item["name"]
    )
