"""Reward spread and expected reward gradients of answers (`run`), and what fine-tuning made of them (`change`)."""

from entangle.commands.rft.change import RewardChange, run_change
from entangle.commands.rft.run import RftResult, prompt_rows, run_rft
from entangle.commands.rft.shards import answer_rows
from entangle.commands.rft.work import FLAGS, Work

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
