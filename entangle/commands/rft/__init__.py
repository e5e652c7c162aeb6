"""Reward spread and expected reward gradients of answers (`run`), and what fine-tuning made of them (`change`)."""

from entangle.commands.rft.change import RewardChange, run_change
from entangle.commands.rft.run import RftResult, prompt_rows, run_rft

__all__ = ["RewardChange", "RftResult", "prompt_rows", "run_change", "run_rft"]
