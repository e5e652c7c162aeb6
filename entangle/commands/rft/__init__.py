"""Reward spread and expected reward gradients of answers (`run`), and what fine-tuning made of them (`change`)."""

from rich.console import Console

from entangle.commands.rft.change import RewardChange, run_change
from entangle.commands.rft.run import RftResult, prompt_rows, run_rft
from entangle.config import RftConfig

__all__ = ["RewardChange", "RftResult", "command", "prompt_rows", "run_change", "run_rft"]


def command(config: RftConfig, console: Console | None = None) -> RftResult | RewardChange:
    """`entangle rft`: a run, or two finished ones beside each other."""
    return run_rft(config, console) if config.before is None else run_change(config)
