"""Reward spread and expected reward gradients of answers (`run`), and what fine-tuning made of them (`change`)."""

from entangle.rft.change import RewardChange, run_change
from entangle.rft.run import FLAGS, RftResult, Work, answer_rows, prompt_rows, run_rft

__all__ = [
    "FLAGS",
    "RewardChange",
    "RftResult",
    "Work",
    "answer_rows",
    "prompt_rows",
    "run_change",
    "run_rft",
]
