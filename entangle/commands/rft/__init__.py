"""Reward spread and expected reward gradients of answers (`run`), and what fine-tuning made of them (`change`)."""

from rich.console import Console

from entangle.analysis.real_steps import is_refuted
from entangle.commands.output import Output
from entangle.commands.rft.change import RewardChange, run_change
from entangle.commands.rft.run import RftResult, prompt_rows, run_rft
from entangle.config import RftConfig

__all__ = ["RewardChange", "RftResult", "command", "prompt_rows", "run_change", "run_rft"]


def command(config: RftConfig, console: Console | None = None) -> RftResult | RewardChange | Output:
    """`entangle rft`: a run, or two finished ones beside each other; status 1 where real steps refute it."""
    if config.before is not None:
        return run_change(config)
    result = run_rft(config, console)
    if is_refuted(result.summary.get("groups", {}).get("verification", {})):
        return Output(result.renderable(), f"Run folder: {result.run.path}", status=1)
    return result
