"""Options of `entangle rft`, and what it shares with `entangle joint`: the answers to a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from entangle.config.base import InputOptions, Options, RunOptions, check_at_least
from entangle.config.kinds import DataName, Reward, Rewards, RunName
from entangle.errors import ConfigError

LossType = Literal["grpo", "dapo", "bnpo", "dr_grpo", "rloo"]
"""TRL's `loss_type`, and `rloo`, its other trainer."""

ScaleRewards = Literal["group", "batch", "none"]
"""TRL's `scale_rewards`: what advantages are divided by."""


@dataclass(frozen=True)
class AnswerOptions(Options):
    """Answers to a prompt: how they are drawn or where they are read, what rewards them, which spread is small."""

    rollouts: DataName | None = None
    """File with answers drawn before (prompt, completions[, rewards], or a row per answer), or verl's folder of dumps;
    else they are sampled."""
    rollouts_step: int | None = None
    """Step of the training whose answers are scored, where the file holds several; by default the last one."""
    reward: Reward | None = None
    """Reward function, as name, name:key=value,... or module:function. Default: rouge_l against the column chosen; with
    --rollouts, the file's own rewards."""
    reward_range: tuple[float, float] | None = None
    """Smallest and largest possible reward, where the reward doesn't say itself."""
    num_generations: int = 16
    """K, answers sampled per prompt."""
    max_completion_length: int = 48
    """Tokens of a sampled answer at most."""
    temperature: float = 1.0
    """Temperature of the sampling."""
    top_k: int = 0
    """Draw among this many most probable tokens; 0: all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability."""
    group_size: int = 8
    """Answers per group in the GRPO and RLOO views; their expected gradients need twice as many answers."""
    std_threshold: float = 0.1
    """A std below this share of the rewards' half-range is small."""
    mean_threshold: float | None = None
    """A mean reward below this is low; by default the middle of the rewards' range."""
    engine: Literal["auto", "factored", "autograd"] = "auto"
    """How scores are computed: `factored` is fast and exact, `autograd` is its slow oracle."""
    batch_size: int = 64
    """Answers sampled at a time."""
    shard_size: int = 8
    """Prompts per shard: what a killed run loses at most."""
    save_text: bool = True
    """Keep prompts and answers in the run folder."""
    plots: bool = True
    """Draw the figures (needs matplotlib)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(
            self,
            {
                "num_generations": 2,
                "max_completion_length": 1,
                "top_k": 0,
                "group_size": 2,
                "batch_size": 1,
                "shard_size": 1,
            },
        )
        if not (self.temperature > 0 and 0 < self.top_p <= 1 and 0 < self.std_threshold <= 1):
            raise ConfigError(
                "Expected temperature > 0, 0 < top_p <= 1 and 0 < std_threshold <= 1; got "
                f"{self.temperature}, {self.top_p} and {self.std_threshold}."
            )
        if self.reward_range is not None and not self.reward_range[0] < self.reward_range[1]:
            raise ConfigError(f"reward_range needs the smaller number first; got {self.reward_range}.")


@dataclass(frozen=True)
class RftConfig(AnswerOptions, RunOptions, InputOptions):
    """Spread of the rewards of sampled answers, and the reward gradient that it leaves."""

    VERB: ClassVar[str] = "rft"
    UNRECORDED: ClassVar[tuple[str, ...]] = (*RunOptions.UNRECORDED, "plots")

    before: RunName | None = None
    """Finished run of this command before a fine-tuning: compare it with --after, without a model."""
    after: RunName | None = None
    """Finished run on the same prompts with the same reward, after the fine-tuning."""
    further_rewards: Rewards = ()
    """Reward functions to compare with the reward, on the same answers; file:column=A+B compares A and B anyhow."""
    loss_types: tuple[LossType, ...] = ("grpo", "dapo", "dr_grpo", "rloo")
    """Steps whose effect on the answers is predicted, by TRL's names; the first one leads."""
    scale_rewards: ScaleRewards = "group"
    """What advantages are divided by: the std of the group's rewards, of the batch's, or nothing. Not for rloo."""
    mask_truncated_completions: bool = False
    """Answers that were cut before they ended take no part in the step."""
    negative_weight: float = 1.0
    """Factor on the weights of answers with a negative advantage; 0: positive ones only."""
    across: bool = True
    """Sum scores over prompts too: what a batch of prompts does to the answers of others (one more pass)."""
    verify: int = 0
    """Check the predictions by real steps on the groups of this many prompts."""
    tokens: int = 0
    """Prompts, those that lose most to incorrect answers, of which tokens are looked at: which of them cost that."""
    gamma_positions: int = 0
    """Prompts at one answer token of which gamma of the paper's bound is estimated (from below); 0: leave it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, {"gamma_positions": 0, "verify": 0, "tokens": 0})
        if not self.loss_types:
            raise ConfigError(
                "At least one loss type is needed; got none. They are grpo, dapo, bnpo, dr_grpo, rloo."
            )
        if not self.negative_weight >= 0:
            raise ConfigError(f"negative_weight must be at least 0; got {self.negative_weight}.")
        if (self.before is None) != (self.after is None):
            raise ConfigError(f"--before and --after belong together; got {self.before} and {self.after}.")
