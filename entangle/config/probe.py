"""Options of `entangle probe`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from entangle.config.base import DEFAULT_LOSSES, InputOptions, RunOptions, check_at_least
from entangle.config.kinds import DiagnosticNames, Losses
from entangle.errors import ConfigError


@dataclass(frozen=True)
class ProbeConfig(RunOptions, InputOptions):
    """Geometry of every preference pair, and what each loss would do to it."""

    VERB: ClassVar[str] = "probe"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "dry_run")

    losses: Losses = DEFAULT_LOSSES
    """Losses to judge, each name or name:key=value,... (`entangle losses` lists them)."""
    loss_batch_size: int = 8
    """Pairs per batch for losses whose incentives depend on the batch (kto, aot, ...), in dataset order."""
    group_by: str = "kind"
    """Column of the data set by which the tables are broken down, where it is there."""
    engine: Literal["auto", "factored", "autograd"] = "auto"
    """How scores are computed: `factored` is fast and exact, `autograd` is its slow oracle."""
    batch_size: int | None = None
    """Pairs per pass; by default as many as fit 4096 tokens."""
    shard_size: int = 64
    """Pairs per shard: what a killed run loses at most."""
    modules: bool = False
    """Take the scores apart by module too: which layers the entanglement lives in (modules.parquet)."""
    metric: Literal["sgd", "adamw"] = "sgd"
    """The optimizer whose step is predicted: `adamw` needs --optimizer_state, and freezes what it holds."""
    optimizer_state: str | None = None
    """AdamW's second moments: a checkpoint folder with optimizer.pt (the policy's own), or that file."""
    fast_matmul: bool = False
    """Float32 matrix products by oneDNN on the CPU: up to twice as fast, refused where it would round."""
    diagnostics: DiagnosticNames = ()
    """Diagnostics to write beside the geometry, or all. Squeezing costs four times the rest."""
    verify: int = 0
    """Check the predictions by real SGD steps on this many pairs."""
    save_text: bool = True
    """Keep the texts of the pairs in the run folder."""
    dry_run: bool = False
    """Say what would be computed, and stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self,
            {
                "loss_batch_size": 1,
                "batch_size": 1,
                "shard_size": 1,
                "verify": 0,
            },
        )
        if (self.metric == "adamw") != (self.optimizer_state is not None):
            raise ConfigError(
                f"--metric adamw and --optimizer_state belong together; got metric {self.metric} and optimizer_state "
                f"{self.optimizer_state}."
            )
        if self.verify and self.metric != "sgd":
            raise ConfigError(
                f"verify takes real SGD steps, and the metric is {self.metric}. Drop one of them."
            )
        if not self.losses:
            raise ConfigError("At least one loss is needed; got none. `entangle losses` lists them.")
