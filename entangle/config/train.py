"""Options of `entangle train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from entangle.config.base import InputOptions, RunOptions, check_at_least
from entangle.config.kinds import DataName, Loss, Mitigations, Settings
from entangle.config.specs import read_value
from entangle.errors import ConfigError

_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "save_total_limit",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "sft_learning_rate",
    "sft_epochs",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "save_steps",
    "eval_limit",
    "probe_every",
    "probe_trained",
)


@dataclass(frozen=True)
class TrainConfig(RunOptions, InputOptions):
    """Train on preference pairs with any loss of the catalogue, by TRL, and keep what a study needs.

    Defaults are TRL's but for use_peft, learning_rate, bf16 and gradient_checkpointing. Every other option of
    TRL's DPOConfig goes into trainer_options; in a YAML file it may also stand beside ours.
    """

    VERB: ClassVar[str] = "train"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "save_total_limit", "report_to")

    stage: Literal["preference", "sft"] = "preference"
    """`preference`: pairs and a preference loss. `sft`: cross-entropy of the chosen responses, or of the column
    `completion`."""
    loss: Loss = "dpo"
    """Preference loss, as name or name:key=value,... (`entangle losses` lists them)."""
    mitigations: Mitigations = ()
    """What is changed about the gradients or the pairs, each name or name:key=value,..."""
    use_peft: bool = True
    """Train a fresh LoRA; a model that brings an adapter goes on training that one. `false`: train every weight."""
    train_share: float = 1.0
    """Share of the training samples that is used, the same ones for every seed."""
    sft_share: float = 0.0
    """Before preference training, an SFT phase on this share of the chosen responses; it makes the reference."""
    sft_learning_rate: float | None = None
    """Learning rate of that phase; by default learning_rate."""
    sft_epochs: float = 1.0
    """Epochs of that phase."""
    learning_rate: float = 1e-5
    """Step size of the optimiser (TRL: 1e-6, which is meant for full training)."""
    lr_scheduler_type: str = "linear"
    """How the learning rate changes: linear, cosine, constant, constant_with_warmup, ..."""
    warmup_steps: float = 0.0
    """Steps over which the learning rate rises; below 1 a share of all steps."""
    optim: str = "adamw_torch_fused"
    """Optimiser of transformers: adamw_torch_fused, adamw_torch, sgd, rmsprop, ..."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: not at all."""
    adam_beta1: float = 0.9
    """Adam's decay of the mean gradient."""
    adam_beta2: float = 0.999
    """Adam's decay of the mean squared gradient."""
    per_device_train_batch_size: int = 8
    """Pairs per forward pass and process."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    max_steps: int = -1
    """Optimiser steps; -1: as many as num_train_epochs needs."""
    num_train_epochs: float = 3.0
    """Passes over the training pairs."""
    logging_steps: int = 10
    """Optimiser steps between rows of the log."""
    save_steps: int = 500
    """Optimiser steps between checkpoints; a killed run goes on from the last one. 0: none."""
    save_total_limit: int | None = None
    """Keep only this many checkpoints."""
    report_to: tuple[str, ...] = ("none",)
    """Trackers of transformers: tensorboard, trackio, wandb, ..."""
    bf16: bool = False
    """Train under bfloat16 autocast (TRL's default). Off here: then what is trained is what float32 scores measure,
    and a CPU needs no emulation."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (TRL's default): less memory, more time, the same numbers."""
    precompute_ref_log_probs: bool = False
    """Compute the reference's log-probs once, before training."""
    eval_dataset_name: DataName | None = None
    """Held-out pairs; by default eval_share of the training data's prompts is held out, the same for every seed."""
    eval_dataset_split: str = "test"
    """Split of eval_dataset_name."""
    eval_share: float = 0.1
    """Share of the training data that is held out if eval_dataset_name isn't given."""
    eval_limit: int | None = 64
    """Hold out, or read of eval_dataset_name, at most this many pairs."""
    probe_every: int = 0
    """Optimiser steps between probes of the held-out pairs; 0: none."""
    probe_trained: int = 0
    """Probe so many of the pairs that are trained on, evenly spread, in the place of the held-out ones; 0: none."""
    live: bool = False
    """Take the geometry of the very batches that are trained on."""
    ledger: bool = False
    """Split every change of a probed pair's log-probs into its causes. Its own score and its partner are among them
    only for pairs that are trained on: see probe_trained."""
    trainer_options: Settings = ()
    """Further options of TRL's DPOConfig (SFTConfig in the stage sft), as key=value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self, dict.fromkeys(_AT_LEAST_ONE, 1) | dict.fromkeys(_NOT_NEGATIVE, 0) | {"max_steps": -1}
        )
        self._check_shares()
        self._check_stage()

    def _check_shares(self) -> None:
        if not 0 < self.train_share <= 1 or not 0 <= self.sft_share <= 1 or not 0 <= self.eval_share < 1:
            raise ConfigError(
                "Shares: expected 0 < train_share <= 1, 0 <= sft_share <= 1 and 0 <= eval_share < 1; got "
                f"{self.train_share}, {self.sft_share} and {self.eval_share}."
            )
        if self.max_steps == 0 or (self.max_steps < 0 and self.num_train_epochs <= 0):
            raise ConfigError("Nothing to train: give max_steps above 0, or num_train_epochs above 0.")

    def _check_stage(self) -> None:
        if self.stage == "sft" and (
            self.mitigations or self.sft_share or self.live or self.ledger or self.probe_trained
        ):
            raise ConfigError(
                "The stage sft has no preference loss: mitigations, sft_share, live, ledger and probe_trained don't "
                "apply. Drop them, or set stage: preference."
            )
        if self.reference not in ("auto", "self", "model"):
            raise ConfigError(
                f"reference {self.reference!r} isn't for training. The reference is the policy as it starts "
                "(auto, self) or a second model (ref_model_name_or_path); a loss that needs none is given none."
            )

    @property
    def options_of_trainer(self) -> dict[str, Any]:
        """`trainer_options` as a mapping, values read as JSON, or else as YAML."""
        return dict(_option(item) for item in self.trainer_options)


def _option(item: str) -> tuple[str, Any]:
    key, equals, value = item.partition("=")
    if not equals:
        raise ConfigError(
            f"A trainer option is given as key=value (for instance neftune_noise_alpha=5); got {item!r}."
        )
    return key.strip(), read_value(value)
