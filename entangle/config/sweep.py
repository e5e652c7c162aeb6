"""Options of `entangle sweep`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, Literal

import tyro

from entangle.config.kinds import ModelName
from entangle.config.probe import ProbeConfig
from entangle.errors import ConfigError


@dataclass(frozen=True)
class SweepConfig(ProbeConfig):
    """The probe at every checkpoint of a training run: when do both log-probs begin to fall?

    The YAML file of the run itself will do as --config: it names data, losses, model and the run's folder.
    """

    VERB: ClassVar[str] = "sweep"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*ProbeConfig.UNRECORDED, "across", "plots")

    TRAINING_FOLDER: ClassVar[str | None] = "run"

    run: tyro.conf.Positional[str] = ""
    """Folder of the training run, with its checkpoint-* folders."""
    model_name_or_path: ModelName = ""
    """The model that training began from: base of the adapters (by default the one that their adapter_config.json
    names), and the reference of whole models."""
    save_text: bool = False
    """Keep the texts of the pairs in every checkpoint's run folder."""
    metrics: tuple[Literal["sgd", "adamw"], ...] = ("sgd", "adamw")
    """Optimizers whose step is predicted: AdamW's at checkpoints that hold an optimizer.pt of Adam's."""
    across: bool = False
    """Measure at every checkpoint, too, what the other pairs do to each pair over an epoch (see entangle across). Two
    more passes over the pairs."""
    plots: bool = True
    """Draw the figure (needs matplotlib)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "run", self.run or self.output_dir or "")
        for name in ("adapter_name_or_path", "optimizer_state"):
            if getattr(self, name):
                raise ConfigError(f"{name} has no place in a sweep: the checkpoints say what is probed.")
        if "sgd" not in self.metrics:
            raise ConfigError(f"metrics are sgd, or sgd and adamw; got {', '.join(self.metrics) or 'none'}.")

    @property
    def run_path(self) -> Path:
        """The folder of the result: `output_dir`, by default RUN/sweep."""
        given = Path(self.output_dir or self.run)
        return given / "sweep" if given.resolve() == Path(self.run).resolve() else given

    def probe_of(self, checkpoint: Path, metric: str = "sgd") -> ProbeConfig:
        """The probe of one checkpoint in a metric, into a run folder of its own inside this one."""
        options = {f.name: getattr(self, f.name) for f in fields(ProbeConfig)}
        options |= {"output_dir": str(self.run_path / checkpoint.name), "overwrite": False, "metric": metric}
        options["use_peft"] = (
            False  # what the run's own file says of its start; the checkpoint brings its adapter
        )
        if metric != "sgd":
            options |= {"output_dir": f"{options['output_dir']}-{metric}", "optimizer_state": str(checkpoint)}
        is_adapter = (checkpoint / "adapter_config.json").is_file()
        if is_adapter and self.model_name_or_path:
            options["adapter_name_or_path"] = str(checkpoint)
        else:
            options["model_name_or_path"] = str(checkpoint)
        if self.reference == "auto" and not self.ref_model_name_or_path:
            options["ref_model_name_or_path"] = self._start_of(checkpoint, is_adapter)
        return ProbeConfig(**options)

    def _start_of(self, checkpoint: Path, is_adapter: bool) -> str | None:
        """The policy that DPO began from, where it isn't the checkpoint with its adapter off."""
        start = checkpoint / "ref"  # TRL's frozen copy of an adapter that was there before
        if is_adapter:
            return str(start) if start.is_dir() else None
        return self.model_name_or_path or None
