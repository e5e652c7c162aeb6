"""Losses, settings and seeds side by side: trained from one start, judged on the same held-out pairs and posts."""

from entangle.commands.compare.run import CompareResult, run_compare
from entangle.commands.compare.trials import Trial, trials_of

__all__ = ["Trial", "CompareResult", "trials_of", "run_compare"]
